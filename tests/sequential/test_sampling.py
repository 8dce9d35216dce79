"""Samples of a fixed size: probabilities against bisection, and frequencies against probabilities."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mercer.sequential.sampling import draw, inclusion_probabilities

GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def bisected(size, n_drawn):
    """min(1, c size) with c by bisection."""
    low, high = 0.0, len(size) / size.min()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(1, middle * size).sum() < n_drawn else (low, middle)
    return np.minimum(1, high * size)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), size=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30))
def test_probabilities_equal_bisection(data, size):
    n_drawn = data.draw(st.integers(0, len(size)))
    found = inclusion_probabilities(torch.tensor(size, dtype=torch.float64), n_drawn)
    expected = bisected(np.array(size), n_drawn)
    # 30 terms, and a bisection that ends at the spacing of c
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-50)
    np.testing.assert_allclose(found.sum(), n_drawn, rtol=1e-13)


def test_sizes_without_weight_share_what_is_left():
    size = torch.tensor([0.0, 3.0, 0.0, 1.0, 0.0])
    assert inclusion_probabilities(size, 3).tolist() == pytest.approx([1 / 3, 1, 1 / 3, 1, 1 / 3])
    assert inclusion_probabilities(size, 1).tolist() == [0, 0.75, 0, 0.25, 0]
    assert inclusion_probabilities(torch.zeros(4), 1).tolist() == [0.25] * 4
    assert inclusion_probabilities(size, 5).tolist() == [1] * 5
    assert inclusion_probabilities(size, 0).tolist() == [0] * 5
    tiny = inclusion_probabilities(torch.tensor([1e-300, 2e-300, 1e300], dtype=torch.float64), 2)
    assert tiny.tolist() == pytest.approx([1 / 3, 2 / 3, 1])


def test_frequencies_are_the_probabilities():
    size = torch.tensor([0.1, 0.2, 0.5, 1.0, 1.0, 1.5, 2.0, 4.0, 9.0, 0.0], dtype=torch.float64)
    chance, seeded, n_draws = inclusion_probabilities(size, 4), generator(), 8000
    assert (chance == 1).any() and (chance == 0).any()
    count = torch.zeros(len(size), dtype=torch.float64)
    for _ in range(n_draws):
        index = draw(chance, seeded)
        assert len(index) == 4 and (index.diff() > 0).all()
        count[index] += 1
    error = (chance * (1 - chance) / n_draws).sqrt()
    assert ((count / n_draws - chance).abs() <= 4.5 * error).all()


def test_all_pairs_occur_together():
    """In a fixed order rows 0 and 1 never would; for equal chances all pairs are equally likely."""
    seeded, n_draws = generator(), 4000
    pairs = [tuple(draw(torch.full((4,), 0.5, dtype=torch.float64), seeded).tolist()) for _ in range(n_draws)]
    kinds, count = np.unique(pairs, axis=0, return_counts=True)
    assert len(kinds) == 6
    assert (abs(count / n_draws - 1 / 6) <= 4.5 * np.sqrt(5 / 36 / n_draws)).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), n=st.integers(0, 60), seed=st.integers(0, 999))
def test_the_size_is_exact(data, n, seed):
    n_drawn = data.draw(st.integers(0, n))
    size = torch.as_tensor(np.random.default_rng(seed).lognormal(sigma=3.0, size=n))
    index = draw(inclusion_probabilities(size, n_drawn), generator(seed))
    assert len(index) == n_drawn == len(index.unique())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_the_generator_decides_alone_wherever_the_rows_are(device):
    chance = inclusion_probabilities(torch.arange(1.0, 21.0, device=device), 7)
    before = torch.random.get_rng_state()
    index = draw(chance, generator(3))
    assert index.device == chance.device and torch.equal(before, torch.random.get_rng_state())
    assert index.tolist() == draw(chance.cpu(), generator(3)).tolist()
    assert any(index.tolist() != draw(chance, generator(seed)).tolist() for seed in range(4, 8))
