"""One Newton step for the means of latents that a likelihood couples, such as the classes of a softmax.

The dual update reads only the diagonal of the likelihood's curvature. For coupled latents that is far from Newton's
method in the means: two classes that compete need tens of steps. Here the whole curvature W enters, by conjugate
gradients whose only large operation is the posterior covariance times a vector, n² where a factorisation is n³.
The fixed point is that of the dual update.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mercer._typing import Sites

_ITERATIONS = 24
_CHECK_EVERY = 4  # looking at the residual stops a GPU
_TOLERANCE = 1e-2  # relative; the step is one of several


def newton_sites(posterior: Any, m: Tensor, pull: Tensor, precision: Tensor, coupling: Tensor) -> Sites:
    """Return sites of the given precision whose posterior mean is (nearly) one Newton step from m.

    The step δ solves (K⁻¹ + W) δ = p − K⁻¹ m. With the present sites' Λ the posterior covariance is
    V = (K⁻¹ + Λ)⁻¹, so that V⁻¹ δ − (Λ − W) δ is the left-hand side and V its preconditioner; each direction is
    kept with its image under V⁻¹, and no inverse is ever applied.

    Parameters
    ----------
    posterior : Posterior
        Under the present sites; ``covariance_product`` is used.
    m : (C, n)
        Its means of the centred latents at the data.
    pull : (C, n)
        p, the weighted gradient of the data term in m.
    precision : (C, n)
        λ2 of the sites that are returned.
    coupling : (n, C, C)
        W, the weighted curvature of the data term in m.

    Returns
    -------
    Sites
        λ1 such that K⁻¹ (m + δ) = λ1 − λ2 (m + δ). Where W is diag(λ2) it is p + λ2 m.
    """
    present = posterior.sites
    step, step_image = torch.zeros_like(m), torch.zeros_like(m)
    residual = pull - (present.linear - present.precision * m)
    direction, image = torch.zeros_like(m), torch.zeros_like(m)
    size = m.new_ones(())
    start = None
    for iteration in range(_ITERATIONS):
        preconditioned = posterior.covariance_product(residual)
        new_size = (residual * preconditioned).sum()
        start = new_size if start is None else start
        if iteration % _CHECK_EVERY == 0 and not bool(new_size > _TOLERANCE**2 * start * (iteration > 0)):
            break
        ratio = new_size / size if iteration else torch.zeros_like(new_size)
        size = new_size
        direction, image = preconditioned + ratio * direction, residual + ratio * image
        curved = (coupling @ direction.mT.unsqueeze(-1)).squeeze(-1).mT
        product = image - present.precision * direction + curved
        length = size / (direction * product).sum()
        step, step_image = step + length * direction, step_image + length * image
        residual = residual - length * product
    mean = m + step
    prior_pull = present.linear - present.precision * mean + step_image  # K⁻¹ (m + δ)
    return Sites(prior_pull + precision * mean, precision)
