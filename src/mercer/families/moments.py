"""Sums over rows in whitened coordinates of the inducing points, W = L⁻¹ K_uf: O(chunk · m) memory, gradients too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mercer.families.tied import TiedSites
from mercer.kernels.evaluate import gram
from mercer.linalg.dense import matvec, sum_to
from mercer.policy import NumericalPolicy

_KEPT = 6  # chunks of kernel values and of W that a gradient may find instead of making them again


def whitened_moments(
    kernel: Any, X: Tensor, Z: Tensor, L: Tensor, linear: Tensor, precision: Tensor, policy: NumericalPolicy
) -> tuple[Tensor, Tensor]:
    """Return Σ wᵢ λ1ᵢ and Σ λ2ᵢ wᵢ wᵢᵀ with wᵢ = L⁻¹ k(Z, xᵢ).

    Parameters
    ----------
    kernel : gpytorch Kernel
    X, Z : (n, d), (m, d)
    L : (m, m)
        Cholesky factor of K_uu.
    linear, precision : (*b, n), (*c, n)
        λ1 and λ2; c may be shorter than b.
    policy : NumericalPolicy

    Returns
    -------
    (*b, m), (*c, m, m)
        Differentiable in Z, L, λ1, λ2 and the kernel's parameters.

    Notes
    -----
    2 n m² operations forward with n m kernel values and n m² of a triangular solve, and as many for the gradient, which
    makes kernel values and solve again beyond `_KEPT` chunks: whatever n is, no more are in memory.
    """
    parameters = [each for each in kernel.parameters() if each.requires_grad]
    return _Moments.apply(L, linear, precision, Z, X, kernel, policy, *parameters)


def moments_of(W: Tensor, linear: Tensor, precision: Tensor, policy: NumericalPolicy) -> tuple[Tensor, Tensor]:
    """Return the sums of `whitened_moments` for rows whose W, (m, n), is known."""
    m, n = W.shape[-2:]
    second = W.new_zeros(*torch.broadcast_shapes(W.shape[:-2], precision.shape[:-1]), m, m)
    for rows in chunks_of(n, m, precision.shape[:-1].numel(), policy):
        own = W[..., rows]
        second = second + (own * precision[..., rows].unsqueeze(-2)) @ own.mT
    return matvec(W, linear), second


@torch.no_grad()
def tied_from_white(L: Tensor, linear: Tensor, precision: Tensor) -> TiedSites:
    """Return moments of whitened coordinates as sites of u itself: ν = L⁻ᵀ linear, N = L⁻ᵀ precision L⁻¹."""
    nu = torch.linalg.solve_triangular(L.mT, linear.unsqueeze(-1), upper=True).squeeze(-1)
    half = torch.linalg.solve_triangular(L.mT, precision, upper=True)
    N = torch.linalg.solve_triangular(L.mT, half.mT, upper=True)
    return TiedSites(nu, 0.5 * (N + N.mT))


def chunks_of(n: int, m: int, batch: int, policy: NumericalPolicy) -> list[slice]:
    """Return slices of n rows whose m kernel values fit in a temporary for each of ``batch`` members."""
    size = policy.chunk_rows(m * max(1, batch))
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


@dataclass
class _Chunk:
    """Kernel values k(Z, X[rows]), differentiable in ``inducing`` and the kernel's parameters, and W = L⁻¹ k."""

    inducing: Tensor
    K: Tensor
    W: Tensor

    @classmethod
    def of(cls, kernel: Any, X: Tensor, Z: Tensor, L: Tensor, policy: NumericalPolicy, live: bool) -> _Chunk:
        with torch.set_grad_enabled(live):
            inducing = Z.detach().requires_grad_(live and Z.requires_grad)
            K = gram(kernel, inducing, X, policy=policy)
        return cls(inducing, K, torch.linalg.solve_triangular(L, K.detach(), upper=False))


