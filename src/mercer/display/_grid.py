"""Rows to predict at: a slice or a plane through the data, the other columns held at their median."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

MARGIN = 0.05  # how far a grid reaches beyond the data, as a share of their range


@dataclass(frozen=True)
class Grid:
    """Rows along one or two columns.

    Attributes
    ----------
    rows : array-like of shape (m, d)
        What the estimator predicts at; a DataFrame if the data were one.
    axes : tuple of ndarray
        Coordinates along each varied column, in its units: one array for a slice, two for a plane.
    columns : tuple of int
        The varied columns.
    names : tuple of str
        Their names.
    data : ndarray of shape (n, len(columns))
        The data in those columns.
    n_fixed : int
        How many other columns were held at their median.
    """

    rows: Any
    axes: tuple[np.ndarray, ...]
    columns: tuple[int, ...]
    names: tuple[str, ...]
    data: np.ndarray
    n_fixed: int


def feature_names(estimator: Any, X: Any) -> list[str]:
    """Return column names: those the estimator saw, those of X, or ``x0``, ``x1``, …"""
    seen = getattr(estimator, "feature_names_in_", None)
    if seen is None and hasattr(X, "columns"):
        seen = X.columns
    if seen is not None:
        return [str(name) for name in seen]
    d = np.asarray(X).shape[1]
    return ["x"] if d == 1 else [f"x{j}" for j in range(d)]


def build_grid(estimator: Any, X: Any, feature: Any, *, resolution: int, prefer_plane: bool) -> Grid:
    """Lay a grid through ``X``.

    Parameters
    ----------
    estimator : object
        Read only for ``feature_names_in_``.
    X : array-like or DataFrame of shape (n, d)
        The data the grid covers, with a small margin.
    feature : int, str, pair of them, or None
        Column(s) to vary. None takes the only column, both columns if there are two and ``prefer_plane``, and
        otherwise the first.
    resolution : int
        Points along each varied column.
    prefer_plane : bool
        Whether two columns are shown as a plane.

    Returns
    -------
    Grid
        Rows, coordinates and names.

    Raises
    ------
    ValueError
        ``X`` is not two-dimensional, or ``feature`` names no column.
    """
    values = np.asarray(X, dtype=float)
    if values.ndim != 2:
        raise ValueError(f"X must have two dimensions, (rows, columns); it has {values.ndim}.")
    names = feature_names(estimator, X)
    if feature is None:
        feature = (0, 1) if prefer_plane and values.shape[1] == 2 else 0
    wanted = feature if isinstance(feature, tuple | list) else (feature,)
    columns = tuple(_column(item, names) for item in wanted)
    if len(columns) not in (1, 2):
        raise ValueError(f"feature must be one column or a pair of columns; got {len(columns)} columns.")
    axes = tuple(_axis(values[:, j], resolution) for j in columns)
    mesh = np.meshgrid(*axes, indexing="xy")
    rows = np.tile(np.nanmedian(values, axis=0), (mesh[0].size, 1))
    for j, coordinates in zip(columns, mesh, strict=True):
        rows[:, j] = coordinates.ravel()
    if hasattr(X, "columns"):
        rows = type(X)(rows, columns=X.columns)
    return Grid(
        rows,
        axes,
        columns,
        tuple(names[j] for j in columns),
        values[:, list(columns)],
        values.shape[1] - len(columns),
    )


def _column(item: Any, names: list[str]) -> int:
    """Return the number of a column given by number or name."""
    if isinstance(item, str):
        if item not in names:
            raise ValueError(f"feature={item!r} is not a column; the columns are {', '.join(names)}.")
        return names.index(item)
    if not -len(names) <= int(item) < len(names):
        raise ValueError(f"feature={item} is out of range for {len(names)} columns.")
    return int(item) % len(names)


def _axis(column: np.ndarray, resolution: int) -> np.ndarray:
    """Return evenly spaced coordinates over the range of a column and a margin."""
    low, high = float(np.nanmin(column)), float(np.nanmax(column))
    margin = MARGIN * (high - low) if high > low else 1.0
    return np.linspace(low - margin, high + margin, resolution)
