"""Values of mixtures: set, read back, by name, pruned, and refused where they do not fit."""

import pytest
import torch

from mercer.kernels import (
    RBF,
    GaussianMixture,
    MixtureKernel,
    StudentMixture,
    describe,
    gram,
    hyperparameters,
    kernel_params,
    prepare,
    prune,
    set_kernel_param,
    to_model_units,
)


def points(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_frequency_of_zero_is_not_learned():
    kernel = GaussianMixture(frequency=[[0.0, 2.0], [3.0, 0.0]])
    (found,) = [h for h in hyperparameters(kernel) if h.name == "frequency"]
    assert found.log_scale and found.parameter.numel() == 2
    torch.testing.assert_close(found.to_theta(found.parameter).exp(), torch.tensor([2.0, 3.0], dtype=torch.float64))
    assert [h.name for h in hyperparameters(GaussianMixture(frequency=[0.0]))] == ["weight", "lengthscale"]
    kernel.frequency = [[1.0, 2.0], [3.0, 4.0]]
    assert kernel.raw_frequency.numel() == 4
    torch.testing.assert_close(kernel.frequency.detach(), torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64))


def test_pruning_drops_what_has_no_weight():
    weight = [1.0, 1e-10, 0.5, 3e-9]
    kernel = GaussianMixture(weight=weight, lengthscale=[1.0, 2.0, 3.0, 4.0], frequency=[0.0, 1.0, 2.0, 0.0])
    whole = RBF(1.0, outputscale=2.0) + kernel
    pruned, n_dropped = prune(whole)
    assert n_dropped == 2 and kernel.n_components == 4
    left = pruned.kernels[1]
    assert left.frequency.flatten().tolist() == pytest.approx([0.0, 2.0])
    assert left.lengthscale.flatten().tolist() == pytest.approx([1.0, 3.0])
    X = points(5, 1)
    torch.testing.assert_close(gram(pruned, X), gram(whole, X), rtol=0, atol=2e-8)
    equal = GaussianMixture(weight=[0.4, 0.6], frequency=[0.0, 1.0])
    assert prune(equal, 0.45)[1] == 1  # the share of the sum is 0.4, beside the largest 0.67
    assert prune(whole, 0.0)[1] == 0 and prune(GaussianMixture(3))[1] == 0
    with pytest.raises(ValueError, match="tol must be"):
        prune(whole, 1.0)


def test_values_by_name():
    kernel = StudentMixture(2, lengthscale=3.0)
    params = kernel_params(kernel)
    assert params["weight"] is None and params["frequency"] is None
    set_kernel_param(kernel, "weight", [1.0, 2.0])
    assert kernel.weight.tolist() == pytest.approx([1.0, 2.0])
    text = describe(StudentMixture(weight=[1.0, 2.0], lengthscale=3.0, frequency=[0.0, 5.0]))
    assert text == "StudentMixture(weight=[1, 2], lengthscale=[3, 3], frequency=[0, 5])"


def test_lists_by_name_have_one_entry_per_component_and_read_back_as_they_were_set():
    kernel = GaussianMixture(3)
    set_kernel_param(kernel, "lengthscale", [1.0, 2.0, 3.0])
    set_kernel_param(kernel, "frequency", [0.0, 1.0, 2.0])
    assert kernel.lengthscale.shape == (3, 1) and kernel.raw_frequency.numel() == 2
    params = kernel_params(kernel)
    assert params["lengthscale"] == pytest.approx([1.0, 2.0, 3.0])
    assert params["frequency"] == pytest.approx([0.0, 1.0, 2.0], abs=0)
    set_kernel_param(kernel, "frequency", 0.3)
    assert kernel_params(kernel)["frequency"] == pytest.approx([0.3] * 3, rel=1e-12)
    for shape in [(1, 2), (3, 2)]:
        values = torch.arange(6, dtype=torch.float64).reshape(3, 2)[: shape[0]]
        wide = GaussianMixture(shape[0])
        for name in ("lengthscale", "frequency"):
            set_kernel_param(wide, name, (values + (name == "lengthscale")).tolist())
        again = GaussianMixture(shape[0], frequency=torch.ones(shape))
        for name, value in kernel_params(wide).items():
            set_kernel_param(again, name, value)
        assert torch.equal(again.frequency, wide.frequency) and torch.equal(again.lengthscale, wide.lengthscale)
        torch.testing.assert_close(wide.frequency.detach(), values, rtol=1e-12, atol=0)
    set_kernel_param(kernel, "frequency", [0.0, 0.0, 0.0])
    assert kernel_params(kernel)["frequency"] == [0.0, 0.0, 0.0]
    set_kernel_param(kernel, "frequency", None)
    assert kernel_params(kernel)["frequency"] is None and kernel.raw_frequency.numel() == 3
    set_kernel_param(kernel, "lengthscale", None)
    assert kernel_params(kernel)["lengthscale"] is None


def test_values_that_do_not_fit_leave_the_kernel_as_it_was():
    kernel = GaussianMixture(frequency=[0.0, 1.5, 2.0])
    for name in ("frequency", "lengthscale"):
        for value in ([1.0, 2.0], [[1.0, 2.0]] * 3, [[[1.0]]]):
            with pytest.raises(ValueError, match=rf"{name} of GaussianMixture must be one number, \(3,\)"):
                setattr(kernel, name, value)
    with pytest.raises(ValueError, match="frequency of MixtureKernel must lie"):
        kernel.frequency = [1.0, -1.0, 0.0]
    assert kernel.frequency.flatten().tolist() == pytest.approx([0.0, 1.5, 2.0], abs=0)
    with pytest.raises(ValueError, match="weight of MixtureKernel has shape"):
        kernel.weight = [1.0, 2.0]
    with pytest.raises(ValueError, match="frequencies for 1 column"):
        prepare(kernel, 2)


def test_unset_columns_are_those_of_the_data():
    kernel, _ = prepare(GaussianMixture(3, active_dims=["a", "b"]), 3, ["a", "c", "b"])
    assert kernel.frequency.shape == kernel.lengthscale.shape == (3, 2)
    to_model_units(kernel, torch.ones(3), 1.0)
    assert kernel.weight.sum().item() == pytest.approx(1.0)
    assert len({round(value, 6) for value in kernel.frequency[:, 0].tolist()}) == 3
    kernel, _ = prepare(GaussianMixture(lengthscale=[1.0, 2.0]), 2)
    assert kernel.lengthscale.tolist() == [[pytest.approx(1.0)] * 2, [pytest.approx(2.0)] * 2]
    with pytest.raises(ValueError, match="sees 2 columns"):
        prepare(GaussianMixture(frequency=[1.0, 2.0]), 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weight": [1.0, 2.0], "frequency": [1.0]}, "number of components differs"),
        ({"lengthscale": [[1.0, 2.0]], "frequency": [1.0]}, "number of columns differs"),
        ({"frequency": [[1.0, 2.0]], "active_dims": [0]}, "number of columns differs"),
        ({"weight": [-1.0]}, "weight of MixtureKernel must lie"),
        ({"frequency": [-1.0]}, "frequency of MixtureKernel must lie"),
        ({"n_components": 0}, "at least one component"),
        ({"n_components": 2.5}, "n_components must be a whole number, got 2.5"),
        ({"frequency": [[[1.0]]]}, "frequency must be one number, .Q,. or .Q, d., got .1, 1, 1."),
        ({"weight": [[1.0, 2.0]]}, "weight must be one number, .Q,., got .1, 2."),
        ({"spectrum": "cauchy"}, "spectrum must be one of"),
    ],
)
def test_what_does_not_fit_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        MixtureKernel(**values)
