"""Continual learning in Avalanche's words: hooks around experiences, and a small strategy that needs nothing else.

Avalanche calls, on every one of a strategy's ``plugins`` that has them, ``before_training``, ``before_training_exp``,
``after_training_exp``, ``after_training`` and the same four of ``eval``, each with the strategy, whose ``experience``
is the current one. A Gaussian process has no epochs and no losses, and two of these are enough for it: `EstimatorHooks`
learns after an experience, and is scored after one that tests. It is a plugin for Avalanche as it is, beside a network
that Avalanche trains (Avalanche 0.6 looks for methods, not for types)::

    hooks = EstimatorHooks(GPClassifier(), classes=range(10))
    strategy = Naive(model, optimizer, criterion, plugins=[hooks])

and `ContinualStrategy` calls all eight on plugins of its own, so that what was written for one runs in the other.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from sklearn.base import is_classifier

from mercer.interop.continual_score import ContinualScore
from mercer.interop.experiences import Benchmark, Experience, arrays_of, class_incremental, permuted
from mercer.interop.replay import ReplayBuffer

__all__ = [
    "Benchmark",
    "ContinualScore",
    "ContinualStrategy",
    "EstimatorHooks",
    "Experience",
    "ReplayBuffer",
    "arrays_of",
    "class_incremental",
    "permuted",
]


class EstimatorHooks:
    """An estimator that learns from each experience by ``partial_fit`` and is scored on each that tests.

    Parameters
    ----------
    estimator : estimator with ``partial_fit`` and ``score``
        Changed in place. Any of scikit-learn's will do, for comparison.
    classes : array-like, default=None
        All labels that will ever come; a classifier needs them unless the first experience has them all.
    batch_size : int, default=None
        Rows of one ``partial_fit``; None gives it the whole experience at once.

    Attributes
    ----------
    estimator
    seconds : list of float
        To learn from each experience.
    """

    def __init__(self, estimator: Any, *, classes: Any = None, batch_size: int | None = None) -> None:
        if not hasattr(estimator, "partial_fit"):
            raise TypeError(f"estimator must have partial_fit, got {type(estimator).__name__}.")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, or None for whole experiences; got {batch_size}.")
        self.estimator = estimator
        self.classes = classes
        self.batch_size = batch_size
        self.seconds: list[float]
        self._scores: list[dict[int, tuple[float, float]]]
        self.clear()

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Learn from ``strategy.experience``."""
        X, y = arrays_of(strategy.experience)
        known = {} if self.classes is None else {"classes": np.asarray(list(self.classes))}
        size = len(X) if self.batch_size is None else self.batch_size
        began = time.perf_counter()
        for start in range(0, len(X), size):
            self.estimator.partial_fit(X[start : start + size], y[start : start + size], **known)
        self.seconds.append(time.perf_counter() - began)
        self._scores.append({})

    def after_eval_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Score ``strategy.experience``; nothing happens before the first experience was learned."""
        if not self._scores:
            return
        X, y = arrays_of(strategy.experience)
        density = float("nan")
        if hasattr(self.estimator, "log_predictive_density"):
            density = float(np.mean(np.asarray(self.estimator.log_predictive_density(X, y))))
        self._scores[-1][strategy.experience.current_experience] = (float(self.estimator.score(X, y)), density)

    def clear(self) -> None:
        """Drop all scores."""
        self.seconds, self._scores = [], []

    def score(self, n_tasks: int | None = None, names: Sequence[str] = ()) -> ContinualScore:
        """Return the matrix of all scores so far; NaN where an experience was not tested.

        Parameters
        ----------
        n_tasks : int, default=None
            T; by default one more than the highest number of an experience that was learned or tested.
        names : sequence of str, default=()
            Of the tasks.

        Returns
        -------
        ContinualScore
            Its ``baseline`` is the score of a random guess where classes are known, which is what the prior of a
            Gaussian process amounts to, and 0 (that of R²) elsewhere.

        Raises
        ------
        ValueError
            Nothing has been learned.
        """
        if not self._scores:
            raise ValueError("there are no scores yet: train on an experience first, then evaluate.")
        highest = max([len(self._scores) - 1, *(j for row in self._scores for j in row)])
        width = highest + 1 if n_tasks is None else n_tasks
        table = np.full((2, len(self._scores), width), np.nan)
        for i, row in enumerate(self._scores):
            for j, found in row.items():
                table[:, i, j] = found
        labels = getattr(self.estimator, "classes_", None) if is_classifier(self.estimator) else None
        baseline = 0.0 if labels is None else 1.0 / len(labels)
        log_score = None if np.isnan(table[1]).all() else table[1]
        return ContinualScore(table[0], baseline, log_score, list(self.seconds), list(names))


class ContinualStrategy:
    """Train an estimator on one experience after the other, and test it on all of them after each.

    Parameters
    ----------
    estimator : estimator with ``partial_fit`` and ``score``
        Changed in place.
    plugins : sequence of objects, default=()
        Each may have any of the methods ``before_training``, ``before_training_exp``, ``after_training_exp``,
        ``after_training``, ``before_eval``, ``before_eval_exp``, ``after_eval_exp`` and ``after_eval``. They are called
        with this strategy, in the order of the plugins. The estimator comes first: it has learned from an experience
        when others get ``after_training_exp``.
    classes, batch_size
        As in `EstimatorHooks`; `run` fills in the classes.

    Attributes
    ----------
    experience : Experience
        The current one.
    is_training : bool
    learner : EstimatorHooks
    plugins : list
        The learner, and those given.

    Examples
    --------
    >>> import numpy as np
    >>> from mercer import GPClassifier
    >>> from mercer.interop.continual import ContinualStrategy, class_incremental
    >>> X = np.random.default_rng(0).normal(size=(80, 2))
    >>> y = np.digitize(X[:, 0], [-0.7, 0.0, 0.7])
    >>> model = GPClassifier(optimizer=None)
    >>> score = ContinualStrategy(model).run(class_incremental(X, y, [[0, 1], [2, 3]]))
    >>> score.matrix.shape, bool(score.average_accuracy() > 0.7)
    ((2, 2), True)
    """

    def __init__(
        self, estimator: Any, *, plugins: Sequence[Any] = (), classes: Any = None, batch_size: int | None = None
    ) -> None:
        self.learner = EstimatorHooks(estimator, classes=classes, batch_size=batch_size)
        self.plugins = [self.learner, *plugins]
        self.experience: Any = None
        self.is_training = False

    @property
    def estimator(self) -> Any:
        """The estimator that learns."""
        return self.learner.estimator

    def train(self, experiences: Any) -> None:
        """Learn from an experience, or from several in their order."""
        self._go_through(experiences, "training")

    def eval(self, experiences: Any) -> None:
        """Score an experience, or several; `score` has the results."""
        self._go_through(experiences, "eval")

    def score(self) -> ContinualScore:
        """Return all scores so far; see `EstimatorHooks.score`."""
        return self.learner.score()

    def run(self, benchmark: Benchmark) -> ContinualScore:
        """Train on all experiences of a benchmark, and test on all of its test sets after each.

        Scores of before are dropped; what the estimator has learned stays.

        Parameters
        ----------
        benchmark : Benchmark

        Returns
        -------
        ContinualScore
        """
        if self.learner.classes is None and is_classifier(self.estimator):
            self.learner.classes = benchmark.classes
        self.learner.clear()
        for experience in benchmark.train_stream:
            self.train(experience)
            self.eval(benchmark.test_stream)
        return self.learner.score(len(benchmark), benchmark.names)

    def _go_through(self, experiences: Any, what: str) -> None:
        several: Iterable[Any] = experiences if isinstance(experiences, Iterable) else (experiences,)
        self.is_training = what == "training"
        self._call(f"before_{what}")
        for experience in several:
            self.experience = experience
            self._call(f"before_{what}_exp")
            self._call(f"after_{what}_exp")
        self._call(f"after_{what}")
        self.is_training = False

    def _call(self, event: str) -> None:
        for plugin in self.plugins:
            if hasattr(plugin, event):
                getattr(plugin, event)(self)
