"""Orders and neighbours of points."""

from __future__ import annotations

import numpy as np
from numba import prange

from mercer._loops.compiled import compiled, parallel


@compiled
def _squared_distance(X: np.ndarray, i: int, j: int) -> float:
    total = 0.0
    for k in range(X.shape[1]):
        step = X[i, k] - X[j, k]
        total += step * step
    return total


@compiled
def farthest_points(X: np.ndarray, first: int, n_select: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the order and the squared distances of farthest-point selection on the rows of X (n, d).

    n·n_select·d operations and O(n) memory.
    """
    n = len(X)
    nearest = np.full(n, np.inf)
    order = np.empty(n_select, np.int64)
    distance = np.empty(n_select)
    chosen, reach = first, np.inf
    for k in range(n_select):
        order[k], distance[k] = chosen, reach
        nearest[chosen] = -1.0
        best, best_value = -1, -1.0
        for i in range(n):
            if nearest[i] < 0.0:
                continue
            total = _squared_distance(X, i, chosen)
            if total < nearest[i]:
                nearest[i] = total
            if nearest[i] > best_value:
                best, best_value = i, nearest[i]
        chosen, reach = best, best_value
    return order, distance


@compiled
def _sift_down(heap: np.ndarray, place: np.ndarray, key: np.ndarray, size: int, at: int) -> None:
    """Restore a heap, largest key on top and smaller index first among equals, after key[heap[at]] fell."""
    item = heap[at]
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        right = child + 1
        if right < size and _before(key, heap[right], heap[child]):
            child = right
        if not _before(key, heap[child], item):
            break
        heap[at] = heap[child]
        place[heap[at]] = at
        at = child
    heap[at] = item
    place[item] = at


@compiled
def _before(key: np.ndarray, i: int, j: int) -> bool:
    return key[i] > key[j] or (key[i] == key[j] and i < j)


@compiled
def _find(codes: np.ndarray, code: int) -> int:
    """Return the position of a code in the sorted codes, or −1."""
    at = np.searchsorted(codes, code)
    return int(at) if at < len(codes) and codes[at] == code else -1


@compiled
def lower_keys(
    chosen: int,
    radius2: float,
    X: np.ndarray,
    cell: np.ndarray,
    codes: np.ndarray,
    starts: np.ndarray,
    members: np.ndarray,
    offsets: np.ndarray,
    heap: np.ndarray,
    place: np.ndarray,
    key: np.ndarray,
    size: int,
) -> None:
    """Lower the key of every unselected point within the radius of ``chosen`` to its squared distance."""
    for o in range(len(offsets)):
        found = _find(codes, cell[chosen] + offsets[o])
        if found < 0:
            continue
        for at in range(starts[found], starts[found + 1]):
            i = members[at]
            if place[i] < 0:
                continue
            total = _squared_distance(X, i, chosen)
            if total <= radius2 and total < key[i]:
                key[i] = total
                _sift_down(heap, place, key, size, place[i])


@compiled
def take_until(
    floor2: float,
    X: np.ndarray,
    cell: np.ndarray,
    codes: np.ndarray,
    starts: np.ndarray,
    members: np.ndarray,
    offsets: np.ndarray,
    heap: np.ndarray,
    place: np.ndarray,
    key: np.ndarray,
    size: int,
    order: np.ndarray,
    distance: np.ndarray,
    count: int,
) -> tuple[int, int]:
    """Select farthest points until the distance falls to √floor2; return the heap's size and how many are chosen.

    The cells are at least as wide as the first distance, and distances only fall, so that the points whose key a
    selection can lower are in the cells next to its own.
    """
    while size > 0 and key[heap[0]] > floor2:
        chosen = heap[0]
        reach = key[chosen]
        order[count], distance[count] = chosen, reach
        count += 1
        size -= 1
        place[chosen] = -1
        if size > 0:
            heap[0] = heap[size]
            place[heap[0]] = 0
            _sift_down(heap, place, key, size, 0)
        lower_keys(chosen, reach, X, cell, codes, starts, members, offsets, heap, place, key, size)
    return size, count


@parallel
def earlier_nearest(X: np.ndarray, rows: np.ndarray, m: int) -> np.ndarray:
    """Return the m nearest earlier rows of X for each of ``rows`` by looking at all: nearest first, −1 where fewer."""
    n_rows = len(rows)
    found = np.full((n_rows, m), -1, np.int64)
    for r in prange(n_rows):
        i = rows[r]
        best = np.full(m, np.inf)
        for j in range(i):
            total = _squared_distance(X, i, j)
            if total >= best[m - 1]:
                continue
            at = m - 1
            while at > 0 and best[at - 1] > total:
                best[at], found[r, at] = best[at - 1], found[r, at - 1]
                at -= 1
            best[at], found[r, at] = total, j
    return found
