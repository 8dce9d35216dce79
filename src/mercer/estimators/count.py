"""Gaussian-process regression of counts."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from sklearn.base import RegressorMixin
from sklearn.callback import with_callbacks
from sklearn.metrics import d2_tweedie_score
from sklearn.utils import column_or_1d
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from mercer.estimators._base import BaseGP
from mercer.estimators._rows import Container, Rows, Units
from mercer.estimators._validation import check_row_vector, check_targets, check_weight, to_numpy
from mercer.likelihoods.base import Likelihood
from mercer.likelihoods.count import MAX_EXPONENT
from mercer.sequential.options import Stream

_HIGHEST_RATE = np.exp(MAX_EXPONENT - 1)


class GPCountRegressor(RegressorMixin, BaseGP):
    """Counts with a Gaussian process on the log rate.

    y ~ Poisson(e · exp f(x)), or negative binomial for over-dispersed counts, with exposure e.

    Parameters
    ----------
    kernel : str or gpytorch Kernel, default=None
        As in `GPRegressor`; ``"matern52"`` by default. It acts on the log rate.
    likelihood : str or Likelihood, default="poisson"
        ``"poisson"`` or ``"negative_binomial"``, or an object.
    mean : gpytorch Mean, default=None
        Prior mean of the log rate; None is a learned constant.
    family : str or Family, default="auto"
    engine : str or Engine, default="auto"
        ``"dual"``, ``"laplace"`` or ``"power_ep"``.
    stream : Stream, default=None
        How ``partial_fit`` lives on a stream; None is ``Stream()``.
    optimizer : {"lbfgs", None}, default="lbfgs"
    n_restarts : int, default=0
    max_iter : int, default=100
    standardize : bool, default=True
        Standardise X inside; counts are never scaled.
    dtype : {"float64", "float32"}, default="float64"
        Precision in which hyperparameters are learned; the posterior is in float64.
    device : str or torch.device, default=None
    warm_start : bool, default=False
    verbose : int, default=0
    random_state : int, RandomState or None, default=None

    Attributes
    ----------
    kernel_ : gpytorch Kernel
        Learned kernel of the log rate, in the units of X.
    likelihood_, posterior_, log_marginal_likelihood_value_, theta_, theta_names_, fit_report_, n_iter_, converged_
        As in `GPRegressor`.

    See Also
    --------
    GPRegressor, GPClassifier

    Examples
    --------
    >>> import numpy as np
    >>> from mercer import GPCountRegressor
    >>> X = np.linspace(0, 1, 60)[:, None]
    >>> y = np.random.RandomState(0).poisson(np.exp(1 + np.sin(6 * X[:, 0])))
    >>> rate = GPCountRegressor().fit(X, y).predict([[0.25]])
    >>> bool(4 < rate[0] < 11)
    True
    """

    _learned_mean = True

    def __init__(
        self,
        kernel: Any = None,
        *,
        likelihood: Any = "poisson",
        mean: Any = None,
        family: Any = "auto",
        engine: Any = "auto",
        stream: Stream | None = None,
        optimizer: str | None = "lbfgs",
        n_restarts: int = 0,
        max_iter: int = 100,
        standardize: bool = True,
        dtype: str = "float64",
        device: Any = None,
        warm_start: bool = False,
        verbose: int = 0,
        random_state: Any = None,
    ):
        self.kernel = kernel
        self.likelihood = likelihood
        self.mean = mean
        self.family = family
        self.engine = engine
        self.stream = stream
        self.optimizer = optimizer
        self.n_restarts = n_restarts
        self.max_iter = max_iter
        self.standardize = standardize
        self.dtype = dtype
        self.device = device
        self.warm_start = warm_start
        self.verbose = verbose
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.positive_only = True
        return tags

    def _make_likelihood(self, rows: Rows, units: Units) -> Likelihood:
        if isinstance(self.likelihood, str) and self.likelihood not in ("poisson", "negative_binomial"):
            raise ValueError(
                f"likelihood={self.likelihood!r} is not for counts; choose 'poisson' or 'negative_binomial'."
            )
        likelihood = self._fresh_likelihood(self.likelihood, units)
        if likelihood.support not in ("count", "other"):
            raise ValueError(
                f"likelihood={self.likelihood!r} is not for counts; choose 'poisson' or 'negative_binomial'."
            )
        highest = float(np.nanmax(rows.y / rows.side.get("exposure", 1.0)))
        if highest > _HIGHEST_RATE:
            raise ValueError(
                f"y reaches {highest:.3g} per unit of exposure, and log rates above {MAX_EXPONENT:g} are not "
                "represented; use another unit of exposure, or GPRegressor."
            )
        if not _are_integers(rows.y):
            likelihood.support = "other"  # the density continues to real y ≥ 0; _caveats says so
        return likelihood

    def _caveats(self, rows: Rows) -> list[str]:
        found = super()._caveats(rows)
        if not _are_integers(rows.y):
            found.append(
                "y holds values that are not integers; the count density is used as a quasi-likelihood for them"
            )
        return found

    @with_callbacks
    def fit(self, X: Any, y: Any, sample_weight: Any = None, *, exposure: Any = None) -> GPCountRegressor:
        """Learn the hyperparameters and condition on the data.

        Parameters
        ----------
        X : array-like, DataFrame or tensor of shape (n, d)
        y : array-like of shape (n,)
            Counts, ≥ 0; NaN marks a missing target. Other values ≥ 0, such as averages of counts, are taken with
            a warning.
        sample_weight : array-like of shape (n,), default=None
            Replication weights, ≥ 0.
        exposure : float or array-like of shape (n,), default=None
            Time, area or population at risk, > 0; the expected count is exposure times rate.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            Negative targets, bad shapes, NaN in X, all weights zero. The estimator is left as it was.
        """
        return self._fit(X, y, self._counts, sample_weight, {"exposure": exposure})

    def _counts(self, y: Any, X: Any, weight: Any = None) -> np.ndarray:
        """Return y as a float vector of counts."""
        counts = check_targets(self, y, X)
        counts = column_or_1d(counts, warn=True)
        if (counts < 0).any():
            raise ValueError(f"y must hold counts, and {np.nanmin(counts):g} is negative. Use GPRegressor instead.")
        return counts

    _encode_known = _counts

    @with_callbacks
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None, *, exposure: Any = None) -> GPCountRegressor:
        """Learn from a batch, beside all rows seen before; see `GPRegressor.partial_fit`.

        Parameters
        ----------
        X, y, sample_weight, exposure
            As in `fit`.

        Returns
        -------
        self
        """
        return self._partial_fit(X, y, self._counts, sample_weight, {"exposure": exposure})

    # ------------------------------------------------------------------ reading off the posterior

    def _side(self, exposure: Any, n: int, like: Tensor) -> dict[str, Tensor]:
        if exposure is None:
            return {}
        return {
            "exposure": torch.as_tensor(check_row_vector("exposure", exposure, np.empty((n, 1)), positive=True)).to(
                like
            )
        }

    @staticmethod
    def _warn_of_capped_rates(m: Tensor, v: Tensor) -> None:
        n_capped = int((m + 0.5 * v > MAX_EXPONENT).sum())
        if n_capped:
            warnings.warn(
                f"GPCountRegressor: {n_capped} predicted log rate(s) above {MAX_EXPONENT:g} were held there; the "
                "rows are far from the training rows, or the latent variance is large.",
                UserWarning,
                stacklevel=3,
            )

    def predict(self, X: Any, return_std: bool = False, *, exposure: Any = None, latent: bool = False) -> Any:
        """Predict the expected count at X.

        Parameters
        ----------
        X : (n, d)
        return_std : bool, default=False
            Also return the standard deviation of the count, noise included.
        exposure : float or array-like of shape (n,), default=None
            1 by default, so that the prediction is a rate per unit of exposure.
        latent : bool, default=False
            Return mean and standard deviation of the log rate instead.

        Returns
        -------
        mean : (n,)
        std : (n,), if ``return_std``
        """
        X, container = self._prepare_X(X)
        m, v = self._latent_marginals(X)
        if not latent:
            self._warn_of_capped_rates(m, v)
            m, v, _ = self._model.likelihood.predictive(m, v, **self._side(exposure, len(X), m))
        return (container.wrap(m), container.wrap(v.sqrt())) if return_std else container.wrap(m)

    def log_predictive_density(self, X: Any, y: Any, *, exposure: Any = None) -> Any:
        """Return log P(yᵢ | xᵢ, data) per row, (n,), in nats; NaN where y is NaN."""
        X, container = self._prepare_X(X)
        counts = self._counts(y, X)
        m, v = self._latent_marginals(X)
        y_model = torch.as_tensor(counts).to(m)
        side = self._side(exposure, len(X), m)
        density = self._model.likelihood.log_predictive_density(y_model, m, v, **side)
        return container.wrap(density.masked_fill(y_model.isnan(), torch.nan))

    def sample_y(
        self, X: Any, n_samples: int = 1, random_state: Any = 0, *, exposure: Any = None, latent: bool = True
    ) -> Any:
        """Draw functions from the posterior and evaluate them at X.

        Parameters
        ----------
        X : (n, d)
        n_samples : int, default=1
        random_state : int, RandomState or None, default=0
            Equal seeds give the same functions at any X.
        exposure : float or array-like of shape (n,), default=None
        latent : bool, default=True
            Draw log rates; False draws counts.

        Returns
        -------
        (n, n_samples)

        Notes
        -----
        Paths of 2048 random features (where the kernel's spectrum is known) with the exact update for the data: over
        seeds their covariance is that of the posterior; one path is Gaussian up to its features.
        """
        X, container = self._prepare_X(X)
        draws = self._draw(X, n_samples, random_state)
        if not latent:
            side = self._side(exposure, len(X), draws)
            draws = self._model.likelihood.sample(
                draws, generator=self._noise_generator(random_state, draws.device), **side
            )
        return container.wrap(draws.mT)

    def loo_predict(self, return_std: bool = False, *, latent: bool = False) -> Any:
        """Predict each training row from all others, hyperparameters held.

        Parameters
        ----------
        return_std : bool, default=False
        latent : bool, default=False
            Log rates instead of counts (at each row's own exposure).

        Returns
        -------
        mean : (n,) at the rows passed to ``fit``; NaN for rows of zero weight
            From the cavity of each row's site; approximate as the sites are.
        std : (n,), if ``return_std``
        """
        check_is_fitted(self, "posterior_")
        m, v = self._loo_marginals()
        if not latent:
            side = {name: torch.as_tensor(value).to(m) for name, value in self._rows.side.items()}
            m, v, _ = self._model.likelihood.predictive(m, v, **side)
        mean = Container().wrap(self._to_original_rows(m))
        return (mean, Container().wrap(self._to_original_rows(v).sqrt())) if return_std else mean

    def score(self, X: Any, y: Any, sample_weight: Any = None, *, exposure: Any = None) -> float:
        """Return D², the fraction of Poisson deviance explained; 1 is best, 0 a constant rate.

        Parameters
        ----------
        X, y, sample_weight, exposure
            As in ``fit``.
        """
        predicted, weight = to_numpy(self.predict(X, exposure=exposure)), check_weight(sample_weight, X)
        return float(d2_tweedie_score(self._counts(y, X), predicted, sample_weight=weight, power=1))


def _are_integers(counts: np.ndarray) -> bool:
    """Whether all observed counts are whole numbers."""
    return bool((np.isnan(counts) | (counts == np.round(counts))).all())
