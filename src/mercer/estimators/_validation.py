"""Check what the user passes, in the user's words, for arrays, data frames and tensors alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.utils.validation import check_array, check_consistent_length, validate_data
from torch import Tensor


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
        return validate_data(estimator, X, reset=reset, dtype=[np.float64, np.float32], accept_sparse=False)
    name = type(estimator).__name__
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
    if isinstance(y, Tensor):
        y = to_numpy(y)
    y = check_array(y, ensure_2d=False, allow_nd=True, dtype="numeric", ensure_all_finite="allow-nan", input_name="y")
    if y.ndim not in (1, 2):
        raise ValueError(f"y must have shape (n_samples,) or (n_samples, n_outputs), got {y.shape}.")
    check_consistent_length(X, y)
    return y.astype(np.float64)


def check_row_vector(name: str, values: Any, X: Any, *, positive: bool) -> np.ndarray:
    """Return per-row side information (n,) as float64.

    Raises
    ------
    ValueError
        Wrong length, or entries that are not finite and positive (non-negative if not ``positive``).
    """
    values = to_numpy(values)
    n = len(X)
    values = check_array(values, ensure_2d=False, dtype=np.float64, input_name=name)
    if values.ndim == 0:
        values = np.full(n, float(values))
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
    """Return the requested device, or that of X; clear error where CUDA is asked for and absent."""
    if device is None:
        return X.device if isinstance(X, Tensor) else torch.device("cpu")
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda' was asked for and no CUDA device is available; use device=None or 'cpu'.")
    return device
