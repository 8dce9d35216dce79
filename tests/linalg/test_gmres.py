"""Minimal residuals against a dense solution."""

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
