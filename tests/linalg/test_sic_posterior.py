"""The posterior precision of a sparse inverse Cholesky prior against dense matrices."""

import math

import pytest
import torch

from mercer.linalg.krylov import quadratic_forms
from mercer.linalg.sic import Pattern
from mercer.linalg.sic_posterior import PosteriorPrecision

DTYPE = torch.float64
N = 30


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def model(m):
    """A factor whose row i sees i − 1, i − 4, i − 9, …, so that V cannot be complete, and two sets of sites."""
    away = range(1, N) if m == N - 1 else [k**2 for k in range(1, m + 1)]
    pattern = Pattern(torch.tensor([[max(i - k, -1) for k in away] for i in range(N)]))
    val = (0.4 * normal(N, m + 1)).masked_fill(pattern.padding, 0.0)
    val[:, -1] = 1.0 + val[:, -1].abs()
    U = torch.zeros(N, N, dtype=DTYPE)
    for i in range(N):
        for k, j in enumerate(pattern.columns[i].tolist()):
            if j >= 0:
                U[j, i] = val[i, k]
    precision = 3 * normal(2, N, seed=1).square()
    return PosteriorPrecision(pattern, val, precision, tol=1e-12), U @ U.mT + torch.diag_embed(precision)


@pytest.mark.parametrize("m", [2, 5, N - 1])
def test_products_and_solves_are_those_of_the_dense_matrix(m):
    posterior, dense = model(m)
    x = normal(4, 2, N, seed=2)
    torch.testing.assert_close(posterior.product(x), (dense @ x.unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(posterior.diagonal, dense.diagonal(dim1=-2, dim2=-1))
    found = posterior.solve(x)
    assert found.status == "ok" and found.stats["residual"] <= 1e-12
    torch.testing.assert_close(found.value, torch.linalg.solve(dense, x.unsqueeze(-1)).squeeze(-1))


def test_draws_have_the_posterior_covariance():
    """20 000 draws, every entry of the covariance within six standard errors."""
    posterior, dense = model(3)
    k = 20_000
    draws = posterior.exact_draws(normal(k, 2, N, seed=3), normal(k, 2, N, seed=4)).value
    for member in range(2):
        V = torch.linalg.inv(dense[member])
        found = draws[:, member].mT @ draws[:, member] / k
        error = ((V.diagonal().unsqueeze(-1) * V.diagonal() + V.square()) / k).sqrt()
        assert bool(((found - V).abs() < 6 * error).all())


def test_conditional_means_estimate_variances_better_than_squares():
    posterior, dense = model(3)
    V = torch.linalg.inv(dense).diagonal(dim1=-2, dim2=-1)
    errors = {"conditional": [], "plain": []}
    for seed in range(50):
        draws = posterior.exact_draws(normal(20, 2, N, seed=100 + seed), normal(20, 2, N, seed=200 + seed)).value
        errors["conditional"].append(posterior.sampled_variance(draws) / V - 1)
        errors["plain"].append(draws.square().mean(0) / V - 1)
    spread = {name: torch.stack(each).square().mean().sqrt() for name, each in errors.items()}
    assert spread["conditional"] < 0.6 * spread["plain"]
    # unbiased: the mean of 50 · 2 · N estimates of 20 draws each, taken as independent in seeds only
    error = float(torch.stack(errors["conditional"]).mean((1, 2)).std()) / 50**0.5
    assert abs(float(torch.stack(errors["conditional"]).mean())) < 6 * error
    assert abs(float(torch.stack(errors["conditional"]).mean())) < 0.01


def test_the_determinant_is_exact_with_probes_along_every_axis():
    posterior, dense = model(3)
    probes = math.sqrt(N) * torch.eye(N, dtype=DTYPE).unsqueeze(1).expand(N, 2, N)
    expected = torch.linalg.slogdet(dense)[1]
    torch.testing.assert_close(
        posterior.logdet + posterior.missing_logdet(probes, n_steps=N).mean(0), expected, rtol=1e-10, atol=0
    )
    few = posterior.logdet + posterior.missing_logdet(probes, n_steps=6).mean(0)
    torch.testing.assert_close(few, expected, rtol=1e-7, atol=0)


def test_random_probes_correct_what_the_incomplete_factor_misses():
    posterior, dense = model(3)
    expected = torch.linalg.slogdet(dense)[1]
    found = torch.stack(
        [posterior.logdet + posterior.missing_logdet(normal(500, 2, N, seed=seed).sign()).mean(0) for seed in range(20)]
    )
    error = found.std(0) / 20**0.5
    missed = expected - 2 * posterior.factor[..., -1].log().sum(-1)
    assert bool(((found.mean(0) - expected).abs() < 6 * error).all())
    assert float(missed.abs().max()) > 12 * float(error.max())  # else this shows nothing


def test_a_complete_pattern_leaves_nothing_to_correct():
    posterior, dense = model(N - 1)
    found = posterior.logdet + posterior.missing_logdet(normal(1, 2, N, seed=5).sign()).mean(0)
    torch.testing.assert_close(found, torch.linalg.slogdet(dense)[1], rtol=1e-10, atol=0)
    assert posterior.solve(normal(2, N)).stats["iterations"] <= 4


def dense_factor(posterior):
    """Return V, (2, N, N)."""
    V = torch.zeros(2, N, N, dtype=DTYPE)
    columns = posterior.pattern.columns
    for i in range(N):
        for k, j in enumerate(columns[i].tolist()):
            if j >= 0:
                V[:, j, i] = posterior.factor[:, i, k]
    return V


def sparse_vectors(q=7, m=4):
    rows = torch.randint(N, (q, m), generator=torch.Generator().manual_seed(3))
    rows[0, :2], rows[1] = -1, torch.tensor([5, 5, 2, -1])  # padding, and a row named twice
    return rows, normal(q, m, seed=6).masked_fill(rows < 0, 0.0)


@pytest.mark.parametrize("m", [2, N - 1])
def test_quadratic_forms_of_sparse_vectors(m):
    posterior, _ = model(m)
    rows, weights = sparse_vectors()
    b = torch.zeros(len(rows), N, dtype=DTYPE).scatter_add(-1, rows.clamp_min(0), weights)
    V = dense_factor(posterior)
    S = torch.linalg.inv(V @ V.mT)
    leaf = weights.clone().requires_grad_()
    found = posterior.quadratic_forms(rows, leaf)
    torch.testing.assert_close(found.detach(), torch.einsum("qi,cij,qj->cq", b, S, b), rtol=1e-10, atol=0)
    cotangent = normal(2, len(rows), seed=8)
    (slope,) = torch.autograd.grad((found * cotangent).sum(), leaf)
    expected = 2 * torch.einsum("cq,cij,qj->qi", cotangent, S, b).gather(-1, rows.clamp_min(0))
    torch.testing.assert_close(slope, expected.masked_fill(rows < 0, 0.0), rtol=1e-9, atol=1e-9)


def test_quadratic_forms_of_many_rows_leave_out_what_adds_nothing(monkeypatch):
    posterior, _ = model(5)
    rows, weights = sparse_vectors()
    whole = posterior.quadratic_forms(rows, weights)
    monkeypatch.setattr("mercer.linalg.sic_posterior._FEW_ROWS", 0)
    part = posterior.quadratic_forms(rows, weights)
    assert not torch.equal(part, whole)
    torch.testing.assert_close(part, whole, rtol=1e-3, atol=0)


def test_draws_of_the_factor_have_its_covariance():
    posterior, _ = model(3)
    V = dense_factor(posterior)
    eye = torch.eye(N, dtype=DTYPE).unsqueeze(1).expand(N, 2, N)
    root = posterior.draws(eye).permute(1, 2, 0)
    torch.testing.assert_close(root @ root.mT, torch.linalg.inv(V @ V.mT), rtol=1e-9, atol=1e-9)
    white = posterior.whiten(eye).permute(1, 0, 2)
    torch.testing.assert_close(white @ white.mT, torch.linalg.inv(V @ V.mT), rtol=1e-9, atol=1e-9)


def test_quadratic_forms_stop_at_an_invariant_space():
    """Two eigenvalues: the second step is exact, and what would follow is not looked at."""
    A = torch.diag(torch.tensor([2.0, 2.0, 5.0, 5.0], dtype=DTYPE))
    z = normal(3, 4)
    found = quadratic_forms(lambda x: x @ A, z, torch.log, n_steps=4)
    torch.testing.assert_close(found, (z.square() * A.diagonal().log()).sum(-1))
