"""Condition small Gaussians N(m, C) on sites, many at once and differentiably in everything.

What `mercer.linalg.conditioning` does once for the n rows of the data, this does for the few rows of a fantasy or of a
batch of observations, thousands of times. As there, B = I + s C s with s = √λ2 is factored and never C, so that rows
that coincide or say nothing do no harm, and negative precisions are a downdate:

    mean = m + C r,   covariance = C − C M C,   M = s B⁻¹ s − U Uᵀ,   r = (I − M C) (λ1 − λ2 m).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Update(NamedTuple):
    """What sites make of N(·, C): batches of matrices of a few rows Q.

    Attributes
    ----------
    C : (*b, Q, Q)
        Covariance before.
    root : (*b, Q)
        s, the roots of the non-negative precisions.
    chol : (*b, Q, Q)
        Lower factor of B.
    downdate : (*b, Q, Q) or None
        U, None where no precision is negative.
    logdet : (*b,)
        log |I + C Λ2|.
    proper : (*b,) boolean
        Whether there is such a Gaussian; elsewhere the numbers mean nothing.
    """

    C: Tensor
    root: Tensor
    chol: Tensor
    downdate: Tensor | None
    logdet: Tensor
    proper: Tensor

    @classmethod
    def of(cls, C: Tensor, precision: Tensor) -> Update:
        """Factor for covariances C (*b, Q, Q), in units of f², and precisions λ2 (*b, Q); batch shapes broadcast."""
        eye = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
        root = _root(precision)
        weighted = root.unsqueeze(-1) * C
        chol, info = torch.linalg.cholesky_ex(eye + weighted * root.unsqueeze(-2))
        logdet, proper, downdate = _logdet(chol), info == 0, None
        if bool((precision < 0).any()):
            omega = _root(-precision).unsqueeze(-2)
            left = eye - root.unsqueeze(-1) * torch.cholesky_solve(weighted, chol)  # I − M₊ C
            small, info = torch.linalg.cholesky_ex(eye - omega.mT * (C @ left) * omega)
            downdate = torch.linalg.solve_triangular(small, (left * omega).mT, upper=False).mT
            logdet, proper = logdet + _logdet(small), proper & (info == 0)
        return cls(C, root, chol, downdate, logdet, proper)

    def reduce(self, cross: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return T and D, (*b, Q, q), with crossᵀ M cross = TᵀT − DᵀD for cross (*b, Q, q)."""
        T = torch.linalg.solve_triangular(self.chol, self.root.unsqueeze(-1) * cross, upper=False)
        return T, None if self.downdate is None else self.downdate.mT @ cross

    def weights(self, cross: Tensor) -> Tensor:
        """Return M cross, (*b, Q, q), for cross (*b, Q, q)."""
        T, D = self.reduce(cross)
        found = self.root.unsqueeze(-1) * torch.linalg.solve_triangular(self.chol.mT, T, upper=True)
        return found if D is None or self.downdate is None else found - self.downdate @ D

    def residual(self, pull: Tensor) -> Tensor:
        """Return (I − M C) pull, (*b, Q), for pull = λ1 − λ2 m, of which s⁻¹ is taken before it can cancel."""
        size = self.C.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
        floor = (torch.finfo(pull.dtype).eps / size.clamp_min(torch.finfo(pull.dtype).tiny)).sqrt()
        divisible = self.root > floor
        z = torch.where(divisible, pull / self.root.where(divisible, torch.ones_like(self.root)), 0.0)
        rest = torch.where(divisible, torch.zeros_like(pull), pull)
        drawn = z - self.root * _product(self.C, rest)
        solved = torch.cholesky_solve(drawn.unsqueeze(-1), self.chol).squeeze(-1)
        found = self.root * solved + rest
        if self.downdate is None:
            return found
        return found + _product(self.downdate, _product(self.downdate.mT, _product(self.C, pull)))

    def variance(self) -> Tensor:
        """Return diag(C − C M C), (*b, Q)."""
        T, D = self.reduce(self.C)
        taken = T.square().sum(-2)
        taken = taken if D is None else taken - D.square().sum(-2)
        return (self.C.diagonal(dim1=-2, dim2=-1) - taken).clamp_min(0.0)

    def shift(self, residual: Tensor) -> Tensor:
        """Return C r, (*b, Q), by which the means move."""
        return _product(self.C, residual)


def _product(A: Tensor, x: Tensor) -> Tensor:
    return (A @ x.unsqueeze(-1)).squeeze(-1)


def _root(value: Tensor) -> Tensor:
    """Return the root of what is positive and 0 elsewhere, without the infinite slope at 0."""
    positive = value > 0
    return torch.where(positive, value, 1.0).sqrt().masked_fill(~positive, 0.0)


def _logdet(L: Tensor) -> Tensor:
    return 2.0 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
