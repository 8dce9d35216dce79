"""Mixtures start from the waves in the data, whatever the columns are, and from nothing else."""

import math

import pytest
import torch

from mercer.kernels import (
    RBF,
    GaussianMixture,
    Linear,
    MixtureKernel,
    ScaleKernel,
    StudentMixture,
    prepare,
    start_from_data,
)

D = torch.float64


def started(kernel, X, y, **options):
    kernel, _ = prepare(kernel, X.shape[1])
    notes = start_from_data(kernel, X, y, **options)
    return kernel, notes


def uniform(n, d, seed=0):
    return torch.rand(n, d, generator=torch.Generator().manual_seed(seed), dtype=D)


def noise(n, seed=9):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=D)


def test_waves_of_one_column_are_found_in_its_units():
    x = 40 * uniform(200, 1)
    y = 3 * torch.sin(2 * math.pi * 0.3 * x[:, 0]) + torch.cos(2 * math.pi * 0.8 * x[:, 0]) + 0.1 * noise(200) + 7
    kernel, notes = started(GaussianMixture(4), x, y)
    assert notes == ["GaussianMixture starts from 2 wave(s) in the data"]
    assert kernel.frequency[:3, 0].tolist() == pytest.approx([0, 0.3, 0.8], abs=0.01)
    assert kernel.weight[1:3].tolist() == pytest.approx([4.5, 0.5], rel=0.15)
    assert kernel.weight.min() > 0 and kernel.lengthscale[1, 0].item() == pytest.approx(20, rel=0.05)


def test_products_of_waves_along_two_of_three_columns_are_found():
    X = uniform(300, 3) * torch.tensor([1.0, 10.0, 0.1], dtype=D)
    y = torch.sin(2 * math.pi * 3 * X[:, 0]) * torch.cos(2 * math.pi * 0.5 * X[:, 1])
    y = y + 0.3 * torch.sin(2 * math.pi * 40 * X[:, 2]) + 0.05 * noise(300)
    kernel, _ = started(StudentMixture(3), X, y)
    expected = torch.tensor([[0, 0, 0], [3, 0.5, 0], [0, 0, 40]], dtype=D)
    assert ((kernel.frequency - expected).abs() * torch.tensor([1.0, 10.0, 0.1]) < 0.2).all(), kernel.frequency
    assert kernel.raw_frequency.numel() == 3  # a column without a wave is not given one


@pytest.mark.parametrize("d", [1, 2, 3])
def test_noise_has_no_waves(d):
    X = uniform(200, d)
    kernel, notes = started(GaussianMixture(3), X, noise(200))
    assert notes == ["GaussianMixture starts from 0 wave(s) in the data"]
    assert kernel.weight.sum().item() == pytest.approx(1, rel=0.3)
    assert len({tuple(row) for row in kernel.frequency.tolist()}) == 3


def test_what_was_set_stays_and_other_kernels_are_left_alone():
    x = uniform(60, 2)
    y = torch.sin(30 * x[:, 1])
    given = GaussianMixture(weight=[1.0, 2.0], frequency=[0.0, 3.0], active_dims=[0])
    kernel, notes = started(ScaleKernel(StudentMixture(2, lengthscale=5.0, active_dims=[1])) + given + RBF(), x, y)
    assert len(notes) == 1
    first, second = kernel.kernels[0].base_kernel, kernel.kernels[1]
    assert first.frequency[1].tolist() == pytest.approx([30 / (2 * math.pi)], rel=1e-5)
    assert first.lengthscale.tolist() == [[pytest.approx(5.0)]] * 2
    assert second.frequency.tolist() == [[0.0], [pytest.approx(3.0)]]
    assert start_from_data(RBF() + Linear(), x, y) == []


def test_outputs_share_frequencies_missing_targets_are_left_out_and_scale_does_not_matter():
    x = uniform(120, 1)
    y = torch.stack([1e3 * torch.sin(40 * x[:, 0]), 1e-3 * torch.cos(40 * x[:, 0])], 1)
    y[3, 0] = float("nan")
    kernel, _ = started(GaussianMixture(2), x, y)
    assert kernel.frequency[1].item() == pytest.approx(40 / (2 * math.pi), rel=1e-5)
    assert kernel.weight[1].item() == pytest.approx(1, rel=0.3)


def test_amplitudes_are_left_alone_where_they_say_nothing():
    x = uniform(60, 1)
    kernel, _ = started(GaussianMixture(2), x, torch.sin(40 * x[:, 0]), amplitudes=False)
    assert not kernel.raw_weight.any() and kernel.frequency[1].item() > 6


