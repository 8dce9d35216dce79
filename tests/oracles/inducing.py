"""Sparse variational inference at inducing points from its definitions, dense and slow; imports nothing of ours.

u are values at Z; q(u) = N(m, S); q(f) = ∫ p(f | u) q(u) du. Every function is one formula with explicit inverses, in
torch, so that autograd gives gradients in whatever the covariances were made of.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import optimize

OWN = 1e-10  # variance that inducing values have beside the prior's, relative to it: K_uu = k(Z, Z) + OWN diag


# ---- closed formulas for covariances, differentiable at coinciding rows


def rbf(X1, X2, lengthscale, outputscale=1.0):
    return outputscale * torch.exp(-0.5 * _squares(X1, X2, lengthscale))


def matern52(X1, X2, lengthscale, outputscale=1.0):
    squares = _squares(X1, X2, lengthscale)
    apart = squares > 0
    a = torch.where(apart, 5.0 * squares, 1.0).sqrt()
    return outputscale * torch.where(apart, (1.0 + a + a**2 / 3.0) * torch.exp(-a), 1.0)


def _squares(X1, X2, lengthscale):
    return ((X1.unsqueeze(-2) - X2.unsqueeze(-3)) / lengthscale).square().sum(-1)


def between(kernel, Z1, Z2):
    """Cov(u1, u2): an inducing value is f(z) and a share of its own, which it keeps wherever z is spoken of."""
    same = (Z1.unsqueeze(-2) == Z2.unsqueeze(-3)).all(-1)
    own = OWN * torch.stack([kernel(z[None], z[None])[0, 0] for z in Z2])
    return kernel(Z1, Z2) + same * own


def covariances(kernel, Z, X):
    """K_uu, K_uf and K_ff."""
    return between(kernel, Z, Z), kernel(Z, X), kernel(X, X)


# ---- Titsias (2009)


def collapsed_bound(Kuu, Kuf, Kff, y, R):
    """log N(y; 0, Q + R) − ½ tr R⁻¹ (K_ff − Q), Q = K_fu K_uu⁻¹ K_uf: eq. 9, for noise of covariance R."""
    Q = Kuf.T @ torch.linalg.inv(Kuu) @ Kuf
    fit = log_density(y, torch.zeros_like(y), Q + R)
    return fit - 0.5 * torch.trace(torch.linalg.inv(R) @ (Kff - Q))


def optimal_q(Kuu, Kuf, y, R):
    """m = K_uu Σ K_uf R⁻¹ y and S = K_uu Σ K_uu with Σ = (K_uu + K_uf R⁻¹ K_fu)⁻¹: eq. 10."""
    middle = torch.linalg.inv(Kuu + Kuf @ torch.linalg.inv(R) @ Kuf.T)
    return Kuu @ middle @ Kuf @ torch.linalg.inv(R) @ y, Kuu @ middle @ Kuu


def log_density(y, mean, covariance):
    """log N(y; mean, covariance)."""
    gap = y - mean
    logdet = torch.linalg.slogdet(covariance)[1]
    return -0.5 * (gap @ torch.linalg.inv(covariance) @ gap + logdet + len(y) * math.log(2 * math.pi))


# ---- q(f) of any q(u)


def predict(Kuu, Kus, Kss, m, S):
    """Mean and covariance of f at other rows: E and Cov of E[f | u] plus Cov(f | u)."""
    A = Kus.T @ torch.linalg.inv(Kuu)
    return A @ m, Kss - A @ Kus + A @ S @ A.T


def kl(Kuu, m, S):
    """KL[N(m, S) ‖ N(0, K_uu)]."""
    inverse = torch.linalg.inv(Kuu)
    logs = torch.linalg.slogdet(Kuu)[1] - torch.linalg.slogdet(S)[1]
    return 0.5 * (torch.trace(inverse @ S) + m @ inverse @ m - len(m) + logs)


def elbo(Kuu, Kuf, Kff, m, S, log_prob):
    """Σ E_q[log p(yᵢ | fᵢ)] − KL[q(u) ‖ p(u)]: the bound of SVGP; ``log_prob(f)`` acts on (…, n)."""
    mean, covariance = predict(Kuu, Kuf, Kff, m, S)
    return expectations(log_prob, mean, covariance.diagonal()).sum() - kl(Kuu, m, S)


def expectations(log_prob, m, v):
    """E[log p] under N(mᵢ, vᵢ) by a fine trapezoidal rule."""
    u = torch.linspace(-9, 9, 1201, dtype=m.dtype)[:, None]
    weight = torch.exp(-0.5 * u**2) / math.sqrt(2 * math.pi) * (u[1] - u[0])
    return (weight * log_prob(m + v.sqrt() * u)).sum(0)


def optimum(Kuu, Kuf, Kff, log_prob):
    """(bound, m, S) at the top of the bound over all m and S = T Tᵀ, climbed by L-BFGS without any natural gradient."""
    n = len(Kuu)
    rows, columns = np.tril_indices(n)

    def unpack(x):
        T = x.new_zeros(n, n).index_put((torch.as_tensor(rows), torch.as_tensor(columns)), x[n:])
        return x[:n], T @ T.T

    def negative(x):
        x = torch.tensor(x, requires_grad=True)
        value = -elbo(Kuu, Kuf, Kff, *unpack(x), log_prob)
        return value.item(), torch.autograd.grad(value, x)[0].numpy()

    x = np.concatenate([np.zeros(n), torch.linalg.cholesky(Kuu).numpy()[rows, columns]])
    options = {"maxiter": 5000, "maxfun": 20000, "ftol": 1e-15, "gtol": 1e-9, "maxcor": 40}
    for _ in range(3):  # a fresh start frees the search of its stale curvature
        x = optimize.minimize(negative, x, jac=True, method="L-BFGS-B", options=options).x
    m, S = unpack(torch.as_tensor(x))
    return elbo(Kuu, Kuf, Kff, m, S, log_prob), m, S


# ---- q(u) of sites


def q_of_sites(Kuu, Kuf, linear, precision, nu=0.0, N=0.0):
    """m and S of p(u) exp(νᵀu − ½ uᵀN u) ∏ exp(λ1 a u − ½ λ2 (a u)²), a = k_fu K_uu⁻¹ of the row."""
    A = Kuf.T @ torch.linalg.inv(Kuu)
    S = torch.linalg.inv(torch.linalg.inv(Kuu) + A.T @ torch.diag(precision) @ A + N)
    return S @ (A.T @ linear + nu), S


def log_partition(Kuu, Kuf, Kff, linear, precision, nu=0.0, N=0.0):
    """log ∫ p(u) exp(νᵀu − ½ uᵀN u) ∏ exp(E_{p(f | u)}[λ1 f − ½ λ2 f²]) du."""
    m, S = q_of_sites(Kuu, Kuf, linear, precision, nu, N)
    logs = torch.linalg.slogdet(S)[1] - torch.linalg.slogdet(Kuu)[1]
    left = Kff.diagonal() - (Kuf.T @ torch.linalg.inv(Kuu) @ Kuf).diagonal()
    return 0.5 * (m @ torch.linalg.inv(S) @ m + logs) - 0.5 * (precision * left).sum()


def q_of_form(form, Kuu, first, second):
    """m and S of dual parameters in one of three coordinates: u itself, K_uu⁻¹u, or L⁻¹u with L Lᵀ = K_uu."""
    if form == "U":
        S = torch.linalg.inv(torch.linalg.inv(Kuu) + second)
        return S @ first, S
    if form == "K":
        gain = Kuu @ torch.linalg.inv(Kuu + second)
        return gain @ first, gain @ Kuu
    L = torch.linalg.cholesky(Kuu)
    B = torch.linalg.inv(torch.eye(len(Kuu), dtype=Kuu.dtype) + second)
    return L @ B @ first, L @ B @ L.T


def dual_form(form, Kuu, m, S):
    """Dual parameters, posterior minus prior, of N(m, S): the inverse of `q_of_form`."""
    nu, N = torch.linalg.inv(S) @ m, torch.linalg.inv(S) - torch.linalg.inv(Kuu)
    left = {"U": torch.eye(len(Kuu), dtype=Kuu.dtype), "K": Kuu, "W": torch.linalg.cholesky(Kuu).T}[form]
    return left @ nu, left @ N @ left.T


# ---- Bui, Nguyen and Turner (2017), streaming sparse regression at fixed hyperparameters


def streaming(kernel, Z_old, m, S, Z, X, y, R):
    """(bound, m', S') at Z after data (X, y) with noise R, from q(a) = N(m, S) at Z_old: section 3.2.

    The old posterior over the old prior is seen as observations ỹ = D S⁻¹ m of a with noise D = (S⁻¹ − K_aa⁻¹)⁻¹.
    """
    Kaa, Kbb = between(kernel, Z_old, Z_old), between(kernel, Z, Z)
    D = torch.linalg.inv(torch.linalg.inv(S) - torch.linalg.inv(Kaa))
    pull = torch.linalg.inv(S) @ m
    targets, noise = torch.cat([y, D @ pull]), torch.block_diag(R, D)
    Kbf = torch.cat([kernel(Z, X), between(kernel, Z, Z_old)], 1)
    prior = torch.block_diag(kernel(X, X), Kaa)  # of which the blocks on the diagonal are looked at
    logs = [torch.linalg.slogdet(each)[1] for each in (D, Kaa, S)]
    constant = pull @ D @ pull - m @ pull + logs[0] + logs[1] - logs[2] + len(m) * math.log(2 * math.pi)
    bound = collapsed_bound(Kbb, Kbf, prior, targets, noise) + 0.5 * constant
    return bound, *optimal_q(Kbb, Kbf, targets, noise)
