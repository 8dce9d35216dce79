"""Laplace's approximation by algorithms 3.1 and 3.2 of Rasmussen and Williams (2006); imports nothing of ours."""

from __future__ import annotations

import numpy as np


def mode(K, log_prob, slope, curvature, n_steps=100):
    """Algorithm 3.1: the mode f̂ of p(f | y) and the approximate log evidence.

    ``log_prob(f)``, ``slope(f)`` and ``curvature(f)`` act row by row; the curvature −∂² log p must be ≥ 0.
    """
    n = len(K)
    f = np.zeros(n)
    for _ in range(n_steps):
        W = np.diag(curvature(f))
        root = np.sqrt(W)
        L = np.linalg.cholesky(np.eye(n) + root @ K @ root)
        b = W @ f + slope(f)
        a = b - root @ np.linalg.solve(L.T, np.linalg.solve(L, root @ K @ b))
        f = K @ a
    W = np.diag(curvature(f))
    B = np.eye(n) + np.sqrt(W) @ K @ np.sqrt(W)
    return f, -0.5 * a @ f + np.sum(log_prob(f)) - 0.5 * np.linalg.slogdet(B)[1]


def predict(K, K_new, k_new, f, slope, curvature):
    """Algorithm 3.2, lines 4–6: mean and variance of the latent at new rows, one by one."""
    root = np.diag(np.sqrt(curvature(f)))
    L = np.linalg.cholesky(np.eye(len(K)) + root @ K @ root)
    mean, variance = [], []
    for row, prior in zip(K_new, k_new, strict=True):
        mean.append(row @ slope(f))
        v = np.linalg.solve(L, root @ row)
        variance.append(prior - v @ v)
    return np.array(mean), np.array(variance)
