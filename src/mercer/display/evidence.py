"""How the evidence rose while hyperparameters were learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mercer.display._style import BLUE, GREY, VERMILLION, new_axes, tidy

SPAN = 25.0  # the view is widened to the start only while it is within so many times the last half's rise


@dataclass
class EvidenceTraceDisplay:
    """Show the evidence (or its bound) at every iteration of a fit.

    Parameters
    ----------
    trace : ndarray of shape (n_iterations,)
        Evidence in nats, in order.
    converged : bool or None
        What the fit said of itself; shown in the title.
    label : str
        What the values are.
    """

    trace: np.ndarray
    converged: bool | None = None
    label: str = "log marginal likelihood (nats)"

    @classmethod
    def from_estimator(cls, estimator: Any, *, ax: Any = None) -> EvidenceTraceDisplay:
        """Draw ``estimator.fit_report_.evidence_trace``.

        Parameters
        ----------
        estimator : fitted estimator
            Any estimator of this library.
        ax : matplotlib Axes, optional
            Where to draw.

        Returns
        -------
        EvidenceTraceDisplay
            Drawn.

        Raises
        ------
        ValueError
            The fit moved no hyperparameter (``optimizer=None``), so there is no trace.
        """
        report = estimator.fit_report_
        return cls.from_predictions(report.evidence_trace, converged=report.converged, ax=ax)

    @classmethod
    def from_predictions(cls, trace: Any, *, converged: bool | None = None, ax: Any = None) -> EvidenceTraceDisplay:
        """Draw a trace of evidences in nats; see :meth:`from_estimator`."""
        values = np.asarray(trace, dtype=float).reshape(-1)
        if not np.isfinite(values).any():
            raise ValueError("The evidence trace is empty: the fit moved no hyperparameter (optimizer=None?).")
        return cls(values, converged).plot(ax=ax)

    def plot(self, ax: Any = None) -> EvidenceTraceDisplay:
        """Draw the stored trace; ``ax`` is a matplotlib Axes or None for a new figure."""
        ax = new_axes(ax)
        steps = np.arange(1, len(self.trace) + 1)
        finite = np.where(np.isfinite(self.trace), self.trace, -np.inf)
        best = np.maximum.accumulate(finite)
        ax.plot(steps, self.trace, "o", color=GREY, markersize=4, label="iteration")
        ax.step(
            steps,
            np.where(np.isfinite(best), best, np.nan),
            where="post",
            color=BLUE,
            linewidth=1.8,
            label="best so far",
        )
        top = best[-1]
        ax.plot(steps[int(np.argmax(finite))], top, "*", color=VERMILLION, markersize=11, label=f"best: {top:.2f}")
        self._focus(ax, finite, top)
        state = {None: None, True: "converged", False: "not converged"}[self.converged]
        tidy(ax, xlabel="iteration", ylabel=self.label, title=state)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend(frameon=False, fontsize="small", loc="lower right")
        self.ax_, self.figure_ = ax, ax.figure
        return self

    def _focus(self, ax: Any, finite: np.ndarray, top: float) -> None:
        """Keep a wild first step from flattening everything after it."""
        usual = finite[np.isfinite(finite)]
        floor = np.quantile(usual, 0.25)
        rise = max(top - floor, 1e-9 * max(1.0, abs(top)))
        if top - usual.min() > SPAN * rise:
            ax.set_ylim(top - 4 * rise, top + 0.4 * rise)
