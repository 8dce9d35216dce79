"""A Gaussian process on a stream: what it keeps of all rows seen, and how a batch changes that.

One update moves what is known to the next inducing points, takes the memory's old share out of it, infers with batch
and memory by their likelihood given the rest, learns hyperparameters on the way, and chooses the next memory. Every
row counts once: by its likelihood while it is in the batch or in memory, by its frozen site afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mercer._typing import Data, Sites
from mercer.families.inducing_plan import InducingPlan
from mercer.families.moments import tied_from_white, whitened_moments
from mercer.families.tied import GaussianStatistics, Projection, TiedSites, inducing_factor
from mercer.inference.base import latent_shape, run
from mercer.inference.evidence import Evidence
from mercer.inference.streaming import ConjugateStream, gaussian_statistics, noise_variance
from mercer.inference.theta import ThetaVector
from mercer.kernels.evaluate import diag, gram
from mercer.linalg.cholesky import NotPositiveDefiniteError
from mercer.sequential.memory import Candidates, get_policy
from mercer.sequential.options import Stream
from mercer.sequential.places import next_inducing

if TYPE_CHECKING:
    from mercer.model import Model

Past = Any  # TiedSites, or GaussianStatistics where the noise is one unknown variance; a stream never mixes them
_FEW_SCORES = 5
_SETTLED = 1e-3  # nats per row that an iteration for hyperparameters has to gain


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
        Whether Z or hyperparameters ever changed after the first batch.
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


@dataclass(frozen=True)
class Update:
    """How one batch went.

    ``posterior`` is that of the memory's rows given the rest; ``kept`` (M,) says which of memory's and the batch's
    rows, one after the other, are in memory now; ``loss`` are nats lost by moving inducing points; ``score`` is the
    mean log density of the batch before it was learned from (NaN for the first), and ``surprise`` how many standard
    deviations that is below the batches before.
    """

    state: StreamState
    posterior: Any
    engine: Any
    kept: Tensor
    value: float
    loss: float
    n_inner: int
    n_iter: int
    n_evaluations: int
    converged: bool
    score: float
    surprise: float
    notes: tuple[str, ...]


def start(model: Model, data: Data, options: Stream, seed: int, Z: Tensor | None = None) -> StreamState:
    """Return the state before any row: no inducing points, or those given, and nothing known."""
    Z = data.X[:0] if Z is None else Z
    batch = latent_shape(model, data)[:-1]
    empty = data.rows(torch.arange(0, device=data.X.device))
    kind = GaussianStatistics if _one_noise(model, data) else TiedSites
    none = kind.none(Z, batch)
    nothing = data.X.new_zeros(*batch, 0)
    memory = Memory(empty, Sites(nothing, nothing), nothing.new_zeros(0), none, nothing.new_zeros(0))
    random = torch.Generator().manual_seed(seed).get_state()
    return StreamState(Z, none, memory, 0, 0, 0.0, False, random)


def _one_noise(model: Model, data: Data) -> bool:
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


def update(model: Model, state: StreamState, batch: Data, options: Stream, learn: bool = True) -> Update:
    """Take in one batch.

    Parameters
    ----------
    model : Model
        Its hyperparameters are changed in place if they are learned; its engine is a conjugate or a dual one.
    state : StreamState
        Left as it is.
    batch : Data
    options : Stream
    learn : bool
        Whether to learn hyperparameters.

    Raises
    ------
    NotPositiveDefiniteError
        A factorisation failed.
    """
    score, surprise, scores, curvature = _prequential(model, state, batch)
    state, loss = _moved(model, state, batch.X, curvature, options)
    memory = state.memory
    rest = (state.total - memory.share).scale(options.forgetting)
    kept_weight = memory.data.weight * options.forgetting
    rows = _joined(replace(memory.data, weight=kept_weight), batch)
    sites = Sites(*(_padded(each, batch.n_rows) for each in (memory.sites.linear, memory.sites.precision)))
    n_iter = n_evaluations = 0
    notes: list[str] = []
    if learn:
        n_iter, n_evaluations, notes = _learn(model, state, rest, rows, batch, sites, options)
    engine, tied = given(model, rest)
    counted = rows
    if options.memory_weight != 1.0:
        heavier = torch.cat([options.memory_weight * kept_weight, batch.weight])
        counted = replace(rows, weight=heavier)
    inner = replace(model, engine=engine)
    plan = InducingPlan(rows.X, state.Z, model.policy, rest=tied)
    inference = run(inner, plan, counted, sites)
    posterior = inference.state.posterior
    with torch.no_grad():
        value = float(inner.engine.objective(inner, plan, inference.state, counted))
    if not np.isfinite(value):
        raise NotPositiveDefiniteError("The objective of the batch is not a finite number: y or X is out of range.")
    generator = torch.Generator()
    generator.set_state(state.random)
    n_seen = state.n_seen + batch.n_rows
    kept, inclusion = _remember(model, posterior, counted, memory, n_seen, options, generator)
    found = posterior.sites
    expanded = Sites(*(each.expand(*latent_shape(model, rows)) for each in (found.linear, found.precision)))
    # total = rest + all rows at hand
    total = rest + _share(model, posterior, counted, None)
    share = _share(model, posterior, counted, kept)
    own = Sites(expanded.linear[..., kept], expanded.precision[..., kept])
    memory = Memory(rows.rows(kept), own, inclusion, share, counted.weight[kept])
    moved = state.moved or (state.n_batches > 0 and n_iter > 0)
    after = StreamState(
        state.Z, total, memory, n_seen, state.n_batches + 1, state.loss, moved, generator.get_state(), scores
    )
    outcome = (inference.n_steps, n_iter, n_evaluations, inference.converged, score, surprise)
    all_notes = (*notes, *inference.notes)
    return Update(after, posterior_of(model, after), engine, kept, value, loss, *outcome, all_notes)


@torch.no_grad()
def without(model: Model, state: StreamState, inside: Tensor, gone: Data | None) -> StreamState:
    """Return the state without some rows: those at ``inside`` of memory, and ``gone``, whose statistics are taken off.

    Exact for rows in memory. Of others, with Gaussian noise, what is subtracted is what they would say at the present
    inducing points and hyperparameters.

    Raises
    ------
    ValueError
        What is left would be negative: the rows were not among those seen.
    """
    memory = state.memory
    stays = torch.ones(memory.data.n_rows, dtype=torch.bool, device=state.Z.device)
    stays[inside] = False
    index = stays.nonzero().squeeze(-1)
    own = Sites(memory.sites.linear[..., index], memory.sites.precision[..., index])
    share = _share_of_memory(model, state, index)
    total = state.total - (memory.share - share)
    n_gone = len(inside)
    if gone is not None:
        L, _ = inducing_factor(model.prior, state.Z, model.policy)
        total = total - gaussian_statistics(model, state.Z, L, gone)
        n_gone += gone.n_rows
    left = sites_of(model, total - share).precision
    smallest, largest = (torch.linalg.eigvalsh(left)[..., k] for k in (0, -1))
    if n_gone > state.n_seen or bool((smallest < -1e-6 * largest.clamp_min(1.0)).any()):
        raise ValueError("the rows cannot have been among those seen: what is left without them is less than nothing.")
    memory = Memory(memory.data.rows(index), own, memory.inclusion[index], share, memory.counted[index])
    return replace(state, total=total, memory=memory, n_seen=state.n_seen - n_gone)


def _share_of_memory(model: Model, state: StreamState, index: Tensor) -> Past:
    """Return what the memory's rows ``index`` account for."""
    sites = state.memory.sites
    data = replace(state.memory.data.rows(index), weight=state.memory.counted[index])
    L, _ = inducing_factor(model.prior, state.Z, model.policy)
    if isinstance(state.total, GaussianStatistics):
        return gaussian_statistics(model, state.Z, L, data)
    own = (sites.linear[..., index], sites.precision[..., index])
    return tied_from_white(L, *whitened_moments(model.prior.kernel, data.X, state.Z, L, *own, model.policy))


