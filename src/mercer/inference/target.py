"""What the likelihood asks of the sites at a posterior: the image of the fixed-point iteration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from mercer._typing import Data, Sites
from mercer.inference.coupled import newton_sites
from mercer.inference.objective import coupling
from mercer.likelihoods.base import ExpectedLogProb

if TYPE_CHECKING:
    from mercer.model import Model

SMALLEST_PRECISION = 1e-8


def target_sites(model: Model, posterior: Any, m: Tensor, expected: ExpectedLogProb, data: Data) -> Sites:
    """Return the sites (w (α + β m), w β) that the likelihood asks for at means m.

    Where it couples its latents the means move by Newton's method instead, towards the same fixed point.

    Parameters
    ----------
    model : Model
    posterior
        ``sites``, ``variance_at_data`` and ``covariance_product`` are read, where latents are coupled.
    m : (*b, n)
        Its means of the centred latents at the rows of ``data``.
    expected : ExpectedLogProb
        There.
    data : Data
    """
    pull, precision = data.weight * expected.alpha, data.weight * expected.beta
    if model.likelihood.n_latents == 1:
        return Sites(pull + precision * m, precision)
    weighted = data.weight[:, None, None] * coupling(model, data, m, posterior.variance_at_data)
    return newton_sites(posterior, m, pull, precision, weighted)


def clamped(target: Sites, m: Tensor) -> Sites:
    """Return sites of positive precision that pull at means m (*b, n) as ``target`` does.

    λ1 − λ2 m, the gradient in m, stays: only the curvature is another one. Precisions of zero, as of missing targets,
    stay too.
    """
    precision = target.precision.masked_fill(target.precision < 0, SMALLEST_PRECISION)
    return Sites(target.linear + (precision - target.precision) * m, precision)


def check_positivity(positivity: str) -> None:
    """Refuse an unknown way to treat negative curvature."""
    if positivity not in ("allow", "clamp", "riemann"):
        raise ValueError(f"positivity must be 'allow', 'clamp' or 'riemann', got {positivity!r}.")
