"""Sites of new observations: what targets at a few more rows push, given everything that a process already knows.

A Gaussian likelihood has them in closed form. For any other one the sites at the new rows alone take natural-gradient
steps within the process's N(m, C) at those rows, thousands of small problems at once, each with step control. Sites of
the training rows stay as they are. At the fixed point λ = F(λ; m, C, y) the derivative follows from the implicit
function theorem, (I − ∂F/∂λ)⁻¹ ∂F, so that no step is unrolled and none needs to be kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from mercer._typing import Sites
from mercer.families.update import Update
from mercer.likelihoods.base import Likelihood
from mercer.likelihoods.quadrature import gauss_hermite

_STEPS = 500
_TOLERANCE = 1e-11  # relative change of sites at which they have converged
_SLACK = 1e-10  # relative fall of the bound that still counts as rounding
_SMALLEST_STEP = 1e-4
_NODES = 32


def sites_of(likelihood: Likelihood, process: Any, X: Tensor, y: Tensor, **side: Tensor) -> Sites:
    """Return the sites that targets y ask for at new rows X of a process.

    Parameters
    ----------
    likelihood : Likelihood
    process : Process
        A posterior, or one conditioned on more already.
    X : (*t, Q, d)
        Rows, of which each t is a set by itself.
    y : (*p, *s, *t, Q), in units of y
        Targets of outputs *p (none for a likelihood of C latents), NaN where missing; *s are alternatives, such as
        fantasies of one another.
    **side : broadcastable to y
        What the likelihood reads per row (``noise_variance``, ``exposure``).

    Returns
    -------
    Sites
        λ1 (*b, *s, *t, Q) of the centred latent g = f − μ, with C latents for *b where the likelihood has them; λ2 of
        Gaussian noise lacks what it does not depend on. Differentiable in X, y and what the process is differentiable
        in.
    """
    if likelihood.conjugate:
        return _gaussian(likelihood, process, X, y, side)
    mean, C = process.joint(X)
    apart = len(y.shape) - 1 - (mean.dim() - 1 - (likelihood.n_latents > 1))  # dimensions of *s
    n_latents = mean.dim() - (X.dim() - 1) if not hasattr(process, "n_latents") else process.n_latents
    for _ in range(max(0, apart)):
        mean, C = mean.unsqueeze(n_latents), C.unsqueeze(n_latents)
    problem = _Problem(likelihood, mean, C, y, side)
    with torch.no_grad():
        found = _converge(problem)
    if torch.is_grad_enabled() and any(each.requires_grad for each in (mean, C, y)):
        found = _differentiable(problem, found)
    linear, precision = found
    return Sites(linear + precision * (mean - process.prior.mean_at(X)), precision)


def expected_precision(likelihood: Likelihood, m: Tensor, v: Tensor, **side: Tensor) -> Tensor:
    """Return E β, what an observation not yet made is expected to add to the precision of f.

    Parameters
    ----------
    likelihood : Likelihood
    m, v : (*b, *t, Q)
        Mean and variance of f.

    Returns
    -------
    (*b, *t, Q)
        In units of 1/f², differentiable in m and v: the average over classes, or at the expected y.
    """
    if likelihood.n_latents > 1 or likelihood.support != "classes":
        y = m[0] if likelihood.n_latents > 1 else likelihood.predictive(m, v, **side).mean
        return _push(likelihood, torch.zeros_like(y) if likelihood.n_latents > 1 else y, m, v, side)[1]
    probs = likelihood.predictive(m, v, **side).probs
    assert probs is not None
    of_class = [
        probs[..., c] * _push(likelihood, torch.full_like(m, float(c)), m, v, side)[1] for c in range(probs.shape[-1])
    ]
    return torch.stack(of_class).sum(0)


def _gaussian(likelihood: Any, process: Any, X: Tensor, y: Tensor, side: dict[str, Tensor]) -> Sites:
    """Return λ2 = 1/σ² and λ1 = λ2 (y − μ); alternatives that share σ² share λ2."""
    n_outputs = y.dim() - 1 - (X.dim() - 2)
    n_outputs = min(n_outputs, len(process.sites.linear.shape) - 1) if not side else n_outputs
    raise NotImplementedError
