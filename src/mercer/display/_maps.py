"""What pictures of solutions share: predictions on a slice, checked arrays, maps and logarithmic axes."""

from __future__ import annotations

from typing import Any

import numpy as np

from mercer.display._domain import Slice
from mercer.display._style import tidy, two_sided_map

_FAINTEST = 1e-5  # of the largest value: what a logarithmic scale shows at the least
_STRAIGHT = 1e-2  # of the largest value: where a scale with signs is linear


def predicted(solver: Any, part: Slice, derivative: str, field: str | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Return mean and standard deviation on a slice; None for the latter where the method has none."""
    options = {"derivative": derivative, "field": field}
    try:
        mean, std = solver.predict(part.X, return_std=True, **options)
    except NotImplementedError:
        return np.asarray(solver.predict(part.X, **options)).reshape(part.shape), None
    return np.asarray(mean).reshape(part.shape), np.asarray(std).reshape(part.shape)


def quantity(solver: Any, derivative: str, field: str | None) -> str:
    name = field or solver.pde.fields[0]
    return f"∂{derivative} {name}" if derivative else name


def coordinates_of(axes: Any) -> tuple[np.ndarray, ...]:
    """Return one or two arrays of coordinates from an array or a pair of them."""
    given = axes if isinstance(axes, tuple) else (axes,)
    if len(given) not in (1, 2):
        raise ValueError(f"axes must be the coordinates along one axis, or a tuple of two; got {len(given)}.")
    return tuple(np.asarray(axis, dtype=float).reshape(-1) for axis in given)


def on_axes(axes: tuple[np.ndarray, ...], values: Any, name: str) -> np.ndarray:
    """Return values as an array on the axes, checked."""
    found = np.asarray(values, dtype=float)
    shape = tuple(len(axis) for axis in reversed(axes))
    if found.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, the second axis first; got {found.shape}.")
    return found


def draw_map(
    ax: Any,
    axes: tuple[np.ndarray, ...],
    names: tuple[str, ...],
    values: np.ndarray,
    *,
    label: str,
    title: str | None,
    scale: str = "linear",
) -> None:
    """Draw values over two axes; ``scale`` is "linear", "log", or "signed": logarithmic to both sides of zero."""
    from matplotlib.colors import LogNorm, SymLogNorm

    options: dict[str, Any] = {"cmap": "cividis"}
    top = float(np.abs(values).max()) or 1.0
    if scale == "signed":
        # errors gather in corners, and on a linear scale nothing else would be seen
        options = {"cmap": two_sided_map(), "norm": SymLogNorm(_STRAIGHT * top, vmin=-top, vmax=top, base=10)}
    elif scale == "log":
        options["norm"] = LogNorm(vmin=max(float(values.min()), _FAINTEST * top), vmax=top)
        values = np.maximum(values, _FAINTEST * top)
    mesh = ax.pcolormesh(*axes, values, shading="nearest", rasterized=True, **options)
    ax.figure.colorbar(mesh, ax=ax, label=label)
    tidy(ax, xlabel=names[0], ylabel=names[1], title=title, grid=False)


def show_from(ax: Any, values: np.ndarray) -> None:
    """Let a logarithmic axis begin where it still tells something: exact conditions make zeros."""
    top = float(values.max())
    if top > 0:
        ax.set_ylim(bottom=max(float(values.min()), _FAINTEST * top) / 2)
