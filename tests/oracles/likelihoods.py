"""Loop-style oracles for likelihoods, written from definitions with SciPy; imports nothing of ours."""

from __future__ import annotations

import itertools

import numpy as np
from scipy import stats


def gaussian(y, f, variance):
    return stats.norm.logpdf(y, f, np.sqrt(variance))


def student_t(y, f, df, scale):
    return stats.t.logpdf((y - f) / scale, df) - np.log(scale)


def probit(y, f):
    return stats.norm.logcdf(f if y == 1 else -f)


def logit(y, f):
    return -np.logaddexp(0, -f if y == 1 else f)


def poisson(y, f, exposure=1.0):
    return stats.poisson.logpmf(y, exposure * np.exp(f))


def negative_binomial(y, f, dispersion, exposure=1.0):
    """NB2: mean μ, variance μ + a μ², as a count of failures before 1/a successes."""
    r = 1 / dispersion
    return stats.nbinom.logpmf(y, r, r / (r + exposure * np.exp(f)))


def ordinal(y, f, cutpoints):
    edges = np.concatenate([[-np.inf], cutpoints, [np.inf]])
    low, high = edges[int(y)] - f, edges[int(y) + 1] - f
    left = stats.norm.cdf(high) - stats.norm.cdf(low)
    right = stats.norm.sf(low) - stats.norm.sf(high)
    return np.log(np.where(low + high > 0, right, left))


def expectation(log_density, m, v):
    """E[log p(f)] under N(m, v): a fine trapezoidal rule over fourteen standard deviations."""
    u = np.linspace(-14, 14, 20001)
    weight = stats.norm.pdf(u) * (u[1] - u[0])
    seen = weight > 0
    return np.sum(weight[seen] * log_density(m + np.sqrt(v) * u[seen]))


def log_evidence(log_density, m, v):
    """log ∫ p(f) N(f; m, v) df: trapezoidal in t with u = peak + 1e-6 sinh t, so that no width is missed."""
    s = np.sqrt(v)
    grid = np.linspace(-14, 14, 20001)
    peak = grid[np.argmax(log_density(m + s * grid) - 0.5 * grid**2)]
    t = np.linspace(-18, 18, 80001)
    u = peak + 1e-6 * np.sinh(t)
    logs = log_density(m + s * u) + stats.norm.logpdf(u) + np.log(1e-6 * np.cosh(t))
    return np.log(np.sum(np.exp(logs - logs.max()))) + logs.max() + np.log(t[1] - t[0])


def softmax_expectations(y, m, v, n_nodes=24):
    """(value, α, β, probabilities) of one row under N(m, diag v), on a tensor grid over the C latents."""
    x, w = np.polynomial.hermite_e.hermegauss(n_nodes)
    w = w / w.sum()
    classes = len(m)
    value, alpha, beta, probs = 0.0, np.zeros(classes), np.zeros(classes), np.zeros(classes)
    for index in itertools.product(range(n_nodes), repeat=classes):
        f = np.array([m[c] + np.sqrt(v[c]) * x[index[c]] for c in range(classes)])
        weight = np.prod([w[i] for i in index])
        pi = np.exp(f - f.max())
        pi /= pi.sum()
        value += weight * np.log(pi[int(y)])
        for c in range(classes):
            alpha[c] += weight * ((c == y) - pi[c])
            beta[c] += weight * pi[c] * (1 - pi[c])
            probs[c] += weight * pi[c]
    return value, alpha, beta, probs


def weighted_gaussian_log_evidence(K, y, variance, weight):
    """Log density of the data set in which row i is written out ``weight[i]`` times."""
    rows = np.repeat(np.arange(len(y)), weight)
    covariance = K[np.ix_(rows, rows)] + np.diag(variance[rows])
    return stats.multivariate_normal.logpdf(y[rows], np.zeros(len(rows)), covariance)
