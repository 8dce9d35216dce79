"""Order and neighbours of a sparse inverse Cholesky family: integers, found once and without gradients."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mercer.families.base import Prior
from mercer.families.nearness import Nearness
from mercer.geometry import ordering
from mercer.geometry.neighbours import moved
from mercer.kernels.evaluate import diag, scaled_inputs
from mercer.linalg.sic import Pattern
from mercer.policy import NumericalPolicy


class Nugget:
    """The relative jitter of a prior, raised where factors break down and never lowered.

    It is part of the model: all rows have it, new ones too, and once raised so have all evaluations with one plan.
    """

    _LADDER = (0.0, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3)

    def __init__(self, dtype: torch.dtype):
        self._left = [each for each in self._LADDER if each == 0.0 or each > torch.finfo(dtype).eps]
        self.value = self._left.pop(0)

    def raise_after(self, failure: Exception) -> None:
        """Take the next value, or raise ``failure`` again after the last."""
        if not self._left:
            raise failure
        self.value = self._left.pop(0)


@dataclass(frozen=True)
class SicPlan:
    """Order and neighbours for the rows of X under a prior; integers, found without gradients.

    ``order`` (n,) are the rows in maximin order, ``X`` (n, d) the inputs and ``pattern`` the neighbours in that
    order, ``distance`` (n,) the maximin distances; ``scale`` (d,) how many lengthscales the inputs spread over (None
    where the kernel has no such), ``notes`` what a user should know, ``rows`` the columns that a sum over columns
    takes (all if None), and ``nugget`` the jitter that the latent prior has needed so far.
    """

    order: Tensor
    X: Tensor
    pattern: Pattern
    distance: Tensor
    policy: NumericalPolicy
    scale: Tensor | None = None
    notes: tuple[str, ...] = ()
    rows: Tensor | None = None
    nugget: Nugget = field(default_factory=lambda: Nugget(torch.float64), compare=False)

    def chunks(self, rows: Tensor | None, members: int = 1) -> tuple[Tensor, ...]:
        """Split columns (all if None) so that the tiles of a chunk, for each member of a batch, fit the policy."""
        columns = self.pattern.columns
        rows = torch.arange(len(columns), device=columns.device) if rows is None else rows
        return rows.split(self.policy.chunk_rows(4 * members * columns.shape[-1] ** 2))

    @cached_property
    def walk(self) -> Tensor:
        """(n,), the columns such that near ones come together: sums take them so, and find their rows in the cache."""
        return torch.as_tensor(ordering.walk(self.X.double().cpu().numpy()), device=self.X.device)

    @property
    def in_data_order(self) -> Tensor:
        """(n, d), the inputs in the order of the data."""
        return torch.empty_like(self.X).index_copy(0, self.order, self.X)

    def prior_variance(self, prior: Prior) -> Tensor:
        """Return the mean prior variance of the rows, a scalar in units of f², differentiable."""
        return diag(prior.kernel, self.X).mean()

    def stale(self, prior: Prior) -> bool:
        """Whether lengthscales that matter have moved by more than a factor of 1.5 against each other.

        All moving together leaves order and neighbours as they are. A sum over some columns only says where to look
        further, and bears a factor of 2.
        """
        scale = spread_in_lengthscales(prior, self.X)
        if scale is None or self.scale is None:
            return False
        factor = 1.5 if self.rows is None else 2.0
        return moved(scale.cpu().numpy(), self.scale.cpu().numpy(), factor)


def _positions(order: Tensor) -> Tensor:
    """Return where each row of the data stands in the order, (n,)."""
    rows = torch.arange(len(order), device=order.device)
    return torch.empty_like(rows).index_copy(0, order, rows)


@torch.no_grad()
def spread_in_lengthscales(prior: Prior, X: Tensor) -> Tensor | None:
    """Return the standard deviation of each column of X over its lengthscale, (d,); None without lengthscales."""
    scaled = scaled_inputs(prior.kernel, X)
    return None if scaled is None else scaled.std(0, correction=0)


@torch.no_grad()
def plan_columns(
    prior: Prior,
    X: Tensor,
    policy: NumericalPolicy,
    n_neighbors: int = 30,
    rho: float | None = None,
    rows: Tensor | None = None,
    lengths: bool = True,
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
    rows : (r,) int tensor, optional
        Rows of X whose columns alone will be summed over, for all; others get no neighbours.
    lengths : bool, default=True
        Whether maximin distances are wanted, which many rows in many dimensions have to be searched for.

    Returns
    -------
    SicPlan
    """
    if n_neighbors < 1:
        raise ValueError(f"n_neighbors must be at least 1, got {n_neighbors}.")
    if prior.kernel.batch_shape:
        raise ValueError(
            f"kernel has a batch shape {tuple(prior.kernel.batch_shape)}, and rows can have one set of neighbours "
            "only; use family='exact', or one estimator for each kernel."
        )
    if rho is not None and rho < 1.0:
        raise ValueError(f"rho must be at least 1, got {rho}.")
    nearness = Nearness(prior.kernel, X, policy)
    order, distance = nearness.maximin(X, lengths)
    index = torch.as_tensor(order, device=X.device)
    ordered = X[index]
    some = None if rows is None else _positions(index)[rows].sort().values
    n_neighbors = min(n_neighbors, max(1, len(X) - 1))
    if rho is not None:
        neighbours = nearness.within_radius(ordered, distance, rho, n_neighbors)
    elif some is None:
        neighbours = nearness.nearest_earlier(ordered, n_neighbors)
    else:
        neighbours = np.full((len(X), n_neighbors), -1)
        neighbours[some.cpu().numpy()] = nearness.nearest_earlier(ordered, n_neighbors, some.cpu().numpy())
    pattern = Pattern(torch.as_tensor(neighbours, device=X.device))
    notes = () if nearness.note is None else (nearness.note,)
    scale = spread_in_lengthscales(prior, X)
    return SicPlan(
        index,
        ordered,
        pattern,
        torch.as_tensor(distance, device=X.device),
        policy,
        scale,
        notes,
        some,
        Nugget(X.dtype),
    )
