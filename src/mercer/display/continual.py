"""Learning one thing after the other: what is kept of each task, and how a stream goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mercer.display._panels import MARKERS
from mercer.display._style import BLUE, GREY, INK, ORANGE, class_colour, draw_panels, tidy

MOST_NUMBERS = 12  # tasks up to which every cell of the heat map is told as a number, too


@dataclass
class ContinualDisplay:
    """Show how well each task is known after each experience.

    On the left a line for each task, dotted before its own experience, and the mean of the tasks seen so far; on the
    right the same numbers as a heat map. Above its stepped line are tasks that are still to come, below it is what
    remains of those that were taught.

    Parameters
    ----------
    matrix : ndarray of shape (k, T)
        ``matrix[i, j]`` is the score on task j after experience i.
    names : list of str
        Of the tasks.
    label : str
        What the score is.
    """

    matrix: np.ndarray
    names: list[str]
    label: str = "accuracy"

    @classmethod
    def from_matrix(
        cls, matrix: Any, names: Sequence[str] = (), *, label: str = "accuracy", kind: str = "both", ax: Any = None
    ) -> ContinualDisplay:
        """Draw a matrix of scores.

        Parameters
        ----------
        matrix : array-like of shape (k, T)
            A row per experience so far and a column per task.
        names : sequence of str, default=()
            Of the tasks; their numbers by default.
        label : str, default="accuracy"
            What the score is.
        kind, ax
            As in :meth:`plot`.

        Returns
        -------
        ContinualDisplay
            Drawn.

        Raises
        ------
        ValueError
            ``matrix`` is no matrix, or has more experiences than tasks.
        """
        values = np.asarray(matrix, dtype=float)
        if values.ndim != 2 or not 1 <= len(values) <= values.shape[1]:
            raise ValueError(f"matrix must be (k, T), k ≤ T experiences by T tasks, got shape {values.shape}.")
        labels = [str(name) for name in names] or [str(j + 1) for j in range(values.shape[1])]
        if len(labels) != values.shape[1]:
            raise ValueError(f"names must be {values.shape[1]}, one per task, got {len(labels)}.")
        return cls(values, labels, label).plot(ax=ax, kind=kind)

    @classmethod
    def from_score(cls, score: Any, *, label: str = "accuracy", kind: str = "both", ax: Any = None) -> ContinualDisplay:
        """Draw a `mercer.interop.continual.ContinualScore`; see :meth:`from_matrix`."""
        return cls.from_matrix(score.matrix, score.names, label=label, kind=kind, ax=ax)

    def plot(self, ax: Any = None, *, kind: str = "both") -> ContinualDisplay:
        """Draw the stored numbers.

        Parameters
        ----------
        ax : matplotlib Axes or pair of them, optional
            A pair for ``kind="both"``, one otherwise; a new figure by default.
        kind : {"both", "lines", "matrix"}
            Panels to draw.

        Returns
        -------
        ContinualDisplay
            Itself; ``ax_`` is the Axes, or the pair of them.
        """
        panels = {"both": [self._lines, self._matrix], "lines": [self._lines], "matrix": [self._matrix]}
        self.ax_ = draw_panels(panels, kind, ax)
        self.figure_ = np.atleast_1d(self.ax_)[0].figure
        return self

    def _lines(self, ax: Any) -> None:
        n_done, n_tasks = self.matrix.shape
        steps = np.arange(1, n_done + 1)
        for j, name in enumerate(self.names):
            style = {"color": class_colour(j), "marker": MARKERS[j % len(MARKERS)], "markersize": 5, "linewidth": 1.3}
            own = min(j, n_done)
            ax.plot(steps[own:], self.matrix[own:, j], label=name, **style)
            if own:
                before = slice(0, own + 1)
                ax.plot(steps[before], self.matrix[before, j], color=style["color"], linestyle=":", linewidth=1.0)
        mean = [self.matrix[i, : i + 1].mean() for i in range(n_done)]
        ax.plot(steps, mean, color=INK, linewidth=2.4, label="mean of those seen")
        tidy(ax, xlabel="experience", ylabel=self.label)
        ax.set_xticks(steps)
        ax.legend(title="task", frameon=False, fontsize="small", loc="best", ncols=1 + (n_tasks > 6))

    def _matrix(self, ax: Any) -> None:
        n_done, n_tasks = self.matrix.shape
        low, top = _range(self.matrix)
        image = ax.imshow(self.matrix, cmap="cividis", vmin=low, vmax=top, aspect="auto")
        ax.figure.colorbar(image, ax=ax, label=self.label)
        if n_tasks <= MOST_NUMBERS:
            for (i, j), value in np.ndenumerate(self.matrix):
                colour = "black" if np.isnan(value) or value > (low + top) / 2 else "white"
                text = "" if np.isnan(value) else f"{value:.2f}"
                ax.text(j, i, text, ha="center", va="center", color=colour, fontsize="small")
        # the corner of each cell on the diagonal
        corners = np.repeat(np.arange(n_done + 1), 2)[1:-1] - 0.5
        ax.plot(np.repeat(np.arange(1, n_done + 1), 2) - 0.5, corners, color=ORANGE, linewidth=2.0)
        tidy(ax, xlabel="task tested", ylabel="after experience", grid=False)
        ax.set_xticks(np.arange(n_tasks), self.names)
        ax.set_yticks(np.arange(n_done), [str(i + 1) for i in range(n_done)])
        ax.set(xlim=(-0.5, n_tasks - 0.5), ylim=(n_done - 0.5, -0.5))


@dataclass
class StreamDisplay:
    """Show a stream that was tested, then learned from, batch by batch.

    Parameters
    ----------
    log_score : ndarray of shape (n_batches,)
        Mean log predictive density of each batch before it was learned from, nats per row; NaN where there was none.
    seconds : ndarray of shape (n_batches,)
        To learn from each.
    n_rows : ndarray of shape (n_batches,)
        Rows of each.
    """

    log_score: np.ndarray
    seconds: np.ndarray
    n_rows: np.ndarray = field(default_factory=lambda: np.empty(0))

    @classmethod
    def from_score(cls, score: Any, *, kind: str = "both", ax: Any = None) -> StreamDisplay:
        """Draw what ``estimator.score_stream`` returned.

        Parameters
        ----------
        score : StreamScore
        kind, ax
            As in :meth:`plot`.

        Returns
        -------
        StreamDisplay
            Drawn.
        """
        return cls.from_predictions(score.log_score, score.seconds, score.n_rows, kind=kind, ax=ax)

    @classmethod
    def from_predictions(
        cls, log_score: Any, seconds: Any, n_rows: Any = None, *, kind: str = "both", ax: Any = None
    ) -> StreamDisplay:
        """Draw given log scores and seconds of batches; see :meth:`from_score`.

        Parameters
        ----------
        log_score, seconds : array-like of shape (n_batches,)
        n_rows : array-like of shape (n_batches,), optional
            Weights of the running mean; equal by default.
        kind, ax
            As in :meth:`plot`.

        Raises
        ------
        ValueError
            Unequal lengths, or nothing to draw.
        """
        log_score, seconds = (np.asarray(each, dtype=float).reshape(-1) for each in (log_score, seconds))
        rows = np.ones(len(seconds)) if n_rows is None else np.asarray(n_rows, dtype=float).reshape(-1)
        if not 0 < len(log_score) == len(seconds) == len(rows):
            lengths = f"{len(log_score)}, {len(seconds)} and {len(rows)}"
            raise ValueError(f"log_score, seconds and n_rows must have an entry for each batch, got {lengths}.")
        return cls(log_score, seconds, rows).plot(ax=ax, kind=kind)

    def plot(self, ax: Any = None, *, kind: str = "both") -> StreamDisplay:
        """Draw the stored numbers.

        Parameters
        ----------
        ax : matplotlib Axes or pair of them, optional
            A pair for ``kind="both"``, one otherwise; a new figure by default.
        kind : {"both", "score", "seconds"}
            Panels to draw.

        Returns
        -------
        StreamDisplay
            Itself; ``ax_`` is the Axes, or the pair of them.
        """
        panels = {"both": [self._score, self._seconds], "score": [self._score], "seconds": [self._seconds]}
        self.ax_ = draw_panels(panels, kind, ax)
        self.figure_ = np.atleast_1d(self.ax_)[0].figure
        return self

    def _score(self, ax: Any) -> None:
        steps = np.arange(1, len(self.log_score) + 1)
        seen = np.isfinite(self.log_score)
        weight = np.where(seen, self.n_rows, 0.0)
        total = np.cumsum(weight)
        running = np.cumsum(weight * np.where(seen, self.log_score, 0.0)) / np.where(total > 0, total, np.nan)
        ax.plot(steps, self.log_score, "o", color=GREY, markersize=4, label="batch, before it was learned")
        ax.plot(steps, running, color=BLUE, linewidth=1.8, label="mean so far")
        tidy(ax, xlabel="batch", ylabel="log score (nats per row)")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend(frameon=False, fontsize="small", loc="best")

    def _seconds(self, ax: Any) -> None:
        steps = np.arange(1, len(self.seconds) + 1)
        ax.bar(steps, self.seconds, color=BLUE, width=0.8)
        tidy(ax, xlabel="batch", ylabel="seconds to learn it")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(False, axis="x")


def _range(values: np.ndarray) -> tuple[float, float]:
    """Return the ends of the colour scale: those of shares where the values may be shares."""
    known = values[np.isfinite(values)]
    if len(known) == 0 or (known.min() >= 0 and known.max() <= 1):
        return 0.0, 1.0
    return float(known.min()), float(known.max())
