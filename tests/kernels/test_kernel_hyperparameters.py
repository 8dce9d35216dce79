"""θ and the raw tensors behind it are inverse to each other, far out too."""

import math

import pytest
import torch
from gpytorch.constraints import GreaterThan, Interval, LessThan, Positive
from gpytorch.means import LinearMean
from gpytorch.priors import GammaPrior, NormalPrior
from hypothesis import given, settings
from hypothesis import strategies as st

from mercer.kernels import RBF, Linear, Periodic, RBFKernel, ScaleKernel, hyperparameters
from mercer.kernels.hyperparameters import inverse_softplus

DTYPE = torch.float64


def one(constraint):
    kernel = RBFKernel(lengthscale_constraint=constraint).double()
    return hyperparameters(kernel)[0]


def test_names_are_paths_without_raw():
    kernel = RBF([1.0, 2.0], outputscale=2.0) + Linear(1.0) * Periodic(1.0, 1.0)
    kernel.kernels[1].kernels[0].raw_variance.requires_grad_(False)
    assert [h.name for h in hyperparameters(kernel)] == [
        "kernels.0.outputscale",
        "kernels.0.base_kernel.lengthscale",
        "kernels.1.kernels.1.lengthscale",
        "kernels.1.kernels.1.period_length",
    ]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.floats(-12, 12))
def test_softplus_round_trip_is_exact_over_24_decades(exponent):
    value = torch.tensor(10.0**exponent, dtype=DTYPE)
    torch.testing.assert_close(torch.nn.functional.softplus(inverse_softplus(value)), value, rtol=1e-13, atol=0.0)


@pytest.mark.parametrize(
    "constraint, log_scale",
    [
        (Positive(), True),
        (Positive(transform=torch.exp, inv_transform=torch.log), True),
        (Positive(transform=None), True),
        (GreaterThan(1e-4), True),
        (GreaterThan(1e6), True),
        (Interval(0.1, 5.0), True),
        (Interval(1e-9, 1e-7), True),
        (Interval(-2.0, 5.0), False),
        (LessThan(3.0), False),
    ],
)
def test_theta_round_trip_and_bounds_stay_inside_the_constraint(constraint, log_scale):
    h = one(constraint)
    assert h.log_scale is log_scale and h.lower < h.upper
    theta = torch.linspace(h.lower, h.upper, 33, dtype=DTYPE).requires_grad_()
    storage = h.to_storage(theta)
    torch.testing.assert_close(h.to_theta(storage), theta, rtol=1e-8, atol=1e-8)
    (slope,) = torch.autograd.grad(h.to_theta(storage).sum(), theta)
    torch.testing.assert_close(slope, torch.ones_like(slope), rtol=1e-6, atol=1e-6)
    value = theta.exp() if log_scale else theta
    assert bool((value > constraint.lower_bound).all() and (value < constraint.upper_bound).all())


def test_default_bounds_follow_the_kind_of_parameter():
    scale, lengthscale = hyperparameters(ScaleKernel(RBFKernel()))
    assert (scale.lower, scale.upper) == pytest.approx((math.log(1e-6), math.log(1e6)))
    assert (lengthscale.lower, lengthscale.upper) == pytest.approx((math.log(1e-3), math.log(1e4)))


def test_mean_parameters_are_their_own_coordinate():
    weights, bias = hyperparameters(LinearMean(2))
    assert not weights.log_scale and bias.upper == 1e3
    assert torch.equal(weights.to_storage(weights.to_theta(weights.parameter)), weights.parameter)


def test_registered_priors_contribute_their_density():
    kernel = RBFKernel(ard_num_dims=2, lengthscale_prior=GammaPrior(3.0, 6.0)).double()
    kernel.register_prior("smooth", NormalPrior(0.0, 1.0), lambda m: m.lengthscale.log())
    kernel.lengthscale = torch.tensor([0.5, 2.0])
    expected = GammaPrior(3.0, 6.0).log_prob(kernel.lengthscale).sum()
    expected = expected + NormalPrior(0.0, 1.0).log_prob(kernel.lengthscale.log()).sum()
    torch.testing.assert_close(hyperparameters(kernel)[0].log_prior(), expected)
    assert hyperparameters(RBFKernel())[0].log_prior is None
