"""Covariances of derivatives: every rule against nested autograd, sums and products included."""

import itertools

import pytest
import torch
from gpytorch.kernels import RBFKernel as GPyTorchRBF
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import derivatives as oracle

from mercer.kernels import (
    RBF,
    Constant,
    Kernel,
    Linear,
    Matern12,
    Matern32,
    Matern52,
    MixtureKernel,
    Periodic,
    RationalQuadratic,
    ScaleKernel,
    derivative_gram,
    derivative_leaf,
    gram,
    has_derivatives,
)

ELL = torch.tensor([0.7, 1.3], dtype=torch.float64)
V = torch.tensor([0.4, 2.0], dtype=torch.float64)
MIX = (
    torch.tensor([1.0, 0.3], dtype=torch.float64),
    torch.tensor([[0.8, 1.1], [0.5, 2.0]], dtype=torch.float64),
    torch.tensor([[0.0, 0.0], [0.9, 0.4]], dtype=torch.float64),
)


def mixture(spectrum):
    return MixtureKernel(weight=MIX[0], lengthscale=MIX[1], frequency=MIX[2], spectrum=spectrum)


def in_column(function, j):
    return lambda x, y: function(x[[j]], y[[j]])


SMOOTH = {
    "rbf": (RBF(ELL), oracle.rbf(ELL)),
    "rbf, one lengthscale": (RBF(0.6, ard=False), oracle.rbf(0.6)),
    "rq": (RationalQuadratic(ELL, 0.7), oracle.rational_quadratic(ELL, 0.7)),
    "gaussian": (mixture("gaussian"), oracle.mixture("gaussian", *MIX)),
    "student": (mixture("student"), oracle.mixture("student", *MIX)),
    "linear": (Linear(V), oracle.linear(V)),
    "constant": (Constant(2.0), lambda x, y: 2.0 + 0.0 * x.sum()),
    "scaled": (RBF(ELL, outputscale=3.0), lambda x, y: 3.0 * oracle.rbf(ELL)(x, y)),
    "sum": (
        RBF(ELL, outputscale=2.0) + Linear([0.4], active_dims=[1]) + Constant(0.3),
        lambda x, y: 2 * oracle.rbf(ELL)(x, y) + 0.4 * x[1] * y[1] + 0.3,
    ),
    "product": (RBF(ELL) * Linear(V), lambda x, y: oracle.rbf(ELL)(x, y) * oracle.linear(V)(x, y)),
    "product of columns": (
        RBF([0.6], active_dims=[1]) * RationalQuadratic([0.9], 1.2, active_dims=[0]) * Linear([0.5], active_dims=[1]),
        lambda x, y: (
            in_column(oracle.rbf(0.6), 1)(x, y)
            * in_column(oracle.rational_quadratic(0.9, 1.2), 0)(x, y)
            * (0.5 * x[1] * y[1])
        ),
    ),
    "sum in a product": (
        (RBF(ELL) + Constant(0.5)) * mixture("gaussian"),
        lambda x, y: (oracle.rbf(ELL)(x, y) + 0.5) * oracle.mixture("gaussian", *MIX)(x, y),
    ),
    "scaled column": (
        ScaleKernel(RBF([0.6], active_dims=[1]), active_dims=[1]).double(),
        lambda x, y: torch.log(torch.tensor(2.0, dtype=torch.float64)) * in_column(oracle.rbf(0.6), 1)(x, y),
    ),
}
ROUGH = {
    "matern32": (Matern32(ELL), oracle.matern32(ELL), 2),
    "matern52": (Matern52(ELL), oracle.matern52(ELL), 4),
    "matern52, one lengthscale": (Matern52(0.9, ard=False), oracle.matern52(0.9), 4),
}
ORDERS = [((0, 0), (0, 0)), ((1, 0), (0, 0)), ((0, 0), (0, 1)), ((1, 0), (0, 1)), ((2, 0), (0, 2)), ((1, 1), (1, 1))]


def points(n, seed=0, d=2):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check(kernel, function, a, b):
    X1, X2 = points(4), points(3, 1)
    expected = oracle.nested(function, X1, X2, a, b)
    value = derivative_gram(kernel, X1, X2, a, b).detach()
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize(("a", "b"), [*ORDERS, ((0, 2), (0, 2)), ((2, 0), (1, 0))])
def test_rule_is_nested_autograd(name, a, b):
    check(*SMOOTH[name], a, b)


