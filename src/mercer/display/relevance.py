"""Which columns the kernel listens to: inverse length scales in units of each column's spread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mercer.display._grid import feature_names
from mercer.display._style import class_colour, new_axes, tidy


@dataclass
class RelevanceDisplay:
    """Show the relevance sd(xⱼ) / lengthscaleⱼ of each column, dimensionless.

    Above about 1 the function changes within the spread of the column; far below 1 it hardly depends on it
    (beyond a straight line). It is a property of the prior the data chose, not a measure of cause.

    Parameters
    ----------
    relevance : dict of str to ndarray of shape (d,)
        One row per stationary part of the kernel; NaN where a part does not see the column.
    names : list of str
        Column names.
    """

    relevance: dict[str, np.ndarray]
    names: list[str]

    @classmethod
    def from_estimator(cls, estimator: Any, X: Any, *, max_features: int = 20, ax: Any = None) -> RelevanceDisplay:
        """Read the length scales of ``estimator.kernel_`` and compare them with the spread of ``X``.

        Parameters
        ----------
        estimator : fitted estimator
            Its ``kernel_`` is in the units of X.
        X : array-like or DataFrame of shape (n, d)
            The data that define the spread; usually the training rows.
        max_features : int
            Show the most relevant so many columns.
        ax : matplotlib Axes, optional
            Where to draw.

        Returns
        -------
        RelevanceDisplay
            Drawn.

        Raises
        ------
        ValueError
            No part of the kernel has a length scale.
        """
        spread = np.nanstd(np.asarray(X, dtype=float), axis=0)
        relevance: dict[str, np.ndarray] = {}
        for part in _parts_with_lengthscale(estimator.kernel_):
            active = part.active_dims
            columns = np.arange(len(spread)) if active is None else active.cpu().numpy()
            # Batches are latents (classes, outputs): one bar for their geometric mean.
            scales = _lengthscale(part).detach().cpu().double().numpy()
            scales = np.exp(np.log(scales).reshape(-1, scales.shape[-1]).mean(axis=0))
            row = np.full(len(spread), np.nan)
            row[columns] = spread[columns] / scales
            kind = type(part).__name__.removesuffix("Kernel")
            count = sum(label.split(" ")[0] == kind for label in relevance)
            relevance[kind if count == 0 else f"{kind} ({count + 1})"] = row
        if not relevance:
            raise ValueError("No part of the kernel has a length scale, so there is no relevance to show.")
        return cls.from_predictions(relevance, feature_names(estimator, X), max_features=max_features, ax=ax)

    @classmethod
    def from_predictions(
        cls, relevance: Any, names: Any, *, max_features: int = 20, ax: Any = None
    ) -> RelevanceDisplay:
        """Draw given relevances, an array (d,) or a dict of them by label; see :meth:`from_estimator`."""
        rows = relevance if isinstance(relevance, dict) else {"relevance": np.asarray(relevance, dtype=float)}
        highest = np.nanmax(np.vstack([np.nan_to_num(row, nan=-1.0) for row in rows.values()]), axis=0)
        keep = np.argsort(-highest, kind="stable")[:max_features]
        display = cls({label: np.asarray(row)[keep] for label, row in rows.items()}, [str(names[j]) for j in keep])
        return display.plot(ax=ax)

    def plot(self, ax: Any = None) -> RelevanceDisplay:
        """Draw the stored bars, most relevant first; ``ax`` is a matplotlib Axes or None for a new figure."""
        d, parts = len(self.names), len(self.relevance)
        ax = new_axes(ax, size=(6.4, 1.3 + 0.28 * d * max(1, 0.7 * parts)))
        height = 0.8 / parts
        for i, (label, row) in enumerate(self.relevance.items()):
            positions = np.arange(d) + (i - (parts - 1) / 2) * height
            bars = ax.barh(positions, np.nan_to_num(row), height=0.92 * height, color=class_colour(i), label=label)
            texts = ["" if np.isnan(value) else f"{value:.2g}" for value in row]
            ax.bar_label(bars, texts, padding=3, fontsize="x-small")
        ax.set_yticks(np.arange(d), self.names)
        ax.invert_yaxis()
        ax.margins(x=0.12)
        tidy(ax, xlabel="relevance: sd of the column / length scale (dimensionless)", ylabel="")
        ax.grid(False, axis="y")
        if parts > 1:
            ax.legend(frameon=False, fontsize="small")
        self.ax_, self.figure_ = ax, ax.figure
        return self


def _parts_with_lengthscale(kernel: Any) -> list[Any]:
    """Return the stationary parts of a kernel, or of one kernel per latent, in order of appearance."""
    kernels = kernel if isinstance(kernel, list | tuple) else [kernel]
    return [
        part
        for one in kernels
        for part in one.modules()
        if getattr(part, "has_lengthscale", False) and part.lengthscale is not None
    ]


def _lengthscale(part: Any) -> Any:
    """Return the length scale in the units of the columns.

    That of gpytorch's periodic kernel is dimensionless. For small distances δ its exponent 2 sin²(πδ/p)/ℓ is
    δ²/2L² with L = p√ℓ/2π, which is what compares with other parts.
    """
    period = getattr(part, "period_length", None)
    return part.lengthscale if period is None else period * part.lengthscale.sqrt() / (2 * np.pi)
