"""Incomplete factors of a posterior precision, what they say of its determinant, and solves with their help."""

import pytest
import torch
from test_sic import DTYPE, N, dense, model, normal

from mercer.linalg.cholesky import NotPositiveDefiniteError
from mercer.linalg.incomplete import incomplete_factor, incomplete_logdet, precision_entries
from mercer.linalg.krylov import conjugate_gradients
from mercer.linalg.sic import precision_diagonal, solve, times


def posterior_entries(pattern, val, precision):
    """Return U Uᵀ + diag(λ) on the pattern."""
    entries = precision_entries(pattern, val).expand(*precision.shape[:-1], *val.shape)
    return torch.cat([entries[..., :-1], entries[..., -1:] + precision.unsqueeze(-1)], -1)


def test_entries_are_those_of_the_dense_product():
    _, pattern, val = model()
    U = dense(pattern, val)
    on = dense(pattern, torch.ones_like(val).masked_fill(pattern.padding, 0.0)) != 0
    torch.testing.assert_close(dense(pattern, precision_entries(pattern, val)), (U @ U.mT) * on, rtol=1e-12, atol=1e-10)


def log_v(pattern, val, precision):
    """Return log |V Vᵀ| and its slope in λ, of a fresh factor."""
    entries = posterior_entries(pattern, val, precision)
    return incomplete_logdet(pattern, entries, *incomplete_factor(pattern, entries))


@pytest.mark.parametrize("m", [3, N - 1])
@pytest.mark.parametrize("shape", [(), (2,)])
def test_the_determinant_has_its_slope_and_that_has_its_own(m, shape):
    """Against central differences of the determinant, and of the slope."""
    _, pattern, val = model(m=m)
    precision = 3 * normal(*shape, N, seed=1).square()
    val.requires_grad_()
    precision.requires_grad_()
    logdet, variance = log_v(pattern, val, precision)
    weights = normal(*variance.shape, seed=4)
    by_logdet = torch.autograd.grad(logdet.sum(), (val, precision), retain_graph=True)
    by_variance = torch.autograd.grad((variance * weights).sum(), (val, precision), retain_graph=True)
    by_both = torch.autograd.grad(logdet.sum() + (variance * weights).sum(), (val, precision))
    torch.testing.assert_close(by_logdet[1], variance.detach())
    for one, two, both in zip(by_logdet, by_variance, by_both, strict=True):
        torch.testing.assert_close(one + two, both)
    step = 1e-6
    for which, leaf in enumerate((val, precision)):
        direction = normal(*leaf.shape, seed=5).masked_fill(pattern.padding if which == 0 else torch.tensor(False), 0.0)
        with torch.no_grad():
            moved = [[each, each] for each in (val, precision)]
            moved[which] = [leaf + step * direction, leaf - step * direction]
            ahead, behind = (log_v(pattern, *pair) for pair in zip(*moved, strict=True))
        for k, found in enumerate((by_logdet[which], by_variance[which])):
            scale = 1.0 if k == 0 else weights
            expected = float(((ahead[k] - behind[k]) * scale).sum()) / (2 * step)
            assert float((found * direction).sum()) == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_a_complete_factor_gives_determinant_and_variances():
    _, pattern, val = model(m=N - 1)
    precision = 3 * normal(2, N, seed=1).square()
    U = dense(pattern, val)
    target = U @ U.mT + torch.diag_embed(precision)
    logdet, variance = log_v(pattern, val, precision)
    torch.testing.assert_close(logdet, torch.linalg.slogdet(target)[1], rtol=1e-10, atol=0)
    torch.testing.assert_close(variance, torch.linalg.inv(target).diagonal(dim1=-2, dim2=-1), rtol=1e-8, atol=0)


def test_slopes_of_few_neighbours_are_close_to_the_variances():
    _, pattern, val = model(m=10)
    precision = 3 * normal(2, N, seed=1).square()
    U = dense(pattern, val)
    expected = torch.linalg.inv(U @ U.mT + torch.diag_embed(precision)).diagonal(dim1=-2, dim2=-1)
    assert float((log_v(pattern, val, precision)[1] / expected - 1).abs().max()) < 0.02


