"""The next memory: score the rows at hand and let the policy choose."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mercer._typing import Data
from mercer.inference.base import latent_shape
from mercer.kernels.evaluate import gram
from mercer.sequential.memory import Candidates, get_policy
from mercer.sequential.options import Stream
from mercer.sequential.state import Memory

if TYPE_CHECKING:
    from mercer.model import Model


@torch.no_grad()
def remember(
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

    kernel, numerics = model.prior.kernel, model.policy
    crossed: list[Tensor] = []  # k(Z, rows), which few policies ask for

    def covariance(j: Tensor) -> Tensor:
        Z, weights = posterior.covariance_weights(data.X[j])
        if not crossed:
            crossed.append(gram(kernel, Z, data.X, policy=numerics))
        return gram(kernel, data.X[j], data.X, policy=numerics) - weights.mT @ crossed[0]

    candidates = Candidates(score, is_old, n_seen, labels, weight, inclusion, covariance, variance, beta)
    policy = get_policy(options.policy)
    if options.memory is None:
        new = candidates.take(torch.arange(n_old, data.n_rows, device=device))
        chosen = policy.select(new, min(options.memory_per_batch, len(new)), generator)
        index = torch.cat([torch.arange(n_old, device=device), n_old + chosen.index])
        return index, torch.cat([inclusion[:n_old], chosen.inclusion])
    chosen = policy.select(candidates, min(options.memory, len(candidates)), generator)
    return chosen.index, chosen.inclusion