@pytest.mark.parametrize("name", ROUGH)
@pytest.mark.parametrize(("a", "b"), [*ORDERS, ((2, 0), (2, 0)), ((2, 0), (1, 1)), ((0, 1), (0, 1))])
def test_matern_rule_is_nested_autograd_as_far_as_it_goes(name, a, b):
    kernel, function, most = ROUGH[name]
    if sum(a + b) <= most:
        check(kernel, function, a, b)
    else:
        with pytest.raises(ValueError, match="smoother kernel"):
            derivative_gram(kernel, points(2), points(2), a, b)


@pytest.mark.parametrize("name", SMOOTH | ROUGH)
def test_no_derivative_is_gram(name):
    kernel = (SMOOTH | ROUGH)[name][0]
    X1, X2 = points(5), points(3, 1)
    X2[0] = X1[0]
    for other in (X1, X2):
        value = derivative_gram(kernel, X1, other, (0, 0), (0, 0))
        torch.testing.assert_close(value, gram(kernel, X1, other), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", [*SMOOTH, "matern32", "matern52"])
def test_equal_rows_are_the_limit_of_close_ones(name):
    kernel = (SMOOTH | ROUGH)[name][0]
    most = ROUGH[name][2] // 2 if name in ROUGH else 2
    X = points(3)
    for a, b in itertools.product(itertools.product(range(most + 1), repeat=2), repeat=2):
        if max(sum(a), sum(b)) > most:
            continue
        at = derivative_gram(kernel, X, X, a, b).diagonal()
        sides = [derivative_gram(kernel, X + h, X, a, b).diagonal() for h in (-1e-8, 1e-8)]
        torch.testing.assert_close(at, (sides[0] + sides[1]) / 2, rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(name=st.sampled_from([*SMOOTH, "matern52"]), n=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_values_slopes_and_curvatures_have_a_positive_joint_covariance(name, n, seed):
    kernel = (SMOOTH | ROUGH)[name][0]
    X = points(n, seed)
    X[-1] = X[0]
    every = [(0, 0), (1, 0), (0, 1), (2, 0), (1, 1)]
    K = torch.cat([torch.cat([derivative_gram(kernel, X, X, a, b) for b in every], 1) for a in every]).detach()
    size = K.abs().max().item()
    torch.testing.assert_close(K, K.mT, rtol=0, atol=1e-13 * size)
    assert torch.linalg.eigvalsh(K)[0] > -1e-10 * size


@pytest.mark.parametrize("name", SMOOTH | ROUGH)
def test_hyperparameters_have_gradients_even_where_rows_are_equal(name):
    kernel = (SMOOTH | ROUGH)[name][0]
    X = points(3)
    parameters = list(kernel.parameters())
    b = (0, 1)

    def value():
        K = derivative_gram(kernel, X, X, (0, 1), b)
        return (K * torch.linspace(-1, 2, K.numel(), dtype=torch.float64).reshape(K.shape)).sum()

    gradients = torch.autograd.grad(value() + 0.0 * sum(p.sum() for p in parameters), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction = torch.ones_like(parameter)
        with torch.no_grad():
            parameter.add_(1e-6 * direction)
            up = value()
            parameter.sub_(2e-6 * direction)
            down = value()
            parameter.add_(1e-6 * direction)
        assert gradient.sum().item() == pytest.approx((up - down).item() / 2e-6, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ROUGH)
def test_rows_that_nearly_agree_have_the_covariance_of_rows_that_do(name, dtype):
    kernel, most = ROUGH[name][0], ROUGH[name][2] // 2
    order = (most, 0)
    small = torch.finfo(dtype).tiny
    for distance in (small, small**0.5, small**0.3, small**0.26, small**0.25, small**0.2):
        for row in ([[distance, 0.0]], [[distance, -distance]]):
            X = torch.tensor(row, dtype=dtype).requires_grad_()
            zero = torch.zeros_like(X)
            value = derivative_gram(kernel, X, zero, order, order)
            expected = derivative_gram(kernel, zero, zero, order, order).detach()
            torch.testing.assert_close(value.detach(), expected, rtol=10 * torch.finfo(dtype).eps, atol=0)
            parameters = [p for p in kernel.parameters() if p.requires_grad]
            for gradient in torch.autograd.grad(value.sum(), [X, *parameters]):
                assert bool(gradient.isfinite().all()), (distance, gradient)


def test_a_kernel_with_a_batch_shape_is_refused():
    kernel = GPyTorchRBF(batch_shape=torch.Size([2])).double()
    with pytest.raises(TypeError, match="batch shape are not known; take its members one by one"):
        derivative_gram(kernel, points(3), points(3), (1, 0), (0, 0))


def test_sets_of_rows_are_independent():
    kernel = RBF(ELL) * Linear(V) + Matern52(ELL, outputscale=2.0) + Constant(1.0)
    X1, X2 = points(12).reshape(2, 2, 3, 2), points(4, 1).reshape(2, 1, 2, 2)
    whole = derivative_gram(kernel, X1, X2, (1, 0), (0, 1))
    for i, j in itertools.product(range(2), repeat=2):
        one = derivative_gram(kernel, X1[i, j], X2[i, 0], (1, 0), (0, 1))
        torch.testing.assert_close(whole[i, j], one, rtol=1e-12, atol=1e-13)


def test_a_column_that_no_part_sees_has_no_derivative():
    kernel = RBF([0.5], active_dims=[0]) + Linear([1.0], active_dims=[0])
    X = points(3)
    assert (derivative_gram(kernel, X, X, (0, 1), (0, 0)) == 0).all()
    assert (derivative_gram(kernel * Constant(2.0), X, X, (1, 1), (0, 0)) == 0).all()
    assert (derivative_gram(Constant(2.0) * Constant(2.0), X, X, (1, 0), (0, 0)) == 0).all()


def test_a_part_without_a_rule_may_be_left_alone():
    kernel = Periodic(1.3, 0.7, active_dims=[0]) * RBF([0.5], active_dims=[1])
    assert not has_derivatives(kernel) and has_derivatives(RBF() + Constant())
    X1, X2 = points(4), points(3, 1)
    wave = gram(Periodic(1.3, 0.7, active_dims=[0]), X1, X2)
    value = derivative_gram(kernel, X1, X2, (0, 1), (0, 1))
    torch.testing.assert_close(value, wave * derivative_gram(RBF([0.5], active_dims=[1]), X1, X2, (0, 1), (0, 1)))
    with pytest.raises(TypeError, match="PeriodicKernel has no rule"):
        derivative_gram(kernel, X1, X2, (1, 0), (0, 0))


def test_a_new_kernel_registers_a_rule():
    class Shifted(Kernel):
        def forward(self, x1, x2, diag=False, **params):
            return (x1.sum(-1, keepdim=True) + 1) * (x2.sum(-1) + 1).unsqueeze(-2)

    X = points(3)
    with pytest.raises(TypeError, match="Shifted has no rule"):
        derivative_gram(Shifted(), X, X, (1, 0), (0, 0))

    @derivative_leaf.register
    def _(kernel: Shifted, X1, X2, a, b):
        left, right = (
            (X.sum(-1) + 1 if not any(order) else X.new_full(X.shape[:-1], float(sum(order) == 1)))
            for X, order in ((X1, a), (X2, b))
        )
        return left.unsqueeze(-1) * right.unsqueeze(-2)

    torch.testing.assert_close(derivative_gram(Shifted(), X, X, (0, 0), (0, 0)), gram(Shifted(), X))
    assert (derivative_gram(Shifted(), X, X, (1, 0), (0, 1)) == 1).all()


@pytest.mark.parametrize(
    ("kernel", "a", "message"),
    [
        (Matern12(ELL), (1, 0), "Matérn-1/2 has derivatives up to order 0"),
        (mixture("student"), (5, 0), "use a smoother kernel: GaussianMixture or RBF"),
        (RBF(ELL), (1,), "one integer ≥ 0 for each of 2 columns"),
        (RBF(ELL), (-1, 0), "one integer ≥ 0"),
        (RBF(ELL), (0.5, 0), "one integer ≥ 0"),
        (RBF([1.0, 2.0, 3.0]), (1, 0), "3 lengthscales but sees 2 columns"),
        (RBF(1.0, active_dims=[4]), (1, 0), "addresses column 4"),
    ],
)
def test_what_cannot_be_differentiated_is_refused(kernel, a, message):
    X = points(2)
    with pytest.raises(ValueError, match=message):
        derivative_gram(kernel, X, X, a, (0,) * len(a))
