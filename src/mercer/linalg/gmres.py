"""Generalised minimal residuals for one right-hand side of any shape."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mercer.linalg.cholesky import Solution

_LOOK_EVERY = 3  # looking at the residual stops a GPU


@torch.no_grad()
def gmres(
    product: Callable[[Tensor], Tensor],
    rhs: Tensor,
    preconditioner: Callable[[Tensor], Tensor],
    *,
    tol: float,
    max_iter: int = 60,
) -> Solution:
    """Solve A x = rhs for an A that need not be symmetric, without restarts.

    Parameters
    ----------
    product, preconditioner : callable
        x → A x and x → M⁻¹ x, M near A, on tensors of the shape of ``rhs``.
    rhs : tensor of any shape
    tol : float
        Stop when the residual is no longer than ``tol`` times the right-hand side.
    max_iter : int
        Most products; as many tensors are kept.

    Returns
    -------
    Solution
        ``status`` is "ok" or "not converged"; ``stats`` holds ``iterations`` and the relative ``residual``. Where
        numbers are not finite the value is zero and the residual inf.

    References
    ----------
    Saad and Schultz (1986), with M on the right, so that the residual is that of A; vectors are made orthogonal twice.
    """
    shape, b = rhs.shape, rhs.reshape(-1)
    length = torch.linalg.vector_norm(b)
    if bool(length == 0):
        return Solution(torch.zeros_like(rhs), "ok", {"iterations": 0, "residual": 0.0})
    eps, tiny = torch.finfo(b.dtype).eps, torch.finfo(b.dtype).tiny
    basis = b.new_zeros(max_iter + 1, len(b))
    basis[0] = b / length
    H = b.new_zeros(max_iter + 1, max_iter)
    y, residual, k = H[:0, 0], math.inf, 0
    for k in range(1, max_iter + 1):
        w = product(preconditioner(basis[k - 1].reshape(shape))).reshape(-1)
        size = torch.linalg.vector_norm(w)
        for _ in range(2):
            along = basis[:k] @ w
            w = w - along @ basis[:k]
            H[:k, k - 1] += along
        left = torch.linalg.vector_norm(w)
        H[k, k - 1] = left
        # what is left of an exhausted space is rounding: a basis vector of zeros, and columns of zeros from here on
        basis[k] = torch.where(left <= eps * size, 0.0, w / left.clamp_min(tiny))
        if k % _LOOK_EVERY == 0 or k == max_iter or k == len(b):
            y, residual = _least_squares(H[: k + 1, :k])
            if residual <= tol or k == len(b) or not (math.isfinite(residual) and bool(basis[k].any())):
                break
    x = preconditioner((length * (y @ basis[: len(y)])).reshape(shape))
    if not (math.isfinite(residual) and bool(x.isfinite().all())):
        return Solution(torch.zeros_like(rhs), "not converged", {"iterations": k, "residual": math.inf})
    return Solution(x, "ok" if residual <= tol else "not converged", {"iterations": k, "residual": residual})


def _least_squares(H: Tensor) -> tuple[Tensor, float]:
    """Minimise |e₁ − H y|, with the shortest y where H has not full rank, and say how small it is."""
    if not bool(H.isfinite().all()):
        return H.new_zeros(H.shape[1]), math.inf
    first = H.new_zeros(H.shape[0])
    first[0] = 1
    u, s, vt = torch.linalg.svd(H, full_matrices=False)
    kept = s > torch.finfo(H.dtype).eps * s[0]
    y = vt[kept].mT @ (u[0, kept] / s[kept])
    return y, float(torch.linalg.vector_norm(first - H @ y))
