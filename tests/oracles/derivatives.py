"""Derivatives of covariances by nested automatic differentiation, pair by pair, away from lag zero. Imports nothing of
ours.
"""

from __future__ import annotations

import math

import torch


def nested(function, X1, X2, a, b):
    """Fill the matrix of ∂^a ∂^b function(x, x′) for all pairs of rows."""
    out = torch.empty(len(X1), len(X2), dtype=torch.float64)
    for i in range(len(X1)):
        for j in range(len(X2)):
            x, y = X1[i].clone().requires_grad_(), X2[j].clone().requires_grad_()
            value = function(x, y)
            for point, order in ((x, a), (y, b)):
                for column, n in enumerate(order):
                    for _ in range(n):
                        (slope,) = torch.autograd.grad(value, point, create_graph=True, allow_unused=True)
                        value = 0.0 * x.sum() + 0.0 * y.sum() + (0.0 if slope is None else slope[column])
            out[i, j] = value.detach()
    return out


def window(spectrum, d, ell):
    if spectrum == "gaussian":
        return torch.exp(-(d**2) / (2 * ell**2))
    r = d * torch.sign(d.detach())  # signed lag: smooth on either side of zero
    a = math.sqrt(5) * r / ell
    return (1 + a + a**2 / 3) * torch.exp(-a)


def mixture(spectrum, weight, ell, mu):
    def function(x, y):
        total = 0.0
        for q in range(len(weight)):
            product = weight[q]
            for j in range(len(x)):  # the adjoint of torch.prod divides by factors that may be nearly zero
                d = x[j] - y[j]
                product = product * window(spectrum, d, ell[q, j]) * torch.cos(2 * math.pi * mu[q, j] * d)
            total = total + product
        return total

    return function


def distance(x, y, ell):
    return (((x - y) / ell) ** 2).sum().sqrt()


def matern32(ell):
    def function(x, y):
        a = math.sqrt(3) * distance(x, y, ell)
        return (1 + a) * torch.exp(-a)

    return function


def matern52(ell):
    def function(x, y):
        a = math.sqrt(5) * distance(x, y, ell)
        return (1 + a + a**2 / 3) * torch.exp(-a)

    return function


def rbf(ell):
    return lambda x, y: torch.exp(-0.5 * (((x - y) / ell) ** 2).sum())


def rational_quadratic(ell, alpha):
    return lambda x, y: (1 + (((x - y) / ell) ** 2).sum() / (2 * alpha)) ** (-alpha)


def linear(variance):
    return lambda x, y: (variance * x * y).sum()
