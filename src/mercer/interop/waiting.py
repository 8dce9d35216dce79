"""Rows that come one at a time, as dicts, until there are enough of them for a batch.

What a row holds, in which order of columns, and what becomes of features that are missing or new is decided here;
whose protocol it is, elsewhere.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np
import pandas as pd

Row = tuple[dict, Any, float]  # features, target and weight


class WaitingRows:
    """Turn rows into batches, with columns in one order."""

    estimator: Any
    batch_size: int
    strict: bool

    def _start(self) -> None:
        if not hasattr(self.estimator, "partial_fit"):
            raise TypeError(f"estimator must have partial_fit, got {type(self.estimator).__name__}.")
        if not isinstance(self.batch_size, int | np.integer) or self.batch_size < 1:
            raise ValueError(f"batch_size must be a positive integer, got {self.batch_size!r}.")
        self._model = copy.deepcopy(self.estimator)
        self._begun = hasattr(self._model, "posterior_")
        self._rows: list[Row] = []
        self._features: list[Hashable] | None = None
        self._sums: dict[Hashable, tuple[float, int]] = {}
        if self._begun:
            names = getattr(self._model, "feature_names_in_", None)
            if names is None:
                raise ValueError(
                    "estimator was fitted on columns without names; fit it on a data frame, or not at all."
                )
            self._features = names.tolist()
            known = self._model.memory_.X
            self._sums = {name: (float(column.sum()), len(column)) for name, column in zip(names, known.T, strict=True)}

    @property
    def model(self) -> Any:
        """The estimator that learns: a copy, ``estimator`` stays as it was given."""
        return self._model

    @property
    def n_waiting(self) -> int:
        """Rows that wait for their batch."""
        return len(self._rows)

    def flush(self) -> None:
        """Learn from the rows that wait; a classifier that was not told its classes waits for a second label."""
        if self._rows and self._ready(self._rows):
            rows, self._rows = self._rows, []
            try:
                self._learn(rows)
            except Exception:
                self._rows = rows
                raise
            self._begun = True

    def _ready(self, rows: list[Row]) -> bool:
        return True

    def _known(self) -> dict[str, Any]:
        """Return what ``partial_fit`` is told beside the rows."""
        return {}

    def _learn(self, rows: list[Row]) -> None:
        if self._features is None:
            # sorted, so that columns do not depend on the order in which the first dicts happen to be
            self._features = sorted({name for x, _, _ in rows for name in x}, key=str)
        X = self._table([x for x, _, _ in rows])
        y, weight = np.array([y for _, y, _ in rows]), np.array([w for _, _, w in rows])
        plain = {} if (weight == 1).all() else {"sample_weight": weight}
        self._model.partial_fit(X, y, **plain, **self._known())

    def _take(self, x: dict, y: Any, w: float) -> None:
        row = {name: value for name, value in x.items() if not _missing(value)}
        self._check(row, x)
        if not self.strict:
            for name, value in row.items():
                if self._features is not None and name not in self._features:
                    continue
                total, count = self._sums.get(name, (0.0, 0))
                self._sums[name] = (total + _number(name, value), count + 1)
        self._rows.append((row, y, float(w)))
        if len(self._rows) % self.batch_size == 0:
            self.flush()

    def _check(self, row: dict, x: dict) -> None:
        """Refuse a row with other features than those before, if that is asked for."""
        for name, value in row.items():
            _number(name, value)
        if not self.strict:
            return
        first: Iterable[Hashable] = self._rows[0][0] if self._rows else x
        known = set(first if self._features is None else self._features)
        lacking = sorted((name for name in known if name not in row), key=str)
        extra = [name for name in row if name not in known]
        if lacking or extra:
            which = f"lacks the feature {lacking[0]!r}" if lacking else f"has the new feature {extra[0]!r}"
            raise ValueError(
                f"x {which}. A Gaussian process has the same features in every row: put preprocessing.StatImputer in "
                "front, or set strict=False, which fills in means and leaves new features out."
            )

    def _table(self, rows: list[dict]) -> Any:
        """Return rows as columns in the order of the features; a data frame where they all have names."""
        assert self._features is not None
        means = {name: total / count for name, (total, count) in self._sums.items()}
        table = np.array([[float(x.get(name, means.get(name, 0.0))) for name in self._features] for x in rows])
        table = table.reshape(len(rows), len(self._features))
        named = all(isinstance(name, str) for name in self._features)
        return pd.DataFrame(table, columns=self._features) if named else table

    def _asked(self, x: dict) -> Any:
        row = {name: value for name, value in x.items() if not _missing(value)}
        self._check(row, x)
        return self._table([row])

    def _learn_many(self, X: pd.DataFrame, y: pd.Series) -> None:
        for x, target in zip(X.to_dict(orient="records"), y.tolist(), strict=True):
            self._take(x, target, 1.0)

    def _asked_many(self, X: pd.DataFrame) -> Any:
        rows = [{k: v for k, v in x.items() if not _missing(v)} for x in X.to_dict(orient="records")]
        for row in rows:
            self._check(row, row)
        return self._table(rows)


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float | np.floating) and bool(np.isnan(value)))


def _number(name: Hashable, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as failure:
        raise ValueError(
            f"feature {name!r} is {value!r}, which is no number; put preprocessing.OneHotEncoder in front, or drop it."
        ) from failure
