"""Vecchia's approximation of the residual of inducing points: its factors, for noisy data, the latent prior, new rows.

In the notation of `mercer.families.hybrid_plan` the data y = μ + Φ u + r + ε have the covariance Φ Φᵀ + (U Uᵀ)⁻¹, U
the sparse inverse Cholesky factor of R + diag(noise). Everything follows from W = Uᵀ Φ, b = Uᵀ y and B = I + Wᵀ W:
p(u | y) = N(B⁻¹ Wᵀ b, B⁻¹), and given u only neighbours' residuals matter to a row. New rows are more columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mercer.families.base import Prior
from mercer.families.hybrid_plan import HybridPlan, Points, Residual
from mercer.families.nearness import Nearness
from mercer.families.vecchia import Appended, rows_before
from mercer.linalg.cholesky import NotPositiveDefiniteError
from mercer.linalg.sic import Pattern, column_factors
from mercer.policy import NumericalPolicy

_SMALLEST_PIVOT = 1e3  # times ε: a conditional variance below, relative to the prior's, is rounding
# nuggets of new rows, tried in turn, in units of prior variance and of the square root of a rounding error: a new row
# may be one of the data, or of the others
_APART = (1e-2, 1.0, 1e2)


def response_log_likelihood(prior: Prior, plan: HybridPlan, y: Tensor, noise: Tensor) -> Tensor:
    """Return log p̂(y) of noisy data, in nats, with its gradient in the hyperparameters.

    Σ log Uᵢᵢ − ½ log|B| − ½ bᵀb + ½ bᵀ W B⁻¹ Wᵀ b − (n/2) log 2π.

    Parameters
    ----------
    prior : Prior
    plan : HybridPlan
    y : (*b, n)
        Targets minus the prior mean, in the order of the data.
    noise : (*b, n), or fewer dimensions
        Noise variance of each row, > 0, in units of y²; batch members with one noise share the factor.

    Returns
    -------
    (*b,)

    Notes
    -----
    O(n (m³ + m² M + M²)) operations. Chunks of columns are recomputed for the gradient, so that memory is O(n M) for
    Φ and O(chunk · m (m + M)) for the rest.

    References
    ----------
    Gyger, Furrer and Sigrist (2025), arXiv 2507.05064.
    """
    residual = Residual(prior.kernel, plan.Z, plan.policy)
    noise = noise.expand(*noise.shape[:-1], len(plan.X))
    sums = response_sums(plan, residual, residual.points(plan.X), y[..., plan.order], noise[..., plan.order])
    L, inside = sums.solved()
    fit = 0.5 * (sums.square - inside.square().sum(-1))
    half_logdet = L.diagonal(dim1=-2, dim2=-1).log().sum(-1) - sums.log_diagonal
    return -half_logdet - fit - 0.5 * y.shape[-1] * math.log(2 * math.pi)


@dataclass(frozen=True)
class Sums:
    """Σ log Uᵢᵢ (*b,), bᵀ b (*b,), Wᵀ W (*b, M, M) and Wᵀ b (*b, M)."""

    log_diagonal: Tensor
    square: Tensor
    gram: Tensor
    cross: Tensor

    def solved(self) -> tuple[Tensor, Tensor]:
        """Return L, L Lᵀ = B = Cov(u | y)⁻¹, (*b, M, M), and L⁻¹ Wᵀ b, (*b, M), so that E(u | y) is L⁻ᵀ of that."""
        identity = torch.eye(self.gram.shape[-1], dtype=self.gram.dtype, device=self.gram.device)
        L = torch.linalg.cholesky(self.gram + identity)
        return L, torch.linalg.solve_triangular(L, self.cross.unsqueeze(-1), upper=False).squeeze(-1)


def response_sums(plan: HybridPlan, residual: Residual, data: Points, y: Tensor, noise: Tensor) -> Sums:
    """Go through the columns of noisy data (*b, n), in the plan's order, in chunks, and keep sums only."""
    table = RowTable(data.features)

    def of_chunk(y: Tensor, noise: Tensor, chunk: Tensor) -> tuple[Tensor, ...]:
        u, features = _columns(plan, residual, table, noise, chunk)
        W, b = (u.unsqueeze(-2) @ features).squeeze(-2), (u * y[..., plan.pattern.columns[chunk].clamp_min(0)]).sum(-1)
        cross = (b.unsqueeze(-2) @ W).squeeze(-2)
        return u[..., -1].log().sum(-1), b.square().sum(-1), W.mT @ W, cross

    totals: list[Any] = [0.0, 0.0, 0.0, 0.0]
    for chunk in _chunks(plan, noise):
        parts = checkpoint(of_chunk, y, noise, chunk, use_reentrant=False, preserve_rng_state=False)
        totals = [total + part for total, part in zip(totals, parts, strict=True)]
    return Sums(*totals)


