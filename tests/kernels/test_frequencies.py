"""Frequencies of waves: found to the digits of the data, also for less than a period, and none in noise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mercer.kernels import find_frequencies, find_frequencies_grid
from mercer.kernels.periodogram import peak, sampled

D = torch.float64
PI = math.pi


def grid(low, high, n):
    return torch.linspace(low, high, n, dtype=D)


def omega(x, values, **options):
    frequency, amplitude = find_frequencies(x, values, **options)
    return (2 * PI * frequency).tolist(), amplitude.tolist()


def test_a_sixth_of_a_period_is_enough():
    x = grid(0, 1, 400)
    assert omega(x, torch.sin(x))[0] == pytest.approx([1.0], rel=1e-6)


@pytest.mark.parametrize(
    ("x", "values", "expected"),
    [
        (grid(0, 2 * PI, 400), lambda x: -1e4 * torch.sin(100 * x), [100]),
        (grid(0, 2 * PI, 400), lambda x: torch.sin(6 * x) * torch.cos(100 * x), [94, 106]),
        (grid(0, 1, 900), lambda x: -torch.sin(x) - 40 * torch.sin(20 * x) - 500 * torch.sin(100 * x), [100, 20, 1]),
        (grid(0, 1, 900), lambda x: torch.sin(x) + 0.1 * torch.sin(20 * x) + 0.05 * torch.sin(100 * x), [1, 20, 100]),
        (grid(0, 1, 400), lambda x: -2.5e5 * torch.sin(500 * x) - 4, [500]),
        (grid(0, 1, 400), lambda x: torch.sin(500 * x) - 2 * (x - 0.5) ** 2, [500]),
    ],
)
def test_the_forcings_of_the_suite_are_read_to_six_digits(x, values, expected):
    assert omega(x, values(x))[0] == pytest.approx(expected, rel=1e-6)


def test_a_wave_of_varying_amplitude_is_one_line():
    x = grid(0, 2 * PI, 900)
    frequency, amplitude = omega(x, x * torch.sin(200 * x))
    assert frequency == pytest.approx([200], rel=1e-6)
    assert amplitude == pytest.approx([math.sqrt(2) * (x * torch.sin(200 * x)).square().mean().sqrt().item()])


@pytest.mark.parametrize(
    "values", [lambda x: (x - 0.3) ** 2, lambda x: 3 + 0 * x, lambda x: 0 * x, lambda x: 2 - 5 * x]
)
def test_what_has_no_waves_has_no_frequencies(values):
    x = grid(0, 1, 50)
    assert omega(x, values(x)) == ([], [])


def test_noise_has_no_frequencies_and_does_not_hide_them():
    rng = torch.Generator().manual_seed(0)
    x = 10 * torch.rand(300, generator=rng, dtype=D)
    noise = torch.randn(300, generator=rng, dtype=D)
    assert omega(x, noise)[0] == []
    frequency, amplitude = omega(x, torch.sin(8 * x) + 0.5 * torch.cos(3 * x) + 0.3 * noise)
    # the bound of Cramér and Rao on a frequency's sd is √6 σ / (A L √n) per unit of angle here
    assert frequency == pytest.approx([8, 3], abs=4 * math.sqrt(6) * 0.3 / (0.5 * 5 * math.sqrt(300)))
    assert amplitude == pytest.approx([1, 0.5], abs=4 * 0.3 * math.sqrt(2 / 300))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    first=st.floats(1.5, 6),
    gap=st.floats(2, 8),
    phase=st.floats(0, 6),
    size=st.floats(1e-2, 1e2),
    shift=st.floats(-1e3, 1e3),
    stretch=st.floats(1e-3, 1e3),
    uniform=st.booleans(),
)
def test_origin_units_and_order_of_rows_do_not_matter(first, gap, phase, size, shift, stretch, uniform):
    rng = torch.Generator().manual_seed(1)
    t = grid(0, 1, 120) if uniform else torch.rand(120, generator=rng, dtype=D)
    values = torch.sin(2 * PI * first * t + phase) + size * torch.cos(2 * PI * (first + gap) * t)
    x = (shift + t) * stretch
    shuffled = torch.randperm(120, generator=rng)
    frequency, _ = find_frequencies(x[shuffled], values[shuffled])
    found = sorted((frequency * stretch).tolist())
    assert found == pytest.approx([first, first + gap], rel=1e-6)


def test_several_functions_share_their_frequencies():
    x = grid(0, 1, 60)
    values = torch.stack([torch.sin(20 * x), torch.cos(20 * x) + torch.sin(50 * x)], 1)
    assert omega(x, values)[0] == pytest.approx([20, 50], rel=1e-6)


def sine(x, frequency, noise=0.0, seed=5):
    rng = torch.Generator().manual_seed(seed)
    return torch.sin(2 * PI * frequency * x) + noise * torch.randn(x.shape, generator=rng, dtype=D)


def sd_of_frequency(n, noise):
    """Bound of Cramér and Rao for a wave of amplitude one, in cycles over the data."""
    return math.sqrt(6 / n) * noise / PI


def test_replicates_do_not_raise_the_highest_frequency():
    x = grid(0, 1, 50).repeat_interleave(5)  # 91 cycles look like 7 at these places
    frequency, _ = find_frequencies(x, sine(x, 7, 0.1))
    assert frequency.tolist() == pytest.approx([7], abs=4 * sd_of_frequency(250, 0.1))
    near = torch.cat([x, x + 1e-13, x + 1e-7])
    frequency, _ = find_frequencies(near, sine(near, 7, 0.1))
    assert frequency.tolist() == pytest.approx([7], abs=4 * sd_of_frequency(750, 0.1))
    scattered = torch.rand(40, generator=torch.Generator().manual_seed(2), dtype=D).repeat(6)
    frequency, _ = find_frequencies(scattered, sine(scattered, 7, 0.1))
    assert frequency.tolist() == pytest.approx([7], abs=4 * sd_of_frequency(240, 0.1))


def test_a_grid_with_holes_tells_what_its_step_tells():
    kept = torch.rand(300, generator=torch.Generator().manual_seed(0)) > 0.5
    x = torch.arange(300, dtype=D)[kept]
    length = float(x[-1] - x[0])
    found = sampled((x - x[0]) / length - 0.5)
    assert found.highest == pytest.approx(length / 2) and found.n_nodes == length + 1
    frequency, _ = find_frequencies(x, sine(x, 0.31, 0.05))
    assert frequency.tolist() == pytest.approx([0.31], abs=4 * sd_of_frequency(len(x), 0.05) / length)


@pytest.mark.parametrize("uniform", [True, False])
def test_a_peak_is_read_to_a_small_part_of_a_cycle(uniform):
    rng = torch.Generator().manual_seed(3)
    t = grid(-0.5, 0.5, 100) if uniform else (torch.rand(100, generator=rng, dtype=D) - 0.5).sort().values
    samples = sampled(t)
    assert (samples.node is not None) == uniform
    for frequency in (8.0, 8.3, 8.5, 8.8):
        assert peak(samples, sine(t, frequency)[:, None]) == pytest.approx(frequency, abs=0.2)


def test_two_lines_closer_than_a_cycle_are_one_wave_of_varying_amplitude():
    x = grid(0, 1, 100)
    frequency, _ = find_frequencies(x, sine(x, 6.4) + 0.7 * sine(x, 6.95))
    assert len(frequency) == 1 and 6.4 < frequency[0].item() < 6.95


@pytest.mark.parametrize("offset", [1e7, -1e5])
def test_a_large_constant_hides_no_wave(offset):
    x = torch.arange(64, dtype=D)
    assert find_frequencies(x, offset + sine(x, 0.1))[0].tolist() == pytest.approx([0.1], rel=1e-4)
    assert len(find_frequencies(x, torch.full((64,), offset, dtype=D))[0]) == 0
    X, Y = torch.meshgrid(x[:40], x[:30], indexing="ij")
    frequency, amplitude = find_frequencies_grid([x[:40], x[:30]], offset + sine(X, 0.1) * sine(Y, 0.2))
    expected = torch.tensor([[0, 0], [0.1, 0.2]], dtype=D)
    torch.testing.assert_close(frequency, expected, rtol=1e-4, atol=1e-12)
    assert amplitude.tolist() == pytest.approx([abs(offset), 1], rel=1e-6)


def test_a_constant_is_all_there_is_on_a_constant_grid():
    x = grid(0, 1, 20)
    frequency, amplitude = find_frequencies_grid([x, x], torch.full((20, 20), 3.7, dtype=D))
    assert frequency.tolist() == [[0, 0]] and amplitude.tolist() == pytest.approx([3.7])


def test_rounding_of_single_precision_is_no_wave():
    x = grid(0, 1, 64)
    values = (1e6 + sine(x, 6.3)).float()
    assert find_frequencies(x, values)[0].tolist() == pytest.approx([6.3], abs=0.05)
    assert len(find_frequencies(x, (1e6 + 1e-2 * sine(x, 6.3)).float())[0]) == 0


def test_most_limits_the_number_of_lines():
    x = grid(0, 1, 200)
    values = sum(torch.sin(2 * PI * 5 * k * x) / k for k in range(1, 6))
    assert omega(x, values, most=2)[0] == pytest.approx([2 * PI * 5, 2 * PI * 10], rel=1e-2)


def test_on_a_grid_only_the_pairs_that_are_there_are_found():
    x, y = grid(0, 2 * PI, 80), grid(0, 1, 50)
    X, Y = torch.meshgrid(x, y, indexing="ij")
    values = torch.sin(6 * X) * torch.cos(40 * Y) + 0.5 * torch.sin(20 * X) + 3
    frequency, amplitude = find_frequencies_grid([x, y], values)
    expected = torch.tensor([[0, 0], [6, 40], [20, 0]], dtype=D)
    torch.testing.assert_close(2 * PI * frequency, expected, rtol=1e-6, atol=1e-12)
    assert amplitude.tolist() == pytest.approx([3, 1, 0.5], rel=1e-6)


def test_on_a_grid_a_travelling_wave_is_one_pair():
    x, t = grid(0, 1, 60), grid(0, 1, 61)
    X, T = torch.meshgrid(x, t, indexing="ij")
    frequency, amplitude = find_frequencies_grid([x, t], torch.sin(X - 50 * T))
    torch.testing.assert_close(2 * PI * frequency, torch.tensor([[1.0, 50.0]], dtype=D), rtol=1e-6, atol=0)
    assert amplitude.tolist() == pytest.approx([math.sqrt(2)])


def test_grids_of_one_and_three_axes():
    axes = [grid(0, 1, 20), grid(0, 1, 24), grid(0, 1, 28)]
    X, Y, Z = torch.meshgrid(*axes, indexing="ij")
    frequency, _ = find_frequencies_grid(axes, torch.sin(20 * X) * torch.cos(30 * Y) * torch.sin(50 * Z))
    torch.testing.assert_close(2 * PI * frequency, torch.tensor([[20.0, 30.0, 50.0]], dtype=D), rtol=1e-6, atol=0)
    frequency, _ = find_frequencies_grid(axes[:1], torch.sin(20 * axes[0]))
    torch.testing.assert_close(2 * PI * frequency, torch.tensor([[20.0]], dtype=D), rtol=1e-6, atol=0)
    assert find_frequencies_grid(axes[:1], 0 * axes[0])[0].shape == (0, 1)


def test_what_does_not_fit_is_refused():
    x = grid(0, 1, 5)
    with pytest.raises(ValueError, match="x must be"):
        find_frequencies(x, x[:3])
    with pytest.raises(ValueError, match="four different places"):
        find_frequencies(torch.ones(9), torch.ones(9))
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"values must be finite.*leave those rows out"):
            find_frequencies(x, x.where(x != x[2], bad))
        with pytest.raises(ValueError, match="x must be finite"):
            find_frequencies(x.where(x != x[2], bad), x)
        with pytest.raises(ValueError, match="values must be finite"):
            find_frequencies_grid([x], x.where(x != x[2], bad))
    with pytest.raises(ValueError, match="do not fit axes"):
        find_frequencies_grid([x, x], torch.zeros(5, 4))
