"""Operators handed to gpytorch pass the shipped conformance suite: one row each."""

import pytest
import torch
from linear_operator.operators import (
    BlockDiagLinearOperator,
    DenseLinearOperator,
    DiagLinearOperator,
    KroneckerProductLinearOperator,
    LowRankRootAddedDiagLinearOperator,
    LowRankRootLinearOperator,
    MatmulLinearOperator,
)

from mercer.linalg.operators import SparsePrecisionOperator
from mercer.linalg.sic import Pattern
from mercer.testing import check_operator


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def covariance(*shape):
    A = random(*shape, shape[-1])
    return DenseLinearOperator(A @ A.mT + torch.eye(shape[-1], dtype=torch.float64))


def sparse_precision(*shape):
    """Rows of 3 neighbours, fewer at the start; the diagonal dominates, so that float32 keeps its digits."""
    n = shape[-1]
    pattern = Pattern(torch.tensor([[max(i - k, -1) for k in (1, 2, 4)] for i in range(n)]))
    val = (0.3 * random(*shape, 4)).masked_fill(pattern.padding, 0.0)
    val[..., -1] = 1.0 + val[..., -1].abs()
    return SparsePrecisionOperator(val, pattern)


# name: (operator, positive definite)
TABLE = {
    "dense": (covariance(5), True),
    "dense, batch": (covariance(2, 5), True),
    "diagonal, batch": (DiagLinearOperator(1 + random(3, 5).square()), True),
    "kronecker": (KroneckerProductLinearOperator(covariance(3), covariance(4)), True),
    "block diagonal": (BlockDiagLinearOperator(covariance(3, 4)), True),
    "low rank and diagonal": (
        LowRankRootAddedDiagLinearOperator(
            LowRankRootLinearOperator(random(6, 2)), DiagLinearOperator(1 + random(6).square())
        ),
        True,
    ),
    "sparse inverse Cholesky": (sparse_precision(9), True),
    "sparse inverse Cholesky, batch": (sparse_precision(2, 9), True),
    "rectangular product": (MatmulLinearOperator(random(5, 3), random(3, 4)), False),
}


@pytest.mark.parametrize("name", TABLE)
def test_operator_keeps_its_contract(name):
    operator, positive_definite = TABLE[name]
    check_operator(operator, positive_definite=positive_definite)
