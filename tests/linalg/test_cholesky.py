"""The Cholesky factorisation: exact where it can be, jittered as little as helps, and honest about both."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mercer.linalg.cholesky import NotPositiveDefiniteError, cholesky
from mercer.policy import NumericalPolicy

DTYPE = torch.float64
POLICY = NumericalPolicy()


def with_eigenvalues(*values, seed=0):
    """A symmetric matrix with given eigenvalues."""
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))[0]
    return torch.as_tensor(basis * np.array(values) @ basis.T)


def test_a_definite_matrix_is_factored_without_jitter():
    A = with_eigenvalues(0.5, 1.0, 2.0, 9.0)
    kept = A.clone()
    found = cholesky(A, POLICY)
    assert found.status == "ok" and found.stats["jitter"] == 0.0
    np.testing.assert_allclose(found.value, np.linalg.cholesky(A), rtol=1e-12)
    assert torch.equal(A, kept)


def test_only_the_lower_triangle_is_read():
    A = with_eigenvalues(0.5, 1.0, 2.0)
    half = A.tril() + torch.full_like(A, torch.nan).triu(1)
    assert torch.equal(cholesky(half, POLICY).value, cholesky(A, POLICY).value)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e8])
def test_the_smallest_jitter_that_succeeds_is_used_and_reported_relative_to_the_diagonal(size):
    A = size * with_eigenvalues(-1e-8, 1.0, 2.0, 5.0)
    found = cholesky(A, NumericalPolicy(jitter_ladder=(0.0, 1e-12, 1e-9, 1e-7, 1e-3)))
    assert found.status == "jittered" and found.stats["jitter"] == 1e-7
    expected = A + 1e-7 * A.diagonal().mean() * torch.eye(4, dtype=DTYPE)
    torch.testing.assert_close(found.value @ found.value.T, expected, rtol=1e-12, atol=1e-14 * size)


def test_a_batch_reports_the_jitter_of_its_worst_member():
    good, bad = with_eigenvalues(1.0, 2.0, 3.0), with_eigenvalues(-1e-9, 2.0, 3.0)
    ladder = NumericalPolicy(jitter_ladder=(0.0, 1e-8))
    found = cholesky(torch.stack([good, bad]).unsqueeze(1), ladder)
    assert found.value.shape == (2, 1, 3, 3) and found.stats["jitter"] == 1e-8
    for L, A in zip(found.value[:, 0], (good, bad), strict=True):
        torch.testing.assert_close(L @ L.T, A, rtol=1e-7, atol=1e-7)


def test_an_empty_ladder_end_is_an_error_that_names_the_near_duplicates():
    A = with_eigenvalues(1.0, 2.0, 3.0, 4.0)
    A[3], A[:, 3] = A[1].clone(), A[:, 1].clone()
    A[3, 3] = A[1, 1] - 1e-3
    with pytest.raises(NotPositiveDefiniteError, match=r"Gram matrix .* Rows 1 and 3 are near-duplicates") as caught:
        cholesky(A, POLICY, "Gram matrix")
    assert caught.value.rows == (1, 3)


def test_near_duplicates_are_found_in_any_member_of_a_batch():
    A = torch.eye(4, dtype=DTYPE).repeat(3, 1, 1)
    A[2, 2, 0] = A[2, 0, 2] = 1.5
    with pytest.raises(NotPositiveDefiniteError) as caught:
        cholesky(A, POLICY)
    assert caught.value.rows == (0, 2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("entry", [(0, 0), (2, 1), (3, 3)])
def test_entries_that_are_not_finite_are_named_as_such(value, entry):
    A = with_eigenvalues(1.0, 2.0, 3.0, 4.0)
    A[entry] = value
    with pytest.raises(NotPositiveDefiniteError, match="NaN or infinite"):
        cholesky(A, POLICY)


def test_a_single_row_has_no_duplicate_to_name():
    with pytest.raises(NotPositiveDefiniteError) as caught:
        cholesky(torch.tensor([[-1.0]], dtype=DTYPE), POLICY)
    assert "Rows" not in str(caught.value) and "noise variance" in str(caught.value)


def test_float32_has_a_ladder_of_its_own():
    policy = NumericalPolicy(dtype=torch.float32)
    A = with_eigenvalues(-2e-6, 1.0, 2.0, 5.0).float()
    found = cholesky(A, policy)
    assert found.value.dtype == torch.float32
    assert found.stats["jitter"] in policy.jitter_ladder and found.stats["jitter"] >= 1e-6


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 9),
    batch=st.sampled_from([(), (1,), (3,), (2, 2)]),
    log_size=st.floats(-12, 12),
    double=st.booleans(),
    seed=st.integers(0, 999),
)
def test_the_factor_is_lower_triangular_and_squares_to_the_matrix(n, batch, log_size, double, seed):
    dtype = DTYPE if double else torch.float32
    root = torch.randn(*batch, n, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    A = 10.0**log_size * (root @ root.mT + torch.eye(n, dtype=dtype))
    found = cholesky(A, NumericalPolicy(dtype=dtype))
    assert found.value.shape == A.shape and torch.equal(found.value, found.value.tril())
    assert (found.value.diagonal(dim1=-2, dim2=-1) > 0).all()
    # backward stable: n rounding errors per entry
    size = float(A.diagonal(dim1=-2, dim2=-1).max())
    gap = (found.value @ found.value.mT - A).abs().max()
    assert gap <= 4 * (n + 1) * torch.finfo(dtype).eps * size