def test_a_shift_is_part_of_the_slope():
    _, pattern, val = model()
    negative = -0.999 * precision_diagonal(pattern, val) * (torch.arange(N) == 3)
    entries = posterior_entries(pattern, val, negative)
    factor, shift = incomplete_factor(pattern, entries)
    assert shift > 0

    def value(at):
        shifted = torch.cat([at[..., :-1], (1 + shift) * at[..., -1:]], -1)
        return incomplete_logdet(pattern, shifted, incomplete_factor(pattern, shifted, shifting=False)[0])[0]

    entries.requires_grad_()
    (found,) = torch.autograd.grad(incomplete_logdet(pattern, entries, factor, shift)[0], entries)
    direction = normal(*entries.shape, seed=5).masked_fill(pattern.padding, 0.0)
    step = 1e-7
    with torch.no_grad():
        expected = float(value(entries + step * direction) - value(entries - step * direction)) / (2 * step)
    assert float((found * direction).sum()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("noise", [1e-2, 1.0, 1e2])
def test_the_incomplete_factor_equals_the_posterior_on_the_pattern(noise):
    _, pattern, val = model()
    precision = normal(2, N, seed=1).square() / noise
    V, shift = incomplete_factor(pattern, posterior_entries(pattern, val, precision))
    assert shift == 0.0 and V.shape == (2, *val.shape)
    U = dense(pattern, val)
    on = dense(pattern, torch.ones_like(val).masked_fill(pattern.padding, 0.0)) != 0
    for each, sites in zip(V, precision, strict=True):
        target, product = U @ U.mT + sites.diag(), dense(pattern, each) @ dense(pattern, each).mT
        torch.testing.assert_close(product[on], target[on], rtol=1e-10, atol=1e-10)


def test_with_all_entries_the_incomplete_factor_is_complete():
    _, pattern, val = model(m=N - 1)
    V, _ = incomplete_factor(pattern, posterior_entries(pattern, val, torch.ones(N, dtype=DTYPE)))
    U = dense(pattern, val)
    target = U @ U.mT + torch.eye(N, dtype=DTYPE)
    reverse = torch.linalg.cholesky(target.flip(0, 1)).flip(0, 1)
    torch.testing.assert_close(dense(pattern, V), reverse, rtol=1e-9, atol=1e-9)


def test_a_broken_pivot_is_shifted_and_said():
    _, pattern, val = model()
    negative = -0.999 * precision_diagonal(pattern, val) * (torch.arange(N) == 3)
    entries = posterior_entries(pattern, val, negative)
    V, shift = incomplete_factor(pattern, entries)
    assert shift > 0 and bool(torch.isfinite(V).all())
    with pytest.raises(NotPositiveDefiniteError, match="negative sites"):
        incomplete_factor(pattern, entries, shifting=False)
    with pytest.raises(NotPositiveDefiniteError, match="negative sites"):
        incomplete_factor(pattern, posterior_entries(pattern, val, torch.full((N,), -1e12, dtype=DTYPE)))


def test_conjugate_gradients_reach_the_dense_solution_quickly():
    _, pattern, val = model()
    precision = 10 * normal(2, N, seed=1).square()
    V, _ = incomplete_factor(pattern, posterior_entries(pattern, val, precision))
    rhs = normal(2, N, seed=2)

    def product(x):
        return times(pattern, val, times(pattern, val, x, transposed=True)) + precision * x

    def near_inverse(x):
        return solve(pattern, V, solve(pattern, V, x), transposed=True)

    U = dense(pattern, val)
    expected = torch.linalg.solve(U @ U.mT + torch.diag_embed(precision), rhs)
    found = conjugate_gradients(product, rhs, near_inverse, tol=1e-10)
    assert found.status == "ok" and found.stats["iterations"] <= 12
    torch.testing.assert_close(found.value, expected, rtol=1e-8, atol=1e-8)
    warm = conjugate_gradients(product, rhs, near_inverse, tol=1e-10, start=expected)
    assert warm.stats["iterations"] == 0
    plain = conjugate_gradients(product, rhs, lambda x: x, tol=1e-10, max_iter=2)
    assert plain.status == "not converged" and plain.stats["residual"] > 1e-10
    zero = conjugate_gradients(product, 0 * rhs, near_inverse, tol=1e-10)
    assert zero.status == "ok" and not bool(zero.value.any())
