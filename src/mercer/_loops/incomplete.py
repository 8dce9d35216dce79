"""Sparse precisions on a pattern, their incomplete Cholesky factors, and the derivatives of both.

Every loop meets every pair (a, b) of entries of each column k: rows i = columns[k, a] ≤ j = columns[k, b]. The entry
(i, j) of the matrix, if the pattern has it, is found by walking the ascending row columns[j] alongside.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from mercer._loops.compiled import parallel


@parallel
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


@parallel
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


@parallel
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


@parallel
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
