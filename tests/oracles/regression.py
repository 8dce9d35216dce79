"""Exact Gaussian-process regression from definitions, in NumPy and SciPy; imports nothing of ours."""

from __future__ import annotations

import numpy as np
from scipy import stats


def log_evidence(K, y, noise):
    """log N(y; 0, K + diag(noise)), in nats."""
    return stats.multivariate_normal.logpdf(y, np.zeros(len(y)), K + np.diag(noise))


def log_evidence_gradient(K, y, noise, slope):
    """Derivative of the log evidence when the covariance of y moves along ``slope``.

    ½ tr((a aᵀ − C⁻¹) dC), a = C⁻¹ y: Rasmussen and Williams (2006), eq. 5.9, trace by trace.
    """
    inverse = np.linalg.inv(K + np.diag(noise))
    a = inverse @ y
    total = 0.0
    for i in range(len(y)):
        for j in range(len(y)):
            total += 0.5 * (a[i] * a[j] - inverse[i, j]) * slope[j, i]
    return total


def predict(K, K_new, K_new_new, y, noise):
    """Mean and covariance of f at new rows: the joint Gaussian of (y, f*) with y given."""
    gain = K_new @ np.linalg.inv(K + np.diag(noise))
    return gain @ y, K_new_new - gain @ K_new.T
