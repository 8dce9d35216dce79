"""Incomplete Cholesky factors on the pattern of a sparse inverse Cholesky factor, and their log-determinant.

A matrix A is given by its entries on the pattern, (*b, n, w) as columns of U are; V Vᵀ equals A there and what would
fall outside is dropped. Compiled loops on the CPU in float64, whatever the device and dtype of the arguments.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mercer import _loops
from mercer.linalg.cholesky import NotPositiveDefiniteError
from mercer.linalg.sic import Pattern

_SMALLEST_PIVOT = 1e-10  # relative to the diagonal; below it the factor has broken down
_FIRST_SHIFT, _SHIFT_GROWTH, _SHIFTS = 1e-3, 4.0, 12
_IMAGINARY = 1e-100  # a derivative by a complex step has no difference that could cancel


def precision_entries(pattern: Pattern, val: Tensor) -> Tensor:
    """Return the entries of U Uᵀ on the pattern, (*b, n, w); differentiable."""
    return _Entries.apply(val, pattern)


class _Entries(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, val: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(val)
        ctx.pattern = pattern
        return _loop(_loops.sic_precision, pattern, val)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (val,) = ctx.saved_tensors
        return _loop(_loops.sic_precision_adjoint, ctx.pattern, val, grad), None


def incomplete_factor(pattern: Pattern, entries: Tensor, shifting: bool = True) -> tuple[Tensor, float]:
    """Return V on the pattern with V Vᵀ ≈ A.

    Parameters
    ----------
    pattern : Pattern
    entries : (*b, n, w)
        A on the pattern.
    shifting : bool
        Whether to add to the diagonal where a pivot breaks down.

    Returns
    -------
    V : (*b, n, w)
        Not differentiable, see `incomplete_logdet`.
    shift : float
        What was added to the diagonal, relative to it; 0 as a rule. With a shift V is a preconditioner and no longer
        an approximation of A.

    Raises
    ------
    NotPositiveDefiniteError
        No shift helped, or none was allowed.

    Notes
    -----
    O(n w²) operations per matrix, each on one thread. Columns are eliminated from the last to the first.
    """
    shift = 0.0
    for _ in range(_SHIFTS if shifting else 1):
        V, broken = _factor(pattern, _shifted(entries.detach(), shift))
        if (broken < 0).all():
            return torch.as_tensor(V).to(entries).reshape(entries.shape), shift
        shift = _FIRST_SHIFT if shift == 0.0 else shift * _SHIFT_GROWTH
    raise NotPositiveDefiniteError(
        "The posterior precision has no incomplete factor: negative sites outweigh the prior."
    )


def incomplete_logdet(pattern: Pattern, entries: Tensor, factor: Tensor, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return log |V Vᵀ| (*b,) and its derivative in the diagonal of A (*b, n), both differentiable in the entries.

    For a complete factor the derivative is the diagonal of A⁻¹; for an incomplete one it is that approximation of it
    which belongs to log |V Vᵀ|, so that a bound made of both has its stationary points where its gradients say.

    Parameters
    ----------
    pattern : Pattern
    entries : (*b, n, w)
        A on the pattern.
    factor, shift
        Of `incomplete_factor`.
    """
    return _Logdet.apply(_shifted(entries, shift), factor, pattern)


class _Logdet(torch.autograd.Function):
    """The factorisation in reverse gives the slope; its own derivative is that of both along a complex step."""

    @staticmethod
    def forward(ctx: Any, entries: Tensor, factor: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
        slope = _loop(_loops.incomplete_logdet_slope, pattern, factor)
        ctx.save_for_backward(entries, slope)
        ctx.pattern = pattern
        ctx.set_materialize_grads(False)
        return 2.0 * factor[..., -1].log().sum(-1), slope[..., -1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_logdet: Tensor | None, by_variance: Tensor | None) -> tuple[Tensor | None, None, None]:
        entries, slope = ctx.saved_tensors
        total = None if by_logdet is None else by_logdet[..., None, None] * slope
        if by_variance is not None:
            values = _flat(entries)
            stepped = values + 0j
            stepped[..., -1] += 1j * _IMAGINARY * by_variance.detach().double().cpu().numpy().reshape(values.shape[:-1])
            columns = ctx.pattern.columns.cpu().numpy()
            V, _ = _loops.incomplete_cholesky(columns, stepped, _SMALLEST_PIVOT)
            moved = _loops.incomplete_logdet_slope(columns, V).imag / _IMAGINARY
            moved = torch.as_tensor(moved).to(slope).reshape(slope.shape)
            total = moved if total is None else total + moved
        return total, None, None


def _shifted(entries: Tensor, shift: float) -> Tensor:
    if shift == 0.0:
        return entries
    return torch.cat([entries[..., :-1], (1.0 + shift) * entries[..., -1:]], -1)


def _factor(pattern: Pattern, entries: Tensor) -> tuple[np.ndarray, np.ndarray]:
    return _loops.incomplete_cholesky(pattern.columns.cpu().numpy(), _flat(entries), _SMALLEST_PIVOT)


def _flat(values: Tensor) -> np.ndarray:
    """Return (*b, n, w) as a float64 array (B, n, w)."""
    return values.detach().reshape(-1, *values.shape[-2:]).double().cpu().contiguous().numpy()


def _loop(loop: Any, pattern: Pattern, *values: Tensor) -> Tensor:
    """Run a compiled loop on values of one shape (*b, n, w) and return its result likewise."""
    out = loop(pattern.columns.cpu().numpy(), *(_flat(each) for each in values))
    return torch.as_tensor(out).to(values[0]).reshape(values[0].shape)
