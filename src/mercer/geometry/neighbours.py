"""Who may condition on whom: for each point in an order, some of the points before it.

A pattern is an integer array (n, m), −1 where a point has fewer than m neighbours, the padding first and the
nearest neighbour last.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

from mercer import _loops

_CANDIDATES = 3  # so many times m are asked for, since about half of those near a point come later
_TREE_DIMENSIONS = 12  # beyond, a tree looks at nearly every point anyway


def nearest_earlier(X: np.ndarray, m: int) -> np.ndarray:
    """Return the m nearest earlier rows of every row of X, exactly.

    Parameters
    ----------
    X : (n, d) array
        Dimensionless coordinates, in order.
    m : int ≥ 1

    Returns
    -------
    (n, m) int64 array
        Padded with −1 on the left; nearest last.

    Notes
    -----
    Blocks of rows double in size; a tree over all rows up to the end of a block is asked for 3 m candidates of each
    of its rows. Those of which fewer than m come earlier are looked up among all earlier rows.
    """
    X = np.ascontiguousarray(X, dtype=np.float64)
    n = len(X)
    found = np.full((n, m), -1, np.int64)
    start = min(n, 4 * m + 4)
    found[:start] = _loops.earlier_nearest(X, np.arange(start), m)
    if X.shape[1] > _TREE_DIMENSIONS:
        found[start:] = _loops.earlier_nearest(X, np.arange(start, n), m)
        return found[:, ::-1].copy()
    while start < n:
        stop = min(n, 2 * start)
        rows = np.arange(start, stop)
        asked = min(_CANDIDATES * m + 1, stop)
        _, near = cKDTree(X[:stop]).query(X[start:stop], k=asked, workers=-1)
        earlier = near < rows[:, None]
        # a stable sort keeps the earlier ones first and each group by distance
        picked = np.take_along_axis(near, np.argsort(~earlier, axis=1, kind="stable")[:, :m], axis=1)
        short = earlier.sum(1) < m
        picked[short] = _loops.earlier_nearest(X, rows[short], m)
        found[start:stop] = picked
        start = stop
    return found[:, ::-1].copy()


def nearest(X: np.ndarray, X_new: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the min(m, n) nearest rows of X (n, d) for every row of X_new (q, d), and their squared distances.

    Both are (q, m), nearest first.
    """
    distance, found = cKDTree(X).query(X_new, k=np.arange(1, min(m, len(X)) + 1), workers=-1)
    return found.astype(np.int64), distance**2


def within_radius(X: np.ndarray, distance: np.ndarray, rho: float, largest: int | None = None) -> np.ndarray:
    """Return for every row of X the earlier rows no farther than ρ times its maximin distance.

    Parameters
    ----------
    X : (n, d) array
        Dimensionless coordinates, in maximin order.
    distance : (n,) array
        ℓ of `mercer.geometry.ordering.Ordering`.
    rho : float ≥ 1
        ρ.
    largest : int, optional
        Keep this many of the nearest.

    Returns
    -------
    (n, m) int64 array
        m is the size of the largest set.

    References
    ----------
    Schäfer, Katzfuss and Owhadi (2021), section 3: the ρ-ball pattern.
    """
    X = np.ascontiguousarray(X, dtype=np.float64)
    n = len(X)
    # a little more, so that rounding does not drop the point at exactly ℓ
    radius = rho * np.asarray(distance) * (1 + 1e-12)
    near = cKDTree(X).query_ball_point(X, radius, workers=-1)
    rows = np.repeat(np.arange(n), [len(each) for each in near])
    columns = np.concatenate([np.asarray(each, dtype=np.int64) for each in near])
    earlier = columns < rows
    rows, columns = rows[earlier], columns[earlier]
    away = ((X[rows] - X[columns]) ** 2).sum(1)
    by_distance = np.lexsort((columns, away, rows))
    rows, columns = rows[by_distance], columns[by_distance]
    counts = np.bincount(rows, minlength=n)
    rank = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    m = int(counts.max(initial=0)) if largest is None else min(largest, int(counts.max(initial=0)))
    found = np.full((n, max(m, 1)), -1, np.int64)
    kept = rank < m
    found[rows[kept], rank[kept]] = columns[kept]
    return found[:, ::-1].copy()


def level_schedule(neighbours: np.ndarray) -> list[np.ndarray]:
    """Return groups of rows that need only rows of earlier groups, so that each group is one batched step.

    Parameters
    ----------
    neighbours : (n, m) int array
        A pattern.

    Returns
    -------
    list of int64 arrays
        A partition of 0 … n − 1.
    """
    level = _loops.levels(np.ascontiguousarray(neighbours, dtype=np.int64))
    order = np.argsort(level, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(level[order])) + 1) if len(order) else []


def moved(lengthscale: np.ndarray, lengthscale_then: np.ndarray, factor: float = 1.5) -> bool:
    """Whether some lengthscale changed by more than ``factor`` since order and neighbours were found."""
    return bool(np.abs(np.log(lengthscale) - np.log(lengthscale_then)).max(initial=0.0) > np.log(factor))
