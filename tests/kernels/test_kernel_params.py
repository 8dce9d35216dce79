"""Factories, shorthands and the plain-number view of a kernel."""

import pickle
from copy import deepcopy

import numpy as np
import pytest
from gpytorch.kernels import RBFKernel
from sklearn.gaussian_process.kernels import RBF as SklearnRBF

from mercer.kernels import (
    RBF,
    Constant,
    Linear,
    Matern12,
    Matern52,
    Periodic,
    RationalQuadratic,
    describe,
    get_kernel,
    kernel_params,
    prepare,
    set_kernel_param,
)


def test_describe_reads_as_an_expression():
    kernel = Matern52([0.3, 1.2], outputscale=4.41) + Periodic(1.0, 1.3, outputscale=0.25) * (RBF() + Constant(2.0))
    assert describe(kernel) == (
        "2.1² * Matern52(lengthscale=[0.3, 1.2]) + "
        "0.5² * Periodic(lengthscale=1.3, period=1) * (RBF() + Constant(constant=2))"
    )


def test_params_round_trip_through_plain_numbers():
    kernel = Matern12([0.3, 1.2], outputscale=2.0) + RationalQuadratic(0.5, 2.0) * Linear()
    params = kernel_params(kernel)
    assert params["kernels__1__kernels__1__variance"] is None
    assert params["kernels__0__base_kernel__lengthscale"] == pytest.approx([0.3, 1.2])
    other = Matern12(outputscale=1.0) + RationalQuadratic() * Linear(3.0)
    for path, value in params.items():
        set_kernel_param(other, path, value)
    assert describe(other) == describe(kernel)


def test_list_on_a_deferred_lengthscale_resizes_it():
    kernel = RBF()
    set_kernel_param(kernel, "lengthscale", np.array([1.0, 2.0]))
    assert kernel_params(prepare(kernel, 2)[0])["base_kernel__lengthscale"] == pytest.approx([1.0, 2.0])
    with pytest.raises(ValueError, match="2 lengthscales"):
        prepare(kernel, 3)


@pytest.mark.parametrize("copy", [deepcopy, lambda kernel: pickle.loads(pickle.dumps(kernel))])
def test_what_is_deferred_survives_copies_and_algebra(copy):
    kernel = copy(RBF(active_dims=["a"]) * Linear() + Matern52(2.0))
    leaf = kernel.kernels[0].kernels[0]
    assert leaf.active_columns == ("a",) and leaf.ard_deferred and kernel.kernels[1].ard_deferred


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("length_scale", 1.0, "no parameter 'length_scale'; it has lengthscale"),
        ("lengthscale", -1.0, "lengthscale of RBFKernel must"),
        ("lengthscale", 0.0, "must be positive"),
        ("lengthscale", [1.0, 2.0, 3.0], "has 2 entries, got 3"),
        ("lengthscale", float("nan"), "must lie between"),
    ],
)
def test_bad_parameter_is_refused(path, value, message):
    with pytest.raises(ValueError, match=message):
        set_kernel_param(RBF([1.0, 2.0]), path, value)


def test_lengthscales_must_match_the_columns_they_name():
    with pytest.raises(ValueError, match="3 entries for 2 active_dims"):
        RBF([1.0, 2.0, 3.0], active_dims=["a", "b"])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("rbf", "RBF()"),
        ("matern52 + linear", "Matern52() + Linear()"),
        ("rq*(periodic+matern12) + constant", "RationalQuadratic() * (Periodic() + Matern12()) + Constant()"),
    ],
)
def test_string_expressions(text, expected):
    assert describe(get_kernel(text)) == expected


@pytest.mark.parametrize("text", ["", "foo", "rbf +", "(rbf", "rbf)", "rbf rbf", "rbf ** 2", "__import__('os')"])
def test_unknown_string_lists_the_choices(text):
    with pytest.raises(ValueError, match=r"kernel=.*'matern52'"):
        get_kernel(text)


@pytest.mark.parametrize(
    "value, message",
    [
        (SklearnRBF(), "scikit-learn's RBF; use the kernels of mercer.kernels"),
        (RBFKernel, r"write RBFKernel\(\)"),
        (RBF, r"write RBF\(\)"),
        (np.ones(3), "got ndarray"),
        (None, "got NoneType"),
    ],
)
def test_other_objects_come_with_the_cure(value, message):
    with pytest.raises(TypeError, match=message):
        get_kernel(value)