def residual_factor(prior: Prior, plan: HybridPlan, residual: Residual, data: Points) -> tuple[Tensor, float]:
    """Return U of the latent residual, (n, w), differentiable in the hyperparameters, and the nugget that it has.

    Raises
    ------
    NotPositiveDefiniteError
        Some row is known to rounding from inducing points and neighbours, at the largest nugget too.
    """
    size = plan.prior_variance(prior)
    while True:
        table, share = RowTable(data.features), plan.nugget.value
        nugget = (share * size).expand(len(plan.X))

        def of_chunk(nugget: Tensor, chunk: Tensor, table: RowTable = table) -> Tensor:
            return _columns(plan, residual, table, nugget, chunk)[0]

        try:
            chunks = [
                checkpoint(of_chunk, nugget, chunk, use_reentrant=False, preserve_rng_state=False)
                for chunk in _chunks(plan, nugget)
            ]
            U = torch.cat(chunks, -2)
            known = U.detach()[..., -1].square().amax() * size.detach()
            if bool(known * _SMALLEST_PIVOT * torch.finfo(U.dtype).eps > 1.0):
                raise NotPositiveDefiniteError("A row is so close to its neighbours that only rounding is left of it.")
            return U, share
        except NotPositiveDefiniteError as failure:
            plan.nugget.raise_after(failure)


def _columns(
    plan: HybridPlan, residual: Residual, table: RowTable, noise: Tensor, chunk: Tensor
) -> tuple[Tensor, Tensor]:
    """Return columns ``chunk`` (B,) of the factor of R + diag(noise), (*b, B, w), and the features at them."""
    index = plan.pattern.columns[chunk].clamp_min(0)
    near = Points(plan.X[index], table.rows(index))
    tiles = residual.between(near) + torch.diag_embed(noise[..., index])
    return column_factors(tiles, plan.pattern.padding[chunk]), near.features


def _chunks(plan: HybridPlan, noise: Tensor) -> tuple[Tensor, ...]:
    """Split the columns so that the tiles of a chunk, with features, fit the policy."""
    rows = torch.arange(plan.pattern.n, device=noise.device)
    return rows.split(chunk_rows(plan.policy, plan.pattern.columns.shape[-1], len(plan.Z), noise))


def chunk_rows(policy: NumericalPolicy, width: int, rank: int, members: Tensor) -> int:
    """Return how many tiles of ``width`` rows with features, for each member of a batch (*b, n), fit the policy."""
    return policy.chunk_rows(tile_elements(width, rank, members))


def tile_elements(width: int, rank: int, members: Tensor) -> int:
    """Return the elements that a tile of ``width`` rows with ``rank`` features takes, for a batch (*b, n)."""
    return width * (4 * max(1, members.shape[:-1].numel()) * width + 3 * rank)


