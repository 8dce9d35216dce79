"""Anderson's extrapolation: exact for linear maps, silent where it knows nothing."""

import pytest
import torch
from toys import normal

from mercer._typing import Sites
from mercer.inference.anderson import extrapolate, remember

N = 3


def linear_map(seed=0):
    """A contraction x ↦ A x + b of six numbers, and its fixed point, as sites."""
    A = normal(2 * N, 2 * N, seed=seed)
    A = 0.9 * A / torch.linalg.matrix_norm(A, 2)
    b = normal(2 * N, seed=seed + 1)

    def step(sites):
        return as_sites(A @ torch.cat([sites.linear, sites.precision]) + b)

    return step, as_sites(torch.linalg.solve(torch.eye(2 * N, dtype=A.dtype) - A, b))


def as_sites(x):
    return Sites(*x.reshape(2, N))


@pytest.mark.parametrize("seed", range(3))
def test_a_linear_map_is_solved_once_the_history_spans_the_space(seed):
    step, fixed = linear_map(seed)
    history, here = (), as_sites(normal(2 * N, seed=seed + 7))
    for _ in range(2 * N):
        target = step(here)
        history = remember(history, here, target, memory=2 * N)
        here = target
    found = extrapolate(history, here, step(here))
    for one, other in zip((found.linear, found.precision), (fixed.linear, fixed.precision), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_iterating_with_extrapolation_is_much_faster_than_without():
    step, fixed = linear_map()

    def distance(memory, n_steps=12):
        history, here = (), as_sites(torch.zeros(2 * N, dtype=torch.float64))
        for _ in range(n_steps):
            target = step(here)
            predicted = extrapolate(history, here, target)
            history = remember(history, here, target, memory)
            here = target if predicted is None else predicted
        return float((here.linear - fixed.linear).abs().max())

    assert distance(memory=5) < 1e-3 * distance(memory=0)


def test_without_a_history_there_is_no_prediction():
    step, _ = linear_map()
    here = as_sites(normal(2 * N))
    assert extrapolate((), here, step(here)) is None
    assert remember((), here, step(here), memory=0) == ()


def test_memory_keeps_the_latest_pairs_only():
    step, _ = linear_map()
    history, here = (), as_sites(normal(2 * N))
    for _ in range(5):
        history = remember(history, here, step(here), memory=2)
        here = step(here)
    assert len(history) == 2
    before = history[-1][0]
    torch.testing.assert_close(step(as_sites(before)).linear, here.linear)


def test_a_history_without_change_gives_nothing_or_something_finite():
    step, _ = linear_map()
    here = as_sites(normal(2 * N))
    history = remember((), here, step(here), memory=3)
    found = extrapolate(history, here, step(here))
    assert found is None or bool(torch.isfinite(found.linear).all())


def test_batch_shapes_survive():
    here = Sites(normal(2, N, seed=1), normal(2, N, seed=2))
    target = Sites(0.5 * here.linear, 0.5 * here.precision)
    history = remember((), Sites(2 * here.linear, 2 * here.precision), here, memory=3)
    found = extrapolate(history, here, target)
    # one direction is enough for a map that shrinks everything alike
    torch.testing.assert_close(found.linear, torch.zeros(2, N, dtype=torch.float64), rtol=0, atol=1e-10)
    assert found.precision.shape == (2, N)
