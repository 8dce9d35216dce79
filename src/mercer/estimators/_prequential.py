"""Test, then train: how well each batch of a stream was foretold."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm.auto import tqdm


@dataclass
class StreamScore:
    """What ``score_stream`` measured, a number per batch.

    Attributes
    ----------
    n_rows : list of int
    log_score : list of float
        Mean log predictive density of the batch before it was learned from, nats per row; NaN for the first.
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
        """Negative log predictive density per row of all batches but the first."""
        scores, weight = np.array(self.log_score), np.array(self.n_rows)
        seen = np.isfinite(scores)
        return float(-np.average(scores[seen], weights=weight[seen])) if seen.any() else float("nan")


def score_stream(
    estimator: Any, batches: Iterator[tuple[Any, Any]], n_batches: int | None, **known: Any
) -> StreamScore:
    """Score an estimator on each batch, then let it learn from it.

    Parameters
    ----------
    estimator : BaseGP
    batches : iterator of (X, y)
    n_batches : int or None
        For the progress bar.
    **known
        Passed on to ``partial_fit``.
    """
    found = StreamScore()
    for X, y in tqdm(batches, total=n_batches, desc=type(estimator).__name__, disable=not estimator.verbose):
        density = score = float("nan")
        if hasattr(estimator, "posterior_"):
            density = float(np.nanmean(np.asarray(estimator.log_predictive_density(X, y))))
            score = float(estimator.score(X, y)) if len(X) > 1 and not _has_missing(y) else score
        began = time.perf_counter()
        estimator.partial_fit(X, y, **known)
        found.seconds.append(time.perf_counter() - began)
        found.n_rows.append(len(X))
        found.log_score.append(density)
        found.score.append(score)
    return found


def _has_missing(y: Any) -> bool:
    values = np.asarray(y)
    return values.dtype.kind == "f" and bool(np.isnan(values).any())
