"""How well a sequence of tasks was learned, and how much of it was kept: the matrix of scores and what is read off it.

Definitions of these words differ in the literature. Those here are named with their source, and counted from 1 in the
formulas as there: after k experiences, R[k, j] is the score on the test set of task j.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class ContinualScore:
    """Scores on all test sets after each experience.

    Parameters
    ----------
    matrix : (k, T)
        ``matrix[i, j]`` is the score on test j after experience i, both from 0; k ≤ T experiences so far. Accuracy, or
        any other score of which more is better.
    baseline : float or (T,), default=0.0
        Score on each test before anything was learned, for `forward_transfer`: chance for accuracy, 0 for R².
    log_score : (k, T) or None
        Mean log predictive density likewise, in nats per row.
    seconds : list of float
        To learn from each experience.
    names : list of str
        Of the tasks.

    Raises
    ------
    ValueError
        Shapes that do not fit.

    Examples
    --------
    >>> from mercer.interop.continual import ContinualScore
    >>> score = ContinualScore([[0.9, 0.5], [0.6, 0.8]], baseline=0.5)
    >>> [round(each, 3) for each in (score.average_accuracy(), score.forgetting(), score.backward_transfer())]
    [0.7, 0.3, -0.3]
    """

    matrix: Any
    baseline: Any = 0.0
    log_score: Any = None
    seconds: list[float] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.matrix = np.asarray(self.matrix, dtype=float)
        if self.matrix.ndim != 2 or not 1 <= len(self.matrix) <= self.matrix.shape[1]:
            raise ValueError(
                f"matrix must be (k, T) with 1 ≤ k ≤ T, a row per experience so far and a column per task; got "
                f"{self.matrix.shape}."
            )
        self.baseline = np.asarray(self.baseline, dtype=float)
        if self.baseline.shape not in ((), (self.n_tasks,)):
            raise ValueError(f"baseline must be a number or ({self.n_tasks},), got {self.baseline.shape}.")
        if self.log_score is not None:
            self.log_score = np.asarray(self.log_score, dtype=float)
            if self.log_score.shape != self.matrix.shape:
                raise ValueError(f"log_score must have the shape of matrix, got {self.log_score.shape}.")
        if self.names and len(self.names) != self.n_tasks:
            raise ValueError(f"names must be {self.n_tasks}, one per task, got {len(self.names)}.")

    @property
    def n_tasks(self) -> int:
        """T."""
        return self.matrix.shape[1]

    def _after(self, after: int | None) -> int:
        n_done = len(self.matrix)
        k = n_done if after is None else after
        if not 1 <= k <= n_done:
            raise ValueError(f"after must count experiences, from 1 to {n_done}, got {after!r}.")
        return k

    def average_accuracy(self, after: int | None = None) -> float:
        """Return the mean score on the tasks seen, A_k = 1/k Σ_{j ≤ k} R[k, j].

        Parameters
        ----------
        after : int, default=None
            Number k of experiences; None is all so far.

        Notes
        -----
        After all of them it is ACC of Lopez-Paz and Ranzato (2017); for every k it is A_k of Chaudhry et al. (2018).
        Each task counts the same, however many test rows it has.
        """
        k = self._after(after)
        return float(self.matrix[k - 1, :k].mean())

    def forgetting_by_task(self, after: int | None = None) -> np.ndarray:
        """Return f_j = max_{l < k} R[l, j] − R[k, j] for each task j < k, (k − 1,); see `forgetting`."""
        k = self._after(after)
        past, now = self.matrix[: k - 1, : k - 1], self.matrix[k - 1, : k - 1]
        return past.max(0) - now if k > 1 else now

    def forgetting(self, after: int | None = None) -> float:
        """Return F_k = 1/(k−1) Σ_{j < k} (max_{l < k} R[l, j] − R[k, j]): what was lost of the best there was.

        Parameters
        ----------
        after : int, default=None
            Number k of experiences; None is all so far.

        Returns
        -------
        float
            Negative if tasks are known better than ever; NaN for k = 1.

        Notes
        -----
        Chaudhry, Dokania, Ajanthan and Torr (2018). The maximum is over all experiences before the last, those before
        task j was taught included. Avalanche's "forgetting" compares with the score right after task j was taught,
        which is minus `backward_transfer`; the one here is never smaller than that.
        """
        lost = self.forgetting_by_task(after)
        return float(lost.mean()) if len(lost) else float("nan")

    def backward_transfer(self, after: int | None = None) -> float:
        """Return BWT = 1/(k−1) Σ_{j < k} (R[k, j] − R[j, j]): what later experiences did to earlier tasks.

        Parameters
        ----------
        after : int, default=None
            Number k of experiences; None is all so far.

        Returns
        -------
        float
            Negative where something was forgotten; NaN for k = 1.

        Notes
        -----
        Lopez-Paz and Ranzato (2017). Díaz-Rodríguez et al. (2018) average R[i, j] − R[j, j] over all i > j instead.
        """
        k = self._after(after)
        if k == 1:
            return float("nan")
        return float((self.matrix[k - 1, : k - 1] - self.matrix.diagonal()[: k - 1]).mean())

    def forward_transfer(self, after: int | None = None) -> float:
        """Return FWT = 1/(k−1) Σ_{1 < j ≤ k} (R[j−1, j] − b_j): what is known of a task before it is taught.

        Parameters
        ----------
        after : int, default=None
            Number k of experiences; None is all so far.

        Returns
        -------
        float
            NaN for k = 1. Where every experience brings new classes and one classifier serves them all, new classes are
            never predicted beforehand and this is −b, whatever the learner.

        Notes
        -----
        Lopez-Paz and Ranzato (2017), with b the ``baseline``. Díaz-Rodríguez et al. (2018) average R[i, j] over all
        i < j and take off nothing.
        """
        k = self._after(after)
        if k == 1:
            return float("nan")
        before = np.broadcast_to(self.baseline, self.n_tasks)[1:k]
        return float((self.matrix.diagonal(1)[: k - 1] - before).mean())

    def summary(self, after: int | None = None) -> dict[str, float]:
        """Return the four numbers by name, and the mean ``nlpd`` of the tasks seen where log scores are known."""
        names = ("average_accuracy", "forgetting", "backward_transfer", "forward_transfer")
        found = {name: getattr(self, name)(after) for name in names}
        if self.log_score is not None:
            k = self._after(after)
            found["nlpd"] = -float(self.log_score[k - 1, :k].mean())
        return found
