"""Factor, solve and invert in place: what LAPACK would say, matrix by matrix."""

import numpy as np
import pytest
import torch

from mercer.linalg.dense import factor_, inverse_, inverse_diagonal, solve_factored

SHAPES = [(1,), (5,), (3, 4), (2, 1, 6), (300,)]  # 300 rows are mirrored in more than one block
DTYPES = {torch.float64: 1e-10, torch.float32: 1e-4}


def matrix(shape, dtype=torch.float64):
    n = shape[-1]
    root = torch.randn(*shape, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (root @ root.mT / n + torch.eye(n, dtype=torch.float64)).to(dtype)


def factored(shape, dtype=torch.float64):
    L, ok = factor_(matrix(shape, dtype))
    assert ok
    return L


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_factor_is_lower_triangular_and_in_place(shape, dtype):
    A = matrix(shape, dtype)
    L, ok = factor_(A)
    assert ok and L.data_ptr() == A.data_ptr() and torch.equal(L, L.tril())
    np.testing.assert_allclose(L, np.linalg.cholesky(matrix(shape).numpy()), rtol=0, atol=DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_inverse_is_whole_and_symmetric(shape, dtype):
    inverse = inverse_(factored(shape, dtype))
    assert torch.equal(inverse, inverse.mT)
    np.testing.assert_allclose(inverse, np.linalg.inv(matrix(shape).numpy()), rtol=0, atol=DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_diagonal_of_the_inverse_leaves_the_factor_alone(shape, dtype):
    L = factored(shape, dtype)
    kept = L.clone()
    expected = np.linalg.inv(matrix(shape).numpy()).diagonal(axis1=-2, axis2=-1)
    np.testing.assert_allclose(inverse_diagonal(L), expected, rtol=0, atol=DTYPES[dtype])
    assert torch.equal(L, kept)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "rhs"),
    [((4,), (4,)), ((4,), (3, 4)), ((3, 4), (3, 4)), ((3, 4), (4,)), ((1, 4), (2, 4)), ((2, 1, 4), (3, 4))],
)
def test_solves_broadcast_and_leave_their_arguments_alone(shape, rhs, dtype):
    L = factored(shape, dtype)
    b = torch.randn(rhs, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    kept = L.clone(), b.clone()
    expected = (torch.linalg.inv(matrix(shape)) @ b.double().unsqueeze(-1)).squeeze(-1)
    found = solve_factored(L, b)
    assert found.shape == expected.shape and found.dtype == dtype
    np.testing.assert_allclose(found, expected, rtol=0, atol=10 * DTYPES[dtype])
    assert torch.equal(L, kept[0]) and torch.equal(b, kept[1])


@pytest.mark.parametrize("value", [-1.0, 0.0, torch.nan, torch.inf])
@pytest.mark.parametrize("row", [0, 3])
def test_what_cannot_be_factored_is_said_for_any_member_of_a_batch(value, row):
    A = matrix((3, 4))
    A[1, row, row] = value
    assert not factor_(A)[1]
