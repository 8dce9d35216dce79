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
from mercer.families.base import Confession
from mercer.families.inducing_plan import InducingPlan
from mercer.families.moments import tied_from_white, whitened_moments
from mercer.families.tied import GaussianStatistics, Projection, TiedSites, inducing_factor
from mercer.inference.base import latent_shape, run
from mercer.inference.evidence import Evidence
from mercer.inference.streaming import ConjugateStream, Unexplained, gaussian_statistics, noise_variance
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
_CHANCE = 9.2  # −log of how seldom a batch may be called surprising that is not
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


@dataclass(frozen=True)
class Update:
    """How one batch went.

    ``posterior`` is that of the memory's rows given the rest; ``kept`` (M,) says which of memory's and the batch's
    rows, one after the other, are in memory now; ``value`` is J at the end; ``loss`` are nats lost by moving inducing
    points; ``score`` is the mean log density of the batch before it was learned from (NaN for the first), and
    ``surprise`` how many standard deviations that is below the batches before, no fewer than chance alone explains in
    so few rows; ``confession`` is about memory's and the batch's rows.
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
    confession: Confession
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
    unexplained = _unexplained(model, state)
    if learn:
        n_iter, n_evaluations, notes = _learn(model, state, rest, rows, batch, sites, options, unexplained)
    if unexplained is not None:
        with torch.no_grad():
            ratio = unexplained.ratio(model, state.Z, inducing_factor(model.prior, state.Z, model.policy)[0])
        rest = replace(rest, residual=ratio * rest.residual)
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
    generator.set_state(state.random.cpu())
    n_seen = state.n_seen + batch.n_rows
    kept, inclusion = _remember(model, posterior, counted, memory, n_seen, options, generator)
    found = posterior.sites
    expanded = Sites(*(each.expand(*latent_shape(model, rows)) for each in (found.linear, found.precision)))
    # total = rest + all rows at hand
    total = rest + _share(model, posterior, counted, None)
    share = _share(model, posterior, counted, kept)
    own = Sites(expanded.linear[..., kept], expanded.precision[..., kept])
    memory = Memory(rows.rows(kept), own, inclusion, share, counted.weight[kept])
    weighed = options.forgetting != 1.0 or options.memory_weight != 1.0
    moved = state.moved or (state.n_batches > 0 and (n_iter > 0 or weighed))
    after = StreamState(
        state.Z, total, memory, n_seen, state.n_batches + 1, state.loss, moved, generator.get_state(), scores
    )
    outcome = (inference.n_steps, n_iter, n_evaluations, inference.converged, score, surprise, posterior.confess())
    all_notes = (*notes, *inference.notes)
    return Update(after, posterior_of(model, after), engine, kept, value, loss, *outcome, all_notes)


@torch.no_grad()
def without(model: Model, state: StreamState, left: Tensor, gone: Data | None) -> StreamState:
    """Return the state without some rows.

    Exact for rows in memory, as far as inference is: the sites of those that stay are found anew. Of others, with
    Gaussian noise, what is subtracted is what they would say at the present inducing points and hyperparameters.

    Parameters
    ----------
    model, state
    left : (M,)
        Share of each of memory's rows that stays, from 0 to 1.
    gone : Data or None
        Rows that are in memory no more; their statistics are taken off.

    Raises
    ------
    ValueError
        What is left would be negative: the rows were not among those seen.
    """
    memory, rest = state.memory, state.total - state.memory.share
    n_seen = state.n_seen - int((left <= 0).sum())
    if gone is not None:
        L, _ = inducing_factor(model.prior, state.Z, model.policy)
        rest = rest - gaussian_statistics(model, state.Z, L, gone)
        n_seen -= gone.n_rows
        values = torch.linalg.eigvalsh(sites_of(model, rest).precision)
        if n_seen < 0 or bool((values[..., 0] < -1e-6 * values[..., -1].clamp_min(1.0)).any()):
            raise ValueError("the rows cannot have been among those seen: without them less than nothing is left.")
    index = (left > 0).nonzero().squeeze(-1)
    some = left[index]
    data = memory.data.rows(index)
    data = replace(data, weight=data.weight * some)
    sites = Sites(memory.sites.linear[..., index] * some, memory.sites.precision[..., index] * some)
    return _with_memory(
        model,
        replace(state, n_seen=n_seen),
        rest,
        Memory(data, sites, memory.inclusion[index], memory.share, memory.counted[index] * some),
    )


def _with_memory(model: Model, state: StreamState, rest: Past, memory: Memory) -> StreamState:
    """Return the state whose total is ``rest`` and the rows of ``memory``, whose sites are found anew given it."""
    data = replace(memory.data, weight=memory.counted)
    sites = memory.sites
    if not model.likelihood.conjugate:
        plan = InducingPlan(data.X, state.Z, model.policy, rest=rest)
        sites = run(model, plan, data, sites).state.sites
    memory = replace(memory, sites=sites)
    share = _share_of(model, state, memory)
    return replace(state, total=rest + share, memory=replace(memory, share=share))


@torch.no_grad()
def merged(
    model: Model, states: Sequence[StreamState], common: StreamState | None, options: Stream
) -> tuple[StreamState, Tensor]:
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

    Returns
    -------
    StreamState
    (M,) int tensor
        Which rows of all memories, one after the other, are in memory now. Equal rows have become one.

    Raises
    ------
    ValueError
        Inducing points differ, or rows have been weighed since the streams parted.
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
    memories = [state.memory for state in states]
    data = memories[0].data
    for memory in memories[1:]:
        data = _joined(data, memory.data)
    owner = torch.cat([torch.full((each.data.n_rows,), k) for k, each in enumerate(memories)]).to(data.X.device)
    inclusion = torch.cat([each.inclusion for each in memories])
    amounts = torch.cat([_amounts(each) for each in memories], -1)
    if common is not None:
        if options.forgetting != 1.0 or options.memory_weight != 1.0:
            raise ValueError("merge with a common start needs forgetting=1 and memory_weight=1; rows count otherwise.")
        extra = len(states) - 1
        total, n_seen = total - common.total.scale(float(extra)), n_seen - extra * common.n_seen
        data = _joined(data, common.memory.data)
        owner = torch.cat([owner, owner.new_full((common.memory.data.n_rows,), -1)])
        amounts = torch.cat([amounts, _amounts(common.memory)], -1)
    place, n_places = _equal_rows(data)
    positions = torch.arange(data.n_rows, device=place.device)
    if common is not None:
        # a row of the common start that several memories hold is one row: all but one of its copies go
        shared = torch.unique(torch.stack([place[owner >= 0], owner[owner >= 0]]), dim=1)[0]
        n_holders = torch.bincount(shared, minlength=n_places)
        copies = (n_holders - 1).clamp_min(0)[place[owner < 0]]
        amounts = torch.cat([amounts[..., owner >= 0], -copies * amounts[..., owner < 0]], -1)
    sums = amounts.new_zeros(*amounts.shape[:-1], n_places).index_add_(-1, place, amounts)
    mine = owner >= 0
    earliest = torch.full((n_places,), data.n_rows, device=place.device)
    earliest.scatter_reduce_(0, place[mine], positions[mine], "amin")
    kept, order = earliest[earliest < data.n_rows].sort()
    sums = sums[..., earliest < data.n_rows][..., order]
    weight, counted = (sums[k][(0,) * (sums.dim() - 2)] for k in (0, 1))
    memory = Memory(
        replace(data.rows(kept), weight=weight), Sites(sums[2], sums[3]), inclusion[kept], first.memory.share, counted
    )
    state = replace(first, total=total, memory=memory, n_seen=n_seen, n_batches=max(each.n_batches for each in states))
    state = replace(state, memory=replace(memory, share=_share_of(model, state, memory)))
    if options.memory is not None and len(kept) > options.memory:
        generator = torch.Generator()
        generator.set_state(state.random.cpu())
        counts = replace(memory.data, weight=counted)
        index, chance = _remember(model, posterior_of(model, state), counts, memory, n_seen, options, generator)
        own = Sites(memory.sites.linear[..., index], memory.sites.precision[..., index])
        memory = Memory(memory.data.rows(index), own, chance, memory.share, counted[index])
        state = replace(state, memory=memory, random=generator.get_state())
        state = replace(state, memory=replace(memory, share=_share_of(model, state, memory)))
        kept = kept[index]
    return _with_memory(model, state, state.total - state.memory.share, state.memory), kept


def _amounts(memory: Memory) -> Tensor:
    """Return what adds up where rows are the same: weight, counted weight and sites, (4, *b, M)."""
    linear, precision = torch.broadcast_tensors(memory.sites.linear, memory.sites.precision)
    return torch.stack(torch.broadcast_tensors(memory.data.weight, memory.counted, linear, precision))


def _equal_rows(data: Data) -> tuple[Tensor, int]:
    """Return the number of each row (n,) among the different ones, and how many these are; NaN equals NaN."""
    if data.n_rows == 0:
        return torch.zeros(0, dtype=torch.long, device=data.X.device), 0
    y = data.y.reshape(-1, data.n_rows)
    columns = [y.nan_to_num(0.0), y.isnan().to(y), *(each.reshape(-1, data.n_rows) for each in data.side.values())]
    _, place = torch.unique(torch.cat([data.X, torch.cat(columns).mT], -1), dim=0, return_inverse=True)
    return place, int(place.max()) + 1


def _share_of(model: Model, state: StreamState, memory: Memory) -> Past:
    """Return what the memory's rows account for at their present sites."""
    L, _ = inducing_factor(model.prior, state.Z, model.policy)
    if isinstance(state.total, GaussianStatistics):
        return gaussian_statistics(model, state.Z, L, replace(memory.data, weight=memory.counted))
    own = (memory.sites.linear, memory.sites.precision)
    return tied_from_white(L, *whitened_moments(model.prior.kernel, memory.data.X, state.Z, L, *own, model.policy))


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


