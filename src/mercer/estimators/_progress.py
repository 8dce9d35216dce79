"""The iterations of a fit, as scikit-learn's callbacks and a progress bar see them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm


class Progress:
    """Context manager whose ``step`` ends one task of the callbacks and begins the next.

    Parameters
    ----------
    estimator : BaseGP
        Being fitted to X and y.
    context : CallbackContext
        Of the whole fit.
    X, y
        As the user passed them.
    snapshot : callable
        Returns the attributes of the estimator as if fit had ended now; called only if a callback asks.

    Attributes
    ----------
    stopped : bool
        Whether a callback ended the fit.
    """

    def __init__(self, estimator: Any, context: Any, X: Any, y: Any, snapshot: Callable[[], dict[str, Any]]):
        self.estimator, self.context, self.snapshot = estimator, context, snapshot
        self.stopped = False
        self.task: Any = None
        self.rows = {"estimator": estimator, "X": X, "y": y}
        self.bar = tqdm(total=estimator.max_iter, desc=type(estimator).__name__, disable=not estimator.verbose)

    def __enter__(self) -> Progress:
        self._begin()
        return self

    def _begin(self) -> None:
        self.task = self.context.subcontext(task_name="iteration")
        self.task.call_on_fit_task_begin(**self.rows, reconstruction_attributes=self.snapshot)

    def step(self, iteration: int, value: float) -> None:
        """Report an iteration and its objective in nats; StopIteration where a callback asks to stop."""
        self.bar.update(1)
        self.bar.set_postfix(evidence=f"{value:.3f}")
        task, self.task = self.task, None
        self.stopped = task.call_on_fit_task_end(**self.rows, reconstruction_attributes=self.snapshot)
        self._begin()
        if self.stopped:
            raise StopIteration

    def __exit__(self, *failure: object) -> None:
        if self.task is not None:  # an iteration that never ran
            self.task.call_on_fit_task_end(estimator=self.estimator)
        self.bar.close()
