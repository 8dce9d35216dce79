"""Maximin order: each point is the one farthest from all before it, coarse to fine.

Coordinates are dimensionless, inputs over lengthscales, so that distance is what the kernel sees. The order decides
which points a sparse inverse Cholesky factor may condition on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.spatial import cKDTree

from mercer import _loops
from mercer.geometry.neighbours import nearest_earlier

_EXACT_ROWS = 20_000  # up to here n² distances take a second or two
_GRID_DIMENSIONS = 4  # 3ᵈ cells are searched around a point
_SUBSET = 4096


class Ordering(NamedTuple):
    """A maximin order of n points.

    ``order`` (n,) are row numbers, first chosen first. ``distance`` (n,) is ℓ, the distance of each chosen point to
    those before it: never rising over the exactly ordered part; the first is set to the second.
    """

    order: np.ndarray
    distance: np.ndarray


def maximin(X: np.ndarray, generator: np.random.Generator, method: str = "auto", lengths: bool = True) -> Ordering:
    """Return the maximin order of the rows of X.

    Parameters
    ----------
    X : (n, d) array
        Dimensionless coordinates.
    generator : numpy Generator
        Draws the subset and the order of the rest where ``method`` is "blocked".
    method : {"auto", "exact", "grid", "blocked"}
        "exact" looks at all n² distances. "grid" gives the same order in about n log n steps, with a constant that
        grows as 3ᵈ. "blocked" orders a random subset of 4096 rows exactly and appends the rest at random. "auto"
        takes "exact" up to 20 000 rows, then "grid" up to four dimensions, else "blocked".
    lengths : bool, default=True
        Whether the distances are wanted. "blocked" has to search for those of most rows, and else leaves NaN.

    Returns
    -------
    Ordering

    Raises
    ------
    ValueError
        Unknown method.

    References
    ----------
    Guinness (2018), "Permutation and grouping methods for sharpening Gaussian process approximations"; Schäfer,
    Katzfuss and Owhadi (2021), "Sparse Cholesky factorization by Kullback-Leibler minimization", section 4.1.
    """
    X = np.ascontiguousarray(X, dtype=np.float64)
    n, d = X.shape
    if method == "auto":
        method = "exact" if n <= _EXACT_ROWS else "grid" if d <= _GRID_DIMENSIONS else "blocked"
    if method == "exact":
        order, squared = _loops.farthest_points(X, _middle(X), n)
    elif method == "grid":
        order, squared = _grid(X)
    elif method == "blocked":
        order, squared = _blocked(X, generator, lengths)
    else:
        raise ValueError(f"method must be 'auto', 'exact', 'grid' or 'blocked', got {method!r}.")
    return Ordering(order, _lengths(squared))


def maximin_by(squared_distance_from: Callable[[int], np.ndarray], n: int) -> Ordering:
    """Return the maximin order under any distance, from n rows of n distances; the first point is row 0.

    Parameters
    ----------
    squared_distance_from : callable
        i → (n,) squared distances from row i to all rows, such as 1 − |correlation| of a non-stationary kernel.
    n : int

    Returns
    -------
    Ordering
    """
    nearest = np.full(n, np.inf)
    order, squared = np.empty(n, np.int64), np.empty(n)
    chosen, reach = 0, np.inf
    for k in range(n):
        order[k], squared[k] = chosen, reach
        np.minimum(nearest, squared_distance_from(chosen), out=nearest)
        nearest[chosen] = -np.inf
        chosen = int(nearest.argmax())
        reach = max(nearest[chosen], 0.0)
    return Ordering(order, _lengths(squared))


def walk(X: np.ndarray) -> np.ndarray:
    """Return the rows of X (n, d) such that near ones come together: the leaves of a tree, one after another."""
    return np.asarray(cKDTree(X).indices, dtype=np.int64)


def _middle(X: np.ndarray) -> int:
    return int(((X - X.mean(0)) ** 2).sum(1).argmin())


def _lengths(squared: np.ndarray) -> np.ndarray:
    distance = np.sqrt(squared)
    if len(distance):
        distance[0] = distance[1] if len(distance) > 1 else 1.0
    return distance


def _blocked(X: np.ndarray, generator: np.random.Generator, lengths: bool) -> tuple[np.ndarray, np.ndarray]:
    n = len(X)
    shuffled = generator.permutation(n)
    subset, rest = shuffled[:_SUBSET], shuffled[_SUBSET:]
    chosen, squared = _loops.farthest_points(X[subset], _middle(X[subset]), len(subset))
    order = np.concatenate([subset[chosen], rest])
    if len(rest) and not lengths:
        squared = np.concatenate([squared, np.full(len(rest), np.nan)])
    elif len(rest):
        nearest = nearest_earlier(X[order], 1)[len(subset) :, 0]
        squared = np.concatenate([squared, ((X[rest] - X[order[nearest]]) ** 2).sum(1)])
    return order, squared


def _grid(X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Select by a heap of distances; cells of the size of the present distance, halved with it, hold who is near."""
    n, d = X.shape
    first = _middle(X)
    low = X.min(0)
    key = ((X - X[first]) ** 2).sum(1)
    heap = np.lexsort((np.arange(n), -key))
    heap = heap[heap != first]
    place = np.empty(n, np.int64)
    place[heap] = np.arange(n - 1)
    place[first] = -1
    order, squared = np.empty(n, np.int64), np.empty(n)
    order[0], squared[0] = first, np.inf
    size, count = n - 1, 1
    steps = np.array(list(itertools.product((-1, 0, 1), repeat=d)))
    while size > 0:
        reach = float(key[heap[0]])
        if reach == 0.0:  # only copies of chosen points are left
            rest = np.sort(heap[:size])
            order[count:], squared[count:] = rest, 0.0
            break
        width = np.sqrt(reach)
        at = np.floor((X - low) / width).astype(np.int64) + 1
        spans = np.append(np.cumprod((at.max(0) + 2)[::-1])[::-1][1:], 1)
        code = at @ spans
        members = np.argsort(code, kind="stable")
        codes, starts = np.unique(code[members], return_index=True)
        starts = np.append(starts, n)
        size, count = _loops.take_until(
            reach / 4, X, code, codes, starts, members, steps @ spans, heap, place, key, size, order, squared, count
        )
    return order, squared