class _Moments(torch.autograd.Function):
    """Sums that keep their arguments, and kernel values where these are few."""

    @staticmethod
    def forward(
        ctx: Any,
        L: Tensor,
        linear: Tensor,
        precision: Tensor,
        Z: Tensor,
        X: Tensor,
        kernel: Any,
        policy: NumericalPolicy,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        first = second = None
        live = any(ctx.needs_input_grad)
        chunks = chunks_of(len(X), len(Z), precision.shape[:-1].numel(), policy)
        kept: list[_Chunk] = []
        for rows in chunks:
            chunk = _Chunk.of(kernel, X[rows], Z, L, policy, live and len(chunks) <= _KEPT)
            if live and len(chunks) <= _KEPT:
                kept.append(chunk)
            W = chunk.W
            pull = matvec(W, linear[..., rows])
            weighted = (W * precision[..., rows].unsqueeze(-2)) @ W.mT
            first = pull if first is None else first.add_(pull)
            second = weighted if second is None else second.add_(weighted)
        if first is None or second is None:  # no rows
            own = L.shape[:-2]
            first = linear.new_zeros(*torch.broadcast_shapes(own, linear.shape[:-1]), len(Z))
            second = linear.new_zeros(*torch.broadcast_shapes(own, precision.shape[:-1]), len(Z), len(Z))
        ctx.save_for_backward(L, linear, precision, Z, X, first, second, *parameters)
        ctx.kernel, ctx.policy, ctx.kept = kernel, policy, kept
        return first, second

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_first: Tensor, by_second: Tensor) -> tuple[Any, ...]:
        L, linear, precision, Z, X, first, second, *parameters = ctx.saved_tensors
        need_L, need_linear, need_precision, need_Z = ctx.needs_input_grad[:4]
        both = by_second + by_second.mT
        # cotangents of k(Z, xᵢ) are L⁻ᵀ (λ2ᵢ both wᵢ + λ1ᵢ by_first)
        half = torch.linalg.solve_triangular(L.mT, both, upper=True)
        pulled = torch.linalg.solve_triangular(L.mT, by_first.unsqueeze(-1), upper=True).squeeze(-1)
        by_L = None
        if need_L:
            outer = by_first.unsqueeze(-1) * first.unsqueeze(-2)
            push = sum_to(both @ second, L.shape) + sum_to(outer, L.shape)
            by_L = -torch.linalg.solve_triangular(L.mT, push, upper=True).tril()
        needed = (need_Z, *ctx.needs_input_grad[7:])
        leaves = [each for each, wanted in zip((Z, *parameters), needed, strict=True) if wanted]
        slopes = [torch.zeros_like(each) for each in leaves]
        by_linear = torch.zeros_like(linear) if need_linear else None
        by_precision = torch.zeros_like(precision) if need_precision else None
        for i, rows in enumerate(chunks_of(len(X), len(Z), precision.shape[:-1].numel(), ctx.policy)):
            # L⁻ᵀ both L⁻¹ k would spare the solve, and rounding would see the square of the condition number of L
            chunk = ctx.kept[i] if ctx.kept else _Chunk.of(ctx.kernel, X[rows], Z, L, ctx.policy, True)
            values, W = chunk.K.detach(), chunk.W
            turned = half @ W
            if by_linear is not None:
                by_linear[..., rows] = sum_to(matvec(W.mT, by_first), linear[..., rows].shape)
            if by_precision is not None:
                by_precision[..., rows] = sum_to(0.5 * (turned * values).sum(-2), precision[..., rows].shape)
            if not leaves:
                continue
            cotangent = sum_to(turned.mul_(precision[..., rows].unsqueeze(-2)), W.shape)
            own = linear[..., rows]
            if W.dim() == 2:
                cotangent.addmm_(pulled.reshape(-1, len(Z)).mT, own.reshape(-1, own.shape[-1]))
            else:
                cotangent = cotangent + sum_to(pulled.unsqueeze(-1) * own.unsqueeze(-2), W.shape)
            inputs = [each for each, wanted in zip((chunk.inducing, *parameters), needed, strict=True) if wanted]
            found = torch.autograd.grad(chunk.K, inputs, cotangent, retain_graph=bool(ctx.kept), materialize_grads=True)
            for slope, more in zip(slopes, found, strict=True):
                slope += more
        given = iter(slopes)
        by_Z, *rest = (next(given) if wanted else None for wanted in needed)
        return by_L, by_linear, by_precision, by_Z, None, None, None, *rest
