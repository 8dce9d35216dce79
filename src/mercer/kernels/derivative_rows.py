"""Rows that say what they observe: a value of f, or one of its derivatives.

A row is its d columns and, beside them, the order of the derivative in each. A kernel of such rows is a kernel like any
other, so that families, engines and predictions need not know that some rows are slopes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from gpytorch.kernels import Kernel
from gpytorch.means import Mean
from torch import Tensor

from mercer.kernels.derivatives import Order, derivative_gram
from mercer.kernels.evaluate import diag, gram


def derivative_rows(X: Tensor, orders: Tensor | Sequence[int]) -> Tensor:
    """Return X (*b, n, d) with orders (*b, n, d), or (d,) for all rows, beside it: (*b, n, 2d)."""
    orders = torch.as_tensor(orders, device=X.device).to(X.dtype).expand(X.shape)
    return torch.cat([X, orders], -1)


class DerivativeRows(Kernel):
    """Cov(∂^a f(x), ∂^b f(x′)) for rows (x, a) and (x′, b) of `derivative_rows`.

    Parameters
    ----------
    kernel : gpytorch Kernel
        Covariance of f, without batch shape; it has the hyperparameters.
    """

    def __init__(self, kernel: Kernel):
        super().__init__()
        self.wrapped = kernel

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        """Evaluate on rows (*b, n, 2d): (*b, n1, n2), or with ``diag`` (*b, n)."""
        if diag:
            return self._diagonal(x1)
        if x1.dim() > 2 or x2.dim() > 2:
            return self._of_sets(x1, x2)
        first, second = _by_order(x1), _by_order(x2)
        blocks = [[self._block(p, q) for q in second] for p in first]
        stacked = torch.cat([torch.cat(row, -1) for row in blocks], -2)
        if len(first) == len(second) == 1:
            return stacked
        back = [torch.cat([index for _, index, _ in parts]).argsort() for parts in (first, second)]
        return stacked[back[0]][:, back[1]]

    def _block(self, first: tuple[Order, Tensor, Tensor], second: tuple[Order, Tensor, Tensor]) -> Tensor:
        if not any(first[0] + second[0]):
            return gram(self.wrapped, first[2], second[2])
        return derivative_gram(self.wrapped, first[2], second[2], first[0], second[0])

    def _of_sets(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Evaluate sets of rows, of which each may mix orders in its own way."""
        d = x1.shape[-1] // 2
        total: Tensor | None = None
        for a, at_a in _masks(x1):
            for b, at_b in _masks(x2):
                block = derivative_gram(self.wrapped, x1[..., :d], x2[..., :d], a, b)
                block = torch.where(at_a.unsqueeze(-1) & at_b.unsqueeze(-2), block, 0.0)
                total = block if total is None else total + block
        assert total is not None
        return total

    def _diagonal(self, x: Tensor) -> Tensor:
        d = x.shape[-1] // 2
        point = x[..., :d].unsqueeze(-2)
        total = x.new_zeros(x.shape[:-1])
        for order, at in _masks(x):
            if any(order):
                value = derivative_gram(self.wrapped, point, point, order, order)[..., 0, 0]
            else:
                value = diag(self.wrapped, x[..., :d])
            total = torch.where(at, value, total)
        return total


class DerivativeRowsMean(Mean):
    """∂^a μ(x) for rows (x, a) of `derivative_rows`, μ a mean that torch can differentiate or a constant."""

    def __init__(self, mean: Mean):
        super().__init__()
        self.wrapped = mean

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate on rows (*b, n, 2d): (*b, n)."""
        d = x.shape[-1] // 2
        with torch.enable_grad():
            point = x[..., :d] if x.requires_grad else x[..., :d].detach().requires_grad_()
            total = self.wrapped(point)
            for order, at in _masks(x):
                value = self.wrapped(point)
                for column, n in enumerate(order):
                    for _ in range(n):
                        value = _slope(value, point, column)
                total = torch.where(at, value, total)
        return total if torch.is_grad_enabled() else total.detach()


def _slope(value: Tensor, point: Tensor, column: int) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(value)
    (slope,) = torch.autograd.grad(value.sum(), point, create_graph=True, allow_unused=True)
    return torch.zeros_like(value) if slope is None else slope[..., column]


def _masks(x: Tensor) -> list[tuple[Order, Tensor]]:
    """Return every order that occurs in rows (*b, n, 2d), and which rows have it (*b, n)."""
    orders = x.detach()[..., x.shape[-1] // 2 :]
    found = orders.reshape(-1, orders.shape[-1]).unique(dim=0)
    return [(tuple(int(n) for n in order.tolist()), (orders == order).all(-1)) for order in found]


def _by_order(x: Tensor) -> list[tuple[Order, Tensor, Tensor]]:
    """Return every order that occurs in rows (n, 2d), the rows' index and their x."""
    found = [(order, at.nonzero().squeeze(-1)) for order, at in _masks(x)]
    return [(order, index, x[index][:, : x.shape[-1] // 2]) for order, index in found]
