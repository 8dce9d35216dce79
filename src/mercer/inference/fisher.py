"""Fisher's information of Vecchia's likelihood: the curvature to expect, without one evaluation of the evidence.

For column u of the factor of K + noise, with w = uᵀ(y − μ) standard normal under the model, the expected curvature of
log u_ii − ½ w² is u̇_aᵀ K u̇_b + ∂_a log u_ii ∂_b log u_ii + uᵀμ̇_a uᵀμ̇_b.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mercer._typing import Data
from mercer.inference.theta import ThetaVector

if TYPE_CHECKING:
    from mercer.model import Model

_DIFFERENCE = 3e-3  # in θ; its fourth power is the error of the five-point rule
_RULE = ((1, 8.0 / 12.0), (-1, -8.0 / 12.0), (2, -1.0 / 12.0), (-2, 1.0 / 12.0))


@torch.no_grad()
def fisher_information(model: Model, plan: Any, data: Data) -> np.ndarray:
    """Return the expected information on θ at its present value, (k, k).

    Parameters
    ----------
    model : Model
        With a conjugate engine and a family that has ``response_columns``.
    plan : Plan
        Where it has ``rows``, those columns stand for all.
    data : Data

    Notes
    -----
    Derivatives of columns are differences, so that any kernel has them: 4 k evaluations of the columns.

    References
    ----------
    Guinness (2021), "Gaussian process learning via Fisher scoring of Vecchia's approximation", eq. 8.
    """
    vector = ThetaVector(model)
    theta = vector.read()
    total = torch.zeros(len(theta), len(theta), dtype=torch.float64)
    chunks = plan.chunks(plan.rows, max(1, data.y.shape[:-1].numel()))
    try:
        for chunk in chunks:
            slopes = [_slope(model, plan, data, vector, theta, a, chunk) for a in range(len(theta))]
            vector.write(theta)
            u, tiles, _, seen = _columns(model, plan, data, chunk)
            turned = torch.stack([column for column, _ in slopes])
            weight = seen * (data.y.shape[:-1].numel() / u.shape[:-2].numel())
            pushed = (tiles @ turned.unsqueeze(-1)).squeeze(-1) * weight.unsqueeze(-1)
            logs = turned[..., -1] / u[..., -1]
            means = torch.stack([(u * by_mean).sum(-1) for _, by_mean in slopes])
            flat = [each.expand_as(logs).flatten(1) for each in (logs, means)]
            total += (turned.flatten(1) @ pushed.flatten(1).mT).double().cpu()
            for each in flat:
                total += (each @ (each * weight.expand_as(logs[0]).flatten()).mT).double().cpu()
    finally:
        vector.write(theta)
    share = 1.0 if plan.rows is None else len(plan.X) / len(plan.rows)
    return share * total.numpy()


def _columns(model: Model, plan: Any, data: Data, chunk: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return columns, their tiles, the prior mean at their rows and which have a target."""
    engine: Any = model.engine
    posterior = model.family.condition(model.prior, plan, engine.sites(model, data))
    u, tiles = posterior.response_columns(chunk)
    index = plan.pattern.columns[chunk].clamp_min(0)
    mean = model.prior.mean_at(plan.X)[index]
    return u, tiles, mean, (posterior.sites.precision[..., plan.order[chunk]] > 0).to(u)


def _slope(
    model: Model, plan: Any, data: Data, vector: ThetaVector, theta: np.ndarray, a: int, chunk: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the derivatives in θ_a of columns and of the prior mean at their rows."""
    by_column = by_mean = plan.X.new_zeros(())
    for k, weight in _RULE:
        step = np.zeros_like(theta)
        step[a] = k * _DIFFERENCE
        vector.write(theta + step)
        u, _, mean, _ = _columns(model, plan, data, chunk)
        by_column, by_mean = by_column + weight / _DIFFERENCE * u, by_mean + weight / _DIFFERENCE * mean
    return by_column, by_mean
