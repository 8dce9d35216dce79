"""Maximin orders against the definition: the next point is the one farthest from all before it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mercer.geometry.ordering import maximin, maximin_by, walk


def uniform(n, d, seed=0):
    return np.random.default_rng(seed).uniform(size=(n, d))


def by_definition(X, first):
    """Order and squared distances from the n × n matrix of distances; the first of equals is taken."""
    D = ((X[:, None] - X) ** 2).sum(-1)
    order, reach = [first], [np.inf]
    while len(order) < len(X):
        nearest = D[order].min(0)
        nearest[order] = -1.0
        order.append(int(nearest.argmax()))
        reach.append(nearest.max())
    return np.array(order), np.sqrt(reach)


@pytest.mark.parametrize("method", ["exact", "grid"])
@pytest.mark.parametrize(("n", "d"), [(1, 1), (2, 3), (150, 1), (300, 2), (200, 3), (120, 5)])
def test_the_order_is_that_of_the_definition(method, n, d):
    X = uniform(n, d)
    found = maximin(X, np.random.default_rng(0), method)
    order, reach = by_definition(X, found.order[0])
    assert np.array_equal(found.order, order)
    np.testing.assert_allclose(found.distance[1:], reach[1:], rtol=1e-12)
    assert found.order[0] == ((X - X.mean(0)) ** 2).sum(1).argmin()
    assert found.distance[0] == (found.distance[1] if n > 1 else 1.0)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 60),
    d=st.integers(1, 4),
    scale=st.sampled_from([1e-9, 1.0, 1e9]),
    copies=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_every_row_is_covered_once_and_distances_never_rise(n, d, scale, copies, seed):
    X = scale * uniform(n, d, seed)
    X = np.concatenate([X, X[:copies]])
    for method in ("exact", "grid"):
        found = maximin(X, np.random.default_rng(0), method)
        assert np.array_equal(np.sort(found.order), np.arange(len(X)))
        assert (np.diff(found.distance) <= 0).all()
        # copies of chosen points are at distance zero, and last
        assert (found.distance[1:] == 0).sum() == len(X) - len(np.unique(X, axis=0))


def test_a_grid_of_equal_distances_is_ordered_without_loss():
    X = np.stack(np.meshgrid(np.arange(12.0), np.arange(9.0)), -1).reshape(-1, 2)
    exact, grid = (maximin(X, np.random.default_rng(0), method) for method in ("exact", "grid"))
    assert np.array_equal(exact.order, grid.order)


def test_blocked_orders_a_subset_exactly_and_keeps_the_rest(monkeypatch):
    monkeypatch.setattr("mercer.geometry.ordering._SUBSET", 50)
    X = uniform(180, 3)
    found = maximin(X, np.random.default_rng(1), "blocked")
    assert np.array_equal(np.sort(found.order), np.arange(180))
    subset = X[found.order[:50]]
    assert np.array_equal(by_definition(subset, 0)[0], np.arange(50))
    D = np.sqrt(((X[found.order][:, None] - X[found.order]) ** 2).sum(-1))
    np.testing.assert_allclose(found.distance[1:], [D[i, :i].min() for i in range(1, 180)], rtol=1e-12)
    again = maximin(X, np.random.default_rng(1), "blocked")
    assert np.array_equal(found.order, again.order)


def test_any_distance_can_be_ordered_by():
    X = uniform(80, 2)
    correlation = np.exp(-np.abs(X[:, None] - X).sum(-1))
    found = maximin_by(lambda i: 1 - correlation[i], 80)
    nearest = np.full(80, np.inf)
    for k, chosen in enumerate(found.order):
        if k > 0:
            assert nearest[chosen] == nearest[np.setdiff1d(np.arange(80), found.order[:k])].max()
            np.testing.assert_allclose(found.distance[k] ** 2, nearest[chosen])
        nearest = np.minimum(nearest, 1 - correlation[chosen])


def test_automatic_takes_what_the_size_can_bear(monkeypatch):
    X = uniform(40, 2)
    expected = maximin(X, np.random.default_rng(0), "exact").order
    monkeypatch.setattr("mercer.geometry.ordering._EXACT_ROWS", 30)
    assert np.array_equal(maximin(X, np.random.default_rng(0)).order, expected)  # the grid
    monkeypatch.setattr("mercer.geometry.ordering._SUBSET", 20)
    wide = uniform(40, 6)
    blocked = maximin(wide, np.random.default_rng(0), "blocked").order
    assert np.array_equal(maximin(wide, np.random.default_rng(0)).order, blocked)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="'exact', 'grid' or 'blocked'"):
        maximin(uniform(3, 1), np.random.default_rng(0), "spiral")


def test_distances_that_nobody_wants_are_not_searched_for():
    X = np.random.default_rng(3).uniform(size=(5000, 3))
    plain, whole = (maximin(X, np.random.default_rng(0), "blocked", lengths=wanted) for wanted in (False, True))
    assert np.array_equal(plain.order, whole.order)
    assert np.array_equal(np.isnan(plain.distance), np.arange(5000) >= 4096)
    assert np.array_equal(plain.distance[:4096], whole.distance[:4096]) and np.isfinite(whole.distance).all()


def test_a_walk_keeps_near_rows_together():
    X = np.random.default_rng(0).uniform(size=(2000, 3))
    order = walk(X)
    assert np.array_equal(np.sort(order), np.arange(2000))
    steps = np.linalg.norm(np.diff(X[order], axis=0), axis=1)
    assert np.median(steps) < 0.3 * np.median(np.linalg.norm(np.diff(X, axis=0), axis=1))
