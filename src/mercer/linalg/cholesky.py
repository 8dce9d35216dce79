"""Batched Cholesky factorisation with a reported, relative jitter ladder.

Decides how an indefinite matrix is treated: jitters are tried in turn, the one used is reported, and the end of
the ladder is an error that names the rows that are nearly the same. Callers decide whether to warn.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mercer.linalg.dense import factor_
from mercer.policy import NumericalPolicy


class NotPositiveDefiniteError(ArithmeticError):
    """A matrix stayed indefinite at the largest jitter.

    Attributes
    ----------
    rows : tuple of int
        The most correlated pair of rows, the usual cause.
    """

    def __init__(self, message: str, rows: tuple[int, ...] = ()):
        super().__init__(message)
        self.rows = rows


@dataclass(frozen=True)
class Solution:
    """The result of an algorithm that confesses: its value, a status, and what it took to get there."""

    value: Tensor
    status: str = "ok"
    stats: dict[str, Any] = field(default_factory=dict)


def cholesky(A: Tensor, policy: NumericalPolicy, name: str = "covariance matrix") -> Solution:
    """Factor A = L Lᵀ, adding the smallest jitter of the ladder that succeeds.

    Parameters
    ----------
    A : (*b, n, n)
        Symmetric matrices; only the lower triangle is read. No gradients flow through the factor.
    policy : NumericalPolicy
        Its ``jitter_ladder`` is relative to the mean diagonal of each matrix.
    name : str
        What A is, for the error message.

    Returns
    -------
    Solution
        ``value`` (*b, n, n) lower factor; ``stats["jitter"]`` the largest relative jitter used (float).

    Raises
    ------
    NotPositiveDefiniteError
        A is not finite, or stays indefinite at the largest jitter; names the most correlated rows.
    """
    assert policy.jitter_ladder is not None
    n = A.shape[-1]
    for jitter in policy.jitter_ladder:
        target = A.detach().clone(memory_format=torch.contiguous_format)
        if jitter > 0.0:
            diagonal = target.diagonal(dim1=-2, dim2=-1)
            diagonal.add_(jitter * diagonal.mean(-1, keepdim=True))
        L, ok = factor_(target)
        if ok:
            return Solution(L, "ok" if jitter == 0.0 else "jittered", {"jitter": jitter})
    if not bool(torch.isfinite(A).all()):
        raise NotPositiveDefiniteError(
            f"The {name} holds NaN or infinite entries: a hyperparameter or an input is out of range."
        )
    i, j = _most_correlated(A)
    pair = f" Rows {i} and {j} are near-duplicates." if n > 1 else ""
    raise NotPositiveDefiniteError(
        f"The {name} is not positive definite even with relative jitter {policy.jitter_ladder[-1]:g}.{pair} "
        "Remove duplicate rows, raise the noise variance or its lower bound, or use dtype='float64'.",
        rows=(i, j),
    )


def _most_correlated(A: Tensor) -> tuple[int, int]:
    """Return the pair of rows with the largest absolute correlation, over all batches."""
    scale = A.diagonal(dim1=-2, dim2=-1).abs().clamp_min(torch.finfo(A.dtype).tiny).sqrt()
    correlation = (A / scale.unsqueeze(-1) / scale.unsqueeze(-2)).abs().tril(-1)
    flat = int(correlation.flatten(-2).reshape(-1, A.shape[-1] ** 2).amax(0).argmax())
    i, j = divmod(flat, A.shape[-1])
    return min(i, j), max(i, j)
