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


@torch.no_grad()
def quadratic_forms(
    product: Callable[[Tensor], Tensor], probes: Tensor, function: Callable[[Tensor], Tensor], n_steps: int
) -> Tensor:
    """Return zᵀ f(A) z for each probe by Lanczos' quadrature; the mean over random probes estimates tr f(A).

    Parameters
    ----------
    product : callable
        z (*b, n) → A z, A symmetric.
    probes : (*b, n)
    function : callable
        f, elementwise on eigenvalues.
    n_steps : int
        Nodes of the quadrature; exact once they exhaust the spectrum that a probe sees.

    Returns
    -------
    (*b,)

    References
    ----------
    Ubaru, Chen and Saad (2017), "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", section 3.
    """
    n = probes.shape[-1]
    length = probes.norm(dim=-1, keepdim=True)
    basis = [probes / length]
    diagonal, beside = [], []
    for _ in range(min(n_steps, n)):
        image = product(basis[-1])
        diagonal.append((image * basis[-1]).sum(-1))
        # against all earlier vectors, twice: few steps, and orthogonality decides the accuracy
        for vector in (*basis, *basis):
            image = image - (image * vector).sum(-1, keepdim=True) * vector
        size = image.norm(dim=-1, keepdim=True)
        done = size <= 1e-10 * diagonal[-1].abs().unsqueeze(-1)  # an invariant space: what follows has no weight
        beside.append(size.masked_fill(done, 0.0).squeeze(-1))
        basis.append(torch.where(done, torch.zeros_like(image), image / size.masked_fill(done, 1.0)))
    T = torch.diag_embed(torch.stack(diagonal, -1))
    if len(diagonal) > 1:
        off = torch.stack(beside[:-1], -1)
        T = T + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    values, vectors = torch.linalg.eigh(T)
    weights = vectors[..., 0, :].square()
    # nodes behind an invariant space have weight zero and need not be in the domain of f
    terms = torch.where(weights > 0, weights * function(values.where(weights > 1e-14, torch.ones_like(values))), 0.0)
    return length.squeeze(-1).square() * terms.sum(-1)