def merged(model: Model, states: Sequence[StreamState], common: StreamState | None, options: Stream) -> StreamState:
    """Return the stream that has seen what all of ``states`` have, at equal hyperparameters and inducing points.

    Parameters
    ----------
    model : Model
        Its likelihood says whether sites or statistics are added.
    states : sequence of StreamState
        Their totals add up.
    common : StreamState or None
        What each of them had seen before they parted; it counts once.
    options : Stream
        For the size of the memory: of all memories together the policy chooses anew.

    Raises
    ------
    ValueError
        Inducing points differ.
    """
    first = states[0]
    for other in (*states[1:], *(() if common is None else (common,))):
        if not torch.equal(first.Z, other.Z):
            raise ValueError(
                "the streams have different inducing points; merge needs those of one common start: use "
                "Stream(inducing='fixed', hyperparameters='frozen') on all of them."
            )
    total, n_seen = first.total, first.n_seen
    for other in states[1:]:
        total, n_seen = total + other.total, n_seen + other.n_seen
    if common is not None:
        extra = len(states) - 1
        total, n_seen = total - common.total.scale(float(extra)), n_seen - extra * common.n_seen
    memories = [state.memory for state in states]
    data = memories[0].data
    for memory in memories[1:]:
        data = _joined(data, memory.data)
    parts = [(each.sites.linear, each.sites.precision) for each in memories]
    sites = Sites(*(torch.cat(each, -1) for each in zip(*parts, strict=True)))
    inclusion, counted = (torch.cat([getattr(each, name) for each in memories]) for name in ("inclusion", "counted"))
    # a row that was in memory when they parted is in several memories
    _, place = torch.unique(torch.cat([data.X, data.y.reshape(-1, data.n_rows).mT], -1), dim=0, return_inverse=True)
    earliest = torch.full((int(place.max()) + 1 if len(place) else 0,), data.n_rows, device=place.device)
    earliest.scatter_reduce_(0, place, torch.arange(data.n_rows, device=place.device), "amin")
    kept = earliest.sort().values
    if options.memory is not None and len(kept) > options.memory:
        kept = kept[inclusion[kept].argsort(stable=True)[: options.memory]].sort().values
    own = Sites(sites.linear[..., kept], sites.precision[..., kept])
    memory = Memory(data.rows(kept), own, inclusion[kept], first.memory.share, counted[kept])
    n_batches = max(state.n_batches for state in states)
    state = replace(first, total=total, memory=memory, n_seen=n_seen, n_batches=n_batches)
    share = _share_of_memory(model, state, torch.arange(len(kept), device=kept.device))
    return replace(state, memory=replace(memory, share=share))


