"""Points of a domain to show a solution at: a line or a plane through it, the other axes held."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted

from mercer.pde.conditions import Value, evaluate
from mercer.pde.domain import Box

Window = Mapping[str, Any]

_PER_WAVE = 10  # points for each of the shortest waves, where there is room
_FEWEST_PER_WAVE = 4  # fewer look like another wave, or like none
_FAINT = 1e-3  # of the strongest line: the waves of fainter ones are not seen anyway
_RANGE = {1: (401, 4001), 2: (81, 201)}  # fewest and most points along each shown axis, by how many are shown
_OFFSET = 0.271  # of scattered points: none of those that a solver uses


@dataclass(frozen=True)
class Slice:
    """Points along one or two axes of a domain.

    Attributes
    ----------
    domain : Box
    asked : Box
        The shown axes from end to end of what was asked for.
    held : dict of str to float
        Where the other axes are held.
    axes : tuple of ndarray
        Coordinates along each shown axis.
    """

    domain: Box
    asked: Box
    held: dict[str, float]
    axes: tuple[np.ndarray, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Letters of the shown axes."""
        return self.asked.names

    @property
    def note(self) -> str | None:
        """Where the other axes are held, for a title."""
        return ", ".join(f"{name} = {value:g}" for name, value in self.held.items()) or None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of values on the slice: (m,), or (rows, columns) with the second axis upwards."""
        return tuple(len(axis) for axis in reversed(self.axes))

    @property
    def X(self) -> np.ndarray:
        """All points, (m, d)."""
        mesh = np.meshgrid(*self.axes, indexing="xy")
        return self._points(np.stack([coordinates.ravel() for coordinates in mesh], axis=1))

    def scattered(self, n: int) -> np.ndarray:
        """Return points of low discrepancy of what was asked for, (n, d): no wave hides between them."""
        return self._points(self.asked.scattered(n, _OFFSET).numpy())

    def _points(self, shown: np.ndarray) -> np.ndarray:
        X = np.empty((len(shown), self.domain.d))
        for name, value in self.held.items():
            X[:, self.domain.column(name)] = value
        X[:, [self.domain.column(name) for name in self.names]] = shown
        return X


def values_at(solver: Any, function: Value, X: np.ndarray) -> np.ndarray:
    """Return a number or a function of all coordinates, as conditions take it, at X (n, d), (n,)."""
    points = torch.tensor(X)
    found = evaluate(function, points.unbind(-1), len(points), points, "exact", solver.pde_.domain.names)
    return found.detach().cpu().numpy()


def domain_slice(
    solver: Any, window: Window | None = None, resolution: int | None = None, *, shifted: bool = False
) -> Slice:
    """Lay a slice through the domain of a fitted solver.

    Where the points are too few for the fastest wave of the equation's data, the lower part of an axis is taken, with
    a warning: on fewer than four per wave another wave would be seen.

    Parameters
    ----------
    solver : fitted GPPDESolver
    window : mapping of axis to (low, high) or to a number, optional
        An interval to zoom into, or a place where the axis is held. The first two axes that are not held are shown,
        and others are held at their middle.
    resolution : int, optional
        Points along each shown axis; None takes ten per shortest wave, within limits.
    shifted : bool
        Centres between the nodes of the equation (evenly thinned where there are many) in the place of even points.

    Raises
    ------
    NotFittedError
        The solver is not fitted.
    ValueError
        An axis that is not there, an interval off the domain, or every axis held.
    """
    check_is_fitted(solver, "posterior_")
    domain: Box = solver.pde_.domain
    intervals, held = _parts(domain, window or {})
    if not intervals:
        raise ValueError("window holds every axis; leave one to be shown.")
    shown = list(intervals)[:2]
    for name in list(intervals)[2:]:
        held[name] = 0.5 * sum(intervals[name])
    few, most = _RANGE[len(shown)]
    axes = []
    for name in shown:
        column, interval = domain.column(name), intervals[name]
        frequency = _highest(solver, column)
        if shifted:
            nodes = np.linspace(domain.lower[column], domain.upper[column], solver.fit_report_.n_nodes[column])
            points = _within(0.5 * (nodes[1:] + nodes[:-1]), interval)
            if len(points) > (resolution or most):
                points = _within(points, _resolved(name, interval, frequency, resolution or most))
            axes.append(_thinned(points, resolution or most))
        else:
            wanted = math.ceil(_PER_WAVE * frequency * (interval[1] - interval[0]))
            count = resolution or min(max(few, wanted), most)
            axes.append(np.linspace(*_resolved(name, interval, frequency, count), count))
    return Slice(domain, Box(**{name: intervals[name] for name in shown}), held, tuple(axes))


def _highest(solver: Any, column: int) -> float:
    """Return the highest frequency that the equation's data have along an axis, in cycles per unit."""
    lines = solver.lines_
    if not len(lines):
        return 0.0
    return float(lines.frequency[lines.amplitude >= _FAINT * lines.amplitude.max(), column].max())


def _resolved(name: str, interval: tuple[float, float], frequency: float, count: int) -> tuple[float, float]:
    """Return the lower part of an interval in which so many points are enough for a frequency."""
    low, high = interval
    longest = (count - 1) / (_FEWEST_PER_WAVE * max(frequency, 1e-300))
    if high - low <= longest:
        return interval
    warnings.warn(
        f"{name} is shown from {low:g} to {low + longest:.3g} only: {frequency * (high - low):.3g} waves on {count} "
        "points would look like other ones. Zoom with window=, or raise resolution.",
        UserWarning,
        stacklevel=4,
    )
    return low, low + longest


def _parts(domain: Box, window: Window) -> tuple[dict[str, tuple[float, float]], dict[str, float]]:
    """Return the interval of each axis to show, and the places of those that are held."""
    intervals, held = {}, {}
    for name in window:
        domain.column(name)
    for name, low, high in zip(domain.names, domain.lower, domain.upper, strict=True):
        wanted = window.get(name, (low, high))
        ends = np.atleast_1d(np.asarray(wanted, dtype=float))
        if ends.min() < low or ends.max() > high or len(ends) > 2 or (len(ends) == 2 and ends[0] >= ends[1]):
            raise ValueError(f"window[{name!r}] must be a number or an interval within {low:g} to {high:g}.")
        if len(ends) == 1:
            held[name] = float(ends[0])
        else:
            intervals[name] = (float(ends[0]), float(ends[1]))
    return intervals, held


def _within(points: np.ndarray, interval: tuple[float, float]) -> np.ndarray:
    inside = points[(points >= interval[0]) & (points <= interval[1])]
    if len(inside) == 0:
        raise ValueError(f"there is no shifted node between {interval[0]:g} and {interval[1]:g}; widen the window.")
    return inside


def _thinned(points: np.ndarray, most: int) -> np.ndarray:
    """Return at most so many of the points, evenly taken."""
    return points[np.unique(np.linspace(0, len(points) - 1, min(most, len(points))).round().astype(int))]
