"""How far a solution is from one that is known, and from the equation itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.utils.validation import check_is_fitted

from mercer.display._domain import Window, domain_slice, values_at
from mercer.display._maps import coordinates_of, draw_map, log_axis, on_axes, predicted, quantity
from mercer.display._style import GREY, INK, VERMILLION, draw_panels, tidy

_SCATTERED = 2000  # points of the figures in the title: between those of a grid, waves can hide


@dataclass
class ErrorDisplay:
    """Compare a solution with one that is known.

    Along one axis, |error| and two standard deviations on a logarithmic scale; over two, a map of the error, outlined
    where it exceeds two standard deviations. The title tells the relative error and the share of points within.

    Parameters
    ----------
    axes, names, std, label, note
        As in :class:`SolutionDisplay`.
    error : ndarray
        Mean minus exact, like ``std``.
    exact : ndarray
        The known solution.
    relative_error : float
        ‖error‖ / ‖exact‖; over the points shown by default, and over scattered ones of the whole window in
        `from_estimator`.
    coverage : float or None
        Share of the same points with |error| ≤ 2 sd; None without a standard deviation.
    """

    axes: tuple[np.ndarray, ...]
    names: tuple[str, ...]
    error: np.ndarray
    exact: np.ndarray
    std: np.ndarray | None = None
    label: str = "u"
    note: str | None = None
    relative_error: float = math.nan
    coverage: float | None = None

    def __post_init__(self) -> None:
        if math.isnan(self.relative_error):
            self.relative_error, self.coverage = _figures(self.error, self.exact, self.std)

    @classmethod
    def from_estimator(
        cls,
        solver: Any,
        exact: Callable[..., Any] | float,
        *,
        derivative: str = "",
        field: str | None = None,
        window: Window | None = None,
        resolution: int | None = None,
        ax: Any = None,
    ) -> ErrorDisplay:
        """Predict, compare and draw; see :meth:`SolutionDisplay.from_estimator` for the parameters.

        With ``derivative``, ``exact`` must be that derivative of the known solution.
        """
        part = domain_slice(solver, window, resolution)
        X = part.X
        mean, std = predicted(solver, X, derivative, field)
        truth = values_at(solver, exact, X)
        Z = part.scattered(_SCATTERED)
        mean_there, std_there = predicted(solver, Z, derivative, field)
        truth_there = values_at(solver, exact, Z)
        error, truth = (mean - truth).reshape(part.shape), truth.reshape(part.shape)
        std = None if std is None else std.reshape(part.shape)
        figures = _figures(mean_there - truth_there, truth_there, std_there)
        label = quantity(solver, derivative, field)
        return cls(part.axes, part.names, error, truth, std, label, part.note, *figures).plot(ax=ax)

    @classmethod
    def from_predictions(
        cls, axes: Any, mean: Any, exact: Any, std: Any = None, *, names: Any = ("x", "t"), ax: Any = None
    ) -> ErrorDisplay:
        """Draw given numbers; shapes are those of :meth:`SolutionDisplay.from_predictions`."""
        coordinates = coordinates_of(axes)
        truth = on_axes(coordinates, exact, "exact")
        error = on_axes(coordinates, mean, "mean") - truth
        std = None if std is None else on_axes(coordinates, std, "std")
        return cls(coordinates, tuple(names)[: len(coordinates)], error, truth, std).plot(ax=ax)

    def plot(self, ax: Any = None) -> ErrorDisplay:
        """Draw the stored numbers; ``ax`` is a matplotlib Axes or None for a new figure."""
        self.ax_ = draw_panels({"error": [self._curve if len(self.axes) == 1 else self._plane]}, "error", ax)
        self.figure_ = self.ax_.figure
        return self

    def _title(self) -> str:
        parts = [f"relative error {self.relative_error:.1e}"]
        if self.coverage is not None:
            parts.append(f"{100 * self.coverage:.3g} % within 2 sd")
        return ", ".join([*parts, self.note] if self.note else parts)

    def _curve(self, ax: Any) -> None:
        (x,) = self.axes
        size = np.abs(self.error)
        if self.std is not None:
            ax.plot(x, 2 * self.std, color=GREY, linewidth=1.6, linestyle="--", label="2 sd")
        ax.plot(x, size, color=VERMILLION, linewidth=1.0, label="|error|")
        # an error far below the standard deviation is what a reader looks for, too
        log_axis(ax, size if self.std is None else np.maximum(2 * self.std, size), float(np.median(size)))
        tidy(ax, xlabel=self.names[0], ylabel=f"error of {self.label}", title=self._title())
        ax.legend(frameon=False, fontsize="small", loc="best")

    def _plane(self, ax: Any) -> None:
        label = f"error of {self.label}"
        draw_map(ax, self.axes, self.names, self.error, label=label, title=self._title(), scale="signed")
        if self.std is not None:
            excess = np.abs(self.error) - 2 * self.std
            if excess.min() < 0 < excess.max():
                ax.contour(*self.axes, excess, levels=[0.0], colors=INK, linewidths=0.7)


def _figures(error: np.ndarray, exact: np.ndarray, std: np.ndarray | None) -> tuple[float, float | None]:
    """Return the relative error, and the share within two standard deviations."""
    relative = float(np.linalg.norm(error)) / max(float(np.linalg.norm(exact)), 1e-300)
    # where nothing is left unknown both are zero, which counts as within
    return relative, None if std is None else float(np.mean(np.abs(error) <= 2 * std))


@dataclass
class ResidualDisplay:
    """Show N[u] − f where the equation was not asked for, at the centres between its nodes.

    It is the one figure that sees aliasing and needs no known solution. Its root mean square over what is shown is in
    the title; that in ``fit_report_`` is relative to the size of the equation's terms.

    Parameters
    ----------
    axes, names, note
        As in :class:`SolutionDisplay`.
    residual : ndarray of shape (m,) or (m2, m1)
        In units of f.
    """

    axes: tuple[np.ndarray, ...]
    names: tuple[str, ...]
    residual: np.ndarray
    note: str | None = None

    @property
    def rms(self) -> float:
        """Root mean square of what is shown, in units of f."""
        return float(np.sqrt(np.mean(self.residual**2)))

    @classmethod
    def from_estimator(
        cls,
        solver: Any,
        *,
        equation: int = 0,
        window: Window | None = None,
        resolution: int | None = None,
        ax: Any = None,
    ) -> ResidualDisplay:
        """Evaluate the residual of the posterior mean at shifted nodes and draw it.

        Parameters
        ----------
        solver : fitted GPPDESolver
        equation : int
            Which one of a system.
        window : mapping, optional
            As in :meth:`SolutionDisplay.from_estimator`.
        resolution : int, optional
            Most shifted nodes along each shown axis; 4001 on a line and 201 over a plane by default.
        ax : matplotlib Axes, optional
            Where to draw.

        Raises
        ------
        NotFittedError
            The solver is not fitted.
        ValueError
            No such equation, or a window without shifted nodes.
        """
        check_is_fitted(solver, "posterior_")
        n = solver.pde_.n_equations
        if not 0 <= equation < n:
            raise ValueError(f"equation must be 0 to {n - 1}, got {equation}.")
        part = domain_slice(solver, window, resolution, shifted=True)
        residual = np.asarray(solver.residual(part.X)).reshape(n, *part.shape)[equation]
        return cls(part.axes, part.names, residual, part.note).plot(ax=ax)

    @classmethod
    def from_predictions(cls, axes: Any, residual: Any, *, names: Any = ("x", "t"), ax: Any = None) -> ResidualDisplay:
        """Draw given numbers; shapes are those of :meth:`SolutionDisplay.from_predictions`."""
        coordinates = coordinates_of(axes)
        values = on_axes(coordinates, residual, "residual")
        return cls(coordinates, tuple(names)[: len(coordinates)], values).plot(ax=ax)

    def plot(self, ax: Any = None) -> ResidualDisplay:
        """Draw the stored numbers; ``ax`` is a matplotlib Axes or None for a new figure."""
        self.ax_ = draw_panels({"residual": [self._draw]}, "residual", ax)
        self.figure_ = self.ax_.figure
        return self

    def _draw(self, ax: Any) -> None:
        label, title = "N[u] − f at shifted nodes", f"root mean square {self.rms:.1e}"
        title = f"{title}, {self.note}" if self.note else title
        if len(self.axes) == 2:
            draw_map(ax, self.axes, self.names, self.residual, label=label, title=title, scale="signed")
            return
        ax.axhline(0.0, color=GREY, linewidth=0.8)
        ax.plot(self.axes[0], self.residual, color=VERMILLION, linewidth=1.0)
        tidy(ax, xlabel=self.names[0], ylabel=label, title=title)