def _unexplained(model: Model, state: StreamState) -> Unexplained | None:
    """Return how memory tells of the variance that inducing points leave of rows that are gone; None without it."""
    memory = state.memory
    if not isinstance(state.total, GaussianStatistics) or memory.data.n_rows == 0:
        return None
    return Unexplained.at(model, state.Z, memory.data.X, 1.0 / memory.inclusion.to(memory.data.X))


def _learn(
    model: Model,
    state: StreamState,
    rest: Past,
    rows: Data,
    batch: Data,
    sites: Sites,
    options: Stream,
    unexplained: Unexplained | None,
) -> tuple[int, int, list[str]]:
    """Climb a few iterations from the present hyperparameters; return iterations, evaluations and what to report."""
    memory = state.memory
    vector = ThetaVector(model) if state.n_seen == memory.data.n_rows else _Scales(model)
    if len(vector) == 0:
        return 0, 0, []
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
    if unexplained is not None:
        engine = replace(engine, unexplained=unexplained)
    inner = replace(model, engine=engine)
    plan = InducingPlan(data.X, state.Z, model.policy, rest=tied)
    settled = _SETTLED * batch.n_rows
    evidence = Evidence(inner, plan, data, settled=settled)
    evidence.sites, evidence.vector = None if model.likelihood.conjugate else sites, vector
    before = vector.read()
    try:
        learned = evidence.maximise(before, options.n_hyper_iter)
    except (NotPositiveDefiniteError, FloatingPointError) as failure:
        vector.write(before)
        return 0, evidence.n_evaluations, [f"hyperparameters were left as they were: {failure}"]
    finally:
        ThetaVector(model).zero_grad()
    vector.write(learned.theta)
    if learned.interrupted:
        raise KeyboardInterrupt
    return learned.n_iter, learned.n_evaluations, []


