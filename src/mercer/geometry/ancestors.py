"""On whom a point of a sparse factor depends strongly: its reduced ancestors, a few of all points before it.

An entry of V⁻¹ is reached through chains of neighbours, so that all ancestors of a point are a fair share of the
points before it. Those far away, in the maximin distance of the earlier point, hardly matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from scipy.spatial import cKDTree

_BLOCK = 4096  # balls that are turned into arrays at a time
# of the relative distance, so that rounding does not drop the point at exactly ρ ℓ
_SLACK = 1 + 1e-12


def reduced_ancestors(
    X: np.ndarray, distance: np.ndarray, neighbours: np.ndarray, rho: float | None = None, largest: int = 256
) -> np.ndarray:
    """Return for every row of X the earlier rows j no farther than ρ ℓⱼ, and its neighbours.

    Parameters
    ----------
    X : (n, d) array
        Dimensionless coordinates, in maximin order.
    distance : (n,) array
        ℓ of `mercer.geometry.ordering.Ordering`.
    neighbours : (n, m) int array
        s, −1 for padding; always kept.
    rho : float > 0, optional
        ρ. By default how far neighbours reach, see `typical_reach`, as suits m nearest neighbours; the radius of a
        ball pattern suits that.
    largest : int
        Keep so many of the nearest in dist/ℓⱼ, or all neighbours if they are more.

    Returns
    -------
    (n, a) int64 array
        Ascending, padded with −1 on the left; the row itself is not in it.

    References
    ----------
    Cao, Kang, Jimenez, Sang, Schäfer and Katzfuss (2023), "Variational sparse inverse Cholesky approximation for
    latent Gaussian processes via double Kullback-Leibler minimization", reduced ancestor sets.
    """
    X = np.ascontiguousarray(X, dtype=np.float64)
    if rho is None:
        rho = typical_reach(((X[neighbours] - X[:, None]) ** 2).sum(-1), distance, neighbours)
    tree, reach = cKDTree(X), rho * _SLACK * np.asarray(distance)

    def pairs() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for start in range(0, len(X), _BLOCK):
            block = slice(start, min(start + _BLOCK, len(X)))
            near = tree.query_ball_point(X[block], reach[block], workers=-1)
            earlier = np.repeat(np.arange(block.start, block.stop), [len(each) for each in near])
            rows = np.concatenate([np.asarray(each, dtype=np.int64) for each in near])
            later = rows > earlier
            rows, earlier = rows[later], earlier[later]
            yield rows, earlier, ((X[rows] - X[earlier]) ** 2).sum(-1)

    return _nearest_of_each(pairs(), distance, neighbours, largest)


def reduced_ancestors_by(
    squared_rows: Callable[[np.ndarray], np.ndarray],
    distance: np.ndarray,
    neighbours: np.ndarray,
    rho: float | None = None,
    largest: int = 256,
    block: int = _BLOCK,
) -> np.ndarray:
    """Return the same under any distance: ``squared_rows(rows)`` are the (r, n) squared distances of some rows."""
    n = len(neighbours)
    blocks = np.split(np.arange(n), np.arange(block, n, block))
    if rho is None:
        away = [np.take_along_axis(squared_rows(rows), neighbours[rows].clip(0), 1) for rows in blocks]
        rho = typical_reach(np.concatenate(away), distance, neighbours)
    radius = (rho * _SLACK * np.asarray(distance)) ** 2

    def pairs() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for rows in blocks:
            away = squared_rows(rows)
            at, earlier = np.nonzero((away <= radius) & (np.arange(n) < rows[:, None]))
            yield rows[at], earlier, away[at, earlier]

    return _nearest_of_each(pairs(), distance, neighbours, largest)


def typical_reach(squared: np.ndarray, distance: np.ndarray, neighbours: np.ndarray) -> float:
    """Return the median over rows of the distance of the farthest neighbour, in ℓ of the row; at least 1.

    ``squared`` (n, m) are the squared distances of the neighbours (n, m), anything at the padding.
    """
    farthest = np.sqrt(np.where(neighbours >= 0, squared, 0.0).max(1, initial=0.0))
    seen = (neighbours >= 0).any(1) & (np.asarray(distance) > 0)
    return max(1.0, float(np.median(farthest[seen] / distance[seen]))) if seen.any() else 1.0


def _nearest_of_each(
    pairs: Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]],
    distance: np.ndarray,
    neighbours: np.ndarray,
    largest: int,
) -> np.ndarray:
    """Collect (row, earlier row, squared distance) and the neighbours; keep the nearest in dist/ℓ of each row."""
    n = len(neighbours)
    rows, earlier, squared = (np.concatenate(each) for each in zip(*pairs, strict=True))
    length = np.asarray(distance)[earlier]
    # a copy of an earlier copy is at no distance, in any unit
    ratio = np.divide(np.sqrt(squared), length, out=np.zeros(len(rows)), where=length > 0)
    own = neighbours >= 0
    rows = np.concatenate([np.repeat(np.arange(n), own.sum(1)), rows])
    earlier = np.concatenate([neighbours[own], earlier])
    ratio = np.concatenate([np.full(int(own.sum()), -1.0), ratio])  # neighbours come first
    at = np.lexsort((ratio, earlier, rows))
    rows, earlier, ratio = rows[at], earlier[at], ratio[at]
    fresh = np.append(True, (rows[1:] != rows[:-1]) | (earlier[1:] != earlier[:-1]))[: len(rows)]
    at = np.flatnonzero(fresh)
    at = at[np.lexsort((earlier[at], ratio[at], rows[at]))]
    rows, earlier = rows[at], earlier[at]
    counts = np.bincount(rows, minlength=n)
    rank = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    width = min(max(largest, int(own.sum(1).max(initial=0))), int(counts.max(initial=0)))
    found = np.full((n, width), -1, np.int64)
    kept = rank < width
    found[rows[kept], rank[kept]] = earlier[kept]
    return np.sort(found, axis=1)
