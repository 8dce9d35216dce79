"""Generalised minimal residuals for one right-hand side of any shape."""

from __future__ import annotations

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
        ``status`` is "ok" or "not converged"; ``stats`` holds ``iterations`` and the relative ``residual``.

    References
    ----------
    Saad and Schultz (1986), with M on the right, so that the residual is that of A; vectors are made orthogonal twice.
    """
    shape, b = rhs.shape, rhs.reshape(-1)
    length = torch.linalg.vector_norm(b)
    if not bool(length > 0):
        return Solution(torch.zeros_like(rhs), "ok", {"iterations": 0, "residual": 0.0})
    basis = b.new_zeros(max_iter + 1, len(b))
    basis[0] = b / length
    H = b.new_zeros(max_iter + 1, max_iter)
    residual, k = 1.0, 0
    for k in range(1, max_iter + 1):
        w = product(preconditioner(basis[k - 1].reshape(shape))).reshape(-1)
        for _ in range(2):
            along = basis[:k] @ w
            w = w - along @ basis[:k]
            H[:k, k - 1] += along
        H[k, k - 1] = torch.linalg.vector_norm(w)
        basis[k] = w / H[k, k - 1].clamp_min(torch.finfo(w.dtype).tiny)
        if k % _LOOK_EVERY == 0 or k == max_iter or k == len(b):
            y, residual = _least_squares(H[: k + 1, :k])
            if residual <= tol or k == len(b):
                break
    x = preconditioner((length * (y @ basis[:k])).reshape(shape))
    return Solution(x, "ok" if residual <= tol else "not converged", {"iterations": k, "residual": residual})


def _least_squares(H: Tensor) -> tuple[Tensor, float]:
    """Minimise |e₁ − H y|, and say how small it is."""
    Q, R = torch.linalg.qr(H, mode="complete")
    k = H.shape[1]
    y = torch.linalg.solve_triangular(R[:k], Q[0, :k, None], upper=True)[:, 0]
    return y, float(Q[0, k].abs())
