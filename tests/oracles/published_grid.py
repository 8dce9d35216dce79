"""The published objective of a grid of values, literally: dense Kronecker matrices, one loop per sum.

Imports nothing of ours.
"""

from __future__ import annotations

import math

import torch


def window(spectrum, d, log_scale, order):
    """Table of derivatives of g, §2.1 of the specification: order 0 to 2, at one lag."""
    if spectrum == "gaussian":
        s = torch.exp(log_scale)
        factor = [1.0, -2 * s * d, 4 * s**2 * d**2 - 2 * s][order]
        return factor * torch.exp(-s * d**2)
    alpha, r = math.sqrt(5) * torch.exp(log_scale), abs(d)
    factor = [
        1 + alpha * r + alpha**2 * r**2 / 3,
        -(alpha**2) / 3 * d * (1 + alpha * r),
        -(alpha**2) / 3 * (1 + alpha * r - alpha**2 * r**2),
    ][order]
    return factor * torch.exp(-alpha * r)


def covariance(spectrum, d, log_weight, log_scale, frequency, order):
    """∂ⁿ of Σ_q w_q g_q(d) cos(ω_q d), by Leibniz' rule."""
    total = 0.0
    for q in range(len(log_weight)):
        omega = 2 * math.pi * frequency[q]
        for j in range(order + 1):
            turned = omega ** (order - j) * torch.cos(omega * d + (order - j) * math.pi / 2)
            total = (
                total + math.comb(order, j) * torch.exp(log_weight[q]) * window(spectrum, d, log_scale[q], j) * turned
            )
    return total


def matrix(spectrum, x, parameters, order):
    rows = [torch.stack([covariance(spectrum, float(a - b), *parameters, order) for b in x]) for a in x]
    return torch.stack(rows)


def derivatives(spectrum, axes, U, kernels):
    """The function that returns any derivative of grid values at the nodes, in the short form."""
    eye = [torch.eye(len(x), dtype=torch.float64) for x in axes]
    K = {(j, order): matrix(spectrum, x, kernels[j], order) for j, x in enumerate(axes) for order in range(3)}

    def derivative(*orders):
        factors = [
            eye[j] if not n else K[j, n] @ torch.linalg.inv(K[j, 0] + 1e-6 * eye[j]) for j, n in enumerate(orders)
        ]
        dense = factors[0]
        for factor in factors[1:]:
            dense = torch.kron(dense, factor)
        return (dense @ U.reshape(-1)).reshape(U.shape)

    return derivative


def objective(spectrum, axes, U, log_tau, log_v, kernels, residual, forcing, boundary, boundary_weight):
    """J of §4.

    ``kernels`` has (log_weight, log_scale, frequency) per axis; ``residual`` takes a function that differentiates;
    ``boundary`` is a list of (index of node per axis, value), corners as often as they are on a side.
    """
    eye = [torch.eye(len(x), dtype=torch.float64) for x in axes]
    C = [matrix(spectrum, x, kernels[j], 0) + 1e-6 * eye[j] for j, x in enumerate(axes)]
    whole = C[0]
    for factor in C[1:]:
        whole = torch.kron(whole, factor)
    u = U.reshape(-1)
    J = -0.5 * torch.linalg.slogdet(whole)[1] - 0.5 * u @ torch.linalg.solve(whole, u)
    gap = sum((U[place] - value) ** 2 for place, value in boundary)
    J = J + boundary_weight * (0.5 * len(boundary) * log_tau - 0.5 * torch.exp(log_tau) * gap)

    r = residual(derivatives(spectrum, axes, U, kernels)) - forcing
    return J + 0.5 * U.numel() * log_v - 0.5 * torch.exp(log_v) * (r**2).sum()
