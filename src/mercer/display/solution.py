"""The solution of a differential equation, and what is not known of it.

One axis is drawn as curves, two as maps; of a domain with more, a plane is shown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mercer.display._domain import Slice, Window, domain_slice, values_at
from mercer.display._maps import coordinates_of, draw_map, log_axis, on_axes, predicted, quantity
from mercer.display._style import BLUE, INK, ORANGE, draw_panels, tidy
from mercer.estimators._pde_inputs import check_points, readings
from mercer.estimators._validation import to_numpy
from mercer.pde.conditions import field_number


@dataclass
class SolutionDisplay:
    """Show a solution with what is not known of it.

    Along one axis: the mean, a band of two standard deviations, and that deviation itself on a logarithmic scale,
    because a band of 1e-9 cannot be seen. Over two axes: a map of each.

    Parameters
    ----------
    axes : tuple of ndarray
        Coordinates along each shown axis.
    names : tuple of str
        Of the axes.
    mean : ndarray of shape (m,) or (m2, m1)
        The second axis comes first, as in an image.
    std : ndarray or None
        Like ``mean``; None for methods that have no posterior.
    exact : ndarray or None
        A known solution, drawn along one axis.
    samples : ndarray of shape (m, n_samples) or None
        Draws along one axis.
    X, y : ndarray or None
        Observations, (n, 1) or (n, 2) and (n,).
    label : str
        What is shown, such as "u" or "∂xx u".
    note : str or None
        Title.
    """

    axes: tuple[np.ndarray, ...]
    names: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray | None = None
    exact: np.ndarray | None = None
    samples: np.ndarray | None = None
    X: np.ndarray | None = None
    y: np.ndarray | None = None
    label: str = "u"
    note: str | None = None

    @classmethod
    def from_estimator(
        cls,
        solver: Any,
        exact: Callable[..., Any] | float | None = None,
        *,
        observations: Any = None,
        derivative: str = "",
        field: str | None = None,
        window: Window | None = None,
        resolution: int | None = None,
        n_samples: int = 0,
        random_state: Any = 0,
        kind: str | None = None,
        ax: Any = None,
    ) -> SolutionDisplay:
        """Predict along a line or over a plane of the domain, and draw it.

        Parameters
        ----------
        solver : fitted GPPDESolver
        exact : callable or float, optional
            What is known of the quantity shown, of all coordinates in the order of the axes: the solution, or with
            ``derivative`` that derivative of it.
        observations : (X, y), (X, y, noise), Sensors or a sequence of these, optional
            Readings to add, as in ``solver.fit``; those of another derivative or field than the shown one are left
            out. Over a plane their colours are those of the map, and where axes are held they are projections.
        derivative, field : str, optional
            As in ``solver.predict``.
        window : mapping of axis to (low, high) or to a number, optional
            An interval to zoom into, or a place where the axis is held: ``{"x": (0, 0.1), "t": 0.5}``. The first two
            axes that are not held are shown, others are held at their middle.
        resolution : int, optional
            Points along each shown axis; None takes ten per shortest wave, at most 4001 on a line and 201 × 201. Where
            that is fewer than four per wave, the lower part of an axis is shown, with a warning.
        n_samples : int
            Draws to add to a line.
        random_state : int or RandomState
            Of the draws.
        kind, ax
            As in :meth:`plot`.

        Returns
        -------
        SolutionDisplay
            Drawn.

        Raises
        ------
        NotFittedError
            The solver is not fitted.
        ValueError
            A window off the domain, or draws over a plane.
        """
        part = domain_slice(solver, window, resolution)
        X = part.X
        mean, std = predicted(solver, X, derivative, field)
        samples = None
        if n_samples:
            if len(part.axes) == 2:
                raise ValueError("draws can be shown along one axis only; hold the other one by window.")
            options = {"derivative": derivative, "field": field}
            samples = np.asarray(solver.sample(X, n_samples, random_state, **options))
        places, y = (None, None) if observations is None else _read(solver, observations, part, derivative, field)
        display = cls(
            part.axes,
            part.names,
            mean.reshape(part.shape),
            None if std is None else std.reshape(part.shape),
            None if exact is None else values_at(solver, exact, X).reshape(part.shape),
            samples,
            places,
            y,
            quantity(solver, derivative, field),
            part.note,
        )
        return display.plot(ax=ax, kind=kind)

    @classmethod
    def from_predictions(
        cls, axes: Any, mean: Any, std: Any = None, *, names: Any = ("x", "t"), kind: str | None = None, ax: Any = None
    ) -> SolutionDisplay:
        """Draw given numbers.

        Parameters
        ----------
        axes : array-like of shape (m,), or a tuple or list of two
            Coordinates along one or two axes.
        mean, std : array-like of shape (m,) or (m2, m1)
            Over two axes, the second comes first, as in an image.
        names : sequence of str
            Of the axes.
        kind, ax
            As in :meth:`plot`.

        Raises
        ------
        ValueError
            Shapes that do not agree.
        """
        coordinates = coordinates_of(axes)
        mean = on_axes(coordinates, mean, "mean")
        std = None if std is None else on_axes(coordinates, std, "std")
        return cls(coordinates, tuple(names)[: len(coordinates)], mean, std).plot(ax=ax, kind=kind)

    def plot(self, ax: Any = None, *, kind: str | None = None) -> SolutionDisplay:
        """Draw the stored numbers.

        Parameters
        ----------
        ax : matplotlib Axes or pair of them, optional
            A pair for ``kind="both"``, one otherwise; a new figure by default.
        kind : {"both", "solution", "std"}, optional
            Panels to draw; None draws both where there is a standard deviation.

        Returns
        -------
        SolutionDisplay
            Itself; ``ax_`` is the Axes, or the pair of them.
        """
        if self.std is None and kind in ("both", "std"):
            raise ValueError(f"kind={kind!r} needs a standard deviation, and this method has none.")
        kind = kind or ("solution" if self.std is None else "both")
        panels = {"both": [self._solution, self._deviation], "solution": [self._solution], "std": [self._deviation]}
        self.ax_ = draw_panels(panels, kind, ax)
        self.figure_ = np.atleast_1d(self.ax_)[0].figure
        return self

    def _solution(self, ax: Any) -> None:
        if len(self.axes) == 2:
            mesh = draw_map(ax, self.axes, self.names, self.mean, label=self.label, title=self.note)
            if self.X is not None:
                style = {"s": 22, "edgecolors": "white", "linewidths": 0.9, "label": "sensors"}
                ax.scatter(*self.X.T, c=self.y, norm=mesh.norm, cmap=mesh.cmap, **style)
                legend = ax.legend(frameon=False, fontsize="small", loc="lower right", bbox_to_anchor=(1.0, 1.0))
                legend.legend_handles[0].set(array=None, facecolor=INK)  # no one reading's colour
            return
        (x,) = self.axes
        if self.std is not None:
            band = {"color": BLUE, "alpha": 0.25, "linewidth": 0}
            ax.fill_between(x, self.mean - 2 * self.std, self.mean + 2 * self.std, label="2 sd", **band)
        if self.samples is not None:
            lines = ax.plot(x, self.samples, color=ORANGE, linewidth=0.7, alpha=0.8)
            lines[0].set_label(f"{len(lines)} draw{'s' * (len(lines) > 1)}")
        ax.plot(x, self.mean, color=BLUE, linewidth=1.6, label="mean")
        if self.exact is not None:
            ax.plot(x, self.exact, color=INK, linewidth=1.0, linestyle="--", label="exact")
        if self.X is not None:
            ax.plot(self.X[:, 0], self.y, "o", color=INK, markersize=3.5, label="sensors")
        tidy(ax, xlabel=self.names[0], ylabel=self.label, title=self.note)
        # above the axes: fast waves leave no room among them
        ax.legend(frameon=False, fontsize="small", loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=5)

    def _deviation(self, ax: Any) -> None:
        label = f"sd of {self.label}"
        assert self.std is not None
        if len(self.axes) == 2:
            draw_map(ax, self.axes, self.names, self.std, label=label, title=self.note, scale="log")
            return
        ax.plot(self.axes[0], self.std, color=BLUE, linewidth=1.6)
        log_axis(ax, self.std)
        tidy(ax, xlabel=self.names[0], ylabel=label, title=self.note)


def _read(
    solver: Any, observations: Any, part: Slice, derivative: str, field: str | None
) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    """Return where on the shown axes the shown quantity was read, and the readings; None where it never was."""
    pde = solver.pde_
    wanted = (pde.domain.order(derivative), 0 if field is None else field_number(field, pde.fields))
    columns = [pde.domain.column(name) for name in part.names]
    places, values = [], []
    for sensor in readings(observations):
        if (pde.domain.order(sensor.derivative), field_number(sensor.field, pde.fields)) == wanted:
            places.append(check_points(sensor.X, pde.domain, None, extrapolate=True).cpu().numpy()[:, columns])
            values.append(np.asarray(to_numpy(sensor.y), dtype=float))
    return (np.concatenate(places), np.concatenate(values)) if places else (None, None)
