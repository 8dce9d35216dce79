"""Preconditioned conjugate gradients for batches of right-hand sides."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mercer.linalg.cholesky import Solution

_CHECK_EVERY = 4  # looking at the residual stops a GPU


@torch.no_grad()
def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    rhs: Tensor,
    preconditioner: Callable[[Tensor], Tensor],
    *,
    tol: float,
    max_iter: int = 100,
    start: Tensor | None = None,
) -> Solution:
    """Solve A x = rhs for symmetric positive definite A.

    Parameters
    ----------
    product : callable
        x (*b, n) → A x.
    rhs : (*b, n)
    preconditioner : callable
        x (*b, n) → M⁻¹ x, M near A.
    tol : float
        Stop when every residual is no longer than ``tol`` times its right-hand side.
    max_iter : int
    start : (*b, n), optional
        Where to begin; zero by default.

    Returns
    -------
    Solution
        ``status`` is "ok" or "not converged"; ``stats`` holds ``iterations`` and ``residual``, the largest relative
        residual at the end.

    References
    ----------
    Golub and Van Loan (2013), algorithm 11.5.1.
    """
    x = torch.zeros_like(rhs) if start is None else start.expand_as(rhs).clone()
    residual = rhs - product(x) if start is not None else rhs.clone()
    length = rhs.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(rhs.dtype).tiny)
    direction, size = torch.zeros_like(rhs), torch.ones_like(length)
    for iteration in range(max_iter + 1):
        worst = (residual.norm(dim=-1, keepdim=True) / length).amax()
        if iteration % _CHECK_EVERY == 0 or iteration == max_iter:
            relative = float(worst)
            if relative <= tol or iteration == max_iter:
                status = "ok" if relative <= tol else "not converged"
                return Solution(x, status, {"iterations": iteration, "residual": relative})
        conditioned = preconditioner(residual)
        new_size = (residual * conditioned).sum(-1, keepdim=True)
        ratio = torch.where(size > 0, new_size / size, 0.0) if iteration else torch.zeros_like(size)
        direction, size = conditioned + ratio * direction, new_size
        image = product(direction)
        curvature = (direction * image).sum(-1, keepdim=True)
        step = torch.where(curvature > 0, size / curvature, 0.0)  # a member that is done stays where it is
        x, residual = x + step * direction, residual - step * image
    raise AssertionError("unreachable")
