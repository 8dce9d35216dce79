"""What is kept of a stream, and the posterior that it stands for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mercer._typing import Data, Sites
from mercer.families.inducing_plan import InducingPlan
from mercer.families.moments import tied_from_white, whitened_moments
from mercer.families.tied import GaussianStatistics, TiedSites, inducing_factor
from mercer.inference.base import latent_shape
from mercer.inference.streaming import ConjugateStream, gaussian_statistics, noise_variance

if TYPE_CHECKING:
    from mercer.model import Model

Past = Any  # TiedSites, or GaussianStatistics where the noise is one unknown variance; a stream never mixes them


@dataclass(frozen=True)
class Memory:
    """Rows that are kept as they are.

    Parameters
    ----------
    data : Data
        M rows in model units.
    sites : Sites
        Theirs, (*b, M).
    inclusion : (M,)
        Probability that a row of the stream is in memory, as far as the policy knows.
    share : TiedSites or GaussianStatistics
        What of the total they account for, at the present inducing points.
    counted : (M,)
        The weights in ``share``.
    """

    data: Data
    sites: Sites
    inclusion: Tensor
    share: Past
    counted: Tensor


@dataclass(frozen=True)
class StreamState:
    """All that is kept of a stream; its size does not depend on how many rows there were.

    Parameters
    ----------
    Z : (m, d)
        Inducing points, model units.
    total : TiedSites or GaussianStatistics
        What all rows seen say of the process at Z, those in memory included.
    memory : Memory
    n_seen, n_batches : int
    loss : float
        Nats lost so far where inducing points moved.
    moved : bool
        Whether Z, hyperparameters or weights of rows ever changed after the first batch.
    random : (k,) uint8 tensor
        State of the generator that draws memories.
    scores : tuple of float
        Number of batches, mean and sum of squared deviations of the mean log predictive density of new batches.
    """

    Z: Tensor
    total: Past
    memory: Memory
    n_seen: int
    n_batches: int
    loss: float
    moved: bool
    random: Tensor
    scores: tuple[float, float, float] = (0.0, 0.0, 0.0)


def start(model: Model, data: Data, seed: int, Z: Tensor | None = None) -> StreamState:
    """Return the state before any row: no inducing points, or those given, and nothing known."""
    Z = data.X[:0] if Z is None else Z
    batch = latent_shape(model, data)[:-1]
    empty = data.rows(torch.arange(0, device=data.X.device))
    kind = GaussianStatistics if one_noise(model, data) else TiedSites
    none = kind.none(Z, batch)
    nothing = data.X.new_zeros(*batch, 0)
    memory = Memory(empty, Sites(nothing, nothing), nothing.new_zeros(0), none, nothing.new_zeros(0))
    random = torch.Generator().manual_seed(seed).get_state()
    return StreamState(Z, none, memory, 0, 0, 0.0, False, random)


def one_noise(model: Model, data: Data) -> bool:
    return bool(model.likelihood.conjugate) and "noise_variance" not in data.side


def given(model: Model, past: Past) -> tuple[Any, TiedSites | None]:
    """Return the engine and the plan's rest that stand for the rows of ``past``."""
    if isinstance(past, GaussianStatistics):
        return ConjugateStream(past), None
    return model.engine, past


def sites_of(model: Model, past: Past) -> TiedSites:
    """Return what ``past`` says of u at the model's present noise."""
    return past.tied(noise_variance(model, past.count)) if isinstance(past, GaussianStatistics) else past


@torch.no_grad()
def posterior_of(model: Model, state: StreamState) -> Any:
    """Return the posterior of a state: the memory's rows by their sites, given the rest."""
    rest = sites_of(model, state.total - state.memory.share)
    plan = InducingPlan(state.memory.data.X, state.Z, model.policy, rest=rest)
    return model.family.condition(model.prior, plan, state.memory.sites)


@torch.no_grad()
def evidence_of(model: Model, state: StreamState) -> float:
    """Return J of the memory's rows given all others, in nats.

    For Gaussian noise of one variance it is the bound for all rows; otherwise constants of rows that are gone are
    gone too, and only differences between hyperparameters mean something.
    """
    engine, rest = given(model, state.total - state.memory.share)
    model = replace(model, engine=engine)
    data = replace(state.memory.data, weight=state.memory.counted)
    plan = InducingPlan(data.X, state.Z, model.policy, rest=rest)
    return float(engine.objective(model, plan, engine.init(model, plan, data, state.memory.sites), data))


def share_of(model: Model, state: StreamState, memory: Memory) -> Past:
    """Return what the memory's rows account for at their present sites."""
    L, _ = inducing_factor(model.prior, state.Z, model.policy)
    if isinstance(state.total, GaussianStatistics):
        return gaussian_statistics(model, state.Z, L, replace(memory.data, weight=memory.counted))
    own = (memory.sites.linear, memory.sites.precision)
    return tied_from_white(L, *whitened_moments(model.prior.kernel, memory.data.X, state.Z, L, *own, model.policy))


def joined(first: Data, second: Data) -> Data:
    side = {name: torch.cat([first.side[name], value], -1) for name, value in second.side.items()}
    X, weight = torch.cat([first.X, second.X]), torch.cat([first.weight, second.weight])
    return Data(X, torch.cat([first.y, second.y], -1), weight, side)
