"""Columns, amplitudes, units and defaults: what happens between a user's kernel and the model's."""

import gpytorch
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mercer.kernels import (
    RBF,
    Constant,
    GaussianMixture,
    Linear,
    Matern12,
    Matern52,
    Periodic,
    PolynomialKernel,
    RationalQuadratic,
    RBFKernel,
    ScaleKernel,
    SpectralMixtureKernel,
    StudentMixture,
    describe,
    diag,
    get_kernel,
    gram,
    kernel_params,
    prepare,
    rescale,
    to_model_units,
)
from mercer.kernels.params import is_unset

NAMES = ["temp", "wind", "rain"]
KERNELS = {
    "ard": RBF(0.7),
    "isotropic": Matern52(0.7, ard=False),
    "columns": Matern52([1.0, 2.0], active_dims=["rain", "temp"], outputscale=3.0) + Linear(0.5) + Constant(2.0),
    "product": RationalQuadratic(1.0, 2.0) * Linear(0.2),
    "product with sum": Periodic(1.3, 0.7, ard=False) * (RBF(1.0) + Matern12(2.0, active_dims=["wind"])),
    "scaled sum": ScaleKernel(RBF(1.0, ard=False) + Linear(0.3, ard=False)),
    "two scales": RBF(1.0, outputscale=2.0) * Periodic(2.0, 1.0, outputscale=3.0),
    "waves": GaussianMixture(weight=[1.0, 0.5], lengthscale=2.0, frequency=[[0, 0, 0], [1.3, 0, 0.2]]),
    "waves of one column": StudentMixture(frequency=[0.0, 0.7], active_dims=["wind"]) * RBF(1.0),
    "spectral mixture": SpectralMixtureKernel(num_mixtures=2, ard_num_dims=3),
}


def prepared(kernel):
    kernel, _ = prepare(kernel, 3, NAMES)
    for parameter in kernel.parameters():
        if is_unset(parameter):
            parameter.data.fill_(0.3)
    return kernel


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(KERNELS)),
    scales=st.lists(st.floats(1e-2, 1e2), min_size=3, max_size=3),
    output=st.floats(1e-2, 1e2),
)
def test_rescaled_kernel_is_the_same_function_in_other_units(name, scales, output):
    X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = torch.tensor(scales, dtype=torch.float64)
    kernel = prepared(KERNELS[name])
    expected = output**2 * gram(kernel, X / scale).detach()
    identity = [id(parameter) for parameter in kernel.parameters()]
    assert rescale(kernel, scale, output) == []
    size = expected.abs().max().item()
    torch.testing.assert_close(gram(kernel, X).detach(), expected, rtol=1e-9, atol=1e-9 * size)
    assert identity == [id(parameter) for parameter in kernel.parameters()]
    rescale(kernel, 1 / scale, 1 / output)
    torch.testing.assert_close(output**2 * gram(kernel, X / scale).detach(), expected, rtol=1e-9, atol=1e-9 * size)


def test_equal_scales_keep_an_isotropic_lengthscale():
    kernel = prepared(Matern52(0.7, ard=False))
    rescale(kernel, torch.tensor([2.0, 2.0, 2.0]), 1.0)
    assert kernel_params(kernel)["base_kernel__lengthscale"] == pytest.approx(1.4)


def test_every_summand_gets_an_amplitude_and_a_note():
    kernel, notes = prepare(get_kernel("(rbf + linear) * periodic + matern32 + linear * rq + constant"), 2)
    text = describe(kernel)
    assert text.count("σ²") == 2 and len(notes) == 2
    again, more = prepare(kernel, 2)
    assert more == [] and describe(again) == text


def test_prepare_leaves_the_kernel_of_the_user_alone():
    kernel = RBF(2.0, active_dims=["wind"])
    prepare(kernel, 3, NAMES)
    assert kernel.active_columns == ("wind",) and kernel.active_dims is None and kernel.ard_deferred


