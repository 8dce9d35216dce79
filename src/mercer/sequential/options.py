"""How an estimator lives on a stream."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from mercer.sequential.memory import get_policy

OBJECTIVES = ("hybrid", "site", "memory_elbo")


@dataclass(frozen=True)
class Stream:
    """What ``partial_fit`` does with rows that it will not see again.

    Parameters
    ----------
    n_inducing : int, default=256
        Most inducing points; a family ``Inducing(n)`` says so itself.
    memory : int or None, default=200
        Rows that are kept as they are, in all. None keeps ``memory_per_batch`` of every batch for ever.
    memory_per_batch : int, default=0
        Rows kept of each batch where ``memory`` is None.
    policy : str or MemoryPolicy, default="bls_sample"
        Which rows: "bls_sample" (Bayesian leverage, drawn), "bls_top", "uniform", "class_balanced", an object of
        `mercer.sequential.memory`, or a callable like their ``select``.
    objective : {"hybrid", "site", "memory_elbo"}, default="hybrid"
        What hyperparameters are learned from: batch and memory by their likelihood and all other rows by their sites;
        the batch and the sites of all others; batch and memory alone, the latter for all rows seen.
    hyperparameters : {"auto", "frozen"}, default="auto"
        Whether they are learned on the way or stay as they are. Once rows are gone, locations (the prior mean, the
        first threshold of ordered classes) are held in any case: what such rows said is relative to them.
    n_hyper_iter : int, default=5
        Most L-BFGS-B iterations per batch.
    forgetting : float in (0, 1], default=1.0
        Factor on what is known, per batch: below one the process may drift, and 1/(1 − factor) batches count.
    memory_weight : float ≥ 1, default=1.0
        Weight of memory rows in every batch; above one they count more often than they came, which favours old tasks
        and makes the posterior over-confident.
    inducing : {"greedy", "fixed"}, default="greedy"
        Add inducing points where rows are not explained, or keep the first ones.
    residual_tol : float in (0, 1), default=0.01
        Share of the variance of the noise (or of one over the curvature of the log likelihood) from which on the prior
        variance of a row that inducing points leave counts as not explained.
    loss_tol : float, default=0.1
        Nats that may be lost in a batch when inducing points make room for others that save less than that.
    dense_rows : int, default=1000
        Up to so many rows ``family="auto"`` keeps them all and is exact. No stream begins before targets vary (or
        there are 1000 rows): of one value neither units nor hyperparameters can be told.

    References
    ----------
    Chang, Verma, John, Solin and Khan (2023), "Memory-based dual Gaussian processes for sequential learning".
    """

    n_inducing: int = 256
    memory: int | None = 200
    memory_per_batch: int = 0
    policy: Any = "bls_sample"
    objective: str = "hybrid"
    hyperparameters: str = "auto"
    n_hyper_iter: int = 5
    forgetting: float = 1.0
    memory_weight: float = 1.0
    inducing: str = "greedy"
    residual_tol: float = 0.01
    loss_tol: float = 0.1
    dense_rows: int = 1000

    def __post_init__(self) -> None:
        for name, least in (("n_inducing", 1), ("memory", 0), ("memory_per_batch", 0), ("n_hyper_iter", 1)):
            value = getattr(self, name)
            if not (isinstance(value, Integral) and int(value) >= least) and not (name == "memory" and value is None):
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")
        if not (isinstance(self.dense_rows, Integral) and self.dense_rows >= 0):
            raise ValueError(f"dense_rows must be an integer of at least 0, got {self.dense_rows!r}.")
        for name, allowed in (
            ("objective", OBJECTIVES),
            ("hyperparameters", ("auto", "frozen")),
            ("inducing", ("greedy", "fixed")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {list(allowed)}, got {getattr(self, name)!r}.")
        for name, low, high in (
            ("forgetting", 0.0, 1.0),
            ("memory_weight", 1.0, math.inf),
            ("residual_tol", 0.0, 1.0),
            ("loss_tol", 0.0, math.inf),
        ):
            value = getattr(self, name)
            fits = isinstance(value, Real) and low <= value <= high and math.isfinite(value)
            if not fits or (name == "forgetting" and value == 0):
                where = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
                raise ValueError(f"{name} must be a finite number {where}, got {value!r}.")
        if self.memory_per_batch and self.memory is not None:
            raise ValueError("memory_per_batch is for memory=None, which has no limit in all; set memory=None.")
        get_policy(self.policy)
