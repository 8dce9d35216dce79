"""Gaussian-process regression as a user sees it, in the units of the data: dense SciPy, imports nothing of ours."""

from __future__ import annotations

import numpy as np
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.spatial.distance import cdist


def rbf(X1, X2, lengthscale, outputscale=1.0):
    return outputscale * np.exp(-0.5 * cdist(X1 / lengthscale, X2 / lengthscale, "sqeuclidean"))


def matern52(X1, X2, lengthscale, outputscale=1.0):
    a = np.sqrt(5.0) * cdist(X1 / lengthscale, X2 / lengthscale)
    return outputscale * (1.0 + a + a**2 / 3.0) * np.exp(-a)


def matern52_slopes(X, lengthscale, outputscale):
    """Yield ∂K/∂ log ℓⱼ for every column, then ∂K/∂ log s, of the Matérn-5/2 kernel."""
    a = np.sqrt(5.0) * cdist(X / lengthscale, X / lengthscale)
    for column, ell in zip(X.T, lengthscale, strict=True):
        yield outputscale * 5.0 / 3.0 * (1.0 + a) * np.exp(-a) * (np.subtract.outer(column, column) / ell) ** 2
    yield outputscale * (1.0 + a + a**2 / 3.0) * np.exp(-a)


class Regression:
    """f ~ GP(mean, k), y = f + ε, ε ~ N(0, diag(noise)); ``K`` is the covariance of f at the data."""

    def __init__(self, K, y, noise, mean=0.0):
        self.noise, self.mean = np.broadcast_to(noise, y.shape), mean
        self.L = cholesky(K + np.diag(self.noise), lower=True)
        self.residual = y - mean
        self.alpha = cho_solve((self.L, True), self.residual)

    def log_evidence(self):
        n = len(self.alpha)
        logdet = 2.0 * np.log(np.diag(self.L)).sum()
        return -0.5 * (self.residual @ self.alpha + logdet + n * np.log(2.0 * np.pi))

    def slope(self, dC):
        """Derivative of the log evidence along dC, a change of the covariance of y: ½ tr((ααᵀ − C⁻¹) dC)."""
        inverse = cho_solve((self.L, True), np.eye(len(self.alpha)))
        return 0.5 * (self.alpha @ dC @ self.alpha - (inverse * dC).sum())

    def predict(self, K_new, K_new_new):
        """Mean and covariance of f at new rows; ``K_new`` is the covariance of new and old rows."""
        half = solve_triangular(self.L, K_new.T, lower=True)
        return self.mean + K_new @ self.alpha, K_new_new - half.T @ half
