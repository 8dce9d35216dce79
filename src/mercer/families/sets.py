"""Sets of rows: where the dimensions go when latents (*b) meet inputs (*t, q, d) of which each t is a set by itself.

Latents come first, sets next, rows last: (*b, *t, q).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mercer.kernels.evaluate import gram
from mercer.policy import NumericalPolicy


def covariance_of_sets(kernel: Any, X1: Tensor, X2: Tensor | None, policy: NumericalPolicy) -> Tensor:
    """Return prior covariances set by set.

    Parameters
    ----------
    kernel : gpytorch Kernel
        With batch shape (*k).
    X1 : (*t, q1, d)
    X2 : (*t, q2, d) or None
        None is X1; the sets *t broadcast.
    policy : NumericalPolicy

    Returns
    -------
    (*k, *t, q1, q2)
        In units of f², differentiable in the inputs.
    """
    k = len(kernel.batch_shape)
    if k == 0:
        return gram(kernel, X1, X2, policy=policy)
    value = gram(kernel, _apart(X1, k), None if X2 is None else _apart(X2, k), policy=policy)
    n_sets = value.dim() - k - 2
    return value.permute(*range(n_sets, n_sets + k), *range(n_sets), -2, -1)


def joint_of_sets(
    joint: Callable[[Tensor], tuple[Tensor, Tensor]], X: Tensor, row_elements: int, policy: NumericalPolicy
) -> tuple[Tensor, Tensor]:
    """Return what ``joint`` returns for X (*t, q, d), some sets at a time, so that temporaries stay small.

    Parameters
    ----------
    joint : callable
        From (T, q, d), or (q, d) where X is one set, to mean (*b, T, q) and covariance (..., T, q, q), which may lack
        latents that share it.
    X : (*t, q, d)
    row_elements : int
        Elements of temporaries per row.
    policy : NumericalPolicy

    Returns
    -------
    mean, covariance : (*b, *t, q), (*b, *t, q, q)
    """
    sets, (q, d) = X.shape[:-2], X.shape[-2:]
    if X.numel() == 0:  # only an evaluation knows the latents
        latents = joint(X.new_zeros(1, d))[0].shape[:-1]
        return X.new_zeros(*latents, *sets, q), X.new_zeros(*latents, *sets, q, q)
    if X.dim() == 2:
        mean, covariance = joint(X)
        return mean, covariance.expand(*mean.shape, q)
    parts = [joint(some) for some in X.reshape(-1, q, d).split(policy.chunk_rows(row_elements * q))]
    means, covariances = torch.cat([m for m, _ in parts], -2), torch.cat([c for _, c in parts], -3)
    mean = means.reshape(*means.shape[:-2], *sets, q)
    return mean, covariances.reshape(*covariances.shape[:-3], *sets, q, q).expand(*mean.shape, q)


def _apart(X: Tensor, k: int) -> Tensor:
    """Insert ``k`` dimensions of size one between sets and rows."""
    return X.reshape(*X.shape[:-2], *[1] * k, *X.shape[-2:])


def lined_up(value: Tensor, n_latents: int, n_sets: int, trailing: int) -> Tensor:
    """Insert dimensions of size one between the latents and the sets of ``value``, so that it has ``n_sets`` of them.

    Parameters
    ----------
    value : (*b, *t, ...)
    n_latents, n_sets, trailing : int
        Numbers of dimensions: *b as they are, *t as wanted, and those that follow.
    """
    missing = n_latents + n_sets + trailing - value.dim()
    if n_latents == 0 or missing <= 0:
        return value
    return value.reshape(*value.shape[:n_latents], *[1] * missing, *value.shape[n_latents:])
