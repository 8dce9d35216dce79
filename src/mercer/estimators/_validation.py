"""Check what the user passes, in the user's words, for arrays, data frames and tensors alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.utils.validation import _check_sample_weight, check_array, validate_data
from torch import Tensor, nn


def check_inputs(estimator: Any, X: Any, *, reset: bool) -> Any:
    """Return X as a finite 2-D float array or tensor, in its own container and precision.

    Parameters
    ----------
    estimator : BaseEstimator
        Its ``n_features_in_`` and ``feature_names_in_`` are set (``reset``) or compared.
    X : array-like, DataFrame or tensor of shape (n, d)

    Raises
    ------
    ValueError, TypeError
        Wrong shape, NaN or infinite entries, complex or sparse input, or other columns than in ``fit``.
    """
    if not isinstance(X, Tensor):
        try:
            return validate_data(estimator, X, reset=reset, dtype=[np.float64, np.float32], accept_sparse=False)
        except ValueError as failure:
            if "could not convert string" not in str(failure):
                raise
            raise ValueError(f"X must hold numbers: {failure}. Encode text columns as numbers first.") from failure
    name = type(estimator).__name__
    if X.layout != torch.strided:
        raise TypeError("Sparse data was passed for X, but dense data is required. Use X.to_dense().")
    if X.is_complex():
        raise ValueError("Complex data not supported: X is a complex tensor.")
    if X.dim() != 2:
        raise ValueError(
            f"X must be 2-D (n_samples, n_features), got a tensor of {X.dim()} dimension(s). "
            "Reshape your data with X.reshape(-1, 1) for a single feature."
        )
    if X.shape[0] == 0 or X.shape[1] == 0:
        raise ValueError(f"X has shape {tuple(X.shape)}: a minimum of 1 sample and 1 feature is required.")
    if X.dtype not in (torch.float32, torch.float64):
        X = X.to(torch.float64)
    if not bool(torch.isfinite(X).all()):
        raise ValueError("Input X contains NaN or infinity. Impute or drop those rows first.")
    if reset:
        estimator.n_features_in_ = X.shape[1]
        if hasattr(estimator, "feature_names_in_"):
            del estimator.feature_names_in_
    elif X.shape[1] != estimator.n_features_in_:
        raise ValueError(
            f"X has {X.shape[1]} features, but {name} is expecting {estimator.n_features_in_} features as input."
        )
    return X


def to_numpy(values: Any) -> np.ndarray:
    """Return a tensor or array as NumPy, detached."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def check_targets(estimator: Any, y: Any, X: Any) -> np.ndarray:
    """Return numeric y, (n,) or (n, p), float64, NaN allowed as a missing target.

    Raises
    ------
    ValueError
        y is absent, not numeric, infinite, of more than two dimensions or of another length than X.
    """
    if y is None:
        raise ValueError(f"{type(estimator).__name__} requires y to be passed, but the target y is None.")
    y = _numeric("y", y, dtype="numeric", allow_nd=True, ensure_all_finite="allow-nan")
    if y.ndim not in (1, 2):
        raise ValueError(f"y must have shape (n_samples,) or (n_samples, n_outputs), got {y.shape}.")
    check_length("y", y, X)
    return y.astype(np.float64)


def check_length(name: str, values: Any, X: Any) -> None:
    """Raise ValueError unless there is one entry per row of X."""
    if len(values) != len(X):
        raise ValueError(
            f"Found input variables with inconsistent numbers of samples: {name} has {len(values)} and X has {len(X)}."
        )


def check_weight(sample_weight: Any, X: Any) -> np.ndarray:
    """Return replication weights (n,), finite and non-negative; None and one number stand for all rows.

    Raises
    ------
    ValueError, TypeError
        Not numbers, negative, not finite, all zero, or of another length than X.
    """
    weight = None if sample_weight is None else to_numpy(sample_weight)
    if weight is not None and weight.ndim == 0:
        weight = np.full(len(X), weight)
    weight = None if weight is None else _numeric("sample_weight", weight, dtype=np.float64, allow_nd=True)
    return _check_sample_weight(weight, to_numpy(X), dtype=np.float64, ensure_non_negative=True)


def check_mean(mean: Any) -> None:
    """Raise TypeError unless the prior mean is None or a module that maps rows to numbers."""
    if mean is not None and not isinstance(mean, nn.Module):
        raise TypeError(f"mean must be None or a gpytorch Mean such as ConstantMean(), got {mean!r}.")


def _numeric(name: str, values: Any, **options: Any) -> np.ndarray:
    """Return numbers as an array; errors say which argument they are about."""
    try:
        return check_array(to_numpy(values), ensure_2d=False, input_name=name, **options)
    except (ValueError, TypeError) as failure:
        if str(failure).startswith(f"Input {name} "):
            raise
        raise type(failure)(f"{name} cannot be used: {failure}") from failure


def check_row_vector(name: str, values: Any, X: Any, *, positive: bool) -> np.ndarray:
    """Return per-row side information (n,) as float64.

    Raises
    ------
    ValueError
        Wrong length, or entries that are not finite and positive (non-negative if not ``positive``).
    """
    n = len(X)
    if to_numpy(values).ndim == 0:
        values = np.full(n, to_numpy(values))
    values = _numeric(name, values, dtype=np.float64, allow_nd=True)
    if values.shape != (n,):
        raise ValueError(f"{name} must have shape ({n},), one entry per row of X; got {values.shape}.")
    if positive and not (values > 0).all():
        raise ValueError(f"{name} must be positive in every row; the smallest entry is {values.min():g}.")
    if not (values >= 0).all():
        raise ValueError(f"Negative values in {name}: every entry must be non-negative.")
    return values


def resolve_dtype(name: str) -> torch.dtype:
    """Return the torch dtype called "float64" or "float32"."""
    return {"float64": torch.float64, "float32": torch.float32}[name]


def resolve_device(device: Any, X: Any) -> torch.device:
    """Return the requested device, or that of X; ValueError where it cannot compute in float64."""
    if device is None:
        return X.device if isinstance(X, Tensor) else torch.device("cpu")
    try:
        found = torch.device(device)
        torch.zeros((), dtype=torch.float64, device=found).item()
    except (RuntimeError, TypeError, AssertionError) as failure:
        reason = str(failure).splitlines()[0]
        raise ValueError(f"device={device!r} cannot be used; use device=None or 'cpu'. {reason}") from failure
    return found
