"""Hyperparameters on a stream: a few iterations per batch, on one of three objectives."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mercer._typing import Data, Sites
from mercer.families.inducing_plan import InducingPlan
from mercer.families.tied import GaussianStatistics
from mercer.inference.evidence import Evidence
from mercer.inference.streaming import Unexplained
from mercer.inference.theta import ThetaVector
from mercer.kernels.evaluate import gram
from mercer.linalg.cholesky import NotPositiveDefiniteError
from mercer.sequential.options import Stream
from mercer.sequential.state import Past, StreamState, given

if TYPE_CHECKING:
    from mercer.model import Model

_SETTLED = 1e-3  # nats per row that an iteration for hyperparameters has to gain


def unexplained_by(model: Model, state: StreamState, Z: Tensor) -> Unexplained | None:
    """Return how memory tells of the variance that the points Z leave of rows that are gone; None without it."""
    memory = state.memory
    if not isinstance(state.total, GaussianStatistics) or memory.data.n_rows == 0:
        return None
    return Unexplained.at(model, Z, memory.data.X, 1.0 / memory.inclusion.to(memory.data.X))


def learn(
    model: Model,
    state: StreamState,
    rest: Past,
    rows: Data,
    batch: Data,
    sites: Sites,
    options: Stream,
    unexplained: Unexplained | None,
    Z_before: Tensor,
) -> tuple[int, int, list[str]]:
    """Climb a few iterations from the present hyperparameters; return iterations, evaluations and what to report.

    ``Z_before`` (m, d) are the inducing points before the batch came.
    """
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
    # the objective is as curved as that of all rows that count, not of those at hand
    count = float(state.n_seen + batch.n_rows)
    if options.forgetting < 1.0:
        count = min(count, batch.n_rows / (1.0 - options.forgetting))
    n_rows = np.where(_unknown(model, vector, torch.cat([Z_before, memory.data.X])), batch.n_rows, count)
    try:
        learned = evidence.maximise(before, options.n_hyper_iter, steps=vector.scale * n_rows**-0.5)
    except (NotPositiveDefiniteError, FloatingPointError) as failure:
        vector.write(before)
        return 0, evidence.n_evaluations, [f"hyperparameters were left as they were: {failure}"]
    finally:
        ThetaVector(model).zero_grad()
    vector.write(learned.theta)
    if learned.interrupted:
        raise KeyboardInterrupt
    return learned.n_iter, learned.n_evaluations, []


def _unknown(model: Model, vector: ThetaVector, X: Tensor) -> np.ndarray:
    """Say which hyperparameters rows like X (n, d) tell nothing of: lengthscales of columns that have not varied."""
    K = gram(model.prior.kernel, X[:1], X, policy=model.policy)  # one row tells, and memory may be long
    if K.requires_grad:
        K.sum().backward()
    of_kernel = np.array([name.startswith("kernel.") for name in vector.names])
    unknown = of_kernel & (vector.gradient() == 0.0)
    vector.zero_grad()
    return unknown


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
