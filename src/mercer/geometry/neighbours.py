"""Who may condition on whom: for each point in an order, some of the points before it.

A pattern is an integer array (n, m), −1 where a point has fewer than m neighbours, the padding first and the
nearest neighbour last.
"""

from __future__ import annotations

from functools import cache, cached_property
from typing import Any

import numpy as np
from scipy.spatial import cKDTree

from mercer import _loops

_CANDIDATES = 3  # so many times m are asked for, since about half of those near a point come later
_MATTERS = 0.1  # share of the whole spread below which an axis has no say in who is near
_TREE_DIMENSIONS = 12  # beyond, a tree looks at nearly every point anyway
_SPARE = 8  # candidates beyond m that let single precision be checked
_FLAT_FROM = 10_000  # rows; among fewer the compiled loop is faster
_FLAT_GROWTH = 4  # a flat index costs nothing to build and looks at all, so its blocks grow by a quarter only
_FLAT_ROWS = 4096  # asked at once, so that their candidates' coordinates stay small


def nearest_earlier(X: np.ndarray, m: int, rows: np.ndarray | None = None) -> np.ndarray:
    """Return the m nearest earlier rows of every row of X, exactly.

    Parameters
    ----------
    X : (n, d) array
        Dimensionless coordinates, in order.
    m : int ≥ 1
    rows : (r,) int array, optional
        Ascending; return the neighbours of these rows alone.

    Returns
    -------
    (n, m) or (r, m) int64 array
        Padded with −1 on the left; nearest last.

    Notes
    -----
    Blocks of rows double in size; a tree over all rows up to the end of a block is asked for 3 m candidates of each
    of its rows. Those of which fewer than m come earlier are looked up among all earlier rows. Beyond 12 dimensions
    all rows are looked up, or faiss, where it is installed, takes the place of the tree beyond the first 10 000.
    """
    X = np.ascontiguousarray(X, dtype=np.float64)
    n = len(X)
    wanted = np.arange(n) if rows is None else np.asarray(rows)
    found = np.full((len(wanted), m), -1, np.int64)
    flat = X.shape[1] > _TREE_DIMENSIONS
    start = 4 * m + 4 if not flat else n if _faiss() is None else max(_FLAT_FROM, 4 * m + 4)
    start = min(n, start)
    done = int(np.searchsorted(wanted, start))
    found[:done] = _loops.earlier_nearest(X, wanted[:done], m)
    while start < n:
        stop = min(n, start + (start // _FLAT_GROWTH if flat else start))
        block = slice(done, int(np.searchsorted(wanted, stop)))
        start, done = stop, block.stop
        asking = wanted[block]
        if len(asking) == 0:
            continue
        if flat:
            asked = min(m + m // 2 + _SPARE, stop)
            picked, _, short = _flat_nearest(X[:stop], X[asking], m, asked, asking)
        else:
            asked = min(_CANDIDATES * m + 1, stop)
            _, near = cKDTree(X[:stop]).query(X[asking], k=asked, workers=-1)
            earlier = near < asking[:, None]
            # a stable sort keeps the earlier ones first and each group by distance
            picked = np.take_along_axis(near, np.argsort(~earlier, axis=1, kind="stable")[:, :m], axis=1)
            short = earlier.sum(1) < m
        picked[short] = _loops.earlier_nearest(X, asking[short], m)
        found[block] = picked
    return found[:, ::-1].copy()


class Nearest:
    """The nearest of the rows of X (n, d), for any new rows; a tree is built when it is first needed."""

    def __init__(self, X: np.ndarray):
        self.X = X

    @cached_property
    def _tree(self) -> Any:
        return cKDTree(self.X)

    def __call__(self, X_new: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the min(m, n) nearest rows for every row of X_new (q, d), and their squared distances.

        Both are (q, m), nearest first.
        """
        X = self.X
        m = min(m, len(X))
        if X.shape[1] <= _TREE_DIMENSIONS or _faiss() is None:
            return self._by_tree(X_new, m)
        found, squared, unsure = _flat_nearest(X, X_new, m, min(m + m // 4 + _SPARE, len(X)))
        found[unsure], squared[unsure] = self._by_tree(X_new[unsure], m)
        return found, squared

    def _by_tree(self, X_new: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
        distance, found = self._tree.query(X_new, k=np.arange(1, m + 1), workers=-1)
        return found.astype(np.int64), distance**2


@cache
def _faiss() -> Any:
    """Return the optional module, or None where it is not installed."""
    try:
        import faiss
    except ImportError:
        return None
    return faiss


def _flat_nearest(
    X: np.ndarray, X_new: np.ndarray, m: int, asked: int, before: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the m nearest rows of X, nearest first, their squared distances, and where these are not certain.

    faiss proposes ``asked`` rows by products of matrices in single precision; double precision ranks them. What it
    left out is farther in single precision than all that it proposed, so that the m nearest are certain where they
    are nearer than that by more than the rounding. ``before`` (q,) admits only rows of a smaller index.
    """
    faiss, middle = _faiss(), X.mean(0)
    X, X_new = X - middle, X_new - middle  # small norms, small rounding
    index = faiss.IndexFlatL2(X.shape[1])
    index.add(X.astype(np.float32))
    norms = np.sqrt((X_new**2).sum(1)) + np.sqrt((X**2).sum(1).max())
    rounding = (X.shape[1] + 8) * float(np.finfo(np.float32).eps) * norms**2
    found, squared = np.empty((len(X_new), m), np.int64), np.empty((len(X_new), m))
    unsure = np.empty(len(X_new), bool)
    for start in range(0, len(X_new), _FLAT_ROWS):
        part = slice(start, start + _FLAT_ROWS)
        proposed, near = index.search(X_new[part].astype(np.float32), asked)
        steps = X_new[part, None] - X[near]
        away = np.einsum("qkd,qkd->qk", steps, steps)
        if before is not None:
            away[near >= before[part, None]] = np.inf
        nearest_first = np.lexsort((near, away))[:, :m]
        found[part] = np.take_along_axis(near, nearest_first, 1)
        squared[part] = np.take_along_axis(away, nearest_first, 1)
        beyond = proposed[:, -1] - rounding[part] if asked < len(X) else np.inf
        unsure[part] = ~(squared[part, -1] < beyond)
    return found, squared, unsure


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


def moved(scale: np.ndarray, scale_then: np.ndarray, factor: float = 1.5) -> bool:
    """Whether the shape of a cloud of points has changed by more than ``factor`` along some axis that matters.

    Parameters
    ----------
    scale, scale_then : (d,) arrays
        Spread of the points along each axis in lengthscales, now and when order and neighbours were found. Only
        ratios within each count, and axes that are never a tenth of the whole do not.
    """
    now, then = (each / max(np.linalg.norm(each), np.finfo(float).tiny) for each in (scale, scale_then))
    matters = np.maximum(now, then) > _MATTERS
    with np.errstate(divide="ignore"):
        return bool(np.abs(np.log(now[matters] / then[matters])).max(initial=0.0) > np.log(factor))
