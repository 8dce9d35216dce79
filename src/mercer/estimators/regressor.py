"""Gaussian-process regression.

The file is long because it holds the public documentation of one class; the methods themselves are short.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.base import RegressorMixin
from sklearn.callback import with_callbacks
from sklearn.metrics import r2_score
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from mercer.estimators._base import BaseGP
from mercer.estimators._derivatives import DerivativePredictions, in_columns_of
from mercer.estimators._rows import Container, Rows, Units
from mercer.estimators._validation import check_row_vector, check_targets, check_weight, resolve_dtype, to_numpy
from mercer.likelihoods import get_likelihood
from mercer.likelihoods.base import Likelihood
from mercer.likelihoods.gaussian import Gaussian
from mercer.policy import NumericalPolicy
from mercer.sequential.options import Stream

# powers of the unit of y in the learnable parameters of a likelihood
_LIKELIHOOD_UNITS = {"likelihood.noise_variance": 2, "likelihood.scale": 1}
_TASK_OF_SUPPORT = {"classes": "GPClassifier", "count": "GPCountRegressor"}


class GPRegressor(DerivativePredictions, RegressorMixin, BaseGP):
    """Gaussian-process regression with learned kernel and noise.

    y = f(x) + ε with f ~ GP(0, k). Hyperparameters maximise the log evidence; inputs and targets are
    standardised inside and everything is reported in the units of X and y.

    Parameters
    ----------
    kernel : str or gpytorch Kernel, default=None
        ``"matern52"`` (the default), ``"rbf"``, ``"matern32"``, ``"rq"``, ``"periodic"``, ``"linear"``, sums and
        products such as ``"matern52 + linear"``, or any gpytorch kernel; see `mercer.kernels`. Values set
        explicitly are in the units of X; unset ones start from the data. A kernel without an amplitude gets one.
    likelihood : str or Likelihood, default="gaussian"
        ``"gaussian"`` or ``"student_t"`` (robust to outliers), or an object. Values set on our own objects are in
        the units of y, their bounds in standardised units; y is standardised only if the likelihood is for the line.
    mean : gpytorch Mean, default=None
        Prior mean in standardised units; None is the weighted mean of y.
    family : str or Family, default="auto"
        How the posterior is represented; ``"exact"`` is dense, ``"sic"`` gives each row its nearest neighbours, for
        many rows, and ``"inducing_vecchia"`` the same beside inducing points, for many directions.
    engine : str or Engine, default="auto"
        ``"conjugate"`` (Gaussian noise), ``"dual"``, ``"laplace"`` or ``"power_ep"``.
    stream : Stream, default=None
        How ``partial_fit`` lives on a stream; None is ``Stream()``.
    optimizer : {"lbfgs", None}, default="lbfgs"
        None keeps the hyperparameters as given.
    n_restarts : int, default=0
        Random restarts of the optimiser.
    max_iter : int, default=100
        Most optimiser iterations.
    standardize : bool, default=True
        Standardise X and y inside.
    dtype : {"float64", "float32"}, default="float64"
        Precision in which hyperparameters are learned; float32 raises the floor of the noise variance to
        1e-4 var(y). The posterior itself is in float64.
    device : str or torch.device, default=None
        None follows X if it is a tensor, else the CPU.
    warm_start : bool, default=False
        Start from the hyperparameters of the previous fit.
    verbose : int, default=0
        Show a progress bar.
    random_state : int, RandomState or None, default=None
        Draws restarts and subsets.

    Attributes
    ----------
    kernel_ : gpytorch Kernel
        Learned kernel in the units of X and y; with several outputs its variances, like those of ``likelihood``
        and ``theta_``, are in units of the variance of each output.
    noise_variance_ : float or ndarray of shape (n_outputs,)
        Learned noise variance in units of y²; None if it was known per row, if all rows were derivatives or if the
        likelihood has none.
    likelihood_ : Likelihood
        Learned likelihood in standardised units.
    posterior_ : Posterior
        Conditioned process in standardised units.
    log_marginal_likelihood_value_ : float
        Log evidence at the learned hyperparameters, in nats, for y in its own units.
    theta_, theta_names_ : ndarray of shape (k,), list of str
        Learned hyperparameters as one vector, and their names.
    fit_report_ : FitReport
        What ran, why, and how it ended.
    n_iter_ : int
    converged_ : bool
    n_features_in_ : int
    feature_names_in_ : ndarray of str
        Only if X was a data frame.

    See Also
    --------
    GPClassifier, GPCountRegressor

    Notes
    -----
    ``sample_weight`` has replication semantics: weight w is the row seen w times. NaN in y is a missing target.

    References
    ----------
    Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, chapters 2 and 5.

    Examples
    --------
    >>> import numpy as np
    >>> from mercer import GPRegressor
    >>> X = np.linspace(0, 6, 40)[:, None]
    >>> y = np.sin(X[:, 0])
    >>> mean, std = GPRegressor().fit(X, y).predict([[1.5]], return_std=True)
    >>> bool(abs(mean[0] - np.sin(1.5)) < 0.01)
    True
    """

    def __init__(
        self,
        kernel: Any = None,
        *,
        likelihood: Any = "gaussian",
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
        tags.target_tags.multi_output = True
        return tags

    @property
    def _standardize_y(self) -> bool:
        """Whether y may change its units: not if it lives on an interval, say."""
        return get_likelihood(self.likelihood).support == "real"

    def _make_likelihood(self, rows: Rows, units: Units) -> Likelihood:
        likelihood = self._fresh_likelihood(self.likelihood, units)
        if likelihood.support in _TASK_OF_SUPPORT:
            raise ValueError(
                f"likelihood={self.likelihood!r} is not for real targets; choose 'gaussian' or 'student_t', or use "
                f"{_TASK_OF_SUPPORT[likelihood.support]}."
            )
        floor = NumericalPolicy(dtype=resolve_dtype(self.dtype)).noise_floor
        assert floor is not None
        return likelihood.with_noise_floor(floor) if isinstance(likelihood, Gaussian) else likelihood

    @with_callbacks
    def fit(
        self, X: Any, y: Any, sample_weight: Any = None, *, noise_variance: Any = None, derivative: Any = None
    ) -> GPRegressor:
        """Learn the hyperparameters and condition on the data.

        Parameters
        ----------
        X : array-like, DataFrame or tensor of shape (n, d)
        y : array-like or tensor of shape (n,) or (n, n_outputs)
            NaN marks a missing target.
        sample_weight : array-like of shape (n,), default=None
            Replication weights, ≥ 0.
        noise_variance : float or array-like of shape (n,), default=None
            Known noise variance per row, in units of y²; nothing is then learned about the noise.
        derivative : array-like of shape (n, d), default=None
            For each row, the order of the derivative of f in each column that y observes, in units of y over those of
            X; zeros for a value. Columns of a data frame are those of X by their names. Needs the exact family and a
            kernel that is smooth enough. One noise variance for all rows is one in standardised units; give
            ``noise_variance`` where slopes are known better or worse.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            Bad shapes, NaN in X, no observed target, all weights zero, or a covariance that cannot be factored; with
            derivatives a kernel that is not smooth enough or another family. The estimator is left as it was.
        TypeError
            A kernel whose derivatives are not known.
        """
        orders = in_columns_of(X, derivative)
        return self._fit(X, y, self._targets, sample_weight, {"noise_variance": noise_variance}, orders)

    def _targets(self, y: Any, X: Any, weight: Any) -> np.ndarray:
        return check_targets(self, y, X)

    _encode_known = _targets

    @with_callbacks
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None, *, noise_variance: Any = None) -> GPRegressor:
        """Learn from a batch, beside all rows seen before.

        Up to ``stream.dense_rows`` rows are all kept and the posterior is exact. Afterwards the process lives on a
        stream: inducing points carry what is known, a memory of fixed size keeps some rows as they are, and memory and
        time do not depend on how many rows there were. Families other than "auto" and "inducing" keep all rows.

        Parameters
        ----------
        X, y, sample_weight, noise_variance
            As in `fit`. The units of X and y are those of the first rows.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            As in `fit`. The estimator is left as it was.

        References
        ----------
        Chang, Verma, John, Solin and Khan (2023), "Memory-based dual Gaussian processes for sequential learning".
        """
        return self._partial_fit(X, y, self._targets, sample_weight, {"noise_variance": noise_variance})

    @property
    def noise_variance_(self) -> Any:
        """Learned noise variance in units of y², or None."""
        stored = getattr(self.likelihood_, "log_noise_variance", None)
        if stored is None or "noise_variance" in self._rows.side or not self._saw_values:
            return None
        value = to_numpy(stored.exp()).reshape(-1) * np.square(self._units.y_scale)
        return value if self._rows.y.ndim > 1 else float(value[0])

    @property
    def _saw_values(self) -> bool:
        """Whether fit had a value of y; the noise of derivatives alone has other units."""
        orders = self._rows.orders
        return orders is None or bool(self._rows.weight[~orders.any(axis=1)].any())

    def _likelihood_offset(self, name: str, units: Units) -> float:
        return _LIKELIHOOD_UNITS.get(name, 0) * float(np.log(units.output_scale))

    # ------------------------------------------------------------------ reading off the posterior

    def _outputs(self, value: Tensor) -> Tensor:
        """Move outputs from the front, (p, n), to where scikit-learn has them, (n, p)."""
        return value.mT if value.dim() > 1 else value

    def _scale(self, value: Tensor) -> Tensor:
        return torch.as_tensor(np.asarray(self._units.y_scale)).to(value)

    def _in_user_units(self, mean: Tensor) -> Tensor:
        return self._outputs(mean) * self._scale(mean) + torch.as_tensor(np.asarray(self._units.y_center)).to(mean)

    def _side(self, noise_variance: Any, m: Tensor, n: int) -> dict[str, Tensor]:
        """Return the known noise of n new observations in model units, shaped like their means m, if there is any."""
        known = self._rows.side.get("noise_variance")
        if noise_variance is None:
            if not self._saw_values:
                raise ValueError(
                    "noise_variance must be given: fit had derivatives only, whose noise has other units than that of "
                    "y. Pass it, or describe f alone, as predict does with latent=True."
                )
            if known is None:
                return {}
            if len(known) == 0:
                raise ValueError(
                    "noise_variance must be given: the stream keeps no rows from which the noise of new ones could be "
                    "taken. Pass it, or use Stream(memory=...)."
                )
            weight = self._rows.weight * (1 if self._rows.orders is None else ~self._rows.orders.any(axis=1))
            values = np.full(n, np.average(known, weights=weight))
        elif "noise_variance" in self._model.likelihood.side_names:
            values = check_row_vector("noise_variance", noise_variance, np.empty((n, 1)), positive=True)
        else:
            name = type(self._model.likelihood).__name__
            raise ValueError(f"noise_variance is for Gaussian noise and this model has {name}; leave it out.")
        return {"noise_variance": self._noise_in_model_units(values, m)}

    def _noise_in_model_units(self, values: np.ndarray, m: Tensor) -> Tensor:
        """Return noise variances (n,) in units of y² as (n,) or (p, n) in model units."""
        scale = np.square(np.atleast_1d(self._units.y_scale))[:, None]
        return torch.as_tensor(values / scale).to(m).reshape(m.shape)

    def predict(
        self,
        X: Any,
        return_std: bool = False,
        return_cov: bool = False,
        *,
        latent: bool = False,
        noise_variance: Any = None,
        derivative: Any = None,
    ) -> Any:
        """Predict the mean of y at X, and how far y may be from it.

        Parameters
        ----------
        X : array-like, DataFrame or tensor of shape (n, d)
            A tensor gives tensors back, on its device, differentiable in X.
        return_std : bool, default=False
            Also return the standard deviation, in units of y.
        return_cov : bool, default=False
            Also return the covariance, in units of y²; not with ``return_std``.
        latent : bool, default=False
            Describe the noise-free f instead of the observed y.
        noise_variance : float or array-like of shape (n,), default=None
            Known noise of the new observations where ``fit`` had known noise; default its weighted mean.
        derivative : str, int, sequence of str or tuple of int, default=None
            Describe a derivative of f instead, in units of y over those of X: in a column by its name or position, in
            several named columns, or of one order per column such as ``(1, 0)``. Exact family only.

        Returns
        -------
        mean : (n,) or (n, n_outputs)
        std : same shape, if ``return_std``
        cov : (n, n) or (n, n, n_outputs), if ``return_cov``

        Raises
        ------
        ValueError
            Both ``return_std`` and ``return_cov``, or columns other than in ``fit``; a derivative that f does not have
            or that the family does not know; the noise of y where ``fit`` had derivatives only.
        TypeError
            ``derivative`` is none of what is accepted, or the kernel's derivatives are not known.
        """
        if return_std and return_cov:
            raise ValueError("return_std and return_cov cannot both be True; the covariance has the variances.")
        X, container = self._prepare_X(X)
        if derivative is not None:
            if noise_variance is not None:
                raise ValueError("derivatives are those of f, without noise; leave noise_variance out.")
            return self._predict_derivative(X, container, derivative, return_std, return_cov)
        if return_cov:
            return self._predict_cov(X, container, latent, noise_variance)
        if not return_std:
            return container.wrap(self._in_user_units(self._latent_mean(X)))
        m, v = self._latent_marginals(X)
        if not latent:
            m, v, _ = self._model.likelihood.predictive(m, v, **self._side(noise_variance, m, len(X)))
        return container.wrap(self._in_user_units(m)), container.wrap(self._outputs(v).sqrt() * self._scale(v))

    def _predict_cov(self, X: Tensor, container: Container, latent: bool, noise_variance: Any) -> Any:
        policy = self._model.policy
        moved = self._units.inputs(X.to(dtype=policy.dtype, device=policy.device))
        m, covariance = self.posterior_.joint(moved)
        if not latent:
            v = covariance.diagonal(dim1=-2, dim2=-1).expand_as(m)
            observed = self._model.likelihood.predictive(m, v, **self._side(noise_variance, m, len(X)))
            covariance = covariance + torch.diag_embed(observed.variance - v)
        if m.dim() == 2:
            covariance = covariance.expand(len(m), -1, -1).movedim(0, -1)
        mean = self._in_user_units(m)
        return container.wrap(mean), container.wrap(covariance * self._scale(covariance).square())

    def log_predictive_density(self, X: Any, y: Any, *, noise_variance: Any = None) -> Any:
        """Return log p(yᵢ | xᵢ, data) per row.

        Parameters
        ----------
        X : (n, d)
        y : (n,) or (n, n_outputs)
        noise_variance : float or array-like of shape (n,), default=None
            As in `predict`.

        Returns
        -------
        (n,) or (n, n_outputs), in nats for y in its own units; minus its mean is the NLPD. NaN where y is NaN.
        """
        X, container = self._prepare_X(X)
        targets = check_targets(self, y, X)
        if targets.shape[1:] != self._rows.y.shape[1:]:
            raise ValueError(f"y has shape {targets.shape}, and fit had {self._rows.y.shape[1:] or 'one column'}.")
        m, v = self._latent_marginals(X)
        y_model = torch.as_tensor(((targets - self._units.y_center) / self._units.y_scale).T).to(m)
        side = self._side(noise_variance, m, len(X))
        density = self._model.likelihood.log_predictive_density(y_model, m, v, **side)
        density = density.masked_fill(y_model.isnan(), torch.nan)
        return container.wrap(self._outputs(density) - self._scale(density).log())

    def sample_y(
        self, X: Any, n_samples: int = 1, random_state: Any = 0, *, latent: bool = True, noise_variance: Any = None
    ) -> Any:
        """Draw functions from the posterior and evaluate them at X.

        Parameters
        ----------
        X : (n, d)
        n_samples : int, default=1
        random_state : int, RandomState or None, default=0
            Equal seeds give the same functions at any X, so that calls are consistent with each other.
        latent : bool, default=True
            Draw the noise-free f; False adds observation noise.
        noise_variance : float or array-like of shape (n,), default=None
            As in `predict`.

        Returns
        -------
        (n, n_samples) or (n, n_outputs, n_samples), in units of y

        Notes
        -----
        Paths of 2048 random features (where the kernel's spectrum is known) with the exact update for the data: over
        seeds their covariance is that of the posterior; one path is Gaussian up to its features.
        """
        X, container = self._prepare_X(X)
        draws = self._draw(X, n_samples, random_state)
        if not latent:
            side = self._side(noise_variance, draws[0], len(X))
            draws = self._model.likelihood.sample(
                draws, generator=self._noise_generator(random_state, draws.device), **side
            )
        moved = torch.stack([self._in_user_units(draw) for draw in draws], dim=-1)
        return container.wrap(moved)

    def loo_predict(self, return_std: bool = False, *, latent: bool = False) -> Any:
        """Predict each training row from all others, in closed form, hyperparameters held.

        Parameters
        ----------
        return_std : bool, default=False
        latent : bool, default=False
            As in ``predict``.

        Returns
        -------
        mean : (n,) or (n, n_outputs)
            At the rows passed to ``fit``; NaN for rows of zero weight. A row of weight w loses one replicate.
        std : same shape, if ``return_std``

        References
        ----------
        Rasmussen and Williams (2006), eq. 5.12, for Gaussian noise; the site cavity otherwise.
        """
        check_is_fitted(self, "posterior_")
        if self._rows.orders is not None:
            raise ValueError("loo_predict knows values of y only, and this model was fitted to derivatives too.")
        m, v = self._loo_marginals()
        if not latent and return_std:
            known = self._rows.side.get("noise_variance")
            side = {} if known is None else {"noise_variance": self._noise_in_model_units(known, m)}
            m, v, _ = self._model.likelihood.predictive(m, v, **side)
        m, v = self._to_original_rows(m), self._to_original_rows(v.expand_as(m))
        mean = Container().wrap(self._in_user_units(m))
        if not return_std:
            return mean
        return mean, Container().wrap(self._outputs(v).sqrt() * self._scale(v))

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return R², averaged over outputs; 1 is best, 0 a constant.

        Parameters
        ----------
        X, y, sample_weight
            As in ``fit``, without missing targets.
        """
        predicted = to_numpy(self.predict(X))
        return float(r2_score(check_targets(self, y, X), predicted, sample_weight=check_weight(sample_weight, X)))
