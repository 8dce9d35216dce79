"""Products, sweeps and quadratic forms of sparse triangular factors.

Column i of a factor U is row i of ``val``, at the rows ``columns[i]``, ascending, i itself last.
"""

from __future__ import annotations

import heapq

import numpy as np
from numba import prange

from mercer._loops.compiled import compiled, parallel


@compiled
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


@parallel
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


@parallel
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