def _joined(first: Data, second: Data) -> Data:
    side = {name: torch.cat([first.side[name], value], -1) for name, value in second.side.items()}
    X, weight = torch.cat([first.X, second.X]), torch.cat([first.weight, second.weight])
    return Data(X, torch.cat([first.y, second.y], -1), weight, side)


def _padded(values: Tensor, n: int) -> Tensor:
    return torch.cat([values, values.new_zeros(*values.shape[:-1], n)], -1)


@torch.no_grad()
def _moved(model: Model, state: StreamState, X: Tensor, curvature: float, options: Stream) -> tuple[StreamState, float]:
    """Return the state at the inducing points that the rows X ask for, and the nats that moving lost."""
    if options.inducing == "fixed" and len(state.Z):
        return state, 0.0
    tied = sites_of(model, state.total)
    most = int(getattr(model.family, "n_inducing", options.n_inducing))
    how: dict[str, Any] = {
        "most": most,
        "curvature": curvature,
        "residual_tol": options.residual_tol,
        "loss_tol": options.loss_tol,
        "policy": model.policy,
    }
    Z = next_inducing(model.prior, state.Z, X, tied, **how)
    if torch.equal(Z, state.Z):
        return state, 0.0
    move = Projection(model.prior, state.Z, Z, model.policy)
    loss = float(tied.loss(move).sum())
    memory = replace(state.memory, share=state.memory.share.project(move))
    moved = state.moved or state.n_batches > 0
    return replace(
        state, Z=Z, total=state.total.project(move), memory=memory, loss=state.loss + loss, moved=moved
    ), loss


def _most(model: Model, options: Stream) -> int:
    return int(getattr(model.family, "n_inducing", options.n_inducing))


