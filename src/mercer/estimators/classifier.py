"""Gaussian-process classification: two classes, several, or ordered ones."""

from __future__ import annotations

from numbers import Number
from typing import Any

import numpy as np
import torch
from sklearn.base import ClassifierMixin
from sklearn.callback import with_callbacks
from sklearn.metrics import accuracy_score
from sklearn.utils import column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from mercer.estimators._base import BaseGP
from mercer.estimators._rows import Container, Rows, Units
from mercer.estimators._validation import check_length, check_weight, to_numpy
from mercer.likelihoods.base import Likelihood
from mercer.likelihoods.categorical import Bernoulli
from mercer.sequential.options import Stream

_BINARY = ("probit", "logit", "bernoulli")
_ONE_LATENT = ("laplace", "power_ep")  # engines that serve two classes or ordered ones, but not the softmax


class GPClassifier(ClassifierMixin, BaseGP):
    """Gaussian-process classification with calibrated probabilities.

    Two classes use one latent function and a probit or logit link, C > 2 classes C independent latent functions
    and the softmax, ordered classes one latent function with learned cutpoints.

    Parameters
    ----------
    kernel : str or gpytorch Kernel, default=None
        As in `GPRegressor`; ``"matern52"`` by default.
    likelihood : str or Likelihood, default="auto"
        ``"auto"``: ``"logit"`` for two classes, ``"softmax"`` for more. Also ``"probit"`` and ``"ordinal"``.
    mean : gpytorch Mean, default=None
        Prior mean of the latent functions; None is zero.
    family : str or Family, default="auto"
    engine : str or Engine, default="auto"
        ``"dual"`` (variational, any number of classes), ``"laplace"`` or ``"power_ep"`` (one latent function).
    stream : Stream, default=None
        How ``partial_fit`` lives on a stream; None is ``Stream()``.
    optimizer : {"lbfgs", None}, default="lbfgs"
    n_restarts : int, default=0
    max_iter : int, default=100
    standardize : bool, default=True
        Standardise X inside.
    dtype : {"float64", "float32"}, default="float64"
        Precision in which hyperparameters are learned; the posterior is in float64.
    device : str or torch.device, default=None
    warm_start : bool, default=False
    verbose : int, default=0
    random_state : int, RandomState or None, default=None

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        Sorted labels of rows with positive weight; for ``"ordinal"`` this is their order.
    kernel_ : gpytorch Kernel
        Learned kernel in the units of X.
    likelihood_, posterior_, log_marginal_likelihood_value_, theta_, theta_names_, fit_report_, n_iter_, converged_
        As in `GPRegressor`.

    See Also
    --------
    GPRegressor, GPCountRegressor

    References
    ----------
    Rasmussen and Williams (2006), chapter 3; Khan and Lin (2017) for the variational engine.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from mercer import GPClassifier
    >>> X, y = load_iris(return_X_y=True)
    >>> model = GPClassifier().fit(X[::2], y[::2])
    >>> bool(model.score(X[1::2], y[1::2]) > 0.9)
    True
    """

    def __init__(
        self,
        kernel: Any = None,
        *,
        likelihood: Any = "auto",
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
        tags.classifier_tags.multi_class = self._binary_choice() is None
        return tags

    def _binary_choice(self) -> str | None:
        """Return the parameter that restricts the task to two classes, or None."""
        likelihood, engine = self.likelihood, self.engine
        if isinstance(likelihood, Bernoulli) or (isinstance(likelihood, str) and likelihood in _BINARY):
            return f"likelihood={likelihood!r}"
        if isinstance(likelihood, str) and likelihood == "auto" and getattr(engine, "name", engine) in _ONE_LATENT:
            return f"engine={engine!r}"
        return None

    def _make_likelihood(self, rows: Rows, units: Units) -> Likelihood:
        n_classes = len(self.classes_)
        name = self.likelihood
        if n_classes > 2 and (choice := self._binary_choice()) is not None:
            raise ValueError(
                f"Only binary classification is supported with {choice}, and y has {n_classes} classes. Use "
                "likelihood='softmax' with engine='dual', or likelihood='ordinal' if the classes are ordered."
            )
        if isinstance(name, str) and name == "auto":
            name = "logit" if n_classes == 2 else "softmax"
        if isinstance(name, str) and name not in (*_BINARY, "softmax", "ordinal"):
            raise ValueError(
                f"likelihood={name!r} is not for classes; choose 'auto', 'logit', 'probit', 'softmax' or 'ordinal'."
            )
        likelihood = self._fresh_likelihood(name, units, n_classes=n_classes)
        if getattr(likelihood, "n_classes", None) != n_classes:
            raise ValueError(
                f"likelihood={name!r} is not for {n_classes} classes, the number in y; choose 'auto', or an object "
                f"with n_classes={n_classes}."
            )
        return likelihood

    @with_callbacks
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> GPClassifier:
        """Learn the hyperparameters and condition on the data.

        Parameters
        ----------
        X : array-like, DataFrame or tensor of shape (n, d)
        y : array-like of shape (n,)
            Class labels of any type.
        sample_weight : array-like of shape (n,), default=None
            Replication weights, ≥ 0.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            Bad shapes, NaN in X, fewer than two classes with positive weight, all weights zero. The estimator
            is left as it was.
        """
        return self._fit(X, y, self._encode, sample_weight, {})

    def _encode(self, y: Any, X: Any, weight: np.ndarray) -> np.ndarray:
        """Set ``classes_`` and return y as class indices."""
        labels = self._labels(X, y)
        self.classes_ = np.unique(labels[weight > 0])
        if len(self.classes_) < 2:
            raise ValueError(
                f"{type(self).__name__} needs at least 2 classes with positive weight and y has 1 class: "
                f"{self.classes_.tolist()}."
            )
        index = np.searchsorted(self.classes_, labels).clip(max=len(self.classes_) - 1)
        return index.astype(np.float64)

    @with_callbacks
    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> GPClassifier:
        """Learn from a batch, beside all rows seen before; see `GPRegressor.partial_fit`.

        Parameters
        ----------
        X, y, sample_weight
            As in `fit`; a batch may lack classes.
        classes : array-like of shape (n_classes,), default=None
            All labels that will ever come. Needed by the first call unless its y holds them all.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            As in `fit`, or a label that was not announced. The estimator is left as it was.
        """
        known = getattr(self, "classes_", None)
        if classes is not None:
            announced = np.unique(classes)
            if known is not None and not np.array_equal(known, announced):
                raise ValueError(
                    f"classes={announced.tolist()} differ from those of the first call, {known.tolist()}; a Gaussian "
                    "process that has begun cannot add classes."
                )
            if len(announced) < 2:
                raise ValueError(f"classes must hold at least 2 labels, got {announced.tolist()}.")

        def encode(y: Any, X: Any, weight: np.ndarray) -> np.ndarray:
            if known is None and classes is None:
                return self._encode(y, X, weight)
            self.classes_ = announced if known is None else known
            return self._encode_known(y, X, weight)

        return self._partial_fit(X, y, encode, sample_weight, {})

    def _encode_known(self, y: Any, X: Any, weight: Any) -> np.ndarray:
        """Return y as indices of ``classes_``."""
        labels = self._labels(X, y)
        unknown = labels[~np.isin(labels, self.classes_)].tolist()
        if unknown:
            raise ValueError(
                f"y holds the label {unknown[0]!r}, which is not among classes_ {self.classes_.tolist()}; announce all "
                "labels with classes= in the first partial_fit."
            )
        return np.searchsorted(self.classes_, labels).astype(np.float64)

    def _targets_of(self, rows: Rows) -> np.ndarray:
        return self.classes_[rows.y.astype(int)]

    def _labels(self, X: Any, y: Any) -> np.ndarray:
        if y is None:
            raise ValueError(f"{type(self).__name__} requires y to be passed, but the target y is None.")
        try:
            labels = column_or_1d(to_numpy(y) if isinstance(y, Tensor) else y, warn=True)
        except ValueError as failure:
            raise ValueError(f"y cannot be used: {failure}") from failure
        if labels.dtype == object and all(isinstance(label, (Number, np.bool_)) for label in labels):
            labels = np.array(labels.tolist())  # numbers that came in a column of objects
        check_classification_targets(labels)
        check_length("y", labels, X)
        return labels

    # ------------------------------------------------------------------ reading off the posterior

    def _probabilities(self, m: Tensor, v: Tensor) -> Tensor:
        probs = self._model.likelihood.predictive(m, v).probs
        assert probs is not None
        return probs

    def predict_proba(self, X: Any) -> Any:
        """Return class probabilities, averaged over the posterior of the latent functions.

        Parameters
        ----------
        X : (n, d)

        Returns
        -------
        (n, n_classes); rows sum to one, columns in the order of ``classes_``
        """
        X, container = self._prepare_X(X)
        return container.wrap(self._proba(X))

    def _proba(self, X: Tensor) -> Tensor:
        return self._map_rows(X, lambda chunk: (self._probabilities(*self.posterior_.marginals(chunk)),), axis=0)[0]

    def predict_log_proba(self, X: Any) -> Any:
        """Return the logarithm of `predict_proba`, (n, n_classes)."""
        X, container = self._prepare_X(X)
        return container.wrap(self._proba(X).clamp_min(1e-300).log())

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable class of each row, (n,), as labels of ``classes_``."""
        X, _ = self._prepare_X(X)
        with torch.no_grad():
            return self.classes_[self._proba(X).argmax(-1).cpu().numpy()]

    def log_predictive_density(self, X: Any, y: Any) -> Any:
        """Return log P(yᵢ | xᵢ, data) per row, (n,), in nats; minus its mean is the log loss.

        Raises
        ------
        ValueError
            y holds a label that was not in ``fit``.
        """
        X, container = self._prepare_X(X)
        index = torch.as_tensor(self._encode_known(y, X, None).astype(np.int64))
        proba = self._proba(X)
        return container.wrap(proba.gather(-1, index.to(proba.device).unsqueeze(-1)).squeeze(-1).log())

    def sample_y(self, X: Any, n_samples: int = 1, random_state: Any = 0, *, latent: bool = True) -> Any:
        """Draw from the posterior at X.

        Parameters
        ----------
        X : (n, d)
        n_samples : int, default=1
        random_state : int, RandomState or None, default=0
            Equal seeds give the same functions at any X.
        latent : bool, default=True
            Draw latent functions, dimensionless; False draws class labels.

        Returns
        -------
        (n, n_samples), or (n, n_classes, n_samples) for latent functions of more than two classes

        Notes
        -----
        Paths of 2048 random features (where the kernel's spectrum is known) with the exact update for the data: over
        seeds their covariance is that of the posterior; one path is Gaussian up to its features.
        """
        X, container = self._prepare_X(X)
        draws = self._draw(X, n_samples, random_state)
        if latent:
            return container.wrap(draws.movedim(0, -1) if draws.dim() == 2 else draws.permute(2, 1, 0))
        labels = self._model.likelihood.sample(draws, generator=self._noise_generator(random_state, draws.device))
        return self.classes_[labels.long().cpu().numpy().T]

    def loo_predict_proba(self) -> np.ndarray:
        """Return the class probabilities of each training row given all others, hyperparameters held.

        Returns
        -------
        (n, n_classes) at the rows passed to ``fit``; NaN for rows of zero weight
            From the cavity of each row's site; approximate as the sites are.
        """
        check_is_fitted(self, "posterior_")
        m, v = self._loo_marginals()
        probs = self._probabilities(m, v).mT
        return Container().wrap(self._to_original_rows(probs).mT)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the share of correct labels.

        Parameters
        ----------
        X, y, sample_weight
            As in ``fit``.
        """
        weight = check_weight(sample_weight, X)
        return float(accuracy_score(self._labels(X, y), self.predict(X), sample_weight=weight))
