"""Sparse inverse Cholesky factors: an upper triangular U, sparse by columns, with precision U Uᵀ.

Column i of U is nonzero at the rows cᵢ = sᵢ ∪ {i}, sᵢ earlier than i. It is stored as row i of ``val`` (*b, n, w),
its rows as row i of ``Pattern.columns`` (n, w), ascending, i itself last, −1 and zero where there are fewer.
On the CPU the sweeps are compiled loops, one thread per right-hand side; elsewhere they go level by level.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mercer import _loops
from mercer.linalg.cholesky import NotPositiveDefiniteError


class Pattern:
    """Which entries of the factor may differ from zero.

    Parameters
    ----------
    neighbours : (n, m) int tensor
        s, earlier rows, −1 for padding, in any order.

    Attributes
    ----------
    columns : (n, m + 1) int64 tensor
        c, ascending, own row last.
    """

    def __init__(self, neighbours: Tensor):
        n = neighbours.shape[0]
        own = torch.arange(n, device=neighbours.device).unsqueeze(-1)
        if bool((neighbours >= own).any()):
            raise ValueError("neighbours must be rows that come earlier in the order.")
        self.columns = torch.cat([neighbours.long().sort(-1).values, own], -1)

    @property
    def n(self) -> int:
        """Number of rows."""
        return self.columns.shape[0]

    @cached_property
    def padding(self) -> Tensor:
        """(n, w) boolean, true where there is no entry."""
        return self.columns < 0

    @cached_property
    def levels(self) -> list[Tensor]:
        """Groups of columns that need only columns of earlier groups."""
        level = torch.as_tensor(_loops.levels(self.columns[:, :-1].cpu().numpy()))
        groups = level.sort(stable=True).indices.split(level.bincount().tolist())
        return [group.to(self.columns.device) for group in groups]


def column_factors(tiles: Tensor, padding: Tensor) -> Tensor:
    """Return the columns of U that bring N(0, (U Uᵀ)⁻¹) closest to N(0, K) in KL divergence, from tiles of K.

    U_c = K_cc⁻¹ e / √(eᵀ K_cc⁻¹ e) with e the last unit vector, which is L⁻ᵀ e for K_cc = L Lᵀ.

    Parameters
    ----------
    tiles : (*b, B, w, w)
        K_cc of B columns, own row last. What stands in padded rows and columns does not matter.
    padding : (B, w) boolean

    Returns
    -------
    (*b, B, w)
        Zero at the padding; differentiable in ``tiles``.

    Raises
    ------
    NotPositiveDefiniteError
        Some tile is not positive definite.

    References
    ----------
    Schäfer, Katzfuss and Owhadi (2021), theorem 2.1; Cao et al. (2023) for the variational use.
    """
    return _ColumnFactors.apply(tiles, padding)


class _ColumnFactors(torch.autograd.Function):
    """With g = K⁻¹e = u uₗ (uₗ the last entry of u), du = (dg − ½ g eᵀdg / uₗ²) / uₗ and dg = −K⁻¹ dK g."""

    @staticmethod
    def forward(ctx: Any, tiles: Tensor, padding: Tensor) -> Tensor:
        u, L, broken = (_factor_on_cpu if tiles.device.type == "cpu" else _factor_in_batch)(tiles, padding)
        if broken:
            raise NotPositiveDefiniteError(
                "A tile of the covariance matrix is not positive definite: some neighbours are (nearly) the same "
                "point. A larger nugget or noise variance cures it."
            )
        ctx.save_for_backward(L, u, padding)
        return u

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        L, u, padding = ctx.saved_tensors
        if u.device.type == "cpu":
            rows = (each.expand(u.shape).reshape(-1, u.shape[-1]).contiguous() for each in (u, padding, grad))
            arrays = [each.numpy() for each in (L.reshape(-1, *L.shape[-2:]), *rows)]
            return torch.from_numpy(_loops.column_factors_adjoint(*arrays)).reshape(L.shape), None
        return _adjoint_in_batch(L, u, padding, grad), None


def _factor_on_cpu(tiles: Tensor, padding: Tensor) -> tuple[Tensor, Tensor, bool]:
    flat = tiles.detach().reshape(-1, *tiles.shape[-2:]).contiguous()
    padded = padding.expand(tiles.shape[:-1]).reshape(flat.shape[:-1]).contiguous()
    u, L, broken = _loops.column_factors(flat.numpy(), padded.numpy())
    return torch.from_numpy(u).reshape(tiles.shape[:-1]), torch.from_numpy(L).reshape(tiles.shape), bool(broken.any())


def _factor_in_batch(tiles: Tensor, padding: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Do the same with batched operations only."""
    outside = padding.unsqueeze(-1) | padding.unsqueeze(-2)
    eye = torch.eye(tiles.shape[-1], dtype=tiles.dtype, device=tiles.device)
    L, info = torch.linalg.cholesky_ex(torch.where(outside, eye, tiles))
    u = torch.linalg.solve_triangular(L.mT, eye[:, -1:].expand(*L.shape[:-1], 1), upper=True).squeeze(-1)
    return u, L, bool(info.any())


