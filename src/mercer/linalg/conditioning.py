"""Condition a dense Gaussian N(0, K) on sites ∏ exp(λ1ᵢ fᵢ − ½ λ2ᵢ fᵢ²).

With s = √λ2 on the non-negative sites, B = I + s K s is factored and never K itself, so that duplicate rows and
tiny λ2 do no harm (Rasmussen and Williams, 2006, §3.4.3). The few negative sites of a likelihood that is not
log-concave are a low-rank downdate of that result, positive definite exactly when the posterior is. Everything
is described by the residual r and the matrix M of

    mean = K r,   covariance = K − K M K,   M = s B⁻¹ s − U Uᵀ,   r = (I − M K) λ1.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mercer.linalg.cholesky import NotPositiveDefiniteError, cholesky
from mercer.linalg.dense import factor_, inverse_, inverse_diagonal, matvec, solve_factored, sum_to
from mercer.policy import NumericalPolicy


class SiteFactor(NamedTuple):
    """Factor of B and of the downdate: all that prediction needs.

    ``root`` (*b, n) is s, ``chol`` (*b, n, n) the lower factor of B, ``downdate`` (*b, n, k) is U or None,
    ``residual`` (*b, n) is r, ``logdet`` (*b,) is log|I + K Λ2| and ``jitter`` the relative jitter used.
    """

    root: Tensor
    chol: Tensor
    downdate: Tensor | None
    residual: Tensor
    logdet: Tensor
    jitter: float

    def solve(self, rhs: Tensor) -> Tensor:
        """Return B⁻¹ rhs for right-hand sides (*b, n)."""
        return solve_factored(self.chol, rhs)

    def reduce(self, Kfs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return T and D, (*b, n, q) and (*b, k, q), with K_*f M K_f* = TᵀT − DᵀD."""
        T = torch.linalg.solve_triangular(self.chol, self.root.unsqueeze(-1) * Kfs, upper=False)
        return T, None if self.downdate is None else self.downdate.mT @ Kfs

    def reduction(self, Kfs: Tensor) -> Tensor:
        """Return diag(K_*f M K_f*), (*b, q): how much the sites take off the prior variance."""
        T, D = self.reduce(Kfs)
        taken = T.square().sum(-2)
        return taken if D is None else taken - D.square().sum(-2)

    def covariance_product(self, K: Tensor, vectors: Tensor) -> Tensor:
        """Return (K − K M K) times vectors (*b, n)."""
        prior = matvec(K, vectors)
        taken = self.root * self.solve(self.root * prior)
        if self.downdate is not None:
            taken = taken - matvec(self.downdate, matvec(self.downdate.mT, prior))
        return prior - matvec(K, taken)

    def variance_at_sites(self, K: Tensor, precision: Tensor) -> Tensor:
        """Return diag(K − K M K), (*b, n), from n³/3 operations and one n × n buffer.

        It is (1 − [B⁻¹]ᵢᵢ)/λ2ᵢ, before the downdate, wherever λ2 says enough; elsewhere a row is like a test row.
        """
        batch = self.chol.shape[:-2]
        if not bool(self.root.any()):
            variance = K.diagonal(dim1=-2, dim2=-1).expand(*batch, -1).clone()
        else:
            variance, unseen = _variance(K, precision, inverse_diagonal(self.chol))
            root, K = self.root.expand(*batch, -1), K.expand(*batch, -1, -1)
            for latent, rows in unseen:
                columns = root[latent].unsqueeze(-1) * K[latent][:, rows]
                T = torch.linalg.solve_triangular(self.chol[latent], columns, upper=False)
                variance[latent][rows] = K[latent].diagonal()[rows] - T.square().sum(-2)
        if self.downdate is not None:
            variance = variance + (self.downdate.mT @ K).square().sum(-2)
        return variance


