"""Draws of the observed y, for predictive distributions that mean and standard deviation do not describe."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

N_DRAWS = 1000  # a 97.5 % quantile then has a standard error of half a percentage point
CHUNK = 256  # rows drawn together: joint draws cost the cube of the rows, and only marginals are used


def has_gaussian_predictive(estimator: Any) -> bool:
    """Return whether mean and standard deviation say everything about y."""
    return bool(getattr(getattr(estimator, "likelihood_", None), "conjugate", True))


def observed_draws(estimator: Any, X: Any, *, random_state: Any, exposure: Any = None) -> np.ndarray:
    """Draw y at each row of X; draws of different rows are not to be compared with each other.

    Parameters
    ----------
    estimator : fitted estimator
        With ``sample_y(X, n_samples, random_state=…, latent=False)``.
    X : array-like or DataFrame of shape (n, d)
        Rows.
    random_state : int or RandomState
        Of the draws.
    exposure : array-like of shape (n,), optional
        Exposures of counts.

    Returns
    -------
    ndarray of shape (n, 1000)
        In units of y.
    """
    rows = X if hasattr(X, "iloc") else np.asarray(X)
    parts = []
    for start in range(0, len(rows), CHUNK):
        span = slice(start, start + CHUNK)
        side = {} if exposure is None else {"exposure": np.asarray(exposure)[span]}
        with warnings.catch_warnings():
            # Draws that differ between calls with other rows are no harm where only marginals are used.
            warnings.filterwarnings("ignore", message=".*no spectral density is known")
            parts.append(estimator.sample_y(rows[span], N_DRAWS, random_state=random_state, latent=False, **side))
    return np.concatenate([np.asarray(part) for part in parts])
