"""How a batch looks before it is learned from, and whether that is a surprise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from mercer._typing import Data
from mercer.inference.base import latent_shape
from mercer.kernels.evaluate import diag
from mercer.sequential.state import StreamState, posterior_of

if TYPE_CHECKING:
    from mercer.model import Model

_FEW_SCORES = 5
_CHANCE = 9.2  # −log of how seldom a batch may be called surprising that is not


@torch.no_grad()
def foretold(model: Model, state: StreamState, batch: Data) -> tuple[float, float, tuple[float, float, float], float]:
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
