"""Vecchia's approximation of the residual of inducing points, for noisy data of many dimensions.

In the notation of `mercer.families.hybrid_plan` the data y = μ + Φ u + r + ε have the covariance Φ Φᵀ + (U Uᵀ)⁻¹, U
the sparse inverse Cholesky factor of R + diag(noise). Everything follows from W = Uᵀ Φ, b = Uᵀ y and B = I + Wᵀ W:
p(u | y) = N(B⁻¹ Wᵀ b, B⁻¹), and given u only neighbours' residuals matter to a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mercer.families.base import Prior
from mercer.families.hybrid_plan import HybridPlan, Points, Residual
from mercer.kernels.evaluate import diag
from mercer.linalg.cholesky import NotPositiveDefiniteError
from mercer.linalg.sic import column_factors
from mercer.policy import NumericalPolicy


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
    sums = _Data(prior, plan, y, noise).sums()
    L, inside = sums.solved()
    fit = 0.5 * (sums.square - inside.square().sum(-1))
    half_logdet = L.diagonal(dim1=-2, dim2=-1).log().sum(-1) - sums.log_diagonal
    return -half_logdet - fit - 0.5 * y.shape[-1] * math.log(2 * math.pi)


@torch.no_grad()
def response_marginals(
    prior: Prior, plan: HybridPlan, y: Tensor, noise: Tensor, X_new: Tensor, n_neighbors: int = 60
) -> tuple[Tensor, Tensor]:
    """Return mean and variance of the latent function at new rows, each given u and the nearest noisy data.

    Given u a new row is Φ* u + βᵀ (y_s − Φ_s u) and noise of its own, β = (R_ss + noise)⁻¹ R_s*: u counts by
    Φ* − βᵀ Φ_s.

    Parameters
    ----------
    prior, plan, y, noise
        As in `response_log_likelihood`.
    X_new : (q, d)
    n_neighbors : int
        How many data each new row is conditioned on, the most correlated in the residual.

    Returns
    -------
    mean : (*b, q)
        Without the prior mean.
    variance : (*b, q)
        Units of f²; with the batch dimensions of ``noise`` only.

    Raises
    ------
    NotPositiveDefiniteError
        Neighbours are the same point and hardly noisy.
    """
    data = _Data(prior, plan, y, noise)
    known, new = data.low_rank(), data.residual.points(X_new)
    near, _ = plan.nearest(data.residual, new, data.points, n_neighbors)
    means, variances = [], []
    rows = torch.arange(len(X_new), device=X_new.device)
    for chunk in rows.split(chunk_rows(plan.policy, near.shape[-1], len(plan.Z), data.noise)):
        index, own = near[chunk], new[chunk.unsqueeze(-1)]
        given = data.points[index]
        L, info = torch.linalg.cholesky_ex(data.residual.between(given) + torch.diag_embed(data.noise[..., index]))
        if bool(info.any()):
            raise NotPositiveDefiniteError("Neighbours are the same point; a larger noise variance cures it.")
        reduced = torch.linalg.solve_triangular(L, data.residual.between(given, own), upper=False)
        beta = torch.linalg.solve_triangular(L.mT, reduced, upper=True).squeeze(-1)
        pull = (own.features - beta.unsqueeze(-2) @ given.features).squeeze(-2)
        mean, root = known.times(pull)
        left = data.residual.variance(own).squeeze(-1) - reduced.square().sum((-1, -2))
        means.append(mean + (beta * data.y[..., index]).sum(-1))
        variances.append(left.clamp_min(0.0) + root.square().sum(-1))
    return torch.cat(means, -1), torch.cat(variances, -1)


@torch.no_grad()
def response_joint(
    prior: Prior, plan: HybridPlan, y: Tensor, noise: Tensor, X_new: Tensor, n_neighbors: int = 60
) -> tuple[Tensor, Tensor]:
    """Return mean (*b, q) and covariance (*b, q, q) of the latent function at new rows.

    The residual of each new row is given u and the nearest of the noisy data and of the new rows before it.
    O(q m³ + q² (q + M)) operations. Copies among the new rows get the smallest jitter of the policy that helps.
    """
    q, n = len(X_new), len(plan.X)
    data = _Data(prior, plan, y, noise)
    known, new = data.low_rank(), data.residual.points(X_new)
    columns = columns_of_new(plan, data.residual, data.points, new, n_neighbors)
    size = diag(prior.kernel, X_new).mean()

    def diagonal(jitter: float) -> Tensor:
        return torch.cat([data.noise, (jitter * size).expand(*data.noise.shape[:-1], q)], -1)

    u, push = factors_of_new(data.residual, data.points, new, columns, diagonal)
    # f* = U_**⁻ᵀ (ε − U_o*ᵀ (y − Φ u)) + Φ* u, U_** and U_o* the entries of the columns at new rows and at data
    of_new, index = columns >= n, columns.clamp(0, n - 1)
    U = u.new_zeros(*u.shape[:-2], q, q)
    rows, places = of_new.nonzero(as_tuple=True)
    U[..., columns[rows, places] - n, rows] = u[..., rows, places]
    identity = torch.eye(q, dtype=U.dtype, device=U.device).expand_as(U)
    solved = torch.linalg.solve_triangular(U.mT, torch.cat([identity, push], -1), upper=False)
    root = solved[..., :q]
    mean, low_rank = known.times(new.features + solved[..., q:])
    pulled = -(u.masked_fill(of_new, 0.0) * data.y[..., index]).sum(-1)
    mean = mean + (root @ pulled.unsqueeze(-1)).squeeze(-1)
    return mean, root @ root.mT + low_rank @ low_rank.mT


@torch.no_grad()
def columns_of_new(plan: HybridPlan, residual: Residual, data: Points, new: Points, m: int) -> Tensor:
    """Return the nearest of data and of new rows before it for each new row, then itself, (q, m + 1), −1 first.

    New rows are numbered after the n data.
    """
    n, q = len(data.X), len(new.X)
    near, squared = plan.nearest(residual, new, data, m)
    earlier, between = residual.nearest(new, None, m)
    near = torch.cat([near, torch.where(earlier < 0, -1, earlier + n)], -1)
    chosen = torch.cat([squared, between], -1).sort(dim=-1, stable=True).indices[:, :m]
    own = n + torch.arange(q, device=near.device).unsqueeze(-1)
    return torch.cat([near.gather(-1, chosen).sort(-1).values, own], -1)


def factors_of_new(
    residual: Residual,
    data: Points,
    new: Points,
    columns: Tensor,
    diagonal: Callable[[float], Tensor],
    least: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return factor columns (*b, q, w) of new rows behind the data, and U_o*ᵀ Φ (*b, q, M).

    ``diagonal`` says what is added to R at data and new rows, (*b, n + q), for a relative jitter; the first one of
    the policy from ``least`` on that makes all tiles positive definite is taken.
    """
    n, policy = len(data.X), residual.policy
    both = Points(torch.cat([data.X, new.X]), torch.cat([data.features, new.features]))
    reason = NotPositiveDefiniteError("The policy has no jitter left.")
    for jitter in [each for each in policy.jitter_ladder or (0.0,) if each >= least]:
        added = diagonal(jitter)
        found, pushes = [], []
        try:
            for chunk in columns.split(chunk_rows(policy, columns.shape[-1], len(residual.Z), added)):
                index = chunk.clamp_min(0)
                given = both[index]
                u = column_factors(residual.between(given) + torch.diag_embed(added[..., index]), chunk < 0)
                found.append(u)
                pushes.append((u.masked_fill(chunk >= n, 0.0).unsqueeze(-2) @ given.features).squeeze(-2))
            return torch.cat(found, -2), torch.cat(pushes, -2)
        except NotPositiveDefiniteError as failure:
            reason = failure
    raise reason


