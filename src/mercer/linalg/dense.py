"""Dense symmetric positive definite matrices: factor, solve, invert, with as few buffers as possible.

On the CPU the matrices go to SciPy's LAPACK in place. torch's own calls copy each matrix into column-major order,
clear a triangle, and invert at about half the speed. Elsewhere the functions are torch's. Batches are loops over
matrices: a matrix is worth a call, and one n × n buffer serves them all.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from scipy.linalg import get_lapack_funcs
from torch import Tensor

from mercer.linalg.threads import lapack_threads

_MIRROR_ROWS = 256  # rows of a block that is copied across the diagonal; both sides then fit in a cache


def factor_(A: Tensor) -> tuple[Tensor, bool]:
    """Factor A = L Lᵀ in place.

    Parameters
    ----------
    A : (*b, n, n), contiguous
        Only the lower triangle is read; overwritten, also when the factorisation fails.

    Returns
    -------
    L : (*b, n, n)
        Lower triangular, zeros above the diagonal.
    ok : bool
        False if some matrix is not positive definite or not finite.
    """
    if A.device.type != "cpu":
        L, info = torch.linalg.cholesky_ex(A)
        return L, not bool(info.any())
    (potrf,) = get_lapack_funcs(("potrf",), dtype=_numpy_dtype(A))
    with lapack_threads(A.shape[-1]):
        for matrix in _fortran(A):
            # a NaN passes LAPACK's test of the pivots, and ends up on the diagonal
            _, info = potrf(matrix, lower=0, clean=1, overwrite_a=1)
            if info != 0 or not np.isfinite(matrix.diagonal()).all():
                return A, False
    return A, True


def solve_factored(L: Tensor, rhs: Tensor) -> Tensor:
    """Return (L Lᵀ)⁻¹ rhs for right-hand sides (*b, n); batch shapes broadcast.

    Right-hand sides that share one L are solved together.
    """
    batch = torch.broadcast_shapes(L.shape[:-2], rhs.shape[:-1])
    shared = L.shape[:-2].numel() == 1
    if L.device.type != "cpu":
        if not shared:
            return torch.cholesky_solve(rhs.unsqueeze(-1), L).squeeze(-1)
        columns = rhs.reshape(-1, rhs.shape[-1]).mT
        return torch.cholesky_solve(columns, L.reshape(L.shape[-2:])).mT.reshape(*batch, -1)
    (potrs,) = get_lapack_funcs(("potrs",), dtype=_numpy_dtype(L))
    # rows of a contiguous array are the columns of its transpose, which LAPACK overwrites
    out = rhs.expand(*batch, rhs.shape[-1]).clone(memory_format=torch.contiguous_format)
    matrices = L if shared else L.expand(*batch, *L.shape[-2:])
    groups = out.reshape(1, -1, out.shape[-1]) if shared else out.reshape(-1, 1, out.shape[-1])
    with lapack_threads(1):
        for matrix, rows in zip(_fortran(matrices), groups.numpy(), strict=True):
            potrs(matrix, rows.T, lower=0, overwrite_b=1)
    return out


def inverse_(L: Tensor) -> Tensor:
    """Return (L Lᵀ)⁻¹, symmetric, (*b, n, n); L is overwritten on the CPU."""
    if L.device.type != "cpu":
        return torch.cholesky_inverse(L)
    (potri,) = get_lapack_funcs(("potri",), dtype=_numpy_dtype(L))
    with lapack_threads(L.shape[-1]):
        for matrix in _fortran(L):
            potri(matrix, lower=0, overwrite_c=1)
    n = L.shape[-1]
    for start in range(0, n, _MIRROR_ROWS):
        stop = min(start + _MIRROR_ROWS, n)
        square = L[..., start:stop, start:stop]
        square.copy_(square.tril() + square.tril(-1).mT)
        L[..., start:stop, stop:] = L[..., stop:, start:stop].mT
    return L


def inverse_diagonal(L: Tensor) -> Tensor:
    """Return the diagonal of (L Lᵀ)⁻¹, (*b, n): squared norms of the columns of L⁻¹, n³/3 operations."""
    n = L.shape[-1]
    if L.device.type != "cpu":
        inverse = torch.linalg.solve_triangular(L, torch.eye(n, dtype=L.dtype, device=L.device), upper=False)
        return inverse.square().sum(-2)
    (trtri,) = get_lapack_funcs(("trtri",), dtype=_numpy_dtype(L))
    out = L.new_empty(L.shape[:-1])
    buffer = torch.empty(n, n, dtype=L.dtype)
    with lapack_threads(L.shape[-1]):
        for matrix, diagonal in zip(L.reshape(-1, n, n), out.view(-1, n), strict=True):
            buffer.copy_(matrix)
            trtri(buffer.numpy().T, lower=0, overwrite_c=1)
            diagonal.copy_(buffer.square_().sum(0))
    return out


def matvec(A: Tensor, x: Tensor) -> Tensor:
    """Return A x for x (*b, n), as one matrix product when the batches share A."""
    if A.dim() == 2:
        return x @ A.mT
    return (A @ x.unsqueeze(-1)).squeeze(-1)


def sum_to(value: Tensor, shape: torch.Size) -> Tensor:
    """Sum the broadcast dimensions of ``value`` away."""
    return value.sum_to_size(shape) if value.shape != shape else value


def _fortran(A: Tensor) -> Iterator[np.ndarray]:
    """Yield each matrix as LAPACK sees it: the lower triangle of a row-major matrix is its upper one."""
    n = A.shape[-1]
    for matrix in A.detach().reshape(-1, n, n).numpy():
        yield matrix.T


def _numpy_dtype(A: Tensor) -> type[np.floating]:
    return np.float64 if A.dtype == torch.float64 else np.float32
