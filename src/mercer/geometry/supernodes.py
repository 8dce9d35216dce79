"""Columns of a sparse inverse Cholesky factor with nearly the same rows, grouped to share one Cholesky factor."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_WIDTH_STEP = 8  # widths of batches are multiples of this


class Supernodes(NamedTuple):
    """Some groups of columns whose unions of rows have about the same size.

    ``rows`` (g, w) are the unions, ascending, −1 for padding first; ``members`` (g, w) is true at the rows whose
    columns the group holds.
    """

    rows: np.ndarray
    members: np.ndarray


def group_columns(neighbours: np.ndarray, distance: np.ndarray, ratio: float = 1.5) -> list[Supernodes]:
    """Group columns, fine to coarse: each with those of its rows that are at most ``ratio`` times as coarse.

    Parameters
    ----------
    neighbours : (n, m) int array
        A pattern, padded with −1.
    distance : (n,) array
        ℓ of `mercer.geometry.ordering.Ordering`.
    ratio : float ≥ 1
        λ: larger ones make fewer groups with larger unions.

    Returns
    -------
    list of Supernodes
        Batches of groups of like size; every column is a member of exactly one group.

    References
    ----------
    Schäfer, Katzfuss and Owhadi (2021), section 4.2.
    """
    n = len(neighbours)
    free = np.ones(n, bool)
    groups: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    for i in range(n - 1, -1, -1):
        if not free[i]:
            continue
        own = neighbours[i]
        own = own[own >= 0]
        joined = np.append(own[free[own] & (distance[own] <= ratio * distance[i])], i)
        free[joined] = False
        union = np.unique(np.concatenate([neighbours[joined].ravel(), joined]))
        union = union[union >= 0]
        width = -(-len(union) // _WIDTH_STEP) * _WIDTH_STEP
        groups.setdefault(width, []).append((union, joined))
    return [_padded(width, groups[width]) for width in sorted(groups)]


def _padded(width: int, groups: list[tuple[np.ndarray, np.ndarray]]) -> Supernodes:
    rows = np.full((len(groups), width), -1, np.int64)
    members = np.zeros((len(groups), width), bool)
    for k, (union, joined) in enumerate(groups):
        rows[k, width - len(union) :] = union
        members[k, width - len(union) :] = np.isin(union, joined)
    return Supernodes(rows, members)
