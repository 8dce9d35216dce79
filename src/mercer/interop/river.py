"""Estimators in river's terms: rows come one at a time, as dicts, and are learned from in batches.

A Gaussian process learns from a hundred rows in little more time than from one, so rows wait until there are
``batch_size`` of them. Predictions are those of the process as it was after the last batch.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pandas as pd

from mercer.interop.waiting import Row, WaitingRows

try:
    from river import base, proba
except ImportError as failure:
    raise ImportError("mercer.interop.river needs river: pip install 'mercer[streams]'.") from failure


class RiverRegressor(WaitingRows, base.MiniBatchRegressor):
    """A mercer regressor, of real targets or of counts, as a river regressor.

    Parameters
    ----------
    estimator : GPRegressor or GPCountRegressor
        Copied. If it is fitted, learning goes on from there. Its ``stream`` says what is kept of rows that went by.
    batch_size : int, default=100
        Rows that are learned from together. Predictions do not know the rows that still wait; `flush` makes them known.
    strict : bool, default=True
        Refuse rows with other features than the first ones. False replaces missing features (absent, None or NaN) by
        their means so far, and ignores those that the first batch did not have.

    Notes
    -----
    Before the first batch is full the mean of the targets so far is predicted, 0 if there are none. Columns are the
    features in the order of their names.

    Examples
    --------
    >>> from river import datasets, evaluate, metrics
    >>> from mercer import GPRegressor
    >>> from mercer.interop.river import RiverRegressor
    >>> model = RiverRegressor(GPRegressor("rbf"), batch_size=50)
    >>> score = evaluate.progressive_val_score(datasets.synth.Friedman(seed=0).take(200), model, metrics.R2())
    >>> bool(score.get() > 0.5)
    True
    """

    def __init__(self, estimator: Any, batch_size: int = 100, strict: bool = True) -> None:
        self.estimator = estimator
        self.batch_size = batch_size
        self.strict = strict
        self._start()

    def learn_one(self, x: dict, y: Any, w: float = 1.0) -> None:
        """Take in a row; the estimator learns when ``batch_size`` of them wait.

        Parameters
        ----------
        x : dict
            Numbers by the names of the features.
        y : float
        w : float, default=1.0
            Replication weight.

        Raises
        ------
        ValueError
            Features that are no numbers, or others than before.
        """
        self._take(x, y, w)

    def learn_many(self, X: pd.DataFrame, y: pd.Series) -> None:
        """Take in rows one after the other, as `learn_one` does."""
        self._learn_many(X, y)

    def predict_one(self, x: dict, with_dist: bool = False) -> Any:
        """Predict y.

        Parameters
        ----------
        x : dict
        with_dist : bool, default=False
            Return a Gaussian with the predictive mean and variance of y instead of the mean, as
            river's BayesianLinearRegression does.

        Returns
        -------
        float, or river.proba.Gaussian
        """
        if not self._begun:
            return self._guess() if with_dist else self._guess().mu
        X = self._asked(x)
        if not with_dist:
            return float(self._model.predict(X)[0])
        mean, std = self._model.predict(X, return_std=True)
        return proba.Gaussian._from_state(n=1, m=float(mean[0]), var=float(std[0]) ** 2, ddof=0)

    def predict_many(self, X: pd.DataFrame) -> pd.Series:
        """Predict y for all rows."""
        if not self._begun:
            return pd.Series(self._guess().mu, index=X.index, dtype=float)
        return pd.Series(self._model.predict(self._asked_many(X)), index=X.index)

    def _guess(self) -> Any:
        """Return the distribution of the targets that wait."""
        found = proba.Gaussian()
        for _, y, w in self._rows:
            found.update(y, w)
        return found


class RiverClassifier(WaitingRows, base.MiniBatchClassifier):
    """A mercer classifier as a river classifier.

    Parameters
    ----------
    estimator : GPClassifier
        As in `RiverRegressor`.
    batch_size : int, default=100
    classes : sequence, default=None
        All labels that will ever come. By default those of the first batch that has two at least; a label that comes
        later is then refused, since a Gaussian process that has begun cannot add classes.
    strict : bool, default=True
        As in `RiverRegressor`.

    Notes
    -----
    Before the first batch is full, probabilities are the shares of labels so far, each of ``classes`` counted once more
    than it came; without any label there are none, and None is predicted.

    Examples
    --------
    >>> from river import datasets, evaluate, metrics
    >>> from mercer import GPClassifier
    >>> from mercer.interop.river import RiverClassifier
    >>> model = RiverClassifier(GPClassifier("rbf"), batch_size=50, classes=[False, True])
    >>> score = evaluate.progressive_val_score(datasets.Phishing().take(200), model, metrics.Accuracy())
    >>> bool(score.get() > 0.7)
    True
    """

    def __init__(self, estimator: Any, batch_size: int = 100, classes: Any = None, strict: bool = True) -> None:
        self.estimator = estimator
        self.batch_size = batch_size
        self.classes = classes
        self.strict = strict
        self._start()

    @property
    def _multiclass(self) -> bool:
        return True

    def _labels(self) -> list | None:
        """Return all labels that may come, if that is settled."""
        settled = getattr(self._model, "classes_", self.classes)
        return None if settled is None else np.unique(np.array(settled)).tolist()

    def _known(self) -> dict[str, Any]:
        return {} if self.classes is None else {"classes": self._labels()}

    def _ready(self, rows: list[Row]) -> bool:
        return self._begun or self.classes is not None or len({y for _, y, _ in rows}) > 1

    def learn_one(self, x: dict, y: Any, w: float = 1.0) -> None:
        """Take in a row; the estimator learns when ``batch_size`` of them wait.

        Parameters
        ----------
        x : dict
            Numbers by the names of the features.
        y : label
        w : float, default=1.0
            Replication weight.

        Raises
        ------
        ValueError
            As in `RiverRegressor.learn_one`, or a label that was not announced.
        """
        labels = self._labels()
        if labels is not None and y not in labels:
            raise ValueError(f"y is the label {y!r}, which is not among {labels}; announce all labels with classes=.")
        self._take(x, y, w)

    def learn_many(self, X: pd.DataFrame, y: pd.Series) -> None:
        """Take in rows one after the other, as `learn_one` does."""
        for x, label in zip(X.to_dict(orient="records"), y.tolist(), strict=True):
            self.learn_one(x, label)

    def predict_proba_one(self, x: dict, **kwargs: Any) -> dict:
        """Return the probability of each label."""
        if not self._begun:
            return self._shares()
        p = self._model.predict_proba(self._asked(x))[0]
        return dict(zip(self._model.classes_.tolist(), p.tolist(), strict=True))

    def predict_proba_many(self, X: pd.DataFrame) -> pd.DataFrame:
        """Return the probability of each label, a column each, for all rows."""
        if not self._begun:
            shares = self._shares()
            return pd.DataFrame([shares] * len(X) if shares else None, index=X.index)
        p = self._model.predict_proba(self._asked_many(X))
        return pd.DataFrame(p, index=X.index, columns=self._model.classes_.tolist())

    def _shares(self) -> dict:
        """Return the shares of the labels that wait."""
        counts = Counter(self._labels() or [])
        counts.update(y.item() if isinstance(y, np.generic) else y for _, y, _ in self._rows)
        return {label: count / counts.total() for label, count in counts.items()}