@pytest.mark.parametrize("rows", [1, 2, 9, 5000])
@pytest.mark.parametrize("d", [1, 2])
def test_few_rows_equal_rows_and_many_rows_are_no_failure(rows, d):
    X = uniform(rows, d).round(decimals=1 if rows < 10 else 8)
    X[:, 0] = X[0, 0] if d == 2 else X[:, 0]
    kernel, _ = started(GaussianMixture(3), X, X.sum(1))
    values = [kernel.weight, kernel.lengthscale, kernel.frequency]
    assert all(bool(value.isfinite().all()) for value in values) and kernel.n_components == 3


def test_a_product_of_waves_must_explain_more_than_one_wave():
    rng = torch.Generator().manual_seed(15)
    X = torch.rand(60, 3, generator=rng, dtype=D)
    frequency = float(torch.randint(4, 30, (1,), generator=rng)) / 4
    y = torch.sin(2 * math.pi * frequency * X[:, 0]) + torch.randn(60, generator=rng, dtype=D)
    kernel, _ = started(GaussianMixture(2), X, y)
    assert kernel.frequency[1].tolist() == pytest.approx([frequency, 0, 0], abs=0.1)


def test_of_many_rows_none_are_left_out_at_regular_steps():
    x = torch.linspace(0, 1, 4001, dtype=D)[:, None]
    kernel, _ = started(GaussianMixture(2), x, torch.sin(2 * math.pi * 900 * x[:, 0]))
    assert kernel.frequency[1].item() == pytest.approx(900, rel=1e-6)


def test_outputs_that_are_never_seen_together_share_their_waves():
    x = 10 * uniform(200, 1)
    y = torch.stack([1e3 * torch.sin(6 * x[:, 0]), torch.cos(6 * x[:, 0]) + 0.5 * torch.sin(20 * x[:, 0])], 1)
    odd = torch.arange(200) % 2 == 1
    y[odd, 0], y[~odd, 1] = math.nan, math.nan
    kernel, notes = started(GaussianMixture(4), x, y)
    assert notes == ["GaussianMixture starts from 2 wave(s) in the data"]
    assert (2 * math.pi * kernel.frequency[1:3, 0]).tolist() == pytest.approx([6, 20], rel=1e-3)
    # of standardised outputs: all of the first and 0.8 of the second, and 0.2 of the second
    assert kernel.weight[1:3].tolist() == pytest.approx([0.9, 0.1], rel=0.2)


@pytest.mark.parametrize("d", [1, 2])
def test_without_a_value_the_start_has_no_waves_and_the_spread_of_all_rows(d):
    X = uniform(30, d)
    kernel, notes = started(GaussianMixture(2), X, torch.full((30,), math.nan, dtype=D))
    assert notes == ["GaussianMixture starts from 0 wave(s) in the data"]
    spread = X.amax(0) - X.amin(0)
    torch.testing.assert_close(kernel.frequency[1].detach(), 1 / spread, rtol=1e-9, atol=0)
    assert kernel.weight.sum().item() == pytest.approx(1, rel=0.1)


def test_an_output_without_a_value_does_not_count():
    x = uniform(80, 1)
    y = torch.stack([torch.sin(40 * x[:, 0]), torch.full((80,), math.nan, dtype=D)], 1)
    kernel, _ = started(GaussianMixture(2), x, y)
    assert (2 * math.pi * kernel.frequency[1]).item() == pytest.approx(40, rel=1e-5)


CARRIED = {  # does the mixture carry the variance of y?
    "alone": (lambda: GaussianMixture(2), [True]),
    "scale": (lambda: ScaleKernel(GaussianMixture(2)), [False]),
    "sum": (lambda: GaussianMixture(2) + RBF(), [True]),
    "product": (lambda: GaussianMixture(2) * GaussianMixture(2), [True, False]),
    "product with a scale": (lambda: RBF(outputscale=3.0) * GaussianMixture(2), [False]),
    "product with an unset scale": (lambda: ScaleKernel(RBF()) * GaussianMixture(2), [True]),
    "product with a known mixture": (lambda: GaussianMixture(weight=[2.0]) * GaussianMixture(2), [True, False]),
}


@pytest.mark.parametrize("name", CARRIED)
def test_weights_are_in_units_of_y_only_where_they_carry_its_variance(name):
    make, carried = CARRIED[name]
    x = uniform(60, 1)
    y = torch.sin(40 * x[:, 0])
    small, large = (started(make(), x, size * y)[0] for size in (1.0, 1e3))
    pairs = [
        (one, other)
        for one, other in zip(small.modules(), large.modules(), strict=True)
        if isinstance(one, MixtureKernel) and one.n_components == 2
    ]
    for (one, other), carries in zip(pairs, carried[-len(pairs) :], strict=True):
        torch.testing.assert_close(other.weight, one.weight * (1e6 if carries else 1), rtol=1e-9, atol=0)
        if not carries:
            assert one.weight.sum().item() == pytest.approx(1)
