"""Kronecker products and sums, one axis of a tensor at a time; the product itself is never formed.

A vector over a grid is a tensor U (*b, N_1, …, N_D), row-major, and a factor A_j (*b, M_j, N_j) acts on its j-th axis.
Costs are O(Σ N_j³) for factorisations and O(N Σ N_j) for the rest, N = Π N_j. Plain torch operations throughout: all
but the eigenbases of `KroneckerSum` can be differentiated, and they run where their tensors live.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mercer.linalg.cholesky import NotPositiveDefiniteError, Solution

# Eigenvalues of a sum that are nearer to zero than this, beside the largest, leave few digits
_NEARLY_SINGULAR = 1e-13


def mode_product(A: Tensor, U: Tensor, axis: int, n_axes: int) -> Tensor:
    """Apply a matrix along one axis: V[…, i, …] = Σ_k A[i, k] U[…, k, …].

    Parameters
    ----------
    A : (*b, M, N_axis)
    U : (*b, N_1, …, N_D)
        Batch shapes broadcast.
    axis : int
        Which of the D axes, from 0.
    n_axes : int
        D.

    Returns
    -------
    (*b, N_1, …, M, …, N_D)
    """
    place = axis - n_axes
    moved = U.movedim(place, -1)
    batch, rest = moved.shape[: moved.dim() - n_axes], moved.shape[moved.dim() - n_axes : -1]
    product = moved.reshape(*batch, math.prod(rest), moved.shape[-1]) @ A.mT
    return product.reshape(*product.shape[:-2], *rest, A.shape[-2]).movedim(-1, place)


def kron_matvec(factors: Sequence[Tensor], U: Tensor) -> Tensor:
    """Return (A_1 ⊗ … ⊗ A_D) u as a tensor (*b, M_1, …, M_D)."""
    for axis, A in enumerate(factors):
        U = mode_product(A, U, axis, len(factors))
    return U


def kron_cholesky(factors: Sequence[Tensor], nugget: float = 0.0) -> list[Tensor]:
    """Factor each C_j + ε I = L_j L_jᵀ, differentiably.

    Parameters
    ----------
    factors : D tensors (*b, N_j, N_j)
        Symmetric.
    nugget : float
        ε, in units of the factors; part of the model, added to every factor.

    Returns
    -------
    list of (*b, N_j, N_j)
        Lower triangular.

    Raises
    ------
    NotPositiveDefiniteError
        Names the axis; a larger nugget, fewer nodes or a rougher kernel are the usual cures.
    """
    found = []
    for axis, C in enumerate(factors):
        eye = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
        L, info = torch.linalg.cholesky_ex(C + nugget * eye)
        if bool(info.any()) or not bool(torch.isfinite(L).all()):
            raise NotPositiveDefiniteError(
                f"The covariance along axis {axis} is not positive definite with nugget {nugget:g}: its {C.shape[-1]} "
                "nodes are nearly the same to so smooth a kernel. Raise the nugget, or take fewer nodes."
            )
        found.append(L)
    return found


def kron_logdet(cholesky: Sequence[Tensor]) -> Tensor:
    """Return log |C_1 ⊗ … ⊗ C_D| = Σ_j (N/N_j) log |C_j| from the lower factors of each, (*b,)."""
    size = math.prod(L.shape[-1] for L in cholesky)
    terms = [2 * size / L.shape[-1] * L.diagonal(dim1=-2, dim2=-1).log().sum(-1) for L in cholesky]
    return sum(terms[1:], terms[0])


def kron_solve(cholesky: Sequence[Tensor], U: Tensor) -> Tensor:
    """Return (C_1 ⊗ … ⊗ C_D)⁻¹ u, two triangular solves along each axis."""
    return kron_whiten(cholesky, kron_whiten(cholesky, U), transpose=True)


def kron_whiten(cholesky: Sequence[Tensor], U: Tensor, *, transpose: bool = False) -> Tensor:
    """Return (L_1 ⊗ … ⊗ L_D)⁻¹ u, which has unit covariance where u has C; ``transpose`` solves with the L_jᵀ."""
    for axis, L in enumerate(cholesky):
        U = _triangular(L.mT if transpose else L, U, axis, len(cholesky), upper=transpose)
    return U


def kron_quadratic(cholesky: Sequence[Tensor], U: Tensor) -> Tensor:
    """Return uᵀ (C_1 ⊗ … ⊗ C_D)⁻¹ u, (*b,), a sum of squares."""
    white = kron_whiten(cholesky, U)
    return white.square().flatten(white.dim() - len(cholesky)).sum(-1)


class _Basis(NamedTuple):
    """A = V Λ V⁻¹ with V = Q R; R is None where V is orthogonal."""

    values: Tensor
    vectors: Tensor
    Q: Tensor
    R: Tensor | None

    def complex(self) -> _Basis:
        dtype = torch.promote_types(self.values.dtype, torch.complex64)
        R = None if self.R is None else self.R.to(dtype)
        return _Basis(self.values.to(dtype), self.vectors.to(dtype), self.Q.to(dtype), R)


class KroneckerSum:
    """A_1 ⊕ … ⊕ A_D = Σ_j I ⊗ … ⊗ A_j ⊗ … ⊗ I, with the eigenbases that invert it.

    For D = 2 the equation (A_1 ⊕ A_2) u = f is Sylvester's, A_1 U + U A_2ᵀ = F.

    Parameters
    ----------
    factors : D tensors (*b, N_j, N_j)
        Real; need not be symmetric, but must have a basis of eigenvectors.
    symmetric : bool
        Take orthogonal eigenvectors; only the lower triangles are then read.

    Raises
    ------
    ValueError
        A factor that is not square, or empty.

    Notes
    -----
    A_j = V_j Λ_j V_j⁻¹ gives (A_1 ⊕ … ⊕ A_D)⁻¹ = V (λ_i + λ_j + …)⁻¹ V⁻¹ with V = V_1 ⊗ … ⊗ V_D. V_j⁻¹ is applied by a
    QR factorisation. No gradient flows through the eigenbases.
    """

    def __init__(self, factors: Sequence[Tensor], *, symmetric: bool = False):
        self.factors = tuple(factors)
        for axis, A in enumerate(self.factors):
            if A.dim() < 2 or A.shape[-1] != A.shape[-2] or A.shape[-1] == 0:
                raise ValueError(
                    f"factors[{axis}] must be (*b, N, N) with N > 0, got {tuple(A.shape)}; give every axis a node."
                )
        bases = [_eigenbasis(A.detach(), symmetric) for A in self.factors]
        self._bases = [basis.complex() for basis in bases] if any(b.values.is_complex() for b in bases) else bases

    @property
    def n_axes(self) -> int:
        """Number of factors, D."""
        return len(self.factors)

    def apply(self, U: Tensor, shift: float | Tensor = 0.0) -> Tensor:
        """Return (A_1 ⊕ … ⊕ A_D + shift) u for U (*b, N_1, …, N_D)."""
        terms = [mode_product(A, U, axis, self.n_axes) for axis, A in enumerate(self.factors)]
        return sum(terms[1:], terms[0]) + shift * U

    def solve(self, F: Tensor, shift: float | Tensor = 0.0, *, refine: int = 1) -> Solution:
        """Solve (A_1 ⊕ … ⊕ A_D + shift) u = f.

        Parameters
        ----------
        F : (*b, N_1, …, N_D)
        shift : float or (*b, 1, …, 1)
            Multiple of the identity that is added.
        refine : int
            Steps of iterative refinement: they give back the digits that badly conditioned eigenvectors cost.

        Returns
        -------
        Solution
            ``value`` like F; ``status`` is "nearly singular" where an eigenvalue of the sum almost vanishes;
            ``stats["residual"]`` relative to the norm of F, ``stats["smallest"]`` the least eigenvalue beside the
            largest; of several sets the worst.
        """
        total = self._denominator(shift)
        size = total.abs().flatten(total.dim() - self.n_axes)
        tiny = torch.finfo(size.dtype).tiny
        smallest = float((size.amin(-1) / size.amax(-1).clamp_min(tiny)).min())
        U = self._inverse(F, total)
        for _ in range(refine):
            U = U + self._inverse(F - self.apply(U, shift), total)
        off, norm = (self._norm(value) for value in (F - self.apply(U, shift), F))
        residual = float((off / norm.clamp_min(tiny)).max())
        status = "ok" if smallest > _NEARLY_SINGULAR else "nearly singular"
        return Solution(U, status, {"residual": residual, "smallest": smallest})

    def _norm(self, U: Tensor) -> Tensor:
        return torch.linalg.vector_norm(U.flatten(U.dim() - self.n_axes), dim=-1)

    def _denominator(self, shift: float | Tensor) -> Tensor:
        """Return λ_i + λ_j + … + shift over the grid, (*b, N_1, …, N_D)."""
        terms = []
        for axis, basis in enumerate(self._bases):
            shape = [1] * self.n_axes
            shape[axis] = basis.values.shape[-1]
            terms.append(basis.values.reshape(*basis.values.shape[:-1], *shape))
        return sum(terms[1:], terms[0]) + shift

    def _inverse(self, F: Tensor, total: Tensor) -> Tensor:
        W = F.to(total.dtype)
        for axis, basis in enumerate(self._bases):
            W = mode_product(basis.Q.mH, W, axis, self.n_axes)
            W = W if basis.R is None else _triangular(basis.R, W, axis, self.n_axes, upper=True)
        W = kron_matvec([basis.vectors for basis in self._bases], W / total)
        return W.real if W.is_complex() else W


def _eigenbasis(A: Tensor, symmetric: bool) -> _Basis:
    """Return eigenvalues, eigenvectors V, and V = Q R; real where they can be."""
    if symmetric:
        values, vectors = torch.linalg.eigh(A)
        return _Basis(values, vectors, vectors, None)
    values, vectors = torch.linalg.eig(A)
    if not bool(values.imag.any()):
        values, vectors = values.real, vectors.real.contiguous()
    return _Basis(values, vectors, *torch.linalg.qr(vectors))


def _triangular(T: Tensor, U: Tensor, axis: int, n_axes: int, *, upper: bool) -> Tensor:
    """Return T⁻¹ along one axis of U (*b, N_1, …, N_D)."""
    moved = U.movedim(axis - n_axes, -n_axes)  # this axis first, the others are columns
    batch, rest = moved.shape[: moved.dim() - n_axes], moved.shape[moved.dim() - n_axes + 1 :]
    columns = moved.reshape(*batch, moved.shape[-n_axes], math.prod(rest))
    solved = torch.linalg.solve_triangular(T, columns, upper=upper)
    return solved.reshape(*solved.shape[:-1], *rest).movedim(-n_axes, axis - n_axes)
