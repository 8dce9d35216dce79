"""The three panels of :class:`PredictiveDisplay`: bands, class curves and a class plane.

Each takes the display (its numbers) and an Axes; none computes a prediction.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mercer.display._style import BLUE, GREY, INK, ORANGE, class_colour, tidy, two_sided_map

MARKERS = "o^sDvP*X"


def draw_bands(shown: Any, ax: Any) -> None:
    """Draw mean, central intervals, draws and data along one column; count intervals as steps."""
    x, step = shown.axes[0], "mid" if shown.kind == "step" else None
    for level, alpha in zip(sorted(shown.bands, reverse=True), (0.18, 0.28), strict=False):
        lower, upper = shown.bands[level]
        style = {"step": step, "color": BLUE, "alpha": alpha, "linewidth": 0}
        ax.fill_between(x, lower, upper, label=f"{level:.0%} interval", **style)
    if shown.samples is not None:
        lines = ax.plot(x, shown.samples, color=ORANGE, linewidth=0.7, alpha=0.8)
        lines[0].set_label(f"{len(lines)} draw{'s' * (len(lines) > 1)}")
    ax.plot(x, shown.mean, color=BLUE, linewidth=1.8, label="mean")
    if shown.y is not None:
        # Projections of data with other columns need not lie in the bands, so they are drawn fainter.
        faint = shown.note is not None or len(shown.y) > 200
        style = {"color": GREY if shown.note else INK, "alpha": 0.6 if faint else 0.9, "edgecolors": "none"}
        ax.scatter(shown.X[:, 0], shown.y, s=_point_size(len(shown.y)), zorder=3, label="data", **style)
    tidy(ax, xlabel=shown.names[0], ylabel=shown.target_name, title=shown.note)
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(handles[::-1], labels[::-1], frameon=False, fontsize="small")


def draw_curves(shown: Any, ax: Any) -> None:
    """Draw class probabilities along one column, with a rug of the data of each class."""
    x = shown.axes[0]
    binary = len(shown.classes) == 2
    styles = ("-", "--", "-.", ":")
    for k, label in enumerate(shown.classes):
        if binary and k == 0:
            continue
        style = {"color": class_colour(k), "linestyle": styles[(k - binary) % 4], "linewidth": 1.8}
        ax.plot(x, shown.probabilities[:, k], label=f"{shown.target_name} = {label}", **style)
    if shown.y is not None:
        for k, label in enumerate(shown.classes):
            rows = shown.X[shown.y == label, 0]
            height = float(k) if binary else -0.04 * (k + 1)
            ax.plot(rows, np.full(len(rows), height), "|", color=class_colour(k), markersize=9, alpha=0.5)
    if binary:
        ax.axhline(0.5, color=GREY, linewidth=0.8, linestyle=":")
    tidy(ax, xlabel=shown.names[0], ylabel="probability of the class", title=shown.note)
    ax.legend(frameon=False, fontsize="small")


def draw_plane(shown: Any, ax: Any) -> None:
    """Draw class probabilities over two columns: contours for two classes, hue and lightness for more."""
    first, second = shown.axes
    shape = (len(second), len(first))
    extent = (first[0], first[-1], second[0], second[-1])
    raster = {"origin": "lower", "extent": extent, "aspect": "auto", "interpolation": "bilinear"}
    if len(shown.classes) == 2:
        p = shown.probabilities[:, 1].reshape(shape)
        image = ax.imshow(p, cmap=two_sided_map(), vmin=0, vmax=1, **raster)
        ax.figure.colorbar(image, ax=ax, label=f"P({shown.target_name} = {shown.classes[1]})")
        lines = ax.contour(first, second, p, levels=[0.1, 0.5, 0.9], colors=INK, linewidths=[0.7, 1.4, 0.7])
        ax.clabel(lines, fontsize="x-small", fmt="%.1f")
    else:
        # Lightness says how sure the model is, hue says of what: white is a uniform guess.
        from matplotlib.colors import to_rgb

        palette = np.array([to_rgb(class_colour(k)) for k in range(len(shown.classes))])
        sure = (shown.probabilities.max(axis=1) - 1 / len(palette)) / (1 - 1 / len(palette))
        colour = 1 - 0.75 * sure[:, None] * (1 - palette[shown.probabilities.argmax(axis=1)])
        ax.imshow(colour.reshape(*shape, 3), **raster)
    if shown.y is not None:
        size = _point_size(len(shown.y), largest=34.0)
        for k, label in enumerate(shown.classes):
            rows = shown.X[shown.y == label]
            style = {
                "color": class_colour(k),
                "edgecolors": "white",
                "linewidths": 0.5,
                "marker": MARKERS[k % 8],
            }
            ax.scatter(rows[:, 0], rows[:, 1], s=size, label=f"{shown.target_name} = {label}", **style)
        ax.legend(fontsize="small", framealpha=0.85, loc="best")
    tidy(ax, xlabel=shown.names[0], ylabel=shown.names[1], title=shown.note, grid=False)
    ax.set(xlim=extent[:2], ylim=extent[2:])


def _point_size(n: int, largest: float = 22.0) -> float:
    """Return an area in points² that keeps ``n`` points apart."""
    return float(np.clip(40 * largest / max(n, 1), largest / 6, largest))
