"""Whether stated probabilities come true: PIT, coverage of intervals, reliability of class probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import norm

from mercer.display._draws import has_gaussian_predictive, observed_draws
from mercer.display._style import BLUE, GREY, INK, SKY, class_colour, pyplot, tidy

N_LEVELS = 99


@dataclass
class CalibrationDisplay:
    """Compare stated with observed frequencies.

    For regression and counts: the histogram of the probability integral transform (PIT) u = F(y), flat if the
    predictive distributions are right, and the share of targets inside central intervals against their
    nominal level. For classes: how often a class occurs where it was given probability p. Grey bands are
    two binomial standard errors of independent rows; rows that share errors (a forecast) scatter more
    widely.

    Parameters
    ----------
    pit : ndarray of shape (n,) or None
        Values in [0, 1]; None for classification.
    probabilities : ndarray of shape (n, n_classes) or None
        Class probabilities.
    hits : ndarray of shape (n, n_classes) or None
        1 where the row is of the class.
    classes : ndarray or None
        Class labels.
    n_bins : int
        Bins of the histogram or the reliability diagram.

    Attributes
    ----------
    nominal, empirical : ndarray of shape (99,)
        Levels of central intervals and the observed coverage (regression and counts).
    """

    pit: Any = None  # arrays, or None where the other kind of calibration is drawn
    probabilities: Any = None
    hits: Any = None
    classes: Any = None
    n_bins: int = 10

    def __post_init__(self) -> None:
        self.nominal = np.arange(1, N_LEVELS + 1) / (N_LEVELS + 1)
        if self.pit is not None:
            self.empirical = np.array([self.coverage(level) for level in self.nominal])

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        y: Any,
        *,
        n_bins: int = 10,
        kind: str = "both",
        exposure: Any = None,
        random_state: Any = 0,
        ax: Any = None,
    ) -> CalibrationDisplay:
        """Predict at ``X``, compare with ``y`` and draw.

        Parameters
        ----------
        estimator : fitted estimator
            Regressor, classifier or count regressor.
        X, y : array-like of shape (n, d) and (n,)
            Rows the model was not fitted on.
        n_bins : int
            Bins of the histogram or the reliability diagram.
        kind : {"both", "pit", "coverage"}
            Panels to draw; classification has one panel.
        exposure : array-like of shape (n,), optional
            Exposures of the rows, for counts fitted with exposure.
        random_state : int or RandomState
            Of the draws that stand for distributions without closed form, and of the PIT's randomisation
            within the jumps of discrete distributions.
        ax : matplotlib Axes or pair of them, optional
            Where to draw.

        Returns
        -------
        CalibrationDisplay
            Drawn.
        """
        options: dict[str, Any] = {"n_bins": n_bins, "ax": ax}
        if hasattr(estimator, "predict_proba"):
            return cls.from_predictions(
                y, probabilities=estimator.predict_proba(X), classes=estimator.classes_, **options
            )
        if not has_gaussian_predictive(estimator):
            draws = observed_draws(estimator, X, random_state=random_state, exposure=exposure)
            return cls.from_predictions(y, samples=draws, kind=kind, random_state=random_state, **options)
        mean, std = estimator.predict(X, return_std=True)
        return cls.from_predictions(y, mean=mean, std=std, kind=kind, **options)

    @classmethod
    def from_predictions(
        cls,
        y: Any,
        *,
        mean: Any = None,
        std: Any = None,
        samples: Any = None,
        probabilities: Any = None,
        classes: Any = None,
        n_bins: int = 10,
        kind: str = "both",
        random_state: Any = 0,
        ax: Any = None,
    ) -> CalibrationDisplay:
        """Draw from targets and one of: Gaussian moments, draws, or class probabilities.

        Parameters
        ----------
        y : array-like of shape (n,)
            Targets; labels for classification.
        mean, std : array-like of shape (n,)
            Gaussian predictive moments, in units of y.
        samples : array-like of shape (n, n_samples)
            Draws from each row's predictive distribution.
        probabilities : array-like of shape (n, n_classes) or (n,)
            Class probabilities; one column is that of the second class.
        classes : array-like of shape (n_classes,), optional
            Labels in the order of the columns; the sorted labels of ``y`` by default.
        n_bins, kind, random_state, ax
            As in :meth:`from_estimator`.

        Returns
        -------
        CalibrationDisplay
            Drawn.

        Raises
        ------
        ValueError
            None of the three ways, or shapes that do not match ``y``.
        """
        y = np.asarray(y).reshape(-1)
        if probabilities is not None:
            table = np.asarray(probabilities, dtype=float)
            if table.ndim == 1:
                table = np.column_stack([1 - table, table])
            labels = np.unique(y) if classes is None else np.asarray(classes)
            if table.shape != (len(y), len(labels)):
                raise ValueError(f"probabilities has shape {table.shape}; expected {(len(y), len(labels))}.")
            hits = (y[:, None] == labels[None, :]).astype(float)
            return cls(probabilities=table, hits=hits, classes=labels, n_bins=n_bins).plot(ax=ax)
        if samples is not None:
            pit = _sampled_pit(y.astype(float), np.asarray(samples, dtype=float), random_state)
        elif mean is not None and std is not None:
            pit = norm.cdf((y.astype(float) - np.asarray(mean, dtype=float)) / np.asarray(std, dtype=float))
        else:
            raise ValueError("Give mean and std, or samples, or probabilities.")
        return cls(pit=pit, n_bins=n_bins).plot(ax=ax, kind=kind)

    def coverage(self, level: float) -> float:
        """Return the share of targets inside the central interval of nominal ``level``."""
        return float(np.mean(np.abs(2 * self.pit - 1) <= level))

    def plot(self, ax: Any = None, *, kind: str = "both") -> CalibrationDisplay:
        """Draw the stored numbers.

        Parameters
        ----------
        ax : matplotlib Axes or pair of them, optional
            A pair for ``kind="both"``, one otherwise; a new figure by default.
        kind : {"both", "pit", "coverage"}
            Panels to draw; ignored for classification.

        Returns
        -------
        CalibrationDisplay
            Itself; ``ax_`` is the Axes, or the pair of them.
        """
        if kind not in ("both", "pit", "coverage"):
            raise ValueError(f"kind must be 'both', 'pit' or 'coverage', got {kind!r}.")
        panels = [self._reliability]
        if self.pit is not None:
            panels = {"both": [self._pit, self._coverage], "pit": [self._pit], "coverage": [self._coverage]}[kind]
        if ax is None:
            size = (4.4 * len(panels) + 0.4, 4.0)
            ax = pyplot().subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)[1][0]
        targets = np.atleast_1d(np.asarray(ax, dtype=object))
        if len(targets) != len(panels):
            raise ValueError(f"kind={kind!r} needs {len(panels)} axes, got {len(targets)}.")
        for panel, target in zip(panels, targets, strict=True):
            panel(target)
        self.ax_ = targets[0] if len(targets) == 1 else targets
        self.figure_ = targets[0].figure
        return self

    def _pit(self, ax: Any) -> None:
        n, expected = len(self.pit), 1 / self.n_bins
        error = 2 * np.sqrt(expected * (1 - expected) / n) * self.n_bins
        ax.axhspan(max(0.0, 1 - error), 1 + error, color=GREY, alpha=0.2, linewidth=0, label="± 2 standard errors")
        ax.hist(
            self.pit,
            bins=np.linspace(0, 1, self.n_bins + 1),
            density=True,
            color=SKY,
            edgecolor="white",
            alpha=0.9,
        )
        ax.axhline(1.0, color=INK, linewidth=1.0, linestyle="--", label="calibrated")
        tidy(ax, xlabel="PIT: predicted probability of a smaller y", ylabel="density", title=f"{n} rows")
        ax.set(xlim=(0, 1), ylim=(0, 1.22 * ax.get_ylim()[1]))
        ax.legend(frameon=False, fontsize="small", loc="upper left", ncols=2)

    def _coverage(self, ax: Any) -> None:
        level = np.concatenate([[0.0], self.nominal, [1.0]])
        error = 2 * np.sqrt(level * (1 - level) / len(self.pit))
        ax.fill_between(
            level,
            level - error,
            level + error,
            color=GREY,
            alpha=0.2,
            linewidth=0,
            label="± 2 standard errors",
        )
        ax.plot(level, level, color=INK, linewidth=1.0, linestyle="--", label="calibrated")
        ax.plot(self.nominal, self.empirical, color=BLUE, linewidth=1.8, label="observed")
        marks = np.array([0.5, 0.95])
        seen = np.array([self.coverage(mark) for mark in marks])
        ax.plot(marks, seen, "o", color=BLUE, markersize=5)
        text = "\n".join(f"inside {mark:.0%}: {share:.1%}" for mark, share in zip(marks, seen, strict=True))
        ax.text(0.97, 0.05, text, transform=ax.transAxes, ha="right", va="bottom", fontsize="small")
        tidy(ax, xlabel="nominal level of the central interval", ylabel="share of y inside")
        ax.set(xlim=(0, 1), ylim=(0, 1.02))
        ax.legend(frameon=False, fontsize="small", loc="upper left")

    def _reliability(self, ax: Any) -> None:
        edges = np.linspace(0, 1, self.n_bins + 1)
        shown = range(1, 2) if len(self.classes) == 2 else range(len(self.classes))
        ax.plot([0, 1], [0, 1], color=INK, linewidth=1.0, linestyle="--", label="calibrated")
        for k in shown:
            p, hit = self.probabilities[:, k], self.hits[:, k]
            bin_of = np.clip(np.digitize(p, edges) - 1, 0, self.n_bins - 1)
            count = np.bincount(bin_of, minlength=self.n_bins)
            used = count > 0
            stated = np.bincount(bin_of, weights=p, minlength=self.n_bins)[used] / count[used]
            seen = np.bincount(bin_of, weights=hit, minlength=self.n_bins)[used] / count[used]
            if len(shown) == 1:
                error = 2 * np.sqrt(stated * (1 - stated) / count[used])
                ax.fill_between(
                    stated,
                    np.clip(stated - error, 0, 1),
                    np.clip(stated + error, 0, 1),
                    color=GREY,
                    alpha=0.2,
                    linewidth=0,
                    label="± 2 standard errors",
                )
            ax.plot(
                stated,
                seen,
                "o-",
                color=class_colour(k),
                linewidth=1.4,
                label=f"class {self.classes[k]}",
                markersize=4,
            )
        tidy(ax, xlabel="stated probability", ylabel="observed frequency", title=f"{len(self.hits)} rows")
        ax.set(xlim=(0, 1), ylim=(0, 1.02))
        ax.legend(frameon=False, fontsize="small", ncols=1 + (len(shown) > 5))


def _sampled_pit(y: np.ndarray, draws: np.ndarray, random_state: Any) -> np.ndarray:
    """Return P(draw < y) plus a uniform share of P(draw = y): uniform under the truth, for discrete y too."""
    from sklearn.utils import check_random_state

    if draws.shape[0] != len(y):
        raise ValueError(f"samples has {draws.shape[0]} rows, y has {len(y)}.")
    below, equal = np.mean(draws < y[:, None], axis=1), np.mean(draws == y[:, None], axis=1)
    return below + check_random_state(random_state).uniform(size=len(y)) * equal
