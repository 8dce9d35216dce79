"""A posterior of f as one of f and its derivatives: the same rows, sites and factor, read by another kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mercer.families.base import Prior
from mercer.families.exact import ExactPosterior
from mercer.kernels.derivative_rows import DerivativeRows, DerivativeRowsMean, derivative_rows
from mercer.kernels.evaluate import diag


def differentiated(prior: Prior) -> Prior:
    """Return the prior of f and its derivatives, for rows of `derivative_rows`; hyperparameters are shared."""
    mean = None if prior.mean is None else DerivativeRowsMean(prior.mean)
    return Prior(DerivativeRows(prior.kernel), mean)


def differentiable(posterior: Any) -> ExactPosterior:
    """Return a posterior that can be evaluated at rows of `derivative_rows`.

    Parameters
    ----------
    posterior : Posterior
        Of the exact family.

    Returns
    -------
    ExactPosterior
        It shares the factor, so that nothing is computed again.

    Raises
    ------
    ValueError
        Another family.
    """
    if not isinstance(posterior, ExactPosterior):
        raise ValueError(
            f"derivatives can be predicted from the exact posterior only, and this one is a "
            f"{type(posterior).__name__}; fit with family='exact'."
        )
    if isinstance(posterior.prior.kernel, DerivativeRows):
        return posterior
    plan = replace(posterior.plan, X=derivative_rows(posterior.plan.X, (0,) * posterior.plan.X.shape[-1]))
    other = ExactPosterior(differentiated(posterior.prior), plan, posterior.sites)
    other.__dict__["factor"] = posterior.factor
    return other


def at_derivative(posterior: ExactPosterior, X: Tensor, order: Sequence[int]) -> Tensor:
    """Return rows at which ``posterior`` gives ∂^order f(X).

    Raises
    ------
    ValueError
        f has no such derivative; its covariance with values may exist all the same.
    """
    d, orders = posterior.plan.X.shape[-1] // 2, torch.as_tensor(order)
    diag(posterior.prior.kernel, derivative_rows(X.new_zeros(1, d), orders))
    return derivative_rows(X[..., :d], orders)
