"""Sums of what rows say: without some rows, and of several streams together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mercer._typing import Data, Sites
from mercer.families.inducing_plan import InducingPlan
from mercer.families.tied import inducing_factor
from mercer.inference.base import run
from mercer.inference.streaming import gaussian_statistics
from mercer.sequential.options import Stream
from mercer.sequential.remember import remember
from mercer.sequential.state import Memory, Past, StreamState, joined, posterior_of, share_of, sites_of

if TYPE_CHECKING:
    from mercer.model import Model


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
        data = joined(data, memory.data)
    owner = torch.cat([torch.full((each.data.n_rows,), k) for k, each in enumerate(memories)]).to(data.X.device)
    inclusion = torch.cat([each.inclusion for each in memories])
    amounts = torch.cat([_amounts(each) for each in memories], -1)
    if common is not None:
        if options.forgetting != 1.0 or options.memory_weight != 1.0:
            raise ValueError("merge with a common start needs forgetting=1 and memory_weight=1; rows count otherwise.")
        extra = len(states) - 1
        total, n_seen = total - common.total.scale(float(extra)), n_seen - extra * common.n_seen
        data = joined(data, common.memory.data)
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
    state = replace(state, memory=replace(memory, share=share_of(model, state, memory)))
    if options.memory is not None and len(kept) > options.memory:
        generator = torch.Generator()
        generator.set_state(state.random.cpu())
        counts = replace(memory.data, weight=counted)
        index, chance = remember(model, posterior_of(model, state), counts, memory, n_seen, options, generator)
        own = Sites(memory.sites.linear[..., index], memory.sites.precision[..., index])
        memory = Memory(memory.data.rows(index), own, chance, memory.share, counted[index])
        state = replace(state, memory=memory, random=generator.get_state())
        state = replace(state, memory=replace(memory, share=share_of(model, state, memory)))
        kept = kept[index]
    return _with_memory(model, state, state.total - state.memory.share, state.memory), kept


def _with_memory(model: Model, state: StreamState, rest: Past, memory: Memory) -> StreamState:
    """Return the state whose total is ``rest`` and the rows of ``memory``, whose sites are found anew given it."""
    data = replace(memory.data, weight=memory.counted)
    sites = memory.sites
    if not model.likelihood.conjugate:
        plan = InducingPlan(data.X, state.Z, model.policy, rest=rest)
        sites = run(model, plan, data, sites).state.sites
    memory = replace(memory, sites=sites)
    share = share_of(model, state, memory)
    return replace(state, total=rest + share, memory=replace(memory, share=share))


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
