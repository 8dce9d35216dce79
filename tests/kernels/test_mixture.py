"""Spectral mixtures: their derivatives, their spectra, and what an ordinary kernel owes the library."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import derivatives as oracle

from mercer.kernels import (
    RBF,
    MixtureKernel,
    StudentMixture,
    derivative_gram,
    gram,
)
from mercer.kernels import mixture as mixture_module
from mercer.kernels import mixture_gram as module
from mercer.kernels.mixture_gram import mixture_gram
from mercer.kernels.spectral import sample_frequencies
from mercer.testing import check_kernel

WEIGHT = torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64)
ELL = torch.tensor([[1.0], [0.4], [2.0]], dtype=torch.float64)
MU = torch.tensor([[0.0], [1.3], [4.0]], dtype=torch.float64)
SPECTRA = ["gaussian", "student"]


def one_column(spectrum):
    return MixtureKernel(weight=WEIGHT, lengthscale=ELL, frequency=MU, spectrum=spectrum)


def two_columns(spectrum):
    ell = [[1.0, 2.0], [0.5, 0.7]]
    return MixtureKernel(weight=[1.0, 0.4], lengthscale=ell, frequency=[[0.0, 0.0], [1.3, 0.0]], spectrum=spectrum)


def points(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("n", range(5))
def test_derivatives_are_those_of_nested_autograd(spectrum, n):
    X1, X2 = points(6, 1), points(5, 1, 1)
    expected = oracle.nested(oracle.mixture(spectrum, WEIGHT, ELL, MU), X1, X2, (n,), (0,))
    value = derivative_gram(one_column(spectrum), X1, X2, (n,), (0,)).detach()
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


@pytest.mark.parametrize("n", range(5, 9))
def test_gaussian_lines_have_derivatives_to_order_eight(n):
    X1, X2 = points(6, 1), points(5, 1, 1)
    expected = oracle.nested(oracle.mixture("gaussian", WEIGHT, ELL, MU), X1, X2, (n,), (0,))
    value = derivative_gram(one_column("gaussian"), X1, X2, (n - 4,), (4,)).detach()
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("n", range(5))
def test_the_diagonal_is_the_limit_of_small_lags(spectrum, n):
    kernel, zero = one_column(spectrum), torch.zeros(1, 1, dtype=torch.float64)
    near = [derivative_gram(kernel, zero + h, zero, (n,), (0,)).item() for h in (-1e-9, 1e-9)]
    at = derivative_gram(kernel, zero, zero, (n,), (0,)).item()
    size = float((WEIGHT * (1 / ELL[:, 0] + 2 * math.pi * MU[:, 0]) ** n).sum())
    assert at == pytest.approx(sum(near) / 2, abs=1e-6 * size)


def test_fourth_derivatives_at_zero_are_those_of_the_specification():
    omega, w = 2 * math.pi * MU[:, 0], WEIGHT
    s, alpha = 1 / (2 * ELL[:, 0] ** 2), math.sqrt(5) / ELL[:, 0]
    x = torch.tensor([[0.7]], dtype=torch.float64)
    gaussian = derivative_gram(one_column("gaussian"), x, x, (2,), (2,)).item()
    assert gaussian == pytest.approx(float((w * (12 * s**2 + 12 * s * omega**2 + omega**4)).sum()), rel=1e-13)
    student = derivative_gram(one_column("student"), x, x, (2,), (2,)).item()
    expected = w * (alpha**4 + 2 * alpha**2 * omega**2 + omega**4)
    assert student == pytest.approx(float(expected.sum()), rel=1e-13)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_curvatures_have_a_symmetric_positive_covariance_and_slopes_an_odd_one(spectrum):
    X = torch.linspace(0, 2, 40, dtype=torch.float64)[:, None]
    kernel = one_column(spectrum)
    K = derivative_gram(kernel, X, X, (2,), (2,)).detach()
    torch.testing.assert_close(K, K.mT, rtol=0, atol=1e-13 * K.abs().max().item())
    values = torch.linalg.eigvalsh(K)
    assert values[0] >= -1e-10 * values[-1]
    slope = derivative_gram(kernel, X, X, (1,), (0,)).detach()
    torch.testing.assert_close(slope, -slope.mT, rtol=0, atol=1e-13 * slope.abs().max().item())
    assert slope.diagonal().abs().max() <= 1e-15 * slope.abs().max()


def test_lines_in_the_spectrum_are_gaussian_and_student():
    lag, ell, mu = np.array([0.0, 0.05, 0.3, 1.1]), 0.6, 1.7
    X = torch.as_tensor(lag)[:, None]
    xi = np.linspace(-60, 60, 400_001) / ell
    step = xi[1] - xi[0]
    sd = 1 / (2 * math.pi * ell)
    normal = np.exp(-0.5 * (xi / sd) ** 2) / (sd * math.sqrt(2 * math.pi))
    student = 8 / (3 * math.pi * math.sqrt(5) * sd) * (1 + (xi / sd) ** 2 / 5) ** -3  # 5 degrees of freedom
    for spectrum, density, rtol in (("gaussian", normal, 1e-12), ("student", student, 1e-10)):
        kernel = MixtureKernel(weight=[1.0], lengthscale=[ell], frequency=[mu], spectrum=spectrum)
        line = [step * (density * np.cos(2 * math.pi * (xi + mu) * d)).sum() for d in lag]
        np.testing.assert_allclose(gram(kernel, X, X[:1]).detach()[:, 0], line, atol=rtol)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("orders", [(0, 0), (1, 0), (2, 1), (3, 3), (4, 0)])
def test_the_adjoint_is_the_derivative(spectrum, orders):
    kernel = two_columns(spectrum)
    frequency = torch.tensor([[0.3, 0.1], [1.3, 0.4]], dtype=torch.float64)
    tensors = [points(4, 2), points(3, 2, 1), kernel.weight, kernel.lengthscale, frequency]
    leaves = [value.detach().clone().requires_grad_() for value in tensors]
    assert torch.autograd.gradcheck(lambda *t: mixture_gram(spectrum, *t, orders), leaves)


def test_a_weight_that_has_vanished_has_a_gradient():
    leaves = [WEIGHT * torch.tensor([1.0, 0.0, 1e-320], dtype=torch.float64), ELL, MU]
    leaves = [value.detach().clone().requires_grad_() for value in leaves]
    X = points(5, 1)
    gradients = torch.autograd.grad(mixture_gram("gaussian", X, X, *leaves, (0,)).sum(), leaves)
    parts = [mixture_gram("gaussian", X, X, WEIGHT[:1], ELL[[q]], MU[[q]], (0,)).sum() for q in range(3)]
    torch.testing.assert_close(gradients[0], torch.stack(parts), rtol=1e-13, atol=1e-13)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


@pytest.mark.parametrize(("n1", "n2"), [(0, 0), (0, 3), (3, 0)])
def test_no_rows_have_an_empty_matrix(n1, n2):
    kernel = two_columns("gaussian")
    for sets in ((), (2,), (0,)):
        X1, X2 = points(n1, 2).expand(*sets, n1, 2), points(n2, 2).expand(*sets, n2, 2)
        assert gram(kernel, X1, X2).shape == derivative_gram(kernel, X1, X2, (1, 0), (0, 1)).shape == (*sets, n1, n2)
    value = gram(kernel, points(n1, 2), points(n2, 2)).sum()
    assert all(not bool(gradient.any()) for gradient in torch.autograd.grad(value, list(kernel.parameters())))


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_second_derivatives_at_zero_are_those_of_the_specification(spectrum):
    omega, x = 2 * math.pi * MU[:, 0], torch.tensor([[0.7]], dtype=torch.float64)
    window = 1 / ELL[:, 0] ** 2 if spectrum == "gaussian" else 5 / ELL[:, 0] ** 2 / 3
    expected = -float((WEIGHT * (window + omega**2)).sum())
    value = derivative_gram(one_column(spectrum), x, x, (2,), (0,)).item()
    assert value == pytest.approx(expected, rel=1e-12)


def test_frequencies_are_drawn_from_the_lines_of_student():
    ell, lag, n = 0.6, torch.tensor([[0.0], [0.2], [0.5], [1.1]], dtype=torch.float64), 400_000
    kernel = StudentMixture(weight=[1.0], lengthscale=[ell], frequency=[0.4])
    omega = sample_frequencies(kernel, 1, n, torch.Generator().manual_seed(0))
    waves = torch.cos(omega * lag.mT)
    error = waves.std(0) / math.sqrt(n)
    expected = gram(kernel, lag, lag[:1]).detach()[:, 0]
    assert ((waves.mean(0) - expected).abs() <= 4 * error + 1e-14).all()
    # with 4 degrees of freedom in place of 5 lines are √0.8 as wide, which these draws tell
    other = gram(StudentMixture(weight=[1.0], lengthscale=[ell / 0.8**0.5], frequency=[0.4]), lag, lag[:1])[:, 0]
    assert ((other - expected).abs()[1:] > 10 * error[1:]).any()


def test_a_grid_whose_places_are_moved_keeps_their_gradient():
    kernel = one_column("gaussian")
    X = torch.linspace(3, 5, 50, dtype=torch.float64)[:, None].requires_grad_()
    weight = points(50, 50)
    gradients = []
    for other in (X, X * 1.0):
        (gradient,) = torch.autograd.grad((gram(kernel, X, other) * weight).sum(), X)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)
    assert gradients[0].abs().max() > 1


def test_a_second_derivative_raises_instead_of_being_wrong():
    kernel = one_column("student")
    X = points(3, 1).requires_grad_()
    (slope,) = torch.autograd.grad(gram(kernel, X).square().sum(), X, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|not have been used in the graph"):
        torch.autograd.grad(slope.sum(), X)


def test_blocks_do_not_change_the_answer(monkeypatch):
    kernel, X = two_columns("gaussian"), points(11, 2)
    tiles = X[:9].reshape(3, 3, 2)

    def evaluate():
        values = [gram(kernel, X), derivative_gram(kernel, tiles, tiles, (1, 0), (0, 1))]
        weight = torch.linspace(-1, 2, values[0].numel(), dtype=torch.float64).reshape(values[0].shape)
        gradient = torch.autograd.grad((values[0] * weight).sum(), list(kernel.parameters()))
        return [value.detach() for value in (*values, *gradient)]

    whole = evaluate()
    monkeypatch.setitem(module._CACHE_ELEMENTS, "cpu", 20)
    for by_blocks, value in zip(evaluate(), whole, strict=True):
        torch.testing.assert_close(by_blocks, value, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("n", range(5))
def test_a_uniform_grid_is_evaluated_at_its_lags(spectrum, n, monkeypatch):
    kernel = one_column(spectrum)
    X = torch.linspace(3, 5, 50, dtype=torch.float64)[:, None]
    K = derivative_gram(kernel, X, X, (n,), (0,))
    weight = torch.linspace(-1, 2, K.numel(), dtype=torch.float64).reshape(K.shape)
    gradient = torch.autograd.grad((K * weight).sum(), list(kernel.parameters()))
    other = derivative_gram(kernel, X, X.clone(), (n,), (0,))
    size = other.abs().max().item()
    torch.testing.assert_close(K, other, rtol=0, atol=1e-12 * size)
    expected = torch.autograd.grad((other * weight).sum(), list(kernel.parameters()))
    for mine, one in zip(gradient, expected, strict=True):
        torch.testing.assert_close(mine, one, rtol=0, atol=1e-11 * max(size, one.abs().max().item()))
    sizes = []
    for owner in (module, mixture_module):
        monkeypatch.setattr(owner, "mixture_gram", lambda *a: sizes.append(len(a[1])) or mixture_gram(*a))
    derivative_gram(kernel, X, X, (n,), (0,))
    assert sizes == [99]
    almost = torch.cat([X[:-1], X[-1:] + 1e-9])
    derivative_gram(kernel, almost, almost, (n,), (0,))
    assert sizes == [99, 50]  # what is not uniform is not taken for it


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_it_is_a_kernel_like_any_other(spectrum):
    check_kernel(one_column(spectrum), 1)
    check_kernel(two_columns(spectrum), 2)
    check_kernel(MixtureKernel(3, spectrum=spectrum), 3)  # unset, columns unknown
    check_kernel(RBF(1.0, active_dims=[0]) + MixtureKernel(2, frequency=[0.0, 1.0], active_dims=[1]), 2)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    q=st.integers(1, 4),
    d=st.integers(1, 3),
    n=st.integers(1, 6),
    seed=st.integers(0, 10**6),
    spectrum=st.sampled_from(SPECTRA),
)
def test_gram_is_symmetric_positive_and_zero_orders_change_nothing(q, d, n, seed, spectrum):
    rng = torch.Generator().manual_seed(seed)
    draw = [torch.rand(q, d, generator=rng, dtype=torch.float64) for _ in range(2)]
    weight = torch.rand(q, generator=rng, dtype=torch.float64) + 1e-3
    frequency = (4 * draw[1]) * (draw[1] > 0.3)
    kernel = MixtureKernel(weight=weight, lengthscale=draw[0] + 0.05, frequency=frequency, spectrum=spectrum)
    X = points(n, d, seed)
    X[-1] = X[0]
    K = gram(kernel, X).detach()
    assert torch.equal(K, derivative_gram(kernel, X, X, (0,) * d, (0,) * d).detach())
    torch.testing.assert_close(K, K.mT, rtol=0, atol=1e-14 * float(weight.sum()))
    torch.testing.assert_close(K.diagonal(), weight.sum().expand(n), rtol=1e-12, atol=0)
    assert torch.linalg.eigvalsh(K)[0] > -1e-12 * float(weight.sum()) * n