def _adjoint_in_batch(L: Tensor, u: Tensor, padding: Tensor, grad: Tensor) -> Tensor:
    last = u[..., -1:]
    h = grad.masked_fill(padding, 0.0) / last
    h[..., -1:] -= 0.5 * (h * u).sum(-1, keepdim=True) / last
    pulled = torch.cholesky_solve(h.unsqueeze(-1), L).squeeze(-1)
    outer = pulled.unsqueeze(-1) * (-0.5 * last * u).unsqueeze(-2)
    outer = outer.masked_fill(padding.unsqueeze(-2) | padding.unsqueeze(-1), 0.0)
    return outer + outer.mT


def times(pattern: Pattern, val: Tensor, x: Tensor, transposed: bool = False) -> Tensor:
    """Return U x, or Uᵀ x, for x (*b, n); batch shapes broadcast; differentiable in both."""
    return _Map.apply(val, x, pattern, False, transposed)


def solve(pattern: Pattern, val: Tensor, x: Tensor, transposed: bool = False) -> Tensor:
    """Return U⁻¹ x, or U⁻ᵀ x, for x (*b, n); batch shapes broadcast; differentiable in both.

    U⁻ᵀ of standard normal draws has covariance (U Uᵀ)⁻¹.
    """
    return _Map.apply(val, x, pattern, True, transposed)


def logdet(val: Tensor) -> Tensor:
    """Return log |U Uᵀ|, (*b,)."""
    return 2.0 * val[..., -1].log().sum(-1)


def precision_diagonal(pattern: Pattern, val: Tensor) -> Tensor:
    """Return the diagonal of U Uᵀ, (*b, n)."""
    return _scatter(pattern, val.square())


class _Map(torch.autograd.Function):
    """y = A x for A one of U, Uᵀ, U⁻¹, U⁻ᵀ; the adjoint of each is another of them."""

    @staticmethod
    def forward(ctx: Any, val: Tensor, x: Tensor, pattern: Pattern, inverse: bool, transposed: bool) -> Tensor:
        y = _map(pattern, val, x, inverse, transposed)
        ctx.save_for_backward(val, x, y)
        ctx.how = pattern, inverse, transposed
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        val, x, y = ctx.saved_tensors
        pattern, inverse, transposed = ctx.how
        by_x = _map(pattern, val, grad, inverse, not transposed)
        by_val = None
        if ctx.needs_input_grad[0]:
            # dU_ji is left_j right_i: from y = U x and y = Uᵀ x, and with a minus sign from U y = x and Uᵀ y = x
            if inverse:
                left, right = (-y, by_x) if transposed else (-by_x, y)
            else:
                left, right = (x, grad) if transposed else (grad, x)
            by_val = _gather(pattern, left) * right.unsqueeze(-1)
            by_val = by_val.masked_fill(pattern.padding, 0.0).sum_to_size(val.shape)
        return by_val, by_x.sum_to_size(x.shape), None, None, None


def _map(pattern: Pattern, val: Tensor, x: Tensor, inverse: bool, transposed: bool) -> Tensor:
    # the general rule takes longer than a sweep of few rows
    batch = x.shape[:-1] if val.dim() == 2 else torch.broadcast_shapes(val.shape[:-2], x.shape[:-1])
    shared = val.shape[:-2].numel() == 1
    if x.device.type != "cpu":
        return _map_by_levels(pattern, val, x.expand(*batch, -1), inverse, transposed)
    rhs = x.detach().expand(*batch, -1).reshape(-1, pattern.n).contiguous()
    factor = val.detach() if shared else val.detach().expand(*batch, -1, -1)
    factor = factor.reshape(-1, *val.shape[-2:]).contiguous().to(rhs.dtype)
    out = _loops.sic_map(pattern.columns.numpy(), factor.numpy(), rhs.numpy(), inverse, transposed)
    return torch.from_numpy(out).reshape(*batch, -1)


def _map_by_levels(pattern: Pattern, val: Tensor, x: Tensor, inverse: bool, transposed: bool) -> Tensor:
    """Do the same with batched operations only, one per level where an inverse makes columns wait for others."""
    if not inverse:
        return (val * _gather(pattern, x)).sum(-1) if transposed else _scatter(pattern, val * x.unsqueeze(-1))
    # one more entry swallows what the padding adds
    work = torch.cat([x, torch.zeros_like(x[..., :1])], -1)
    columns = torch.where(pattern.padding, pattern.n, pattern.columns)
    for group in pattern.levels if transposed else reversed(pattern.levels):
        others, own = val[..., group, :-1], val[..., group, -1]
        if transposed:
            work[..., group] = (work[..., group] - (others * work[..., columns[group, :-1]]).sum(-1)) / own
        else:
            done = work[..., group] / own
            work[..., group] = done
            push = (others * done.unsqueeze(-1)).flatten(-2)
            work.index_add_(-1, columns[group, :-1].flatten(), push, alpha=-1.0)
            work[..., -1] = 0.0
    return work[..., :-1]


def _gather(pattern: Pattern, x: Tensor) -> Tensor:
    """Return x at the entries of the pattern, (*b, n, w); anything at the padding."""
    return x[..., pattern.columns.clamp_min(0)]


def _scatter(pattern: Pattern, entries: Tensor) -> Tensor:
    """Sum entries (*b, n, w) over equal rows of the matrix: (*b, n)."""
    flat = entries.masked_fill(pattern.padding, 0.0).flatten(-2)
    return flat.new_zeros(*flat.shape[:-1], pattern.n).index_add(-1, pattern.columns.clamp_min(0).flatten(), flat)