def append(
    prior: Prior,
    plan: HybridPlan,
    residual: Residual,
    data: Points,
    X_new: Tensor,
    noise: Tensor | None,
    n_neighbors: int,
    joint: bool,
    nugget: float,
    nearness: Nearness,
) -> tuple[Appended, Tensor]:
    """Return the columns of new rows behind the data, given residuals, and their features.

    Parameters
    ----------
    prior, plan, residual
    data : (n, d) Points
        The planned rows.
    X_new : (*t, q, d)
        Sets of rows, which know nothing of one another. Both results are differentiable in it.
    noise : (*b, n) or None
        Noise variance of the data in the plan's order; None if it is latent residuals that are given.
    n_neighbors : int
        How many each new row is given: the most correlated of the data and, if ``joint``, of its set's rows before it.
    joint : bool
    nugget : float
        Of `residual_factor`, where latent residuals are given.
    nearness : Nearness

    Returns
    -------
    Appended
    (rows, M)
        Φ at the new rows, one set after the other.
    """
    n, q = len(plan.X), X_new.shape[:-1].numel()
    new = residual.points(X_new.reshape(q, -1))
    columns = _columns_of_new(plan, residual, nearness, data, new, n_neighbors, X_new.shape[-2] if joint else 1)
    both = Points(torch.cat([data.X, new.X]), torch.cat([data.features, new.features]))
    size = plan.prior_variance(prior).detach()
    shared = nugget * size if noise is None else 0.0 * size
    noise = shared.expand(n) if noise is None else noise
    reason = NotPositiveDefiniteError("The policy has no jitter left.")
    for apart in _APART:
        own = shared + apart * torch.finfo(size.dtype).eps ** 0.5 * size
        added = torch.cat([noise, own.expand(*noise.shape[:-1], q)], -1)
        try:
            found = []
            for chunk in columns.split(chunk_rows(plan.policy, columns.shape[-1], len(plan.Z), added)):
                index = chunk.clamp_min(0)
                tiles = residual.between(both[index]) + torch.diag_embed(added[..., index])
                found.append(column_factors(tiles, chunk < 0))
            u, of_new = torch.cat(found, -2), columns >= n
        except NotPositiveDefiniteError as failure:
            reason = failure
            continue
        pattern = Pattern(torch.where(of_new, columns - n, -1)[:, :-1])
        weights, factor = -u.masked_fill(of_new, 0.0), u.masked_fill(~of_new, 0.0)
        return Appended(columns.masked_fill(of_new, -1), weights, factor, pattern), new.features
    raise reason


@torch.no_grad()
def _columns_of_new(
    plan: HybridPlan, residual: Residual, nearness: Nearness, data: Points, new: Points, m: int, q: int
) -> Tensor:
    """Return the nearest data and rows before each new row in its set of q, then itself, ascending with −1 first."""
    n = len(data.X)
    near, squared = plan.nearest(residual, nearness, new, data, m)
    own = torch.arange(len(new.X), device=near.device).unsqueeze(-1)
    if q > 1:
        candidates = None if len(new.X) == q else rows_before(own, q).cpu().numpy()
        earlier, between = residual.nearest(new, None, m, candidates)
        near = torch.cat([near, torch.where(earlier < 0, -1, earlier + n)], -1)
        near = near.gather(-1, torch.cat([squared, between], -1).sort(dim=-1, stable=True).indices[:, :m])
    return torch.cat([near.sort(-1).values, own + n], -1)


class RowTable:
    """A matrix whose rows many chunks look up; their gradients add up in place, not in one matrix per chunk."""

    def __init__(self, matrix: Tensor):
        self.gradient: Tensor | None = None
        self.matrix = _Collect.apply(matrix, self)

    def rows(self, index: Tensor) -> Tensor:
        """Return the rows at ``index`` (*c,): (*c, M)."""
        return _Rows.apply(self.matrix, index, self)


class _Collect(torch.autograd.Function):
    """The identity. Its backward runs after that of all look-ups and returns what they added up."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, table: RowTable) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.table = table
        return matrix.view_as(matrix)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _: Any) -> tuple[Tensor | None, None]:
        gradient, ctx.table.gradient = ctx.table.gradient, None
        return gradient, None


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, index: Tensor, table: RowTable) -> Tensor:
        ctx.save_for_backward(index)
        ctx.table, ctx.shape = table, matrix.shape
        return matrix[index]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        if ctx.table.gradient is None:
            ctx.table.gradient = gradient.new_zeros(ctx.shape)
        ctx.table.gradient.index_add_(0, ctx.saved_tensors[0].flatten(), gradient.flatten(0, -2))
        return None, None, None
