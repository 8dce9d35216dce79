"""What every picture shares: the lazy import of matplotlib, one palette, one look for axes.

The palette is that of Okabe and Ito, which stays readable with the common colour-vision deficiencies;
meaning is never carried by hue alone (line style, lightness or a label repeats it).
"""

from __future__ import annotations

from typing import Any

import numpy as np

BLUE, SKY, ORANGE, VERMILLION = "#0072B2", "#56B4E9", "#E69F00", "#D55E00"
GREEN, PURPLE, INK, GREY = "#009E73", "#CC79A7", "#222222", "#8A8A8A"
CLASS_COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, INK, "#B8A000")


def pyplot() -> Any:
    """Return ``matplotlib.pyplot``.

    Raises
    ------
    ImportError
        matplotlib is not installed; the message says how to get it.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("Plotting needs matplotlib: pip install matplotlib.") from error
    return plt


def new_axes(ax: Any, *, size: tuple[float, float] = (7.2, 4.2)) -> Any:
    """Return ``ax`` itself, or the only axes of a new figure when it is None."""
    if ax is not None:
        return ax
    return pyplot().subplots(figsize=size, layout="constrained")[1]


def draw_panels(panels: dict[str, list[Any]], kind: str, ax: Any) -> Any:
    """Draw the panels of a kind, and return the axes: one, or an array of them.

    Raises
    ------
    ValueError
        No such kind, or a number of axes that is not that of its panels.
    """
    if kind not in panels:
        raise ValueError(f"kind must be one of {list(panels)}, got {kind!r}.")
    chosen = panels[kind]
    if ax is None:
        size = (5.2 * len(chosen) + 0.4, 4.0)
        ax = pyplot().subplots(1, len(chosen), figsize=size, layout="constrained", squeeze=False)[1][0]
    targets = np.atleast_1d(np.asarray(ax, dtype=object))
    if len(targets) != len(chosen):
        raise ValueError(f"kind={kind!r} needs {len(chosen)} axes, got {len(targets)}.")
    for panel, target in zip(chosen, targets, strict=True):
        panel(target)
    return targets[0] if len(targets) == 1 else targets


def tidy(ax: Any, *, xlabel: str, ylabel: str, title: str | None = None, grid: bool = True) -> None:
    """Label the axes and give them the common look: no box, a faint grid beneath the data."""
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    if title:
        ax.set_title(title, loc="left", fontsize="medium")
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_axisbelow(True)
    if grid:
        ax.grid(color="#E4E4E4", linewidth=0.6)


def class_colour(k: int) -> str:
    """Return the colour of class number ``k``; the palette repeats after eight."""
    return CLASS_COLOURS[k % len(CLASS_COLOURS)]


def two_sided_map() -> Any:
    """Return a colour map from blue through white to vermillion, for probabilities around one half."""
    pyplot()
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("mercer_two_sided", [BLUE, "#CFE3F1", "#FFFFFF", "#F7DCC9", VERMILLION])
