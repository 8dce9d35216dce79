"""Sequential loops over points, compiled: what no batched operation expresses.

The one file that knows numba. Everything takes and returns NumPy arrays, lets go of the interpreter lock, and is
cached on disk after the first call. Indices are int64 and −1 marks padding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba import njit, prange

_compiled = njit(cache=True, nogil=True)


def _parallel(function: Callable) -> Callable:
    """Compile, run on as many threads as torch has, and leave torch those that it had.

    numba and torch may share one OpenMP, where the number of threads that one sets holds for the other too.
    """
    loop = njit(cache=True, nogil=True, parallel=True)(function)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        threads = torch.get_num_threads()
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        try:
            return loop(*arguments)
        finally:
            torch.set_num_threads(threads)

    return call


@_compiled
def _squared_distance(X: np.ndarray, i: int, j: int) -> float:
    total = 0.0
    for k in range(X.shape[1]):
        step = X[i, k] - X[j, k]
        total += step * step
    return total


@_compiled
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


@_compiled
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


@_compiled
def _before(key: np.ndarray, i: int, j: int) -> bool:
    return key[i] > key[j] or (key[i] == key[j] and i < j)


@_compiled
def _find(codes: np.ndarray, code: int) -> int:
    """Return the position of a code in the sorted codes, or −1."""
    at = np.searchsorted(codes, code)
    return int(at) if at < len(codes) and codes[at] == code else -1


@_compiled
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


@_compiled
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


@_compiled
def levels(neighbours: np.ndarray) -> np.ndarray:
    """Return level(i) = 1 + the largest level among the neighbours of i (n, m), 0 where there are none."""
    n, m = neighbours.shape
    level = np.zeros(n, np.int64)
    for i in range(n):
        highest = -1
        for k in range(m):
            j = neighbours[i, k]
            if j >= 0 and level[j] > highest:
                highest = level[j]
        level[i] = highest + 1
    return level


@_parallel
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


# ---- sparse inverse Cholesky factors: column i of U is row i of ``val``, at the rows ``columns[i]``, i itself last


@_parallel
def sic_map(columns: np.ndarray, val: np.ndarray, x: np.ndarray, inverse: bool, transposed: bool) -> np.ndarray:
    """Return U x, Uᵀ x, U⁻¹ x or U⁻ᵀ x for each row of x (B, n).

    ``columns`` (n, w) is padded with −1; ``val`` is (B, n, w), or (1, n, w) for one factor that all rows share.
    """
    n_rhs, n = x.shape
    last = columns.shape[1] - 1
    out = x.copy() if inverse else np.zeros_like(x)
    for b in prange(n_rhs):
        factor = val[b] if len(val) > 1 else val[0]
        if transposed:
            for i in range(n):
                total = 0.0
                for k in range(last):
                    if columns[i, k] >= 0:
                        total += factor[i, k] * (out[b, columns[i, k]] if inverse else x[b, columns[i, k]])
                if inverse:
                    out[b, i] = (out[b, i] - total) / factor[i, last]
                else:
                    out[b, i] = total + factor[i, last] * x[b, i]
        else:
            for step in range(n):
                i = n - 1 - step
                if inverse:
                    out[b, i] /= factor[i, last]
                value = -out[b, i] if inverse else x[b, i]
                for k in range(last):
                    if columns[i, k] >= 0:
                        out[b, columns[i, k]] += factor[i, k] * value
                if not inverse:
                    out[b, i] += factor[i, last] * x[b, i]
    return out


@_compiled
def _position(row: np.ndarray, j: int) -> int:
    """Return where j stands in a row of ascending indices, or −1."""
    at = np.searchsorted(row, j)
    return int(at) if at < len(row) and row[at] == j else -1


@_compiled
def sic_precision(columns: np.ndarray, val: np.ndarray) -> np.ndarray:
    """Return the entries of U Uᵀ on the pattern, (n, w): [i, k] is the entry at (columns[i, k], i)."""
    n, w = columns.shape
    out = np.zeros((n, w))
    for k in range(n):
        for b in range(w):
            j = columns[k, b]
            if j < 0:
                continue
            for a in range(b + 1):
                if columns[k, a] >= 0:
                    at = _position(columns[j], columns[k, a])
                    if at >= 0:
                        out[j, at] += val[k, a] * val[k, b]
    return out


@_compiled
def incomplete_cholesky(columns: np.ndarray, entries: np.ndarray, smallest: float) -> tuple[np.ndarray, int]:
    """Factor a matrix given on the pattern, last column first, dropping what falls outside; see `sic_precision`.

    Returns V and −1, or what there is and the column whose pivot is not above ``smallest`` times its diagonal.
    """
    n, w = columns.shape
    out = entries.copy()
    for step in range(n):
        k = n - 1 - step
        pivot = out[k, w - 1]
        if not pivot > smallest * entries[k, w - 1]:
            return out, k
        root = np.sqrt(pivot)
        out[k, w - 1] = root
        for a in range(w - 1):
            out[k, a] /= root
        for b in range(w - 1):
            j = columns[k, b]
            if j < 0:
                continue
            for a in range(b + 1):
                if columns[k, a] >= 0:
                    at = _position(columns[j], columns[k, a])
                    if at >= 0:
                        out[j, at] -= out[k, a] * out[k, b]
    return out, -1
