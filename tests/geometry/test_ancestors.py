"""Reduced ancestor sets against their definition, row by row."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mercer.geometry.ancestors import reduced_ancestors, reduced_ancestors_by, typical_reach
from mercer.geometry.neighbours import nearest_earlier, within_radius
from mercer.geometry.ordering import maximin


def ordered(n, d, seed=0):
    X = np.random.default_rng(seed).uniform(size=(n, d))
    order, distance = maximin(X, np.random.default_rng(0), "exact")
    return X[order], distance


def by_definition(X, distance, neighbours, rho, largest):
    """Neighbours, then the nearest in dist/ℓⱼ of those within ρ ℓⱼ."""
    sets = []
    for i in range(len(X)):
        own = set(neighbours[i][neighbours[i] >= 0].tolist())
        away = np.sqrt(((X[:i] - X[i]) ** 2).sum(1))
        within = [j for j in range(i) if away[j] <= rho * distance[j] * (1 + 1e-11) and j not in own]
        within.sort(key=lambda j: away[j] / distance[j] if distance[j] > 0 else 0.0)
        sets.append(own | set(within[: max(0, largest - len(own))]))
    return sets


def as_sets(found):
    return [set(row[row >= 0].tolist()) for row in found]


@pytest.mark.parametrize("largest", [500, 20])
@pytest.mark.parametrize(("rho", "d"), [(1.0, 1), (1.5, 2), (2.0, 3)])
def test_they_are_who_lies_within_the_reach_of_an_earlier_row(rho, d, largest):
    X, distance = ordered(200, d)
    neighbours = nearest_earlier(X, 5)
    found = reduced_ancestors(X, distance, neighbours, rho, largest)
    assert as_sets(found) == by_definition(X, distance, neighbours, rho, largest)
    assert found.dtype == np.int64 and found.shape[1] <= largest
    for row in found:
        kept = row[row >= 0]
        assert (np.diff(kept) > 0).all() and (row[: len(row) - len(kept)] == -1).all()


def test_neighbours_are_kept_when_there_is_room_for_no_one_else():
    X, distance = ordered(100, 2)
    neighbours = nearest_earlier(X, 9)
    found = reduced_ancestors(X, distance, neighbours, 3.0, largest=2)
    assert found.shape == (100, 9) and as_sets(found)[20:] == as_sets(neighbours)[20:]


def test_the_ball_pattern_lies_within_its_own_reach():
    X, distance = ordered(300, 2)
    ball = within_radius(X, distance, 1.5)
    alone = reduced_ancestors(X, distance, np.full((300, 1), -1), 1.5, 300)
    assert all(own <= found for own, found in zip(as_sets(ball), as_sets(alone), strict=True))


def test_any_distance_gives_the_same_as_coordinates():
    X, distance = ordered(150, 2)
    neighbours = nearest_earlier(X, 6)

    def squared(rows):
        return ((X[rows, None] - X) ** 2).sum(-1)

    for rho in (1.7, None):
        expected = reduced_ancestors(X, distance, neighbours, rho, 40)
        for block in (1000, 7):
            assert np.array_equal(reduced_ancestors_by(squared, distance, neighbours, rho, 40, block), expected)


def test_by_default_they_reach_as_far_as_neighbours_do():
    X, distance = ordered(200, 2)
    neighbours = nearest_earlier(X, 8)
    farthest = [
        np.sqrt(((X[neighbours[i][neighbours[i] >= 0]] - X[i]) ** 2).sum(1)).max() / distance[i] for i in range(1, 200)
    ]
    squared = ((X[neighbours] - X[:, None]) ** 2).sum(-1)
    assert typical_reach(squared, distance, neighbours) == pytest.approx(np.median(farthest), rel=1e-12)
    found = reduced_ancestors(X, distance, neighbours)
    assert np.array_equal(found, reduced_ancestors(X, distance, neighbours, float(np.median(farthest))))


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 60), d=st.integers(1, 3), m=st.integers(1, 6), copies=st.integers(0, 8), seed=st.integers(0, 9))
def test_ties_and_copies_keep_to_earlier_rows(n, d, m, copies, seed):
    X = np.random.default_rng(seed).integers(0, 5, size=(n, d)).astype(float)
    X = np.concatenate([X, X[:copies]])
    order, distance = maximin(X, np.random.default_rng(0), "exact")
    X, neighbours = X[order], nearest_earlier(X[order], m)
    found = reduced_ancestors(X, distance, neighbours, 1.5, len(X))
    assert as_sets(found) == by_definition(X, distance, neighbours, 1.5, len(X))
