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

from mercer.testing import check_operator


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def covariance(*shape):
    A = random(*shape, shape[-1])
    return DenseLinearOperator(A @ A.mT + torch.eye(shape[-1], dtype=torch.float64))


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
    "rectangular product": (MatmulLinearOperator(random(5, 3), random(3, 4)), False),
}


@pytest.mark.parametrize("name", TABLE)
def test_operator_keeps_its_contract(name):
    operator, positive_definite = TABLE[name]
    check_operator(operator, positive_definite=positive_definite)
