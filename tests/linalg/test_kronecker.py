"""Every operation on factors against its dense twin, for one to three axes, with and without batches."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mercer.linalg.cholesky import NotPositiveDefiniteError
from mercer.linalg.kronecker import (
    KroneckerSum,
    kron_cholesky,
    kron_logdet,
    kron_matvec,
    kron_quadratic,
    kron_solve,
    kron_whiten,
    mode_product,
)

SHAPES = [(5,), (7, 6), (4, 3, 5)]
BATCHES = [((), ()), ((2,), (2,)), ((), (3,)), ((2, 1), (2, 3)), ((3,), ())]  # of the factors, of the vector
TOL = 1e-10


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(batch, n, seed=0):
    root = draw(*batch, n, n, seed=seed)
    return root @ root.mT / n + torch.eye(n, dtype=torch.float64)


def dense(factors):
    """A_1 ⊗ … ⊗ A_D, entry by entry from the definition, for factors with one batch shape."""
    out = factors[0]
    for A in factors[1:]:
        out = torch.einsum("...ij,...kl->...ikjl", out, A)
        out = out.reshape(*out.shape[:-4], out.shape[-4] * out.shape[-3], out.shape[-2] * out.shape[-1])
    return out


def dense_sum(factors):
    """Σ_j I ⊗ … ⊗ A_j ⊗ … ⊗ I."""
    eyes = [torch.eye(A.shape[-1], dtype=A.dtype).expand(A.shape) for A in factors]
    return sum(dense([A if i == j else eyes[i] for i, A in enumerate(factors)]) for j in range(len(factors)))


def agree(value, expected, tol=TOL):
    torch.testing.assert_close(value, expected, rtol=0, atol=tol * float(expected.abs().max()))


def apply(matrix, U, n_axes):
    vector = U.flatten(U.dim() - n_axes).unsqueeze(-1)
    return (matrix @ vector).squeeze(-1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("of_factors", "of_vector"), BATCHES)
def test_products_and_solves_are_those_of_the_dense_matrix(shape, of_factors, of_vector):
    factors = [positive(of_factors, n, seed=j) for j, n in enumerate(shape)]
    U = draw(*of_vector, *shape, seed=9)
    whole, L = dense(factors), kron_cholesky(factors)
    batch = torch.broadcast_shapes(of_factors, of_vector)
    assert kron_matvec(factors, U).shape == (*batch, *shape)
    agree(kron_matvec(factors, U).flatten(len(batch)), apply(whole, U, len(shape)))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(whole))
    agree(kron_solve(L, U).flatten(len(batch)), apply(inverse, U, len(shape)))
    agree(kron_quadratic(L, U), (U.flatten(len(of_vector)) * apply(inverse, U, len(shape))).sum(-1))
    agree(kron_logdet(L), torch.linalg.eigvalsh(whole).log().sum(-1))
    agree(kron_whiten(L, U).flatten(len(batch)).square().sum(-1), kron_quadratic(L, U))


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_need_not_be_square(shape):
    factors = [draw(2 * n - 3, n, seed=j) for j, n in enumerate(shape)]
    U = draw(*shape, seed=9)
    value = kron_matvec(factors, U)
    assert value.shape == tuple(2 * n - 3 for n in shape)
    agree(value.flatten(), apply(dense(factors), U, len(shape)))


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_flow_through_factors_and_vector(shape):
    factors = [positive((), n, seed=j).requires_grad_() for j, n in enumerate(shape)]
    U = draw(*shape, seed=9).requires_grad_()

    def density(U, *factors):
        L = kron_cholesky([(A + A.mT) / 2 for A in factors], 0.1)
        return kron_quadratic(L, U) + kron_logdet(L)

    assert torch.autograd.gradcheck(density, (U, *factors))


def test_the_nugget_is_part_of_every_factor():
    factors = [positive((), n, seed=n) for n in (4, 3)]
    more = [A + 0.5 * torch.eye(len(A), dtype=A.dtype) for A in factors]
    for L, expected in zip(kron_cholesky(factors, 0.5), kron_cholesky(more), strict=True):
        assert torch.equal(L, expected)


@pytest.mark.parametrize("value", [-5.0, math.nan])
def test_an_axis_that_cannot_be_factored_is_named(value):
    factors = [positive((2,), 4), positive((2,), 3)]
    factors[1][1, 2, 2] = value
    with pytest.raises(NotPositiveDefiniteError, match="axis 1"):
        kron_cholesky(factors, 1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("of_factors", "of_vector"), BATCHES)
def test_a_sum_is_inverted_like_the_dense_matrix(shape, of_factors, of_vector, symmetric):
    factors = [positive(of_factors, n, seed=j) for j, n in enumerate(shape)]
    if not symmetric:
        factors = [A + 0.3 * draw(*A.shape, seed=20 + j) for j, A in enumerate(factors)]  # with complex eigenvalues
    F, batch = draw(*of_vector, *shape, seed=9), torch.broadcast_shapes(of_factors, of_vector)
    done = KroneckerSum(factors, symmetric=symmetric).solve(F, 0.7)
    whole = dense_sum(factors) + 0.7 * torch.eye(math.prod(shape), dtype=torch.float64)
    assert done.status == "ok" and done.value.dtype == torch.float64 and done.stats["residual"] < 1e-12
    agree(apply(whole, done.value, len(shape)), F.expand(*batch, *shape).flatten(len(batch)))


def test_two_axes_are_the_equation_of_sylvester():
    A, B, F = draw(6, 6) + 6 * torch.eye(6).double(), draw(4, 4, seed=1), draw(6, 4, seed=2)
    U = KroneckerSum([A, B]).solve(F).value
    agree(A @ U + U @ B.mT, F)


def test_one_axis_with_complex_eigenvalues_and_one_without():
    turn = torch.tensor([[1.0, 2.0], [-2.0, 1.0]], dtype=torch.float64)
    F = draw(2, 3)
    solver = KroneckerSum([turn, torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))])
    agree(solver.apply(solver.solve(F).value), F)


def test_refinement_gives_back_what_bad_eigenvectors_cost():
    n = 12
    jordan = 2 * torch.eye(n, dtype=torch.float64) + torch.diag(torch.ones(n - 1, dtype=torch.float64), 1)
    jordan += torch.diag(torch.linspace(0, 0.3, n, dtype=torch.float64))
    solver, F = KroneckerSum([jordan, jordan]), draw(n, n)
    plain, refined = (solver.solve(F, refine=k).stats["residual"] for k in (0, 3))
    assert plain > 1e-9 and refined < 1e-2 * plain


def test_a_sum_without_an_inverse_is_said():
    A = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert KroneckerSum([A, -A]).solve(draw(2, 2), refine=0).status == "nearly singular"


def test_sets_of_very_different_size_are_judged_one_by_one():
    A = torch.stack([positive((), 3), 1e14 * positive((), 3, seed=1)])
    F = torch.stack([draw(3, 3), torch.zeros(3, 3, dtype=torch.float64)])
    done = KroneckerSum([A, A]).solve(F)
    assert done.status == "ok" and done.stats["smallest"] > 1e-3 and done.stats["residual"] < 1e-12
    A[0] = torch.diag(torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64))
    assert KroneckerSum([A, A]).solve(F, refine=0).status == "nearly singular"
    crooked = torch.tensor([[1.0, 1e9], [0.0, 1.001]], dtype=torch.float64)
    sets = torch.stack([crooked, 1e9 * torch.eye(2, dtype=torch.float64)])
    small, large = draw(2), 1e12 * draw(2, seed=1)
    one = KroneckerSum([sets[0]]).solve(small, refine=0).stats["residual"]
    both = KroneckerSum([sets]).solve(torch.stack([small, large]), refine=0).stats["residual"]
    assert both == pytest.approx(one, rel=0.5) and one > 1e-12


@pytest.mark.parametrize("shape", [(0, 0), (2, 3), (3,)])
def test_factors_of_a_sum_are_square_and_not_empty(shape):
    with pytest.raises(ValueError, match=r"factors\[1\] must be"):
        KroneckerSum([torch.eye(2, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    batch=st.lists(st.integers(1, 2), max_size=2),
    seed=st.integers(0, 10**6),
)
def test_identities_hold_for_any_shape(shape, batch, seed):
    factors = [positive(batch, n, seed=seed + j) for j, n in enumerate(shape)]
    U, L = draw(*batch, *shape, seed=seed + 9), kron_cholesky(factors)
    agree(kron_matvec(factors, kron_solve(L, U)), U)
    agree(kron_matvec(L, kron_whiten(L, U)), U)
    agree(kron_matvec([A.mT for A in L], kron_whiten(L, U, transpose=True)), U)
    doubled = kron_logdet(kron_cholesky([2 * A for A in factors])) - kron_logdet(L)
    agree(doubled, torch.full(batch, len(shape) * math.prod(shape) * math.log(2), dtype=torch.float64))
    agree(kron_quadratic(L, kron_matvec(L, U)), U.square().flatten(len(batch)).sum(-1))
    total = KroneckerSum(factors, symmetric=True)
    agree(total.apply(total.solve(U).value), U)
    swapped = mode_product(factors[-1], U, len(shape) - 1, len(shape))
    agree(swapped, (factors[-1] @ U.reshape(*batch, -1, shape[-1]).mT).mT.reshape(U.shape))
