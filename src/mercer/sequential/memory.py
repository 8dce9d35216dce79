"""What to keep of a stream: policies that choose the rows of the next memory.

The candidates are the rows in memory and those of the batch, all scored anew. A policy decides which of them stay;
holding the rows, and what becomes of the sites of those that leave, is the business of the stream. Random policies
draw samples of a fixed size in which every candidate has a known probability of being, so that sums over all rows
seen can be estimated without bias from the memory: Σ g(row) over memory of g / ``inclusion``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from mercer.geometry.greedy import greedy_variance
from mercer.sequential.sampling import draw, inclusion_probabilities


@dataclass(frozen=True)
class Candidates:
    """The rows among which a policy chooses.

    Parameters
    ----------
    score : (c,) tensor
        Bayesian leverage h = Σ_latents β v of one copy of a row at the current posterior, without units: expected
        curvature of its log likelihood times marginal variance. Negative where β is (targets that the model does not
        believe); its size counts.
    is_old : (c,) bool tensor
        Which rows come from memory.
    n_seen : int
        Rows that the stream has brought so far, the batch included; at least c.
    labels : (c,) int tensor, optional
        Codes of the classes.
    weight : (c,) tensor, optional
        Replication weights: weight w multiplies leverage and curvature by w. ``Uniform`` counts rows, not copies.
    inclusion : (c,) tensor, optional
        Probability, in (0, 1], with which a row is among the candidates: 1 for those of the batch, for old ones what
        ``Selection`` gave when they were last kept. By default old rows are taken for a uniform sample of all before
        the batch.
    covariance : callable, optional
        ``covariance(j)`` with j an int tensor of shape (1,) gives the posterior covariances, (*b, 1, c) or (*b, c), of
        the latents of row j with those of all candidates, in units of f².
    variance, beta : (*b, c) tensors, optional
        Posterior variances v, in units of f², and expected curvatures β, 1/f², per latent; β of one copy.

    Raises
    ------
    ValueError
        Shapes that do not fit, a score that is not finite, or counts and probabilities out of range.
    """

    score: Tensor
    is_old: Tensor
    n_seen: int
    labels: Tensor | None = None
    weight: Tensor | None = None
    inclusion: Tensor | None = None
    covariance: Callable[[Tensor], Tensor] | None = None
    variance: Tensor | None = None
    beta: Tensor | None = None

    def __post_init__(self) -> None:
        if self.score.ndim != 1:
            raise ValueError(f"score must have shape (c,), got {tuple(self.score.shape)}; sum it over the latents.")
        for name, value in self._tensors().items():
            if value.shape[-1:] != self.score.shape or (value.ndim > 1 and name not in ("variance", "beta")):
                shape = tuple(value.shape)
                raise ValueError(f"{name} must have one entry for each of {len(self)} candidates, got shape {shape}.")
        if self.is_old.dtype != torch.bool:
            raise ValueError(f"is_old must be boolean, got {self.is_old.dtype}.")
        if not bool(self.score.isfinite().all()):
            raise ValueError("score holds NaN or infinite leverages: the posterior has broken down before the choice.")
        if self.n_seen < len(self):
            raise ValueError(f"n_seen must count all rows so far, the batch included, got {self.n_seen} < {len(self)}.")
        if self.inclusion is not None and not bool(((self.inclusion > 0) & (self.inclusion <= 1)).all()):
            raise ValueError("inclusion must hold probabilities in (0, 1]; pass on what Selection gave.")

    def __len__(self) -> int:
        return len(self.score)

    def leverage(self) -> Tensor:
        """Return what rows are ranked by, (c,) ≥ 0 in float64."""
        size = self.score.double().abs()
        return size if self.weight is None else size * self.weight

    def presence(self) -> Tensor:
        """Return ``inclusion``, or its default, (c,) in float64."""
        if self.inclusion is not None:
            return self.inclusion.double()
        n_old = int(self.is_old.sum())
        before = self.n_seen - (len(self) - n_old)
        return torch.ones_like(self.score, dtype=torch.float64).masked_fill_(self.is_old, n_old / max(1, before))

    def take(self, index: Tensor) -> Candidates:
        """Return the candidates ``index``, which can still be told from a sample of the whole stream."""
        chosen: dict[str, Any] = {name: value[..., index] for name, value in self._tensors().items()}
        chosen["inclusion"] = self.presence()[index]
        if (covariance := self.covariance) is not None:
            chosen["covariance"] = lambda j: covariance(index[j])[..., index]
        return Candidates(n_seen=self.n_seen, **chosen)

    def _tensors(self) -> dict[str, Tensor]:
        pairs = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in pairs if isinstance(value, Tensor)}


@dataclass(frozen=True)
class Selection:
    """The rows that are kept.

    Parameters
    ----------
    index : (m,) int tensor
        Positions among the candidates, each once; m = min(capacity, c) for all policies here.
    inclusion : (m,) float64 tensor
        Probability with which a row of the stream is in memory after all choices so far: that of this choice times
        ``Candidates.inclusion``. Store it with the row. Deterministic choices set it to 1: they are no samples.
    """

    index: Tensor
    inclusion: Tensor


class MemoryPolicy(Protocol):
    """How a memory is chosen."""

    def select(self, candidates: Candidates, capacity: int, generator: torch.Generator) -> Selection:
        """Return at most ``capacity`` ≥ 0 of the candidates; random numbers come from ``generator`` alone."""


@dataclass(frozen=True)
class LeverageSample:
    """A sample without replacement of all rows seen, in proportion to their leverage.

    Of the first batch, a row is kept with probability min(1, c h), where c makes M rows of it. A row from memory stands
    for 1/``inclusion`` rows, so that later its chance is min(1, c h / ``inclusion``) and its ``inclusion`` becomes
    min(``inclusion``, c h). Were chances in proportion to h alone, old rows would compete anew with every batch until
    memory held the latest rows only, and a few huge 1/``inclusion`` would drown all others.
    """

    def select(self, candidates: Candidates, capacity: int, generator: torch.Generator) -> Selection:
        return _sample(candidates, candidates.leverage(), capacity, generator)


@dataclass(frozen=True)
class Uniform:
    """A uniform sample of all rows seen: a reservoir, for batches of any sizes.

    All rows seen are in memory with probability M / ``n_seen``. If M has grown since, old rows cannot be recalled: the
    batch fills the room, and ``inclusion`` says so.
    """

    def select(self, candidates: Candidates, capacity: int, generator: torch.Generator) -> Selection:
        return _sample(candidates, torch.ones_like(candidates.score), capacity, generator)


@dataclass(frozen=True)
class LeverageTop:
    """The rows of largest leverage, the lowest position first among equals.

    Parameters
    ----------
    conditional : bool
        Choose one by one, with variances that have been reduced by what observing the chosen rows once more would
        tell, v_i ← v_i − c_ij² / (v_j + 1/β_j), so that near-duplicates are not all kept. Needs ``covariance``,
        ``variance`` and ``beta`` of the candidates; O(c M) operations a row and O(c M) memory for each latent.
        A negative β counts as 0 there. The plain ranking fills what is left when no row has leverage any more.
    """

    conditional: bool = False

    def select(self, candidates: Candidates, capacity: int, generator: torch.Generator) -> Selection:
        order = candidates.leverage().argsort(descending=True, stable=True)
        if self.conditional:
            first = _conditional(candidates, _size(candidates, capacity))
            order = torch.cat([first, order[~torch.isin(order, first)]])
        index = order[: _size(candidates, capacity)]
        return Selection(index, torch.ones_like(index, dtype=torch.float64))


@dataclass(frozen=True)
class ClassBalanced:
    """Equal shares of the memory for the classes present; room that a class cannot fill goes to the others.

    Where shares do not come out even, classes with more candidates get one row more, and among those the ones of
    larger total leverage.

    Parameters
    ----------
    base : what ``get_policy`` takes
        Chooses within each class.
    """

    base: str | MemoryPolicy | Callable[[Candidates, int, torch.Generator], Selection] = LeverageSample()

    def select(self, candidates: Candidates, capacity: int, generator: torch.Generator) -> Selection:
        if candidates.labels is None:
            raise ValueError("ClassBalanced needs the labels of the candidates; without classes use its base alone.")
        base, room = get_policy(self.base), _size(candidates, capacity)
        codes, member, count = candidates.labels.unique(return_inverse=True, return_counts=True)
        total = torch.zeros(len(codes), dtype=torch.float64, device=member.device)
        total.index_add_(0, member, candidates.leverage())
        parts = [Selection(member[:0], total[:0])]
        # The smallest class first: what it leaves of its share is then divided among all others.
        classes = sorted(zip(count.tolist(), total.tolist(), range(len(codes)), strict=True))
        for done, (n_rows, _, code) in enumerate(classes):
            share = min(n_rows, room // (len(codes) - done))
            room -= share
            rows = (member == code).nonzero().squeeze(1)
            part = base.select(candidates.take(rows), share, generator)
            parts.append(Selection(rows[part.index], part.inclusion))
        return Selection(torch.cat([part.index for part in parts]), torch.cat([part.inclusion for part in parts]))


@dataclass(frozen=True)
class _Plain:
    """A policy from a function, whose answers are checked."""

    function: Callable[[Candidates, int, torch.Generator], Selection]

    def select(self, candidates: Candidates, capacity: int, generator: torch.Generator) -> Selection:
        size = _size(candidates, capacity)
        chosen = self.function(candidates, capacity, generator)
        index, inclusion = chosen.index, chosen.inclusion
        if index.ndim != 1 or len(index) > size or len(index.unique()) < len(index):
            raise ValueError(f"the memory policy must choose at most {size} rows, each once, got {index.tolist()}.")
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(candidates):
            raise ValueError(f"the memory policy chose rows outside of the {len(candidates)} candidates.")
        if inclusion.shape != index.shape or not bool(((inclusion > 0) & (inclusion <= 1)).all()):
            raise ValueError("the memory policy must give inclusion, a probability in (0, 1] for each row it chose.")
        return chosen


_POLICIES: dict[str, MemoryPolicy] = {
    "bls_sample": LeverageSample(),
    "bls_top": LeverageTop(),
    "uniform": Uniform(),
    "class_balanced": ClassBalanced(),
}


def get_policy(policy: str | MemoryPolicy | Callable[[Candidates, int, torch.Generator], Selection]) -> MemoryPolicy:
    """Return the memory policy that a name, a policy or a plain function ``f(candidates, capacity, generator)`` means.

    Raises
    ------
    ValueError
        Unknown name; lists those that are known.
    TypeError
        Anything else that cannot select.
    """
    if isinstance(policy, str):
        if policy not in _POLICIES:
            raise ValueError(f"memory policy must be one of {', '.join(map(repr, _POLICIES))}, got {policy!r}.")
        return _POLICIES[policy]
    if isinstance(policy, type):
        raise TypeError(f"memory policy is the class {policy.__name__}; make an object of it, {policy.__name__}().")
    if hasattr(policy, "select"):
        return policy
    if callable(policy):
        return _Plain(policy)
    raise TypeError(f"memory policy must be a name, have a method select or be callable, got {policy!r}.")


def _size(candidates: Candidates, capacity: int) -> int:
    if capacity < 0:
        raise ValueError(f"capacity must not be negative, got {capacity}.")
    return min(capacity, len(candidates))


def _sample(candidates: Candidates, size: Tensor, capacity: int, generator: torch.Generator) -> Selection:
    """Draw candidates so that the rows of the whole stream are in memory in proportion to ``size``."""
    presence = candidates.presence()
    chance = inclusion_probabilities(size / presence, _size(candidates, capacity))
    index = draw(chance, generator)
    return Selection(index, (chance * presence)[index])


def _conditional(candidates: Candidates, n_rows: int) -> Tensor:
    """Return rows of large leverage given one another: at most ``n_rows``, fewer where no other row has any."""
    covariance, variance, beta = candidates.covariance, candidates.variance, candidates.beta
    if covariance is None or variance is None or beta is None:
        raise ValueError(
            "LeverageTop(conditional=True) needs covariance, variance and beta of the candidates; give them, or use "
            "LeverageTop()."
        )
    precision = beta.clamp_min(0.0) if candidates.weight is None else beta.clamp_min(0.0) * candidates.weight
    return greedy_variance(covariance, variance, n_rows, weight=precision, noise=1.0 / precision).index