def factor_sites(K: Tensor, linear: Tensor, precision: Tensor, policy: NumericalPolicy) -> SiteFactor:
    """Factor B = I + s K s and solve for the residual r.

    Parameters
    ----------
    K : (*b, n, n), units of f²
    linear, precision : (*b, n)
        λ1 and λ2; batch shapes broadcast, so several outputs may share one factor.
    policy : NumericalPolicy

    Returns
    -------
    SiteFactor

    Raises
    ------
    NotPositiveDefiniteError
        B is indefinite, or negative sites outweigh the prior; the caller takes a smaller step.

    Notes
    -----
    n³/3 operations and two n² temporaries per batch element.
    """
    n = K.shape[-1]
    root = precision.clamp_min(0.0).sqrt()
    L, jitter = _factor_B(K, root, policy)
    logdet = 2.0 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    # λ1 = s z + λ0: dividing by s is exact and free of cancellation except where λ2 is (nearly) nothing
    floor = torch.finfo(K.dtype).eps / K.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).clamp_min(1e-300)
    divisible = precision > floor
    z = torch.where(divisible, linear / root.where(divisible, torch.ones_like(root)), 0.0)
    rest = torch.where(divisible, torch.zeros_like(linear), linear)
    residual = root * solve_factored(L, z)
    downdate = None
    if bool((~divisible & (linear != 0)).any()):
        residual = residual + rest - root * solve_factored(L, root * (K @ rest.unsqueeze(-1)).squeeze(-1))
    negative = (precision < 0).reshape(-1, n).any(0)
    if bool(negative.any()):
        downdate, correction = _downdate(K, L, root, precision, negative.nonzero().squeeze(-1), policy)
        logdet = logdet + correction
        projected = downdate.mT @ (K @ linear.unsqueeze(-1))
        residual = residual + (downdate @ projected).squeeze(-1)
    return SiteFactor(root, L, downdate, residual, logdet, jitter)


def _factor_B(K: Tensor, root: Tensor, policy: NumericalPolicy) -> tuple[Tensor, float]:
    """Return the Cholesky factor of B = I + s K s and the relative jitter used."""
    L, ok = factor_(_site_matrix(K, root))
    if ok:
        return L, 0.0
    del L  # destroyed by the failed attempt
    solution = cholesky(_site_matrix(K, root), policy, "matrix I + W½ K W½")
    return solution.value, solution.stats["jitter"]


def _site_matrix(K: Tensor, root: Tensor) -> Tensor:
    B = K.new_empty(*torch.broadcast_shapes(K.shape[:-2], root.shape[:-1]), *K.shape[-2:])
    torch.mul(K, root.unsqueeze(-1), out=B)
    B.mul_(root.unsqueeze(-2)).diagonal(dim1=-2, dim2=-1).add_(1.0)
    return B


def _variance(K: Tensor, precision: Tensor, kept: Tensor) -> tuple[Tensor, list[tuple[tuple[int, ...], Tensor]]]:
    """Return (1 − kept)/λ2 with kept = diag(B⁻¹), and the rows where λ2 says too little for that difference.

    The rows are listed per batch element, because latents differ in what they hardly see.
    """
    too_small = precision * K.diagonal(dim1=-2, dim2=-1) < torch.finfo(K.dtype).eps ** 0.375
    variance = (1.0 - kept) / precision.masked_fill(too_small, 1.0)
    too_small = too_small.expand_as(variance).reshape(-1, K.shape[-1])
    counts = too_small.sum(-1).tolist()
    rows = too_small.nonzero()[:, 1].split(counts)
    latents = itertools.product(*map(range, variance.shape[:-1]))
    return variance, [(latent, own) for latent, own in zip(latents, rows, strict=True) if len(own)]


def _downdate(
    K: Tensor, L: Tensor, root: Tensor, precision: Tensor, index: Tensor, policy: NumericalPolicy
) -> tuple[Tensor, Tensor]:
    """Return U and log|C| for the negative sites ``index``, C = I − ω V₊ ω with ω² = −λ2.

    A site that is negative in one batch element only has ω = 0 in the others, where it changes nothing.
    """
    omega = (-precision[..., index]).clamp_min(0.0).sqrt()
    KJ = K[..., index]
    weighted = torch.linalg.solve_triangular(L, root.unsqueeze(-1) * KJ, upper=False)
    left = -root.unsqueeze(-1) * torch.linalg.solve_triangular(L.mT, weighted, upper=True)
    left[..., index, torch.arange(len(index), device=K.device)] += 1.0  # (I − M₊ K)[:, J]
    VJJ = K[..., index, :] @ left
    C = -omega.unsqueeze(-1) * VJJ * omega.unsqueeze(-2)
    C.diagonal(dim1=-2, dim2=-1).add_(1.0)
    factor, info = torch.linalg.cholesky_ex(0.5 * (C + C.mT))
    if bool(info.any()):
        raise NotPositiveDefiniteError("Negative sites outweigh the prior: the posterior is not a Gaussian.")
    U = torch.linalg.solve_triangular(factor, (left * omega.unsqueeze(-2)).mT, upper=False).mT
    return U, 2.0 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


