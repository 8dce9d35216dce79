"""Neighbours by looking at all pairs on an accelerator, a chunk of rows at a time; see `mercer.geometry.neighbours`.

Products of matrices in double precision propose, differences of coordinates rank: which of rows at nearly equal
distance is taken, is the accelerator's choice.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def nearest_earlier(X: Tensor, m: int, chunk_elements: int) -> Tensor:
    """Return the m nearest earlier rows of every row of X.

    Parameters
    ----------
    X : (n, d)
        Dimensionless coordinates, in order.
    m : int ≥ 1
    chunk_elements : int
        Largest temporary, in elements; n if that is more.

    Returns
    -------
    (n, m) int64 tensor
        On the device of X; padded with −1 on the left; nearest last.

    Notes
    -----
    O(n² d) operations.
    """
    X = _centred(X, X)
    n = len(X)
    found = torch.full((n, m), -1, dtype=torch.int64, device=X.device)
    for rows in _chunks(n, n, chunk_elements, X.device):
        stop = int(rows[-1]) + 1
        index, squared = _nearest_of(X[:stop], X[rows], min(m, stop), rows)
        found[rows, m - index.shape[1] :] = index.masked_fill(squared.isinf(), -1).flip(-1)
    return found


@torch.no_grad()
def nearest(X: Tensor, X_new: Tensor, m: int, chunk_elements: int) -> tuple[Tensor, Tensor]:
    """Return the min(m, n) nearest rows of X (n, d) for every row of X_new (q, d), and their squared distances.

    Both are (q, m), nearest first, on the device of X; temporaries hold ``chunk_elements``, or n if that is more.
    """
    X, X_new = _centred(X, X), _centred(X_new, X)
    chunks = _chunks(len(X_new), len(X), chunk_elements, X.device)
    found = [_nearest_of(X, X_new[rows], min(m, len(X))) for rows in chunks]
    index, squared = zip(*found, strict=True)
    return torch.cat(index), torch.cat(squared)


def _centred(X: Tensor, among: Tensor) -> Tensor:
    """Return X in double precision with small norms, which round little."""
    return X.double() - among.double().mean(0)


def _chunks(q: int, n: int, chunk_elements: int, device: torch.device) -> tuple[Tensor, ...]:
    return torch.arange(q, device=device).split(max(1, chunk_elements // max(1, n)))


def _nearest_of(X: Tensor, X_new: Tensor, m: int, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return rows and squared distances, nearest first; ∞ where only rows from ``before`` (q,) on were left."""
    # without the norm of the new row, which is the same for all
    near = torch.addmm(X.square().sum(-1), X_new, X.mT, alpha=-2.0)
    if before is not None:
        later = torch.arange(len(X), device=X.device) >= before.unsqueeze(-1)
        near.masked_fill_(later, torch.inf)
    values, index = near.topk(m, largest=False)
    squared = (X_new.unsqueeze(-2) - X[index]).square().sum(-1).masked_fill_(values.isinf(), torch.inf)
    squared, order = squared.sort(dim=-1, stable=True)
    return index.gather(-1, order), squared