def test_unset_parameters_get_defaults_and_set_ones_change_units():
    kernel, _ = prepare(RBF() + Matern52(2.0, outputscale=9.0), 4)
    notes = to_model_units(kernel, torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64), 3.0)
    params = kernel_params(kernel)
    assert notes == []
    assert params["kernels__0__outputscale"] == pytest.approx(0.5)
    assert params["kernels__0__base_kernel__lengthscale"] == pytest.approx([2.0] * 4)
    assert params["kernels__1__outputscale"] == pytest.approx(1.0)
    assert params["kernels__1__base_kernel__lengthscale"] == pytest.approx([2.0, 1.0, 0.5, 0.25])


@pytest.mark.parametrize("text", ["rbf", "rq * periodic + constant", "matern52 + matern12 * rbf"])
def test_default_prior_variance_is_one(text):
    kernel, _ = prepare(get_kernel(text), 3)
    to_model_units(kernel, torch.ones(3, dtype=torch.float64), 5.0)
    torch.testing.assert_close(
        diag(kernel, torch.zeros(2, 3, dtype=torch.float64)).detach(), torch.ones(2, dtype=torch.float64)
    )


def test_constraints_change_units_and_priors_are_reported():
    constraint = gpytorch.constraints.Interval(0.1, 10.0)
    prior = gpytorch.priors.GammaPrior(3.0, 6.0)
    leaf = RBFKernel(lengthscale_constraint=constraint, lengthscale_prior=prior)
    leaf.lengthscale = 5.0
    kernel, _ = prepare(leaf, 1)
    notes = to_model_units(kernel, torch.tensor([100.0], dtype=torch.float64), 1.0)
    assert kernel.base_kernel.lengthscale.item() == pytest.approx(0.05)
    assert kernel.base_kernel.raw_lengthscale_constraint.upper_bound.item() == pytest.approx(0.1)
    assert any("lengthscale_prior" in note for note in notes)


def test_kernel_without_rule_is_reported():
    leaf = PolynomialKernel(2)
    leaf.offset = torch.tensor(2.0)
    kernel, _ = prepare(leaf, 2)
    assert to_model_units(kernel, torch.tensor([1.0, 3.0]), 1.0) == [
        "The parameters of PolynomialKernel are in standardised units."
    ]


def test_kernel_object_used_twice_is_untied():
    leaf = RBF(2.0)
    kernel, notes = prepare(leaf * Linear(1.0) + ScaleKernel(leaf) + leaf, 2)
    lengthscales = [path for path in kernel_params(kernel) if path.endswith("lengthscale")]
    assert len(lengthscales) == 3 and sum("appears twice" in note for note in notes) == 2
    rescale(kernel, torch.tensor([3.0, 3.0]), 1.0)
    assert all(kernel_params(kernel)[path] == pytest.approx([6.0, 6.0]) for path in lengthscales)


def test_scale_around_a_kernel_with_later_columns_selects_them():
    kernel, _ = prepare(ScaleKernel(RBF(1.0, active_dims=["wind"])), 3, NAMES)
    X = torch.randn(4, 3, dtype=torch.float64)
    same = X.clone()
    same[:, [0, 2]] = 0.0
    assert torch.equal(gram(kernel, X), gram(kernel, same))


@pytest.mark.parametrize(
    "kernel, names, message",
    [
        (RBF([1.0, 2.0]), None, "RBFKernel has 2 lengthscales but sees 3"),
        (RBF(active_dims=[4]), None, "X has 3 columns"),
        (RBF(active_dims=["snow"]), NAMES, "no column 'snow'; it has"),
        (RBF(active_dims=["snow"]), None, "no column names"),
    ],
)
def test_kernel_that_does_not_fit_names_itself(kernel, names, message):
    with pytest.raises(ValueError, match=message):
        prepare(kernel, 3, names)
