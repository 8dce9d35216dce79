"""Inducing points: inside the data, near all of it, and the same every time."""

import numpy as np
import pytest

from mercer.geometry.inducing import choose_inducing


def uniform(n, d, seed=0):
    return np.random.default_rng(seed).uniform(size=(n, d))


def spread(X, Z):
    """Mean squared distance of a row to the nearest inducing point."""
    return ((X[:, None] - Z) ** 2).sum(-1).min(1).mean()


@pytest.mark.parametrize("method", ["kmeans", "kmeans++"])
def test_points_stand_for_the_rows_better_than_chance(method):
    X = uniform(400, 3)
    Z = choose_inducing(X, 20, method=method)
    assert Z.shape == (20, 3) and (X.min(0) <= Z).all() and (X.max(0) >= Z).all()
    chance = [spread(X, X[np.random.default_rng(seed).permutation(400)[:20]]) for seed in range(5)]
    assert spread(X, Z) < 0.9 * np.mean(chance)
    np.testing.assert_array_equal(Z, choose_inducing(X, 20, method=method))
    assert not np.array_equal(Z, choose_inducing(X, 20, method=method, seed=1))


def test_rows_are_chosen_among_the_rows():
    X = uniform(50, 2)
    Z = choose_inducing(X, 7, method="kmeans++")
    assert len(np.unique(Z, axis=0)) == 7 and all((z == X).all(1).any() for z in Z)


def test_clusters_form_in_the_coordinates_and_points_come_back_in_those_of_the_rows():
    X = uniform(300, 2)
    Z = choose_inducing(X, 6, coordinates=X * [100.0, 0.01])
    assert np.diff(np.sort(Z[:, 0])).min() > 0.05  # six slices of the first column,
    assert np.ptp(Z[:, 1]) < 0.4  # each of which has all of the second
    scaled = choose_inducing(X * [100.0, 0.01], 6)
    np.testing.assert_allclose(Z[np.argsort(Z[:, 0])], (scaled / [100.0, 0.01])[np.argsort(scaled[:, 0])], rtol=1e-10)


def test_no_more_points_than_distinct_rows():
    X = np.repeat(uniform(5, 2), 4, axis=0)
    for method in ("kmeans", "kmeans++"):
        for asked in (5, 9):
            Z = choose_inducing(X, asked, method=method)
            np.testing.assert_array_equal(np.unique(Z, axis=0), np.unique(X, axis=0))
        assert len(np.unique(choose_inducing(X, 3, method=method), axis=0)) == 3
    assert choose_inducing(X, 0).shape == (0, 2)


def test_many_rows_are_sampled(monkeypatch):
    monkeypatch.setattr("mercer.geometry.inducing._FULL_ROWS", 399)
    X = uniform(400, 3)
    Z = choose_inducing(X, 20)
    np.testing.assert_array_equal(Z, choose_inducing(X, 20))
    assert spread(X, Z) < spread(X, X[:20])


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="n_inducing"):
        choose_inducing(uniform(5, 1), -1)
    with pytest.raises(ValueError, match="method"):
        choose_inducing(uniform(5, 1), 2, method="grid")
