"""Kernels written pair by pair from their definitions, in NumPy. Imports nothing of ours."""

from __future__ import annotations

import numpy as np


def distance(x, y, lengthscale):
    total = 0.0
    for i in range(len(x)):
        total += ((x[i] - y[i]) / lengthscale[i]) ** 2
    return np.sqrt(total)


def rbf(x, y, lengthscale):
    return np.exp(-0.5 * distance(x, y, lengthscale) ** 2)


def matern12(x, y, lengthscale):
    return np.exp(-distance(x, y, lengthscale))


def matern32(x, y, lengthscale):
    a = np.sqrt(3.0) * distance(x, y, lengthscale)
    return (1.0 + a) * np.exp(-a)


def matern52(x, y, lengthscale):
    a = np.sqrt(5.0) * distance(x, y, lengthscale)
    return (1.0 + a + a * a / 3.0) * np.exp(-a)


def rational_quadratic(x, y, lengthscale, alpha):
    return (1.0 + distance(x, y, lengthscale) ** 2 / (2.0 * alpha)) ** (-alpha)


def periodic(x, y, period, lengthscale):
    total = 0.0
    for i in range(len(x)):
        total += np.sin(np.pi * (x[i] - y[i]) / period[i]) ** 2 / lengthscale[i]
    return np.exp(-2.0 * total)


def linear(x, y, variance):
    total = 0.0
    for i in range(len(x)):
        total += variance[i] * x[i] * y[i]
    return total


def gram(function, X1, X2):
    """Fill the matrix of ``function(x, y)`` for all pairs of rows."""
    K = np.empty((len(X1), len(X2)))
    for i in range(len(X1)):
        for j in range(len(X2)):
            K[i, j] = function(X1[i], X2[j])
    return K
