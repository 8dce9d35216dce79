"""Vecchia's approximation of the data: each row given some of the rows before it.

p̂(y) = ∏ᵢ p(yᵢ | y_sᵢ) of noisy data is one sparse inverse Cholesky factor U of K + diag(noise), column by column,
so that log p̂(y) is a plain sum over rows and any subset of rows estimates it without bias.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mercer.families.base import Prior
from mercer.families.nearness import Nearness
from mercer.families.sic_plan import SicPlan
from mercer.kernels.evaluate import gram
from mercer.linalg.sic import column_factors


def response_log_likelihood(
    prior: Prior, plan: SicPlan, y: Tensor, noise: Tensor, rows: Tensor | None = None
) -> Tensor:
    """Return log p̂(y) of noisy data, in nats, with its gradient in the hyperparameters.

    Parameters
    ----------
    prior : Prior
    plan : SicPlan
    y : (*b, n)
        Targets minus the prior mean, in the order of the data; batch members share the factor.
    noise : (n,) or (1,)
        Noise variance of each row, > 0, in units of y².
    rows : (r,) int tensor, optional
        Positions in the plan's order to sum over instead of all; times n/r the expectation over random rows is
        log p̂(y).

    Returns
    -------
    (*b,)

    Notes
    -----
    O(n m³) operations. Chunks of columns are recomputed for the gradient, so that memory is O(n m) for the pattern
    and O(chunk · m²) for the rest.

    References
    ----------
    Vecchia (1988); Guinness (2021), "Gaussian process learning via Fisher scoring of Vecchia's approximation".
    """
    noise = noise.expand(plan.X.shape[-2])[plan.order]
    y = y[..., plan.order]
    total = y.new_zeros(y.shape[:-1])
    for chunk in _chunks(plan, rows):

        def of_chunk(y: Tensor, noise: Tensor, chunk: Tensor = chunk) -> Tensor:
            columns = plan.pattern.columns[chunk]
            u = column_factors(_tiles(prior, plan, noise, columns), plan.pattern.padding[chunk])
            white = (u * y[..., columns.clamp_min(0)]).sum(-1)
            return (u[:, -1].log() - 0.5 * white.square()).sum(-1) - 0.5 * math.log(2 * math.pi) * len(chunk)

        total = total + checkpoint(of_chunk, y, noise, use_reentrant=False, preserve_rng_state=False)
    return total


@torch.no_grad()
def response_marginals(
    prior: Prior, plan: SicPlan, y: Tensor, noise: Tensor, X_new: Tensor, n_neighbors: int = 60
) -> tuple[Tensor, Tensor]:
    """Return mean and variance of the latent function at new rows, each given the nearest noisy data.

    Parameters
    ----------
    prior, plan, y, noise
        As in `response_log_likelihood`.
    X_new : (q, d)
    n_neighbors : int
        How many data each new row is conditioned on.

    Returns
    -------
    mean : (*b, q)
        Without the prior mean.
    variance : (q,)
        Units of f².
    """
    data = _data_first(plan, y, noise, X_new[:0])
    found, _ = Nearness(prior.kernel, plan.X, plan.policy).nearest(plan.X, X_new, n_neighbors)
    near = torch.as_tensor(found, device=X_new.device)
    means, variances = [], []
    size = plan.policy.chunk_rows(4 * (near.shape[-1] + 1) ** 2)
    for rows, columns in zip(X_new.split(size), near.split(size), strict=True):
        given, own = data.X[columns], rows.unsqueeze(-2)
        tiles = gram(prior.kernel, torch.cat([given, own], -2), policy=plan.policy)
        tiles.diagonal(dim1=-2, dim2=-1)[:, :-1].add_(data.noise[columns])
        u = column_factors(tiles, torch.zeros(tiles.shape[:-1], dtype=torch.bool, device=tiles.device))
        means.append(-(u[:, :-1] * data.y[..., columns]).sum(-1) / u[:, -1])
        variances.append(u[:, -1].reciprocal().square())
    return torch.cat(means, -1), torch.cat(variances)


@torch.no_grad()
def response_joint(
    prior: Prior, plan: SicPlan, y: Tensor, noise: Tensor, X_new: Tensor, n_neighbors: int = 60
) -> tuple[Tensor, Tensor]:
    """Return mean (*b, q) and covariance (q, q) of the latent function at new rows.

    Each new row is given the nearest of the noisy data and of the new rows before it, so that the draws of one
    sparse factor agree with one another. O(q m³ + q³) operations.
    """
    q, n = len(X_new), len(plan.X)
    data = _data_first(plan, y, noise, X_new)
    nearness = Nearness(prior.kernel, plan.X, plan.policy)
    near, squared = (
        torch.as_tensor(each, device=X_new.device) for each in nearness.nearest(plan.X, X_new, n_neighbors)
    )
    new = torch.arange(q, device=X_new.device)
    away = torch.cat([squared, nearness.squared(X_new, X_new).to(squared)], -1)
    # a row sees only the new rows before it
    away[:, near.shape[-1] :].masked_fill_(new >= new.unsqueeze(-1), torch.inf)
    candidates = torch.cat([near, (n + new).expand(q, q)], -1)
    away, chosen = away.sort(dim=-1, stable=True)
    picked = candidates.gather(-1, chosen).masked_fill(away.isinf(), -1)[:, :n_neighbors]
    columns = torch.cat([picked.sort(-1).values, n + new.unsqueeze(-1)], -1)
    index = columns.clamp_min(0)
    tiles = gram(prior.kernel, data.X[index], policy=plan.policy) + torch.diag_embed(data.noise[index])
    u = column_factors(tiles, columns < 0)
    # U_** has the columns' entries at new rows, and pulls on the data by the others
    of_new = columns >= n
    U = u.new_zeros(q, q)
    rows, places = of_new.nonzero(as_tuple=True)
    U[columns[rows, places] - n, rows] = u[rows, places]
    pull = -(u.masked_fill(of_new, 0.0) * data.y[..., index]).sum(-1)
    mean = torch.linalg.solve_triangular(U.mT, pull.unsqueeze(-1), upper=False).squeeze(-1)
    root = torch.linalg.solve_triangular(U, torch.eye(q, dtype=U.dtype, device=U.device), upper=True)
    return mean, root.mT @ root


@dataclass(frozen=True)
class _Given:
    """Data in the plan's order with new rows behind them, which have neither noise nor targets."""

    X: Tensor
    y: Tensor
    noise: Tensor


def _data_first(plan: SicPlan, y: Tensor, noise: Tensor, X_new: Tensor) -> _Given:
    noise = noise.expand(len(plan.X))[plan.order]
    targets = torch.cat([y[..., plan.order], y.new_zeros(*y.shape[:-1], len(X_new))], -1)
    return _Given(torch.cat([plan.X, X_new]), targets, torch.cat([noise, noise.new_zeros(len(X_new))]))


def _chunks(plan: SicPlan, rows: Tensor | None) -> list[Tensor]:
    columns = plan.pattern.columns
    rows = torch.arange(len(columns), device=columns.device) if rows is None else rows
    return list(rows.split(plan.policy.chunk_rows(4 * columns.shape[-1] ** 2)))


def _tiles(prior: Prior, plan: SicPlan, noise: Tensor, columns: Tensor) -> Tensor:
    """Return K_cc + diag(noise_c) of columns (B, w): (B, w, w)."""
    index = columns.clamp_min(0)
    return gram(prior.kernel, plan.X[index], policy=plan.policy) + torch.diag_embed(noise[index])