def _learn(
    model: Model, state: StreamState, rest: Past, rows: Data, batch: Data, sites: Sites, options: Stream
) -> tuple[int, int, list[str]]:
    """Climb a few iterations from the present hyperparameters; return iterations, evaluations and what to report."""
    vector = ThetaVector(model)
    if len(vector) == 0:
        return 0, 0, []
    memory = state.memory
    n_old = memory.data.n_rows
    if options.objective == "hybrid" or state.n_batches == 0:
        data = rows
    elif options.objective == "site":
        data, rest = batch, rest + memory.share.scale(options.forgetting)
        sites = Sites(sites.linear[..., n_old:], sites.precision[..., n_old:])
    else:
        # a memory row stands for 1/π rows; where π is not known for all rows of the same number
        sampled = bool((memory.inclusion < 1).any())
        each = 1.0 / memory.inclusion if sampled else torch.full_like(memory.inclusion, state.n_seen / max(1, n_old))
        data = replace(rows, weight=torch.cat([rows.weight[:n_old] * each.to(rows.weight), batch.weight]))
        rest = rest.scale(0.0)
    engine, tied = given(model, rest)
    inner = replace(model, engine=engine)
    plan = InducingPlan(data.X, state.Z, model.policy, rest=tied)
    settled = _SETTLED * batch.n_rows
    evidence = Evidence(inner, plan, data, settled=settled)
    evidence.sites = None if model.likelihood.conjugate else sites
    before = vector.read()
    try:
        learned = evidence.maximise(before, options.n_hyper_iter)
    except (NotPositiveDefiniteError, FloatingPointError) as failure:
        vector.write(before)
        return 0, evidence.n_evaluations, [f"hyperparameters were left as they were: {failure}"]
    vector.write(learned.theta)
    if learned.interrupted:
        raise KeyboardInterrupt
    return learned.n_iter, learned.n_evaluations, []


def _share(model: Model, posterior: Any, data: Data, index: Tensor | None) -> Past:
    """Return what the rows ``index`` of the posterior's, or all, say of u."""
    if not _one_noise(model, data):
        return posterior.tied(index)
    rows = data if index is None else data.rows(index)
    return gaussian_statistics(model, posterior.plan.Z, posterior.L.detach(), rows)


@torch.no_grad()
def _prequential(
    model: Model, state: StreamState, batch: Data
) -> tuple[float, float, tuple[float, float, float], float]:
    """Return how the batch looks beforehand: its mean log density, how surprising that is, the statistics of such
    scores, and the mean curvature of its log likelihood."""
    if len(state.Z):
        m, v = posterior_of(model, state).marginals(batch.X)
    else:
        v = diag(model.prior.kernel, batch.X).expand(latent_shape(model, batch))
        m = model.prior.mean_at(batch.X).expand(v.shape)
    beta = model.likelihood.expected_log_prob(batch.y, m, v, **batch.side).beta
    curvature = float(beta.abs().reshape(-1, batch.n_rows).sum(0).nanmean())
    if state.n_batches == 0:
        return float("nan"), 0.0, state.scores, curvature
    density = model.likelihood.log_predictive_density(batch.y, m, v, **batch.side)
    score = float(density.masked_fill(batch.y.isnan(), float("nan")).nanmean())
    n, mean, squares = state.scores
    surprise = (mean - score) / (squares / (n - 1)) ** 0.5 if n >= _FEW_SCORES and squares > 0 else 0.0
    step = score - mean
    mean += step / (n + 1)
    return score, surprise, (n + 1, mean, squares + step * (score - mean)), curvature


@torch.no_grad()
def _remember(
    model: Model,
    posterior: Any,
    data: Data,
    memory: Memory,
    n_seen: int,
    options: Stream,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Return which rows stay in memory, and their inclusion probabilities."""
    n_old, device = memory.data.n_rows, data.X.device
    weight = data.weight
    beta = posterior.sites.precision.expand(*latent_shape(model, data)) / weight
    variance = posterior.variance_at_data.expand_as(beta)
    score = (beta * variance).reshape(-1, data.n_rows).sum(0)
    is_old = torch.arange(data.n_rows, device=device) < n_old
    labels = data.y.long() if model.likelihood.support == "classes" else None
    inclusion = torch.cat([memory.inclusion.double(), torch.ones(data.n_rows - n_old, device=device).double()])

    def covariance(j: Tensor) -> Tensor:
        kernel, policy = model.prior.kernel, model.policy
        Z, weights = posterior.covariance_weights(data.X[j])
        crossed = gram(kernel, data.X[j], data.X, policy=policy)
        return crossed - weights.mT @ gram(kernel, Z, data.X, policy=policy)

    candidates = Candidates(score, is_old, n_seen, labels, weight, inclusion, covariance, variance, beta)
    policy = get_policy(options.policy)
    if options.memory is None:
        new = candidates.take(torch.arange(n_old, data.n_rows, device=device))
        chosen = policy.select(new, min(options.memory_per_batch, len(new)), generator)
        index = torch.cat([torch.arange(n_old, device=device), n_old + chosen.index])
        return index, torch.cat([inclusion[:n_old], chosen.inclusion])
    chosen = policy.select(candidates, min(options.memory, len(candidates)), generator)
    return chosen.index, chosen.inclusion
