"""Minimal residuals against a dense solution."""

import math

import pytest
import torch

from mercer.linalg.gmres import gmres


def system(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(n, n, generator=generator, dtype=torch.float64) / n**0.5 + 2 * torch.eye(n, dtype=torch.float64)
    A = A * torch.logspace(0, 4, n, dtype=torch.float64)  # columns of very different size
    return A, torch.randn(n, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 2, 7, 60])
def test_it_finds_the_solution(n):
    A, b = system(n)
    scale = A.diagonal()
    done = gmres(lambda x: A @ x, b, lambda x: x / scale, tol=1e-12, max_iter=n)
    assert done.status == "ok" and done.stats["iterations"] <= n
    assert float((A @ done.value - b).norm()) <= 1e-11 * float(b.norm())


def test_shapes_are_those_of_the_right_hand_side():
    A, b = system(24)
    flat = gmres(lambda x: A @ x, b, lambda x: x / A.diagonal(), tol=1e-12, max_iter=24).value
    folded = gmres(
        lambda x: (A @ x.reshape(-1)).reshape(4, 6),
        b.reshape(4, 6),
        lambda x: x / A.diagonal().reshape(4, 6),
        tol=1e-12,
    ).value
    torch.testing.assert_close(folded.reshape(-1), flat, rtol=1e-10, atol=0)


def test_an_exact_preconditioner_needs_one_look():
    A, b = system(20)
    inverse = torch.linalg.inv(A)
    assert gmres(lambda x: A @ x, b, lambda x: inverse @ x, tol=1e-10).stats["iterations"] <= 3


def test_what_has_not_converged_says_so():
    A, b = system(60)
    done = gmres(lambda x: A @ x, b, lambda x: x, tol=1e-12, max_iter=4)
    assert done.status == "not converged" and done.stats["residual"] > 1e-6
    assert done.stats["residual"] == pytest.approx(float((A @ done.value - b).norm() / b.norm()), rel=1e-8)


def test_nothing_asks_for_nothing():
    done = gmres(lambda x: x, torch.zeros(3), lambda x: x, tol=1e-6)
    assert done.status == "ok" and not done.value.any()


EXHAUSTED = {
    "one product": (lambda x: 2 * x, [3.0, 4.0, 0.0, 0.0, 0.0, 0.0], lambda x: x / 2),
    "a unit vector": (lambda x: x, [1.0, 0.0, 0.0, 0.0], lambda x: x),
    "two eigenvalues": (lambda x: x * torch.tensor([1.0] * 2 + [2.0] * 6, dtype=torch.float64), [1.0] * 8, lambda x: x),
}


@pytest.mark.parametrize("name", EXHAUSTED)
def test_a_space_that_is_exhausted_has_the_solution(name):
    product, b, preconditioner = EXHAUSTED[name]
    b = torch.tensor(b, dtype=torch.float64)
    done = gmres(product, b, preconditioner, tol=1e-9)
    assert done.status == "ok" and done.stats["iterations"] <= 3
    torch.testing.assert_close(product(done.value), b, rtol=0, atol=1e-14)


@pytest.mark.parametrize("scale", [0.0, math.nan, math.inf])
def test_an_operator_without_an_inverse_has_not_converged(scale):
    done = gmres(lambda x: scale * x, torch.ones(6, dtype=torch.float64), lambda x: x, tol=1e-9)
    assert done.status == "not converged" and done.stats["residual"] >= 1
    assert bool(done.value.isfinite().all())


def test_a_singular_operator_is_solved_as_far_as_it_goes():
    kept = torch.tensor([1.0, 1.0, 0.0, 2.0], dtype=torch.float64)
    done = gmres(lambda x: kept * x, torch.ones(4, dtype=torch.float64), lambda x: x, tol=1e-9)
    assert done.status == "not converged" and done.stats["residual"] == pytest.approx(0.5)
    torch.testing.assert_close(kept * done.value, kept.sign(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_right_hand_side_that_is_not_finite_has_no_solution(value):
    b = torch.tensor([1.0, value, 0.0], dtype=torch.float64)
    assert gmres(lambda x: x, b, lambda x: x, tol=1e-6).status == "not converged"


def test_vectors_stay_orthogonal_where_products_are_nearly_parallel():
    n, condition = 40, 1e10
    values = torch.logspace(0, 10, n, dtype=torch.float64)
    _, b = system(n)
    done = gmres(lambda x: values * x, b, lambda x: x, tol=1e-13, max_iter=n)
    assert float((values * done.value - b).norm() / b.norm()) <= torch.finfo(b.dtype).eps * condition
