"""Order and neighbours of a sparse inverse Cholesky family: integers, found once and without gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mercer.families.base import Prior
from mercer.families.nearness import Nearness
from mercer.linalg.sic import Pattern
from mercer.policy import NumericalPolicy


@dataclass(frozen=True)
class SicPlan:
    """Order and neighbours for the rows of X under a prior; integers, found without gradients.

    ``order`` (n,) are the rows in maximin order, ``X`` (n, d) the inputs and ``pattern`` the neighbours in that
    order, ``distance`` (n,) the maximin distances; ``notes`` what a user should know of them.
    """

    order: Tensor
    X: Tensor
    pattern: Pattern
    distance: Tensor
    policy: NumericalPolicy
    notes: tuple[str, ...] = ()


@torch.no_grad()
def plan_columns(
    prior: Prior, X: Tensor, policy: NumericalPolicy, n_neighbors: int = 30, rho: float | None = None
) -> SicPlan:
    """Order the rows of X by maximin and give each its neighbours among those before it.

    Parameters
    ----------
    prior : Prior
        Says what is near, see `mercer.families.nearness`.
    X : (n, d)
    policy : NumericalPolicy
    n_neighbors : int
        m nearest earlier rows; with ``rho`` the most that a row may have.
    rho : float ≥ 1, optional
        Take the earlier rows within ρ maximin distances instead.

    Returns
    -------
    SicPlan
    """
    if n_neighbors < 1:
        raise ValueError(f"n_neighbors must be at least 1, got {n_neighbors}.")
    if rho is not None and rho < 1.0:
        raise ValueError(f"rho must be at least 1, got {rho}.")
    nearness = Nearness(prior.kernel, X, policy)
    order, distance = nearness.maximin(X)
    index = torch.as_tensor(order, device=X.device)
    ordered = X[index]
    neighbours = (
        nearness.nearest_earlier(ordered, min(n_neighbors, max(1, len(X) - 1)))
        if rho is None
        else nearness.within_radius(ordered, distance, rho, n_neighbors)
    )
    pattern = Pattern(torch.as_tensor(neighbours, device=X.device))
    notes = () if nearness.note is None else (nearness.note,)
    return SicPlan(index, ordered, pattern, torch.as_tensor(distance, device=X.device), policy, notes)
