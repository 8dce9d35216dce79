"""The best Gaussian q(f) = N(m, S) for a factorising likelihood, by L-BFGS over mean and covariance.

No natural gradients and no sites: the bound Σ E_q[log p] − KL[q ‖ N(0, K)] is climbed in (m, L), S = L Lᵀ.
Imports nothing of ours.
"""

from __future__ import annotations

import numpy as np
from scipy import optimize, stats


def bound(K, log_density, m, S):
    """Σ E_q[log p(yᵢ | fᵢ)] − KL[N(m, S) ‖ N(0, K)], in nats; ``log_density(f)`` acts on (…, n)."""
    data_term = expectations(log_density, m, np.diag(S))[0].sum()
    kl = np.trace(np.linalg.solve(K, S)) + m @ np.linalg.solve(K, m) - len(m)
    return data_term - 0.5 * (kl + np.linalg.slogdet(K)[1] - np.linalg.slogdet(S)[1])


def expectations(log_density, m, v):
    """E[log p] under N(mᵢ, vᵢ), and its derivatives in m and v by Stein's identity; a fine trapezoidal rule."""
    u = np.linspace(-9, 9, 1201)[:, None]
    weight = stats.norm.pdf(u) * (u[1] - u[0])
    logs = weight * log_density(m + np.sqrt(v) * u)
    return logs.sum(0), (logs * u).sum(0) / np.sqrt(v), 0.5 * (logs * (u**2 - 1)).sum(0) / v


def optimum(K, log_density):
    """Return (bound, m, S) at the optimum; K must be well conditioned."""
    n = len(K)
    rows, columns = np.tril_indices(n)
    prior_precision = np.linalg.inv(K)

    def unpack(x):
        L = np.zeros((n, n))
        L[rows, columns] = x[n:]
        return x[:n], L

    def negative(x):
        m, L = unpack(x)
        S = L @ L.T
        _, slope_m, slope_v = expectations(log_density, m, np.diag(S))
        grad_m = slope_m - prior_precision @ m
        grad_S = np.diag(slope_v) - 0.5 * prior_precision + 0.5 * np.linalg.inv(S)
        grad_L = (2 * grad_S @ L)[rows, columns]
        return -bound(K, log_density, m, S), -np.concatenate([grad_m, grad_L])

    x = np.concatenate([np.zeros(n), np.linalg.cholesky(K)[rows, columns]])
    options = {"maxiter": 5000, "maxfun": 20000, "ftol": 1e-15, "gtol": 1e-9, "maxcor": 40}
    for _ in range(3):  # a fresh start frees the search of its stale curvature
        x = optimize.minimize(negative, x, jac=True, method="L-BFGS-B", options=options).x
    m, L = unpack(x)
    return bound(K, log_density, m, L @ L.T), m, L @ L.T
