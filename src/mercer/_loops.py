"""Sequential loops over points, compiled: what no batched operation expresses.

The one file that knows numba. Everything takes and returns NumPy arrays, lets go of the interpreter lock, and is
cached on disk after the first call. Indices are int64 and −1 marks padding.
"""

from __future__ import annotations

import functools
import heapq
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


# The loops below meet every pair (a, b) of entries of each column k: rows i = columns[k, a] ≤ j = columns[k, b]. The
# entry (i, j) of the matrix, if the pattern has it, is found by walking the ascending row columns[j] alongside.


@_parallel
def sic_precision(columns: np.ndarray, val: np.ndarray) -> np.ndarray:
    """Return the entries of U Uᵀ on the pattern, (B, n, w): [·, i, k] is the entry at (columns[i, k], i)."""
    n_batch, n, w = val.shape
    out = np.zeros_like(val)
    for batch in prange(n_batch):
        for k in range(n):
            for b in range(w):
                j, at = columns[k, b], 0
                if j < 0:
                    continue
                for a in range(b + 1):
                    i = columns[k, a]
                    if i < 0:
                        continue
                    while columns[j, at] < i:
                        at += 1
                    if columns[j, at] == i:
                        out[batch, j, at] += val[batch, k, a] * val[batch, k, b]
    return out


