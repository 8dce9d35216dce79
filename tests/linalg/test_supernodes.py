"""Groups of columns with one Cholesky factor against the same columns one by one."""

import numpy as np
import pytest
import torch

from mercer.geometry.neighbours import nearest_earlier, within_radius
from mercer.geometry.ordering import maximin
from mercer.geometry.supernodes import group_columns
from mercer.linalg.cholesky import NotPositiveDefiniteError
from mercer.linalg.sic import Pattern, column_factors
from mercer.linalg.supernodes import supernode_factors

DTYPE = torch.float64
N = 150


def problem(kind):
    X = np.random.default_rng(0).uniform(size=(N, 2))
    order, distance = maximin(X, np.random.default_rng(0), "exact")
    X = X[order]
    near = nearest_earlier(X, 8) if kind == "nearest" else within_radius(X, distance, 2.5)
    X = torch.as_tensor(X)
    away = 3**0.5 * torch.cdist(X, X, compute_mode="donot_use_mm_for_euclid_dist") / 0.4
    return (1 + away) * torch.exp(-away) + 1e-4 * torch.eye(N, dtype=DTYPE), near, distance


def tiles_of(K, rows):
    index = rows.clamp_min(0)
    return K[index.unsqueeze(-1), index.unsqueeze(-2)]


def factors(K, groups):
    for group in groups:
        rows, members = torch.as_tensor(group.rows), torch.as_tensor(group.members)
        yield supernode_factors(tiles_of(K, rows), rows, members)


def dense(columns, val):
    U = torch.zeros(N, N, dtype=DTYPE)
    for row, entries in zip(columns, val, strict=True):
        kept = row >= 0
        U[row[kept], row[-1]] = entries[kept]
    return U


def kl(K, U):
    return float(-U.diagonal().log().sum() - 0.5 * torch.linalg.slogdet(K)[1])


@pytest.mark.parametrize("ratio", [1.0, 1.5, 4.0])
@pytest.mark.parametrize("kind", ["nearest", "ball"])
def test_every_column_is_in_one_group_whose_union_holds_its_rows(kind, ratio):
    _, near, distance = problem(kind)
    seen = []
    for group in group_columns(near, distance, ratio):
        for rows, members in zip(group.rows, group.members, strict=True):
            kept = rows[rows >= 0]
            assert (np.diff(kept) > 0).all() and (rows[: len(rows) - len(kept)] == -1).all()
            assert not members[rows < 0].any()
            wanted = np.concatenate([near[rows[members]].ravel(), rows[members]])
            assert set(kept) == set(wanted[wanted >= 0])
            assert distance[rows[members]].max() <= ratio * distance[rows[members].max()]
            seen += rows[members].tolist()
    assert sorted(seen) == list(range(N))


@pytest.mark.parametrize("kind", ["nearest", "ball"])
def test_columns_of_a_group_equal_columns_found_one_by_one(kind):
    K, near, distance = problem(kind)
    for columns, val in factors(K, group_columns(near, distance)):
        expected = column_factors(tiles_of(K, columns), columns < 0)
        torch.testing.assert_close(val, expected, rtol=1e-10, atol=1e-10)
        assert (val[columns < 0] == 0).all()


def test_larger_unions_only_lower_the_divergence():
    K, near, distance = problem("nearest")
    pattern = Pattern(torch.as_tensor(near))
    reached = [kl(K, dense(pattern.columns, column_factors(tiles_of(K, pattern.columns), pattern.padding)))]
    for ratio in (1.0, 1.5, 1e9):
        groups = group_columns(near, distance, ratio)
        reached.append(kl(K, sum(dense(*each) for each in factors(K, groups))))
    assert all(0.0 < each < reached[0] for each in reached[1:])


def test_gradients_pass_through_the_shared_factor():
    K, near, distance = problem("nearest")
    group = min(group_columns(near[:30], distance[:30]), key=lambda each: each.rows.shape[1])
    rows, members = (torch.as_tensor(each[:1]) for each in group)
    half = (0.5 * tiles_of(K, rows)).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: supernode_factors(t + t.mT, rows, members)[1], half)


def test_coinciding_points_are_named():
    rows = torch.arange(3).unsqueeze(0)
    with pytest.raises(NotPositiveDefiniteError, match="nugget"):
        supernode_factors(torch.ones(1, 3, 3, dtype=DTYPE) - 1e-3 * torch.eye(3, dtype=DTYPE), rows, rows >= 0)
