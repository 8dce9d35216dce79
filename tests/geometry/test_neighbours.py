"""Patterns against brute force, and schedules against what they promise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mercer.geometry.neighbours import level_schedule, moved, nearest, nearest_earlier, within_radius
from mercer.geometry.ordering import maximin


def ordered(n, d, seed=0):
    X = np.random.default_rng(seed).uniform(size=(n, d))
    order, distance = maximin(X, np.random.default_rng(0), "exact")
    return X[order], distance


def squared(X):
    return ((X[:, None] - X) ** 2).sum(-1)


@pytest.mark.parametrize(("n", "d", "m"), [(1, 1, 1), (3, 2, 5), (500, 1, 4), (400, 3, 30), (300, 15, 7)])
@pytest.mark.parametrize("shuffled", [False, True])
def test_nearest_earlier_equals_brute_force(n, d, m, shuffled):
    X, _ = ordered(n, d)
    if shuffled:  # any order will do
        X = np.random.default_rng(1).permutation(X)
    D, found = squared(X), nearest_earlier(X, m)
    assert found.shape == (n, m) and found.dtype == np.int64
    for i in range(n):
        expected = np.argsort(D[i, :i], kind="stable")[:m][::-1]
        assert (found[i, : m - len(expected)] == -1).all()
        assert np.array_equal(found[i, m - len(expected) :], expected)


def test_rows_in_coordinate_order_have_their_neighbours_too():
    """Nearly all candidates of the tree come later here: the fallback answers."""
    X = np.linspace(0, 1, 200)[:, None] ** 3
    found = nearest_earlier(X, 6)
    assert all(np.array_equal(found[i], np.arange(i - 6, i)) for i in range(6, 200))


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 80), d=st.integers(1, 4), m=st.integers(1, 12), copies=st.integers(0, 20), seed=st.integers(0, 9)
)
def test_ties_and_copies_keep_to_earlier_rows(n, d, m, copies, seed):
    X = np.random.default_rng(seed).integers(0, 4, size=(n, d)).astype(float)
    X = np.concatenate([X, X[:copies]])
    D, found = squared(X), nearest_earlier(X, m)
    for i in range(len(X)):
        kept = found[i][found[i] >= 0]
        assert len(kept) == min(i, m) == len(set(kept)) and (kept < i).all()
        assert np.array_equal(np.sort(D[i, kept]), np.sort(D[i, :i])[: len(kept)])


@pytest.mark.parametrize("m", [1, 4, 50])
def test_nearest_rows_of_another_set_come_nearest_first(m):
    X, X_new = (np.random.default_rng(seed).uniform(size=(n, 2)) for seed, n in ((0, 30), (1, 7)))
    D = ((X_new[:, None] - X) ** 2).sum(-1)
    found, squared_distance = nearest(X, X_new, m)
    assert np.array_equal(found, np.argsort(D, axis=1)[:, : min(m, 30)])
    np.testing.assert_allclose(squared_distance, np.sort(D, axis=1)[:, : min(m, 30)], rtol=1e-12)


@pytest.mark.parametrize(("rho", "d"), [(1.0, 2), (1.5, 1), (2.0, 3)])
def test_the_ball_holds_exactly_who_is_within_it(rho, d):
    X, distance = ordered(250, d)
    D, found = squared(X), within_radius(X, distance, rho)
    for i in range(250):
        # ρ = 1 reaches the point at exactly ℓ
        inside = np.flatnonzero(D[i, :i] <= (rho * distance[i]) ** 2 * (1 + 1e-11))
        kept = found[i][found[i] >= 0]
        assert np.array_equal(np.sort(kept), inside)
        assert (np.diff(D[i, kept]) <= 0).all() and (found[i, : found.shape[1] - len(kept)] == -1).all()
    nearest = within_radius(X, distance, rho, largest=2)
    assert nearest.shape[1] <= 2 and np.array_equal(nearest, found[:, -nearest.shape[1] :])


@pytest.mark.parametrize("m", [1, 5, 20])
def test_levels_need_only_earlier_levels(m):
    X, _ = ordered(300, 2)
    pattern = nearest_earlier(X, m)
    groups = level_schedule(pattern)
    assert np.array_equal(np.sort(np.concatenate(groups)), np.arange(300))
    level = np.empty(300, int)
    for k, group in enumerate(groups):
        level[group] = k
    for i in range(300):
        above = level[pattern[i][pattern[i] >= 0]]
        assert level[i] == 1 + above.max(initial=-1)


def test_nothing_to_schedule():
    assert level_schedule(np.empty((0, 3), np.int64)) == []
    assert len(level_schedule(np.full((4, 2), -1))) == 1


def test_a_lengthscale_that_moved_by_half_asks_for_new_neighbours():
    then = np.array([1.0, 0.1])
    assert not moved(then * [1.4, 0.7], then)
    assert moved(then * [1.0, 1.6], then)
    assert moved(then * [0.6, 1.0], then)