@_parallel
def sic_precision_adjoint(columns: np.ndarray, val: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """Return the derivative in ``val`` of Σ slope · `sic_precision`, (B, n, w)."""
    n_batch, n, w = val.shape
    out = np.zeros_like(val)
    for batch in prange(n_batch):
        for k in range(n):
            for b in range(w):
                j, at = columns[k, b], 0
                if j < 0:
                    continue
                for a in range(b + 1):
                    i = columns[k, a]
                    if i < 0:
                        continue
                    while columns[j, at] < i:
                        at += 1
                    if columns[j, at] == i:
                        out[batch, k, a] += slope[batch, j, at] * val[batch, k, b]
                        out[batch, k, b] += slope[batch, j, at] * val[batch, k, a]
    return out


@_parallel
def incomplete_cholesky(columns: np.ndarray, entries: np.ndarray, smallest: float) -> tuple[np.ndarray, np.ndarray]:
    """Factor matrices given on the pattern, last column first, dropping what falls outside; see `sic_precision`.

    Returns V (B, n, w) and for each −1, or the column whose pivot is not above ``smallest`` times its diagonal.
    ``entries`` may be complex, for a derivative by a step along the imaginary axis.
    """
    n_batch, n, w = entries.shape
    out = entries.copy()
    broken = np.full(n_batch, -1)
    for batch in prange(n_batch):
        V = out[batch]
        for step in range(n):
            k = n - 1 - step
            if not V[k, w - 1].real > smallest * entries[batch, k, w - 1].real:
                broken[batch] = k
                break
            root = np.sqrt(V[k, w - 1])
            V[k, w - 1] = root
            for a in range(w - 1):
                V[k, a] /= root
            for b in range(w - 1):
                j, at = columns[k, b], 0
                if j < 0:
                    continue
                for a in range(b + 1):
                    i = columns[k, a]
                    if i < 0:
                        continue
                    while columns[j, at] < i:
                        at += 1
                    if columns[j, at] == i:
                        V[j, at] -= V[k, a] * V[k, b]
    return out, broken


@_parallel
def incomplete_logdet_slope(columns: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Return the derivative of log |V Vᵀ| in the entries that `incomplete_cholesky` made V from, (B, n, w).

    The factorisation in reverse: first column first. An entry off the diagonal counts once.
    """
    n_batch, n, w = factor.shape
    out = np.zeros_like(factor)
    for batch in prange(n_batch):
        V, slope = factor[batch], out[batch]
        for k in range(n):
            for b in range(w - 1):
                j, at = columns[k, b], 0
                if j < 0:
                    continue
                for a in range(b + 1):
                    i = columns[k, a]
                    if i < 0:
                        continue
                    while columns[j, at] < i:
                        at += 1
                    if columns[j, at] == i:
                        slope[k, a] -= slope[j, at] * V[k, b]
                        slope[k, b] -= slope[j, at] * V[k, a]
            root = V[k, w - 1]
            of_root = 2.0 / root
            for a in range(w - 1):
                of_root -= slope[k, a] * V[k, a] / root
                slope[k, a] /= root
            slope[k, w - 1] = of_root / (2.0 * root)
    return out


@_parallel
def sic_quadratic_forms(
    columns: np.ndarray, factor: np.ndarray, rows: np.ndarray, weights: np.ndarray, smallest: float, n_threads: int
) -> np.ndarray:
    """Return ‖V⁻¹ b‖² for sparse vectors b with ``weights`` (q, m) at ``rows`` (q, m), −1 for padding; V is (n, w).

    The sweep from the last row to the first visits only what b reaches, rows waiting in a heap. An entry of V⁻¹ b
    whose square is below ``smallest`` times the sum so far counts, but is not followed to the rows before it.
    """
    q, m = rows.shape
    n, w = columns.shape
    out = np.zeros(q)
    for thread in prange(n_threads):
        right = np.zeros(n)
        waits = np.zeros(n, np.bool_)
        heap = [0]
        heap.pop()
        for t in range(thread * q // n_threads, (thread + 1) * q // n_threads):
            for a in range(m):
                j = rows[t, a]
                if j >= 0:
                    right[j] += weights[t, a]
                    if not waits[j]:
                        waits[j] = True
                        heapq.heappush(heap, -j)
            while len(heap) > 0:
                i = -heapq.heappop(heap)
                value = right[i] / factor[i, w - 1]
                right[i], waits[i] = 0.0, False
                out[t] += value * value
                if value * value <= smallest * out[t]:
                    continue
                for a in range(w - 1):
                    j = columns[i, a]
                    if j >= 0:
                        right[j] -= factor[i, a] * value
                        if not waits[j]:
                            waits[j] = True
                            heapq.heappush(heap, -j)
    return out


@_parallel
def column_factors(tiles: np.ndarray, padding: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return L⁻ᵀe (B, w) of tiles K = L Lᵀ (B, w, w), e the last unit vector; L; and which tiles have no L.

    Padded rows and columns (B, w) count as those of the identity.
    """
    n_tiles, w, _ = tiles.shape
    L = np.zeros_like(tiles)
    out = np.zeros((n_tiles, w), tiles.dtype)
    broken = np.zeros(n_tiles, np.bool_)
    for t in prange(n_tiles):
        for i in range(w):
            if padding[t, i]:
                L[t, i, i] = 1.0
                continue
            for j in range(i):
                if not padding[t, j]:
                    L[t, i, j] = (tiles[t, i, j] - _dot(L[t, i], L[t, j], j)) / L[t, j, j]
            pivot = tiles[t, i, i] - _dot(L[t, i], L[t, i], i)
            if not pivot > 0.0:
                broken[t] = True
                break
            L[t, i, i] = np.sqrt(pivot)
        if not broken[t]:
            out[t, w - 1] = 1.0
            _solve_transposed(L[t], out[t])
    return out, L, broken


@_parallel
def column_factors_adjoint(L: np.ndarray, u: np.ndarray, padding: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """Return the derivative in the tiles of Σ slope · u, (B, w, w), symmetric.

    With g = K⁻¹e = u uₗ, uₗ the last entry of u: du = (dg − ½ g eᵀdg / uₗ²) / uₗ and dg = −K⁻¹ dK g.
    """
    n_tiles, w, _ = L.shape
    out = np.zeros_like(L)
    for t in prange(n_tiles):
        last = u[t, w - 1]
        pulled = np.zeros(w, L.dtype)
        for i in range(w):
            if not padding[t, i]:
                pulled[i] = slope[t, i] / last
        pulled[w - 1] -= 0.5 * _dot(pulled, u[t], w) / last
        for i in range(w):
            pulled[i] = (pulled[i] - _dot(L[t, i], pulled, i)) / L[t, i, i]
        _solve_transposed(L[t], pulled)
        for i in range(w):
            for j in range(i + 1):
                value = -0.5 * last * (pulled[i] * u[t, j] + pulled[j] * u[t, i])
                out[t, i, j] = value
                out[t, j, i] = value
    return out


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _dot(x: np.ndarray, y: np.ndarray, n: int) -> float:
    total = x[0] * y[0] * 0.0
    for k in range(n):
        total += x[k] * y[k]
    return total


@_compiled
def _solve_transposed(L: np.ndarray, x: np.ndarray) -> None:
    """Overwrite x by L⁻ᵀ x, row by row of L."""
    for i in range(len(x) - 1, -1, -1):
        x[i] /= L[i, i]
        for k in range(i):
            x[k] -= L[i, k] * x[i]