class _Scales(ThetaVector):
    """The hyperparameters that are learned while rows are gone: all but the locations of f, μ and thresholds in y.

    What such rows say is held as sites of g = f − μ. Were a location to follow the rows at hand, the process would move
    with it wherever those are that are gone, and nothing would object.
    """

    def __init__(self, model: Model):
        super().__init__(model)
        owners = [name.partition(".")[0] for name, _ in self.parts]
        scales = [h.log_scale for _, h in self.parts]
        kept = [o == "kernel" or (o == "likelihood" and s) for o, s in zip(owners, scales, strict=True)]
        sizes = [h.parameter.numel() for _, h in self.parts]
        self.parts = [part for part, stays in zip(self.parts, kept, strict=True) if stays]
        entries = np.repeat(np.array(kept, dtype=bool), sizes)
        self.names = [name for name, stays in zip(self.names, entries, strict=True) if stays]
        self.bounds, self.scale = self.bounds[entries], self.scale[entries]


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
    seen = ~batch.y.isnan()
    weight = batch.weight * seen
    score = float((weight * density.masked_fill(~seen, 0.0)).sum() / weight.sum())
    n, mean, squares = state.scores
    surprise = (mean - score) / _spread(state.scores, int(seen.sum())) if n >= _FEW_SCORES else 0.0
    if not np.isfinite(score):
        return score, surprise, state.scores, curvature
    step = score - mean
    mean += step / (n + 1)
    return score, surprise, (n + 1, mean, squares + step * (score - mean)), curvature


def _spread(scores: tuple[float, float, float], n_targets: int) -> float:
    """Return the standard deviation to expect of the next score, by those before and by chance.

    The log density of one target falls like ½ χ² of one degree of freedom at worst: the tail of a mean of so few of
    them is that of Bernstein's inequality, which here counts as four standard deviations.
    """
    n, _, squares = scores
    chance = (_CHANCE / n_targets) ** 0.5 + _CHANCE / n_targets
    return max((squares / (n - 1) * (1 + 1 / n)) ** 0.5, 0.25 * chance)


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
