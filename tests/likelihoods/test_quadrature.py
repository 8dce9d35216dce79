"""The quadrature layer: moments, Bonnet and Price gradients, narrow integrands, v → 0."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mercer.likelihoods.quadrature import (
    attach,
    elementwise_derivatives,
    expectation,
    gauss_hermite,
    log_expectation,
)

DTYPE = torch.float64


def tensor(*values):
    return torch.tensor(values, dtype=DTYPE)


def test_rule_integrates_polynomials_exactly():
    nodes, weights = gauss_hermite(8, tensor(0.0))
    for power, moment in [(0, 1), (1, 0), (2, 1), (4, 3), (6, 15), (14, 135135)]:
        assert float((weights * nodes**power).sum()) == pytest.approx(moment, rel=1e-12, abs=1e-10)


def test_elementwise_derivatives_of_a_quadratic_include_the_vanishing_third():
    found = elementwise_derivatives(lambda f: 3 * f.square(), tensor(2.0, -1.0), 3)
    expected = [tensor(12.0, 3.0), tensor(12.0, -6.0), tensor(6.0, 6.0), tensor(0.0, 0.0)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@given(m=st.floats(-3, 3), v=st.floats(0, 2))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_expectation_of_exp_is_closed(m, v):
    a, b = tensor(m).requires_grad_(), tensor(v).requires_grad_()
    found = expectation(torch.exp, a, b)
    closed = math.exp(m + v / 2)
    for item, factor in zip(found, (1, 1, -1), strict=True):
        assert float(item.detach()) == pytest.approx(factor * closed, rel=1e-9)
    slope_m, slope_v = torch.autograd.grad(found.value.sum(), (a, b))
    assert float(slope_m) == pytest.approx(closed, rel=1e-9)
    assert float(slope_v) == pytest.approx(0.5 * closed, rel=1e-9)


def test_second_derivative_of_an_attached_value_raises_instead_of_lying():
    m = tensor(0.3).requires_grad_()
    (slope,) = torch.autograd.grad(expectation(torch.tanh, m, tensor(0.5)).value.sum(), m, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        torch.autograd.grad(slope.sum(), m)


def test_attach_sums_gradients_over_broadcast_axes():
    m, v = tensor(0.1).requires_grad_(), tensor(0.2, 0.3, 0.4).requires_grad_()
    value = attach(torch.zeros(3, dtype=DTYPE), m, v, tensor(1.0, 2.0, 3.0), tensor(2.0, 4.0, 6.0))
    slope_m, slope_v = torch.autograd.grad(value.sum(), (m, v))
    assert float(slope_m) == 6.0
    torch.testing.assert_close(slope_v, tensor(-1.0, -2.0, -3.0))


def log_gaussian_factor(mean, variance):
    return lambda f: -0.5 * (f - mean) ** 2 / variance


def closed_log_factor(mean, variance, m, v):
    return -0.5 * math.log1p(v / variance) - 0.5 * (mean - m) ** 2 / (variance + v)


@given(
    mean=st.floats(-4, 4),
    log_variance=st.floats(-14, 3),
    m=st.floats(-2, 2),
    log_v=st.floats(-30, 4),
    power=st.sampled_from([0.1, 0.5, 1.0]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_adaptive_rule_is_exact_for_gaussian_factors_of_any_width(mean, log_variance, m, log_v, power):
    variance, v = math.exp(log_variance) / power, math.exp(log_v)
    a, b = tensor(m).requires_grad_(), tensor(v).requires_grad_()
    found = log_expectation(log_gaussian_factor(mean, variance), a, b, adaptive=True)
    expected = closed_log_factor(mean, variance, m, v)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-8, abs=1e-8)
    slopes = torch.autograd.grad(found.sum(), (a, b))
    total, residual = variance + v, mean - m
    assert float(slopes[0]) == pytest.approx(residual / total, rel=1e-7, abs=1e-7)
    assert float(slopes[1]) == pytest.approx(0.5 * (residual**2 / total - 1) / total, rel=1e-5, abs=1e-7 / total)


def test_negative_power_removes_a_factor():
    keep = log_gaussian_factor(0.4, 5.0)
    found = log_expectation(lambda f: -keep(f), tensor(0.2), tensor(0.5), n_nodes=64)
    assert float(found) == pytest.approx(-0.5 * math.log1p(-0.5 / 5) + 0.5 * 0.2**2 / 4.5, rel=1e-10)


@pytest.mark.parametrize("v", [0.0, 1e-30, 1e-16, -1e-18])
def test_vanishing_variance_reads_the_function_at_the_mean(v):
    m, v = tensor(0.7).requires_grad_(), tensor(v).requires_grad_()
    for adaptive in (False, True):
        found = log_expectation(torch.nn.functional.logsigmoid, m, v, adaptive=adaptive)
        slope_m, slope_v = torch.autograd.grad(found.sum(), (m, v))
        up = 1 / (1 + math.exp(-0.7))
        assert float(found.detach()) == pytest.approx(math.log(up), rel=1e-9)
        assert float(slope_m) == pytest.approx(1 - up, rel=1e-7)
        assert float(slope_v) == pytest.approx(0.5 * (1 - up) * (1 - 2 * up), rel=1e-7)


def test_parameters_learn_through_the_nodes():
    scale = tensor(1.3).requires_grad_()
    found = expectation(lambda f: -scale * f.square(), tensor(0.5), tensor(0.2))
    (slope,) = torch.autograd.grad(found.value.sum(), scale)
    assert float(slope) == pytest.approx(-(0.25 + 0.2), rel=1e-12)


def test_rules_are_cached_as_numpy_and_follow_dtype():
    nodes, weights = gauss_hermite(5, torch.zeros(1, dtype=torch.float32))
    assert nodes.dtype == weights.dtype == torch.float32
    assert np.isclose(float(weights.sum()), 1, atol=1e-6)
