"""Test, then train: how well each batch of a stream was foretold."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from mercer.estimators._validation import to_numpy


@dataclass
class StreamScore:
    """What ``score_stream`` measured, a number per batch.

    Attributes
    ----------
    n_rows : list of int
    log_score : list of float
        Mean log predictive density of the batch before it was learned from, nats per target; NaN for the first.
    score : list of float
        What ``estimator.score`` says then (accuracy, R², D²); NaN for the first.
    seconds : list of float
        To learn from the batch.
    """

    n_rows: list[int] = field(default_factory=list)
    log_score: list[float] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def nlpd(self) -> float:
        """Negative log predictive density of all batches but the first, a mean over rows."""
        scores, weight = np.array(self.log_score), np.array(self.n_rows)
        seen = np.isfinite(scores)
        return float(-np.average(scores[seen], weights=weight[seen])) if seen.any() else float("nan")


def score_stream(
    estimator: Any, batches: Iterator[tuple[Any, ...]], n_batches: int | None = None, **known: Any
) -> StreamScore:
    """Score an estimator on each batch, then let it learn from it.

    Parameters
    ----------
    estimator : BaseGP
    batches : iterator of (X, y) or (X, y, dict)
        The dictionary holds values per row for ``partial_fit``.
    n_batches : int, optional
        For the progress bar.
    **known
        Passed on to ``partial_fit``.
    """
    found = StreamScore()
    for X, y, *rest in tqdm(batches, total=n_batches, desc=type(estimator).__name__, disable=not estimator.verbose):
        per_row = {**known, **(rest[0] if rest else {})}
        side = {name: per_row[name] for name in ("exposure", "noise_variance") if per_row.get(name) is not None}
        weight = per_row.get("sample_weight")
        density = score = float("nan")
        if hasattr(estimator, "posterior_"):
            density = _mean(to_numpy(estimator.log_predictive_density(X, y, **side)), weight)
            if len(X) > 1 and not _has_missing(y):
                exposure = {name: value for name, value in side.items() if name == "exposure"}
                score = float(estimator.score(X, y, weight, **exposure))
        began = time.perf_counter()
        estimator.partial_fit(X, y, **per_row)
        found.seconds.append(time.perf_counter() - began)
        found.n_rows.append(len(X))
        found.log_score.append(density)
        found.score.append(score)
    return found


def _mean(values: np.ndarray, weight: Any) -> float:
    """Return the weighted mean over rows of what is not NaN."""
    weights = np.broadcast_to(np.ones(1) if weight is None else to_numpy(weight), len(values))
    seen = ~np.isnan(values.T)
    weights = np.broadcast_to(weights, seen.shape)[seen]
    return float(np.average(values.T[seen], weights=weights)) if weights.sum() > 0 else float("nan")


def _has_missing(y: Any) -> bool:
    values = to_numpy(y)
    return values.dtype.kind == "f" and bool(np.isnan(values).any())
