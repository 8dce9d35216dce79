"""What pictures of solutions share: predictions at points, checked arrays, maps and logarithmic axes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mercer.display._style import tidy, two_sided_map

_FAINTEST = 1e-5  # of the largest value: what a logarithmic scale shows at the least
_STRAIGHT = 1e-2  # of the largest value: where a scale with signs is linear


def predicted(solver: Any, X: np.ndarray, derivative: str, field: str | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Return mean and standard deviation at X (n, d), (n,) each; None for the latter where the method has none."""
    options = {"derivative": derivative, "field": field}
    try:
        return solver.predict(X, return_std=True, **options)
    except NotImplementedError:
        return solver.predict(X, **options), None


def quantity(solver: Any, derivative: str, field: str | None) -> str:
    name = field or solver.pde_.fields[0]
    return f"∂{derivative} {name}" if derivative else name


def coordinates_of(axes: Any) -> tuple[np.ndarray, ...]:
    """Return one or two arrays of coordinates from an array or a pair of them."""
    several = isinstance(axes, (tuple, list)) and all(np.ndim(axis) for axis in axes)
    given = axes if several else (axes,)
    if len(given) not in (1, 2):
        raise ValueError(f"axes must be the coordinates along one axis, or a pair of such; got {len(given)}.")
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
) -> Any:
    """Draw values over two axes, and return the mesh.

    ``scale`` is "linear", "log", or "signed": logarithmic to both sides of zero. What is zero everywhere is drawn on a
    linear scale.
    """
    from matplotlib.colors import LogNorm, SymLogNorm

    options: dict[str, Any] = {"cmap": "cividis"}
    top = float(np.abs(values).max())
    ticks = None
    if scale == "signed":
        # errors gather in corners, and on a linear scale nothing else would be seen
        ticks, top = signed_ticks(top), top or 1.0
        options = {"cmap": two_sided_map(), "norm": SymLogNorm(_STRAIGHT * top, vmin=-top, vmax=top, base=10)}
    elif scale == "log" and top > 0:
        options["norm"] = LogNorm(vmin=max(float(values.min()), _FAINTEST * top), vmax=top)
        values = np.maximum(values, _FAINTEST * top)
    mesh = ax.pcolormesh(*map(_edges, axes), values, shading="flat", rasterized=True, **options)
    bar = ax.figure.colorbar(mesh, ax=ax, label=label)
    if ticks is not None:
        bar.set_ticks(ticks, labels=[f"{tick:.0e}" if tick else "0" for tick in ticks])
        bar.minorticks_off()
    tidy(ax, xlabel=names[0], ylabel=names[1], title=title, grid=False)
    return mesh


def signed_ticks(top: float) -> list[float]:
    """Return the two largest powers of ten up to ``top`` on both sides of zero: more would overlap around it."""
    if top == 0:
        return [0.0]
    largest = 10.0 ** math.floor(math.log10(top))
    return [-largest, -largest / 10, 0.0, largest / 10, largest]


def log_axis(ax: Any, values: np.ndarray, typical: float = math.inf) -> None:
    """Make the upright axis logarithmic from where it still tells something; linear where all values are zero.

    It begins at the least of ``values``, or at the faintest part of the largest where that is less (exact conditions
    make zeros), and no higher than at ``typical``.
    """
    top = float(values.max())
    if top > 0:
        ax.set_yscale("log")
        bottom = max(float(values.min()), _FAINTEST * top)
        ax.set_ylim(bottom=(min(bottom, typical) if typical > 0 else bottom) / 2)


def _edges(points: np.ndarray) -> np.ndarray:
    """Return the edges of cells around points; the outer ones are the outer points, and not beyond the domain."""
    if len(points) == 1:
        return points[0] + np.array([-0.5, 0.5])
    return np.concatenate([points[:1], 0.5 * (points[1:] + points[:-1]), points[-1:]])