class ConditionOnSites(torch.autograd.Function):
    """(K, λ1, λ2) → (r, log|I + K Λ2|, variance), with one hand-written adjoint for all of them.

    With P = I − K M and V = K − K M K, the differentials are
    dr = Pᵀ(dλ1 − m∘dλ2) − M dK r,  d logdet = tr(M dK) + vᵀdλ2,  dv = diag(P dK Pᵀ) − (V∘V) dλ2.
    """

    @staticmethod
    def forward(
        ctx: Any,
        K: Tensor,
        linear: Tensor,
        precision: Tensor,
        policy: NumericalPolicy,
        variance: bool,
        found: SiteFactor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Factor, solve and invert: n³ operations, two n² buffers beside K; ``variance`` adds 2n³.

        ``found`` is the factor of the same K and sites, where there is one already.
        """
        factor = factor_sites(K, linear, precision, policy) if found is None else found
        M = inverse_(factor.chol if found is None else factor.chol.clone())
        kept = M.diagonal(dim1=-2, dim2=-1).clone()  # [B⁻¹]ᵢᵢ = 1 − λ2ᵢ vᵢ
        M.mul_(factor.root.unsqueeze(-1)).mul_(factor.root.unsqueeze(-2))
        if factor.downdate is not None:
            M = M - factor.downdate @ factor.downdate.mT
        KM = K @ M if variance or factor.downdate is not None else None
        if KM is not None:
            v = K.diagonal(dim1=-2, dim2=-1) - (KM * K).sum(-1)
        else:
            v, unseen = _variance(K, precision, kept)
            each_K = K.expand_as(M)
            for latent, rows in unseen:
                crossed = each_K[latent][rows]
                v[latent][rows] = each_K[latent].diagonal()[rows] - ((crossed @ M[latent]) * crossed).sum(-1)
        residual = factor.residual
        # all that the adjoint needs of K are products with vectors, which M gives too when every λ2 > 0
        ctx.shape = K.shape
        tiny = torch.finfo(K.dtype).tiny ** 0.5
        kept_K = K if variance or not bool((precision > tiny).all()) else None
        mean = matvec(K, residual)
        ctx.save_for_backward(kept_K, M, linear, precision, residual, v, mean, KM if variance else None)
        if not variance:
            ctx.mark_non_differentiable(v)
        # clones: autograd writes on what it is given, and the factor may serve others
        return residual.clone(), factor.logdet.clone(), v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_r: Tensor, grad_logdet: Tensor, grad_v: Tensor) -> tuple[Any, ...]:
        """Return the cotangents of K, λ1 and λ2."""
        K, M, linear, precision, r, v, mean, KM = ctx.saved_tensors
        need_K, need_linear, need_precision, *_ = ctx.needs_input_grad
        shape = ctx.shape
        pushed = matvec(M, grad_r)
        # P r̄ = r̄ − K M r̄, and also M r̄ / λ2 where K was not kept
        cotangent = pushed / precision if K is None else grad_r - matvec(K, pushed)
        grad_K = grad_linear = grad_precision = None
        P = None
        if KM is not None:
            P = -KM
            P.diagonal(dim1=-2, dim2=-1).add_(1.0)
        if need_K:
            grad_K = _weighted_sum(grad_logdet, M, shape)
            if len(shape) == 2:
                grad_K.addmm_(pushed.reshape(-1, shape[-1]).mT, r.reshape(-1, shape[-1]), alpha=-1.0)
            else:
                grad_K = grad_K - sum_to(pushed.unsqueeze(-1) * r.unsqueeze(-2), shape)
            if P is not None:
                grad_K = grad_K + sum_to(P.mT @ (grad_v.unsqueeze(-1) * P), shape)
        if need_linear:
            grad_linear = sum_to(cotangent, linear.shape)
        if need_precision:
            grad_precision = sum_to(-mean * cotangent, precision.shape)
            grad_precision = grad_precision + sum_to(grad_logdet.unsqueeze(-1) * v, precision.shape)
            if P is not None:
                squared = (P @ K).square() @ grad_v.unsqueeze(-1)
                grad_precision = grad_precision - sum_to(squared.squeeze(-1), precision.shape)
        return grad_K, grad_linear, grad_precision, None, None, None


def _weighted_sum(weight: Tensor, M: Tensor, shape: torch.Size) -> Tensor:
    """Return weight · M summed to ``shape``, without a temporary of the size of all batches."""
    if len(shape) == 2 and M.dim() > 2:
        return torch.tensordot(weight.reshape(-1), M.reshape(-1, *shape), 1)
    return sum_to(weight[..., None, None] * M, shape)
