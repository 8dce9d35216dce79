"""Points of a domain to show a solution at: a line or a plane through it, the other axes held."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mercer.pde.conditions import Value, evaluate
from mercer.pde.domain import Box

Window = Mapping[str, Any]

_PER_WAVE = 10  # points for each of the shortest waves
_RANGE = {1: (401, 4001), 2: (81, 201)}  # fewest and most points along each shown axis, by how many are shown


@dataclass(frozen=True)
class Slice:
    """Points along one or two axes of a domain.

    Attributes
    ----------
    X : ndarray of shape (m, d)
    axes : tuple of ndarray
        Coordinates along each shown axis.
    names : tuple of str
        Their letters.
    note : str or None
        Where the other axes are held.
    """

    X: np.ndarray
    axes: tuple[np.ndarray, ...]
    names: tuple[str, ...]
    note: str | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of values on the slice: (m,), or (rows, columns) with the second axis upwards."""
        return tuple(len(axis) for axis in reversed(self.axes))

    def values(self, function: Value) -> np.ndarray:
        """Return a number or a function of all coordinates, as conditions take it, on the slice."""
        X = torch.as_tensor(self.X)
        found = evaluate(function, X.unbind(-1), len(X), X, "exact")
        return found.detach().cpu().numpy().reshape(self.shape)


def domain_slice(
    solver: Any, window: Window | None = None, resolution: int | None = None, *, shifted: bool = False
) -> Slice:
    """Lay a slice through the domain of a fitted solver.

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
    ValueError
        An axis that is not there, an interval off the domain, or every axis held.
    """
    domain: Box = solver.pde.domain
    intervals, held = _parts(domain, window or {})
    if not intervals:
        raise ValueError("window holds every axis; leave one to be shown.")
    shown = list(intervals)[:2]
    for name in list(intervals)[2:]:
        held[name] = 0.5 * sum(intervals[name])
    few, most = _RANGE[len(shown)]
    axes = []
    for name in shown:
        column = domain.column(name)
        if shifted:
            nodes = np.linspace(domain.lower[column], domain.upper[column], solver.fit_report_.n_nodes[column])
            axes.append(_thinned(0.5 * (nodes[1:] + nodes[:-1]), intervals[name], resolution or most))
        else:
            share = (intervals[name][1] - intervals[name][0]) / domain.lengths[column]
            waves = share * solver.fit_report_.n_nodes[column] / solver.fit_report_.points_per_wavelength
            count = min(max(few, math.ceil(_PER_WAVE * waves)), most)
            axes.append(np.linspace(*intervals[name], resolution or count))
    mesh = np.meshgrid(*axes, indexing="xy")
    X = np.empty((mesh[0].size, domain.d))
    for name, value in held.items():
        X[:, domain.column(name)] = value
    for name, coordinates in zip(shown, mesh, strict=True):
        X[:, domain.column(name)] = coordinates.ravel()
    note = ", ".join(f"{name} = {value:g}" for name, value in held.items()) or None
    return Slice(X, tuple(axes), tuple(shown), note)


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


def _thinned(points: np.ndarray, interval: tuple[float, float], most: int) -> np.ndarray:
    """Return at most so many of the points in an interval, evenly taken."""
    inside = points[(points >= interval[0]) & (points <= interval[1])]
    if len(inside) == 0:
        raise ValueError(f"there is no shifted node between {interval[0]:g} and {interval[1]:g}; widen the window.")
    return inside[np.unique(np.linspace(0, len(inside) - 1, min(most, len(inside))).round().astype(int))]
