"""A Gaussian process on a stream: what it keeps of all rows seen, and how a batch changes that.

One update adds inducing points where the batch is not explained, takes the memory's old share out of what is known,
learns hyperparameters, drops points again where there are too many, infers with batch and memory by their likelihood
given the rest, and chooses the next memory. Every row counts once: by its likelihood while it is in the batch or in
memory, by its frozen site afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mercer._typing import Data, Sites
from mercer.families.base import Confession
from mercer.families.inducing_plan import InducingPlan
from mercer.families.tied import Projection
from mercer.inference.base import latent_shape, run
from mercer.inference.streaming import gaussian_statistics
from mercer.linalg.cholesky import NotPositiveDefiniteError
from mercer.sequential.foretell import foretold
from mercer.sequential.learn import learn, unexplained_by
from mercer.sequential.options import Stream
from mercer.sequential.places import next_inducing
from mercer.sequential.remember import remember
from mercer.sequential.state import Memory, Past, StreamState, given, joined, one_noise, posterior_of, sites_of

if TYPE_CHECKING:
    from mercer.model import Model


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


def update(model: Model, state: StreamState, batch: Data, options: Stream, learning: bool = True) -> Update:
    """Take in one batch.

    Parameters
    ----------
    model : Model
        Its hyperparameters are changed in place if they are learned; its engine is a conjugate or a dual one.
    state : StreamState
        Left as it is.
    batch : Data
    options : Stream
    learning : bool
        Whether to learn hyperparameters.

    Raises
    ------
    NotPositiveDefiniteError
        A factorisation failed.
    """
    score, surprise, scores, curvature = foretold(model, state, batch)
    # hyperparameters that have not seen the batch may take it for new where it is not: until they have, inducing
    # points that are known well are not given up for it
    before, n_known = state.Z, len(state.Z)
    most = int(getattr(model.family, "n_inducing", options.n_inducing))
    how = {"curvature": curvature, "most": most, "known": n_known}
    Z, move, loss = _places(model, state.Z, state.total, batch.X, options, spare=most if learning else 0, **how)
    if move is not None:
        memory = replace(state.memory, share=state.memory.share.project(move))
        moved = state.moved or state.n_batches > 0
        state = replace(state, Z=Z, total=state.total.project(move), memory=memory, moved=moved)
    memory = state.memory
    rest = (state.total - memory.share).scale(options.forgetting)
    kept_weight = memory.data.weight * options.forgetting
    rows = joined(replace(memory.data, weight=kept_weight), batch)
    sites = Sites(*(_padded(each, batch.n_rows) for each in (memory.sites.linear, memory.sites.precision)))
    n_iter = n_evaluations = 0
    notes: list[str] = []
    # what points that were only added explain of past rows is not known
    added = torch.equal(state.Z[:n_known], before)
    unexplained = unexplained_by(model, state, before if added else state.Z)
    if learning:
        n_iter, n_evaluations, notes = learn(model, state, rest, rows, batch, sites, options, unexplained, before)
    if unexplained is not None:
        with torch.no_grad():
            rest = replace(rest, residual=unexplained.ratio(model) * rest.residual)
    if len(state.Z) > max(most, n_known):
        Z, move, more = _places(model, state.Z, rest, batch.X, options, **how)
        if move is not None:
            rest, loss = rest.project(move), loss + more
            state = replace(state, Z=Z, moved=state.moved or state.n_batches > 0)
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
    kept, inclusion = remember(model, posterior, counted, memory, n_seen, options, generator)
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
        state.Z, total, memory, n_seen, state.n_batches + 1, state.loss + loss, moved, generator.get_state(), scores
    )
    outcome = (inference.n_steps, n_iter, n_evaluations, inference.converged, score, surprise, posterior.confess())
    all_notes = (*notes, *inference.notes)
    return Update(after, posterior_of(model, after), kept, value, loss, *outcome, all_notes)


def _padded(values: Tensor, n: int) -> Tensor:
    return torch.cat([values, values.new_zeros(*values.shape[:-1], n)], -1)


@torch.no_grad()
def _places(
    model: Model, Z: Tensor, past: Past, X: Tensor, options: Stream, **how: Any
) -> tuple[Tensor, Projection | None, float]:
    """Return the inducing points that the rows X ask for, the way there if they move, and the nats that it loses."""
    if options.inducing == "fixed" and len(Z):
        return Z, None, 0.0
    tied, policy = sites_of(model, past), model.policy
    limits: dict[str, Any] = {"residual_tol": options.residual_tol, "loss_tol": options.loss_tol}
    chosen = next_inducing(model.prior, Z, X, tied, policy=policy, **limits, **how)
    if torch.equal(chosen, Z):
        return Z, None, 0.0
    move = Projection(model.prior, Z, chosen, policy)
    return chosen, move, float(tied.loss(move).sum())


def _share(model: Model, posterior: Any, data: Data, index: Tensor | None) -> Past:
    """Return what the rows ``index`` of the posterior's, or all, say of u."""
    if not one_noise(model, data):
        return posterior.tied(index)
    rows = data if index is None else data.rows(index)
    return gaussian_statistics(model, posterior.plan.Z, posterior.L.detach(), rows)
