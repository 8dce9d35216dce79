"""Views of our matrices as ``LinearOperator``, for gpytorch and whoever else speaks its language."""

from __future__ import annotations

from typing import Any

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from mercer.linalg import sic


class SparsePrecisionOperator(LinearOperator):
    """The precision matrix U Uᵀ of a sparse inverse Cholesky factor U; its solves are products with the covariance.

    Parameters
    ----------
    val : (*b, n, w)
        Columns of U, as `mercer.linalg.sic` stores them.
    pattern : Pattern
        Where they stand.

    Notes
    -----
    Products, solves, log-determinant and diagonal take O(n w) operations each; nothing is ever factored or iterated.
    """

    def __init__(self, val: Tensor, pattern: sic.Pattern):
        super().__init__(val, pattern=pattern)
        self.val, self.pattern = val, pattern

    def _size(self) -> torch.Size:
        return torch.Size((*self.val.shape[:-1], self.val.shape[-2]))

    def _transpose_nonbatch(self) -> SparsePrecisionOperator:
        return self

    def _expand_batch(self, batch_shape: torch.Size | list[int]) -> SparsePrecisionOperator:
        return type(self)(self.val.expand(*batch_shape, *self.val.shape[-2:]), self.pattern)

    def _matmul(self, rhs: Tensor) -> Tensor:
        return self._columnwise(sic.times, rhs)

    def _solve(self, rhs: Tensor, preconditioner: Any = None, num_tridiag: int = 0) -> Tensor:
        return self.solve(rhs)

    def solve(self, right_tensor: Tensor, left_tensor: Tensor | None = None) -> Tensor:
        """Return (U Uᵀ)⁻¹ times (*b, n) or (*b, n, k), from the left also times ``left_tensor``."""
        solution = self._columnwise(sic.solve, right_tensor)
        return solution if left_tensor is None else left_tensor @ solution

    def _columnwise(self, operation: Any, rhs: Tensor) -> Tensor:
        """Apply both factors to every column of rhs: U (Uᵀ x), or U⁻ᵀ (U⁻¹ x)."""
        vector = rhs.dim() == 1
        rows = rhs.unsqueeze(0) if vector else rhs.mT
        val, first = self.val.unsqueeze(-3), operation is sic.times
        out = operation(self.pattern, val, operation(self.pattern, val, rows, first), not first)
        return out.squeeze(-2) if vector else out.mT

    def _diagonal(self) -> Tensor:
        return sic.precision_diagonal(self.pattern, self.val)

    def logdet(self) -> Tensor:
        """Return log |U Uᵀ|, (*b,)."""
        return sic.logdet(self.val)

    def inv_quad_logdet(
        self, inv_quad_rhs: Tensor | None = None, logdet: bool = False, reduce_inv_quad: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return rhsᵀ (U Uᵀ)⁻¹ rhs summed over columns (or per column) and, where asked for, the log-determinant."""
        empty = self.val.new_zeros(())
        quadratic = empty
        if inv_quad_rhs is not None:
            rhs = inv_quad_rhs.unsqueeze(-1) if inv_quad_rhs.dim() == 1 else inv_quad_rhs
            whitened = sic.solve(self.pattern, self.val.unsqueeze(-3), rhs.mT)
            quadratic = whitened.square().sum(-1)
            quadratic = quadratic.sum(-1) if reduce_inv_quad else quadratic
        return quadratic, self.logdet() if logdet else empty
