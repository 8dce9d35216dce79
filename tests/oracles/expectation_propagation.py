"""Expectation propagation for the probit likelihood, one site at a time; imports nothing of ours.

Algorithms 3.5 and 3.6 of Rasmussen and Williams (2006), with covariances recomputed from their definitions.
"""

from __future__ import annotations

import numpy as np
from scipy import stats


def fit(K, y, n_sweeps=60):
    """Return site parameters (ν, τ) and log Z_EP for y ∈ {−1, 1}."""
    n = len(y)
    nu, tau = np.zeros(n), np.zeros(n)
    for _ in range(n_sweeps):
        for i in range(n):
            mean, covariance = posterior(K, nu, tau)
            tau_cavity = 1 / covariance[i, i] - tau[i]
            nu_cavity = mean[i] / covariance[i, i] - nu[i]
            _, mean_hat, variance_hat = tilted_moments(y[i], nu_cavity / tau_cavity, 1 / tau_cavity)
            tau[i] = 1 / variance_hat - tau_cavity
            nu[i] = mean_hat / variance_hat - nu_cavity
    return nu, tau, log_evidence(K, y, nu, tau)


def posterior(K, nu, tau):
    """Mean and covariance of N(f; 0, K) ∏ exp(ν f − ½ τ f²), τ > 0 or all zero."""
    covariance = np.linalg.inv(np.linalg.inv(K) + np.diag(tau))
    return covariance @ nu, covariance


def tilted_moments(y, m, v):
    """log Ẑ, mean and variance of Φ(y f) N(f; m, v): eqs. 3.58 and 3.82."""
    z = y * m / np.sqrt(1 + v)
    log_z = stats.norm.logcdf(z)
    ratio = np.exp(stats.norm.logpdf(z) - log_z)
    mean = m + y * v * ratio / np.sqrt(1 + v)
    variance = v - v**2 * ratio / (1 + v) * (z + ratio)
    return log_z, mean, variance


def log_evidence(K, y, nu, tau):
    """Eq. 3.65: log ∫ p(f) ∏ t̃ᵢ, with each site's scale such that its cavity integral is Ẑᵢ."""
    n = len(y)
    mean, covariance = posterior(K, nu, tau)
    total = 0.0
    for i in range(n):
        tau_cavity = 1 / covariance[i, i] - tau[i]
        m, v = (mean[i] / covariance[i, i] - nu[i]) / tau_cavity, 1 / tau_cavity
        site_mean, site_variance = nu[i] / tau[i], 1 / tau[i]
        total += tilted_moments(y[i], m, v)[0] - stats.norm.logpdf(m, site_mean, np.sqrt(v + site_variance))
    return total + stats.multivariate_normal.logpdf(nu / tau, np.zeros(n), K + np.diag(1 / tau))


def predict(K, K_new, k_new, nu, tau):
    """Algorithm 3.6: mean and variance of the latent at new rows."""
    inverse = np.linalg.inv(K + np.diag(1 / tau))
    mean = K_new @ inverse @ (nu / tau)
    variance = [prior - row @ inverse @ row for row, prior in zip(K_new, k_new, strict=True)]
    return mean, np.array(variance)
