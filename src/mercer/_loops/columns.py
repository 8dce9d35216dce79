"""Columns of sparse inverse Cholesky factors from tiles of a covariance matrix, and their derivative."""

from __future__ import annotations

import numpy as np
from numba import prange

from mercer._loops.compiled import compiled, parallel, reordered


@parallel
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


@parallel
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


@reordered
def _dot(x: np.ndarray, y: np.ndarray, n: int) -> float:
    total = x[0] * y[0] * 0.0
    for k in range(n):
        total += x[k] * y[k]
    return total


@compiled
def _solve_transposed(L: np.ndarray, x: np.ndarray) -> None:
    """Overwrite x by L⁻ᵀ x, row by row of L."""
    for i in range(len(x) - 1, -1, -1):
        x[i] /= L[i, i]
        for k in range(i):
            x[k] -= L[i, k] * x[i]
