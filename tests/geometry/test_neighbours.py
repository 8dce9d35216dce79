"""Patterns against brute force, and schedules against what they promise."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mercer.geometry import neighbours, neighbours_torch
from mercer.geometry.neighbours import Nearest, level_schedule, moved, nearest_earlier, within_radius
from mercer.geometry.ordering import maximin

GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


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
    found, squared_distance = Nearest(X)(X_new, m)
    assert np.array_equal(found, np.argsort(D, axis=1)[:, : min(m, 30)])
    np.testing.assert_allclose(squared_distance, np.sort(D, axis=1)[:, : min(m, 30)], rtol=1e-12)


@pytest.fixture
def proposals(monkeypatch):
    """faiss, counting how often it is asked."""
    faiss = pytest.importorskip("faiss")
    monkeypatch.setattr(neighbours, "_FLAT_FROM", 0)
    count = []
    search = faiss.IndexFlatL2.search
    monkeypatch.setattr(faiss.IndexFlatL2, "search", lambda self, *a: count.append(1) or search(self, *a))
    return count


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_single_precision_proposes_and_double_decides(proposals, offset):
    """Far from the origin single precision sees little of the distances."""
    X, X_new = (np.random.default_rng(seed).normal(size=(n, 14)) + offset for seed, n in ((0, 600), (1, 50)))
    by_tree, expected = Nearest(X)._by_tree(X_new, 9)
    found, squared_distance = Nearest(X)(X_new, 9)
    assert proposals and np.array_equal(found, by_tree)
    np.testing.assert_allclose(squared_distance, expected, rtol=1e-9)
    D, earlier = squared(X), nearest_earlier(X, 9)
    assert all(np.array_equal(earlier[i], np.argsort(D[i, :i])[:9][::-1]) for i in range(9, 600))


def test_what_single_precision_cannot_tell_apart_is_looked_up(proposals):
    """All on a tiny sphere beside one far row: their distances drown in the rounding of its norm."""
    generator = np.random.default_rng(0)
    X = np.concatenate([1e3 * np.ones((1, 14)), 1e-3 * generator.normal(size=(300, 14))])
    _, _, unsure = neighbours._flat_nearest(X, X[1:4], 5, 20)
    assert unsure.all()
    D, found = squared(X), nearest_earlier(X, 5)
    assert all(np.array_equal(found[i], np.argsort(D[i, :i])[:5][::-1]) for i in range(5, 301))
    by_tree, expected = Nearest(X)._by_tree(X[1:9] + 1e-4, 5)
    again, squared_distance = Nearest(X)(X[1:9] + 1e-4, 5)
    assert np.array_equal(again, by_tree) and np.array_equal(squared_distance, expected)


def test_many_columns_do_without_faiss(monkeypatch):
    X, X_new = (np.random.default_rng(seed).normal(size=(n, 13)) for seed, n in ((0, 200), (1, 5)))
    monkeypatch.setattr(neighbours, "_faiss", lambda: None)
    D, found = squared(X), nearest_earlier(X, 3)
    assert all(np.array_equal(found[i], np.argsort(D[i, :i])[:3][::-1]) for i in range(3, 200))
    D = ((X_new[:, None] - X) ** 2).sum(-1)
    assert np.array_equal(Nearest(X)(X_new, 3)[0], np.argsort(D, axis=1)[:, :3])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("chunk_elements", [1, 1000, 10**9])
@pytest.mark.parametrize(("n", "d", "m"), [(1, 1, 1), (3, 2, 5), (150, 2, 7), (120, 16, 30)])
def test_chunks_on_a_device_equal_the_loops(n, d, m, chunk_elements, device):
    X, X_new = (np.random.default_rng(seed).uniform(size=(size, d)) for seed, size in ((0, n), (1, 9)))
    on_device, new_on_device = (torch.as_tensor(each, device=device) for each in (X, X_new))
    found = neighbours_torch.nearest_earlier(on_device, m, chunk_elements)
    assert found.device == on_device.device and np.array_equal(found.cpu(), nearest_earlier(X, m))
    near, away = neighbours_torch.nearest(on_device, new_on_device, m, chunk_elements)
    expected, expected_away = Nearest(X)(X_new, m)
    assert np.array_equal(near.cpu(), expected)
    np.testing.assert_allclose(away.cpu(), expected_away, rtol=1e-12)


@pytest.mark.parametrize("copies", [1, 40])
def test_chunks_keep_to_earlier_rows_among_copies(copies):
    X = np.random.default_rng(0).integers(0, 4, size=(60, 2)).astype(float)
    X = np.concatenate([X, X[:copies]])
    D, found = squared(X), neighbours_torch.nearest_earlier(torch.as_tensor(X), 6, 500).numpy()
    for i in range(len(X)):
        kept = found[i][found[i] >= 0]
        assert len(kept) == min(i, 6) == len(set(kept)) and (kept < i).all()
        assert np.array_equal(D[i, kept], np.sort(D[i, :i])[: len(kept)][::-1])


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


@pytest.mark.parametrize("d", [2, 14])
def test_neighbours_of_some_rows_are_theirs(d):
    X = np.random.default_rng(0).uniform(size=(300, d))
    for rows in (np.array([0, 3, 40, 41, 299]), np.arange(150, 160), np.arange(0)):
        assert np.array_equal(nearest_earlier(X, 5, rows), nearest_earlier(X, 5)[rows])


def test_lengthscales_that_moved_against_each_other_ask_for_new_neighbours():
    then = np.array([1.0, 0.5])
    assert not moved(then * 3.0, then)  # all together
    assert not moved(then * [1.3, 0.95], then)
    assert moved(then * [1.0, 2.0], then)
    assert moved(then * [0.5, 1.0], then)
    little = np.array([1.0, 0.01])
    assert not moved(little * [1.0, 5.0], little)  # an axis that has no say before or after
    assert moved(little * [1.0, 50.0], little)
    assert not moved(np.zeros(2), np.zeros(2))
