"""What a fitted model believes about y along one column, or about the class over two.

The file turns an estimator into numbers (bands, probabilities) and draws them; it computes no
Gaussian-process algebra of its own. Bands are of the observed y unless ``latent=True``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import norm

from mercer.display._draws import has_gaussian_predictive, observed_draws
from mercer.display._grid import build_grid
from mercer.display._panels import draw_bands, draw_curves, draw_plane
from mercer.display._style import new_axes

LEVELS = (0.5, 0.95)


@dataclass
class PredictiveDisplay:
    """Show a predictive distribution: mean and bands, count intervals, or class probabilities.

    Build it with :meth:`from_estimator` or :meth:`from_predictions`.

    Parameters
    ----------
    kind : {"band", "step", "curve", "plane"}
        Continuous bands, count intervals, class probabilities along one column, class probabilities over two.
    axes : tuple of ndarray
        Coordinates along each shown column, in its units.
    mean : ndarray or None
        Predictive mean, shape (m,), in units of y.
    bands : dict of float to (ndarray, ndarray)
        Lower and upper limits per central level, each (m,), in units of y.
    probabilities : ndarray or None
        Class probabilities, (m, n_classes); dimensionless.
    classes : ndarray or None
        Class labels.
    samples : ndarray or None
        Draws, (m, n_samples), in units of y.
    X, y : ndarray or None
        Data in the shown columns, (n, 1) or (n, 2), and targets.
    names : tuple of str
        Axis labels of the shown columns.
    target_name : str
        Label of y.
    note : str or None
        Title, such as which columns were held at their median.
    """

    kind: str
    axes: tuple[np.ndarray, ...]
    names: tuple[str, ...] = ("x",)
    target_name: str = "y"
    mean: np.ndarray | None = None
    bands: dict[float, tuple[np.ndarray, np.ndarray]] | None = None
    probabilities: np.ndarray | None = None
    classes: np.ndarray | None = None
    samples: np.ndarray | None = None
    X: np.ndarray | None = None
    y: np.ndarray | None = None
    note: str | None = None

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        y: Any = None,
        *,
        feature: Any = None,
        resolution: int = 200,
        n_samples: int = 0,
        latent: bool = False,
        target_name: str = "y",
        random_state: Any = 0,
        ax: Any = None,
    ) -> PredictiveDisplay:
        """Predict along a slice (or a plane) through ``X`` and draw it.

        Parameters
        ----------
        estimator : fitted estimator
            A regressor, classifier or count regressor.
        X : array-like or DataFrame of shape (n, d)
            Data that set the range; shown as points when ``y`` is given. Columns not shown are held at their
            median, so with d > 1 the points are projections and need not lie in the bands.
        y : array-like of shape (n,), optional
            Targets.
        feature : int, str or pair of them, optional
            Column(s) to show. By default the first; for a classifier on two columns, both.
        resolution : int
            Points along each column (at most 120 along each side of a plane).
        n_samples : int
            Draws of the latent function to add to a picture with bands.
        latent : bool
            Bands of the latent function instead of the observed y.
        target_name : str
            Label of y, with its unit if there is one.
        random_state : int or RandomState
            Of the draws.
        ax : matplotlib Axes, optional
            Where to draw.

        Returns
        -------
        PredictiveDisplay
            Drawn, with ``ax_`` and ``figure_``.
        """
        classifier = hasattr(estimator, "predict_proba")
        grid = build_grid(estimator, X, feature, resolution=resolution, prefer_plane=classifier)
        plane = len(grid.columns) == 2
        if plane:
            if not classifier:
                raise ValueError("A pair of columns is drawn for classifiers only; name one column.")
            grid = build_grid(estimator, X, grid.columns, resolution=min(resolution, 120), prefer_plane=True)
        note = None if grid.n_fixed == 0 else f"other {grid.n_fixed} column{'s' * (grid.n_fixed > 1)} at the median"
        common: dict[str, Any] = {
            "axes": grid.axes,
            "names": grid.names,
            "target_name": target_name,
            "note": note,
            "X": grid.data,
            "y": None if y is None else np.asarray(y).reshape(len(grid.data)),
        }
        if classifier:
            display = cls(
                kind="plane" if plane else "curve",
                classes=np.asarray(estimator.classes_),
                probabilities=np.asarray(estimator.predict_proba(grid.rows)),
                **common,
            )
        elif not latent and not has_gaussian_predictive(estimator):
            draws = observed_draws(estimator, grid.rows, random_state=random_state)
            whole = np.array_equal(draws, np.round(draws))
            display = cls(
                kind="step" if whole else "band",
                mean=np.asarray(estimator.predict(grid.rows)),
                bands=_sampled_bands(draws),
                **common,
            )
        else:
            option = {"latent": True} if latent else {}
            mean, std = (np.asarray(a) for a in estimator.predict(grid.rows, return_std=True, **option))
            if mean.ndim != 1:
                raise ValueError("PredictiveDisplay shows one target; fit or slice a single column of y.")
            draws = None
            if n_samples:
                draws = np.asarray(estimator.sample_y(grid.rows, n_samples, random_state=random_state))
            display = cls(kind="band", mean=mean, bands=_gaussian_bands(mean, std), samples=draws, **common)
        return display.plot(ax=ax)

    @classmethod
    def from_predictions(
        cls,
        x: Any,
        mean: Any,
        std: Any,
        *,
        X: Any = None,
        y: Any = None,
        samples: Any = None,
        name: str = "x",
        target_name: str = "y",
        ax: Any = None,
    ) -> PredictiveDisplay:
        """Draw bands from predictive means and standard deviations along one column.

        Parameters
        ----------
        x, mean, std : array-like of shape (m,)
            Coordinates, and predictive mean and standard deviation there, in units of y.
        X, y : array-like of shape (n,), optional
            Data to add.
        samples : array-like of shape (m, n_samples), optional
            Draws to add.
        name, target_name : str
            Axis labels.
        ax : matplotlib Axes, optional
            Where to draw.

        Returns
        -------
        PredictiveDisplay
            Drawn.
        """
        x, mean, std = (np.asarray(a, dtype=float).reshape(-1) for a in (x, mean, std))
        if not len(x) == len(mean) == len(std):
            raise ValueError(f"x, mean and std must be equally long; got {len(x)}, {len(mean)} and {len(std)}.")
        order = np.argsort(x, kind="stable")
        display = cls(
            kind="band",
            axes=(x[order],),
            names=(name,),
            target_name=target_name,
            mean=mean[order],
            bands=_gaussian_bands(mean[order], std[order]),
            samples=None if samples is None else np.asarray(samples)[order],
            X=None if X is None else np.asarray(X, dtype=float).reshape(-1, 1),
            y=None if y is None else np.asarray(y),
        )
        return display.plot(ax=ax)

    def plot(self, ax: Any = None) -> PredictiveDisplay:
        """Draw the stored numbers.

        Parameters
        ----------
        ax : matplotlib Axes, optional
            Where to draw; a new figure by default.

        Returns
        -------
        PredictiveDisplay
            Itself, with ``ax_`` and ``figure_`` set.
        """
        ax = new_axes(ax, size=(6.0, 5.0) if self.kind == "plane" else (7.2, 4.2))
        {"band": draw_bands, "step": draw_bands, "curve": draw_curves, "plane": draw_plane}[self.kind](self, ax)
        self.ax_, self.figure_ = ax, ax.figure
        return self


def _gaussian_bands(mean: np.ndarray, std: np.ndarray) -> dict[float, tuple[np.ndarray, np.ndarray]]:
    widths = {level: norm.ppf(0.5 + level / 2) * std for level in LEVELS}
    return {level: (mean - width, mean + width) for level, width in widths.items()}


def _sampled_bands(draws: np.ndarray) -> dict[float, tuple[np.ndarray, np.ndarray]]:
    tails = {level: (0.5 - level / 2, 0.5 + level / 2) for level in LEVELS}
    return {level: tuple(np.quantile(draws, tail, axis=1, method="inverted_cdf")) for level, tail in tails.items()}