def chunk_rows(policy: NumericalPolicy, width: int, rank: int, members: Tensor) -> int:
    """Return how many tiles of ``width`` rows with features, for each member of a batch (*b, n), fit the policy."""
    return policy.chunk_rows(width * (4 * max(1, members.shape[:-1].numel()) * width + 3 * rank))


@dataclass(frozen=True)
class _LowRank:
    """p(u | y): L_B of B = Cov(u | y)⁻¹, (*b, M, M), and L_B⁻¹ Wᵀ b, (*b, M)."""

    L: Tensor
    inside: Tensor

    def times(self, pull: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean of G u, (*b, q), for G = ``pull`` (*b, q, M), and a root of G B⁻¹ Gᵀ, (*b, q, M)."""
        root = torch.linalg.solve_triangular(self.L, pull.mT, upper=False).mT
        return (root @ self.inside.unsqueeze(-1)).squeeze(-1), root


@dataclass(frozen=True)
class _Sums:
    """Σ log Uᵢᵢ (*b,), bᵀ b (*b,), Wᵀ W (*b, M, M) and Wᵀ b (*b, M)."""

    log_diagonal: Tensor
    square: Tensor
    gram: Tensor
    cross: Tensor

    def solved(self) -> tuple[Tensor, Tensor]:
        """Return L_B and L_B⁻¹ Wᵀ b."""
        identity = torch.eye(self.gram.shape[-1], dtype=self.gram.dtype, device=self.gram.device)
        L = torch.linalg.cholesky(self.gram + identity)
        return L, torch.linalg.solve_triangular(L, self.cross.unsqueeze(-1), upper=False).squeeze(-1)


class _Data:
    """Noisy data in the plan's order."""

    def __init__(self, prior: Prior, plan: HybridPlan, y: Tensor, noise: Tensor):
        self.prior, self.plan = prior, plan
        self.residual = Residual(prior.kernel, plan.Z, plan.policy)
        self.points = self.residual.points(plan.X)
        self.y = y[..., plan.order]
        self.noise = noise.expand(*noise.shape[:-1], len(plan.X))[..., plan.order]

    def low_rank(self) -> _LowRank:
        """Return what the data say of u."""
        return _LowRank(*self.sums().solved())

    def sums(self) -> _Sums:
        """Go through the columns in chunks, and keep sums only."""
        pattern, table = self.plan.pattern, RowTable(self.points.features)

        def of_chunk(y: Tensor, noise: Tensor, chunk: Tensor) -> tuple[Tensor, ...]:
            index = pattern.columns[chunk].clamp_min(0)
            near = Points(self.plan.X[index], table.rows(index))
            u = column_factors(
                self.residual.between(near) + torch.diag_embed(noise[..., index]), pattern.padding[chunk]
            )
            W, b = (u.unsqueeze(-2) @ near.features).squeeze(-2), (u * y[..., index]).sum(-1)
            cross = (b.unsqueeze(-2) @ W).squeeze(-2)
            return u[..., -1].log().sum(-1), b.square().sum(-1), W.mT @ W, cross

        totals: list[Any] = [0.0, 0.0, 0.0, 0.0]
        rows = torch.arange(pattern.n, device=self.y.device)
        size = chunk_rows(self.plan.policy, pattern.columns.shape[-1], len(self.plan.Z), self.noise)
        for chunk in rows.split(size):
            parts = checkpoint(of_chunk, self.y, self.noise, chunk, use_reentrant=False, preserve_rng_state=False)
            totals = [total + part for total, part in zip(totals, parts, strict=True)]
        return _Sums(*totals)


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
