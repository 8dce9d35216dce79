"""Samples without replacement, of a fixed size, in which every item has a probability that is known beforehand."""

from __future__ import annotations

import torch
from torch import Tensor


def inclusion_probabilities(size: Tensor, n_drawn: int) -> Tensor:
    """Return π_i = min(1, c size_i) with c such that they sum to ``n_drawn``.

    Parameters
    ----------
    size : (c,) tensor, ≥ 0
        Only ratios matter. Where fewer than ``n_drawn`` are positive, those are certain and the others equally likely.
    n_drawn : int
        At most c.

    Returns
    -------
    (c,) float64 tensor
    """
    if n_drawn == len(size):
        return torch.ones_like(size, dtype=torch.float64)
    ordered, order = size.double().sort(descending=True)
    tail = ordered.flip(0).cumsum(0).flip(0)
    # With the k largest certain, the others get (n_drawn − k) size / tail: the first k at which none exceeds 1.
    left = n_drawn - torch.arange(len(size), device=size.device)
    k = ((left * ordered <= tail).int()).argmax()
    rest = left[k] * torch.where(tail[k] > 0, ordered / tail[k], 1.0 / (len(size) - k))
    certain = torch.arange(len(size), device=size.device) < k
    return torch.empty_like(ordered).index_copy_(0, order, torch.where(certain, 1.0, rest.clamp_max(1.0)))


def draw(inclusion: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random set of fixed size in which i is with probability ``inclusion[i]``: systematic sampling.

    Parameters
    ----------
    inclusion : (c,) tensor
        Sums to an integer, the size of the set.
    generator : torch.Generator
        On any device; the set depends on its state alone.

    Returns
    -------
    (m,) int tensor, increasing

    References
    ----------
    Madow (1949), "On the theory of systematic sampling, II"; rows are laid out in random order, so that nearly all
    pairs can occur together.
    """
    home = generator.device
    order = torch.randperm(len(inclusion), generator=generator, device=home).to(inclusion.device)
    offset = torch.rand((), generator=generator, device=home, dtype=torch.float64).to(inclusion.device)
    # The rows lie one after another on a line, each π long; those that hold offset, offset + 1, … are in.
    ends = inclusion[order].cumsum(0)
    ends = torch.minimum(ends, ends[-1:].round())
    held = (torch.cat([ends.new_zeros(1), ends]) - offset).floor().diff() > 0
    return order[held].sort().values
