"""At which frequencies a prior expects a function: the lines of its spectral mixtures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.utils.validation import check_is_fitted

from mercer.display._grid import feature_names
from mercer.display._style import BLUE, draw_panels, tidy
from mercer.kernels import MixtureKernel

_FAINTEST = 1e-8  # share below which a line is not drawn


@dataclass
class SpectrumDisplay:
    """Show the lines of a spectrum, one panel for each axis.

    A point for each component at its frequency and share of the prior variance; its bar reaches one width of the line,
    1/(2πℓ), to both sides. For a Student-t line that is its scale. It is the prior that forcing, conditions and
    evidence chose, not the spectrum of the solution. A solver on a grid has no such prior; the lines that it found in
    forcing and conditions are shown in its place, without widths.

    Parameters
    ----------
    frequency : ndarray of shape (Q, d)
        Cycles per unit of each axis.
    weight : ndarray of shape (Q,)
        Prior variance of each component, in units of u².
    lengthscale : ndarray of shape (Q, d)
        In units of each axis.
    names : list of str
        Of the axes.
    label : str
        What the weights are shares of.
    """

    frequency: np.ndarray
    weight: np.ndarray
    lengthscale: np.ndarray
    names: list[str]
    label: str = "share of the prior variance"

    @classmethod
    def from_estimator(cls, estimator: Any, *, field: str | None = None, ax: Any = None) -> SpectrumDisplay:
        """Read the lines of a fitted kernel.

        Parameters
        ----------
        estimator : fitted GPPDESolver, or an estimator whose ``kernel_`` has a mixture
            The first mixture is shown.
        field : str, optional
            Which unknown function of a system; the first by default.
        ax : matplotlib Axes or one for each axis, optional
            Where to draw.

        Returns
        -------
        SpectrumDisplay
            Drawn.

        Raises
        ------
        NotFittedError
            The estimator is not fitted.
        ValueError
            No such field, no mixture among the kernels, or a solver on a grid that found no line.
        """
        check_is_fitted(estimator)
        if hasattr(estimator, "pde_"):
            fields = list(estimator.pde_.fields)
            if field is not None and field not in fields:
                raise ValueError(f"field must be one of {', '.join(fields)}, got {field!r}.")
            number = 0 if field is None else fields.index(field)
            kernels, names = estimator.kernels_[number : number + 1], list(estimator.pde_.domain.names)
            if not estimator.kernels_:
                return cls._of_data(estimator.lines_, names, ax)
        else:
            kernels = estimator.kernel_ if isinstance(estimator.kernel_, list | tuple) else [estimator.kernel_]
            names = feature_names(estimator, np.empty((0, estimator.n_features_in_)))
        parts = [part for kernel in kernels for part in kernel.modules() if isinstance(part, MixtureKernel)]
        if not parts:
            raise ValueError("there is no mixture of lines among the kernels, so there is no spectrum to show.")
        part = parts[0]
        if part.active_dims is not None:
            names = [names[j] for j in part.active_dims.tolist()]
        lines = (part.frequency, part.weight, part.lengthscale)
        return cls.from_predictions(*(value.detach().cpu().numpy() for value in lines), names=names, ax=ax)

    @classmethod
    def _of_data(cls, lines: Any, names: list[str], ax: Any) -> SpectrumDisplay:
        """Draw lines that were found in forcing and conditions, which have no width."""
        if not len(lines):
            raise ValueError("no line was found in forcing and conditions, so there is no spectrum to show.")
        frequency, amplitude = (value.detach().cpu().numpy() for value in (lines.frequency, lines.amplitude))
        label = "share of the squared amplitude in the data"
        return cls(frequency, amplitude**2, np.full_like(frequency, np.inf), names, label).plot(ax=ax)

    @classmethod
    def from_predictions(
        cls, frequency: Any, weight: Any, lengthscale: Any, *, names: Any = (), ax: Any = None
    ) -> SpectrumDisplay:
        """Draw given lines; see :class:`SpectrumDisplay` for their shapes.

        Raises
        ------
        ValueError
            Shapes that do not agree.
        """
        frequency, weight, lengthscale = (np.asarray(value, dtype=float) for value in (frequency, weight, lengthscale))
        if frequency.ndim != 2 or lengthscale.shape != frequency.shape or weight.shape != frequency.shape[:1]:
            raise ValueError(
                "frequency and lengthscale must be (Q, d) and weight (Q,); got "
                f"{frequency.shape}, {lengthscale.shape} and {weight.shape}."
            )
        labels = [str(name) for name in names] or [f"x{j}" for j in range(frequency.shape[1])]
        if len(labels) != frequency.shape[1]:
            raise ValueError(f"names must be {frequency.shape[1]}, one per axis, got {len(labels)}.")
        return cls(frequency, weight, lengthscale, labels).plot(ax=ax)

    def plot(self, ax: Any = None) -> SpectrumDisplay:
        """Draw the stored lines.

        Parameters
        ----------
        ax : matplotlib Axes or array of them, optional
            As many as there are axes; a new figure by default.

        Returns
        -------
        SpectrumDisplay
            Itself; ``ax_`` is the Axes, or an array of them.
        """
        panels = [lambda target, j=j: self._axis(target, j) for j in range(len(self.names))]
        self.ax_ = draw_panels({"spectrum": panels}, "spectrum", ax)
        self.figure_ = np.atleast_1d(self.ax_)[0].figure
        return self

    def _axis(self, ax: Any, j: int) -> None:
        share = self.weight / self.weight.sum()
        bottom = max(min(share.min() / 3, 1e-2), _FAINTEST)
        ax.vlines(self.frequency[:, j], bottom, share, color=BLUE, linewidth=1.2, alpha=0.5)
        style = {"fmt": "o", "color": BLUE, "markersize": 5, "elinewidth": 1.2, "alpha": 0.8}
        ax.errorbar(self.frequency[:, j], share, xerr=1 / (2 * np.pi * self.lengthscale[:, j]), **style)
        ax.set_yscale("log")
        ax.set_ylim(bottom, 2.0)
        tidy(ax, xlabel=f"cycles per unit of {self.names[j]}", ylabel=self.label)
