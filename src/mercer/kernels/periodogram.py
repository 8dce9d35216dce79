"""Which frequencies the places of data can tell apart, and the highest peak of their periodogram."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_OVERSAMPLING = 8
_MOST_HOLES = 64  # nodes of a grid per place that there is
_MOST_NODES = 1 << 20  # of a grid with holes: each costs a hundred bytes
_OFF_NODE = 1e-3  # steps


@dataclass(frozen=True)
class Samples:
    """Places in units of the length of the data, about their centre.

    Attributes
    ----------
    t : (n,)
        Sorted.
    highest : float
        The frequency, in cycles over the data, above which waves look like slower ones.
    node : (n,) or None
        Numbers of the places along a uniform grid of ``n_nodes``, of which some may be missing and some there more than
        once; None where there is no such grid.
    n_nodes : int
    """

    t: Tensor
    highest: float
    node: Tensor | None = None
    n_nodes: int = 0


def sampled(t: Tensor) -> Samples:
    """Return sorted places (n,), of which some differ, with what they can tell."""
    # places that differ by rounding are one: as two, they would promise frequencies that nothing can tell
    apart = t.diff() > _OFF_NODE * (t[-1] - t[0]) / (len(t) - 1)
    places = t[torch.cat([apart.new_ones(1), apart])]
    gaps = places.diff()
    most = max(len(places), min(_MOST_HOLES * len(places), _MOST_NODES))
    if float((places[-1] - places[0]) / gaps.min()) <= most:
        # gap by gap, because the smallest has an error that would add up
        steps = torch.cat([gaps.new_zeros(1), (gaps / gaps.min()).round().cumsum(0)])
        n_steps = float(steps[-1])
        if float(((places - places[0]) * n_steps - steps).abs().max()) <= _OFF_NODE:
            return Samples(t, n_steps / 2, ((t - t[0]) * n_steps).round().long(), int(n_steps) + 1)
    return Samples(t, (len(places) - 1) / 2)


def peak(samples: Samples, values: Tensor) -> float:
    """Return the frequency of the highest peak of the Hann periodogram of values (n, m), in cycles over the data."""
    t = samples.t
    windowed = values * (math.pi * t).cos().square().unsqueeze(1)
    if samples.node is not None:
        size = _OVERSAMPLING * samples.n_nodes
        nodes = windowed.new_zeros(samples.n_nodes, windowed.shape[1]).index_add_(0, samples.node, windowed)
        power = torch.fft.rfft(nodes, size, dim=0).abs().square().sum(1)
        grid = torch.arange(len(power), device=t.device) * (samples.n_nodes - 1) / size
    else:
        grid = torch.arange(int(_OVERSAMPLING * samples.highest) + 1, device=t.device).to(t) / _OVERSAMPLING
        rows = max(1, (1 << 22) // len(t))
        power = torch.cat([_power(part, t, windowed) for part in grid.split(rows)])
    return float(grid[1:][power[1:].argmax()])


def _power(grid: Tensor, t: Tensor, windowed: Tensor) -> Tensor:
    angle = 2 * math.pi * grid[:, None] * t
    return ((angle.cos() @ windowed).square() + (angle.sin() @ windowed).square()).sum(1)
