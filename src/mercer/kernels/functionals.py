"""Linear functionals of independent processes, and their covariances.

A functional is a sum of terms c(x) ∂^α u(x): a row of a differential equation, a boundary condition, a sensor. Given
the kernel of each field, ``functional_gram`` is the prior covariance of their values, from blocks of
``derivative_gram``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from gpytorch.kernels import Kernel
from torch import Tensor

from mercer.kernels.derivatives import derivative_gram


class Term(NamedTuple):
    """n values c_i ∂^index u_field(x_i).

    Parameters
    ----------
    coefficient : (n,)
    X : (n, d)
        Where the derivative is taken; terms that share the very same tensor share their blocks.
    index : tuple of d integers
        Order of the derivative in each column, ≥ 0.
    field : int
        Which of the unknown functions.
    """

    coefficient: Tensor
    X: Tensor
    index: tuple[int, ...]  # type: ignore[assignment]  # the name of a method of tuples, which nothing here calls
    field: int = 0


Functional = tuple[Term, ...]
"""Row i is ℓ_i(u) = Σ over terms c_i ∂^index u_field(x_i); all terms have the same number of rows."""


def functional_gram(kernels: Sequence[Kernel], L1: Functional, L2: Functional | None = None) -> Tensor:
    """Return Cov(ℓ_i(u), ℓ′_j(u)) for independent fields u.

    Parameters
    ----------
    kernels : sequence of gpytorch Kernel
        One per field.
    L1 : Functional of n1 rows
    L2 : Functional of n2 rows, optional
        None means L1; the result is then exactly symmetric, and half of the blocks are computed.

    Returns
    -------
    (n1, n2). Differentiable once in the hyperparameters and in the coefficients.

    Raises
    ------
    ValueError
        A kernel is not smooth enough, terms differ in their rows, or a field has no kernel.
    TypeError
        float32, or a kernel without a rule.
    """
    _check(kernels, L1)
    if L2 is None:
        return _symmetric(kernels, L1)
    _check(kernels, L2)
    n1, n2 = len(L1[0].coefficient), len(L2[0].coefficient)
    total = L1[0].X.new_zeros(n1, n2)
    known: dict[tuple, Tensor] = {}
    for left in L1:
        for right in L2:
            if left.field == right.field:
                total = total + _weighted(_block(kernels, left, right, known), left, right)
    return total


def functional_diag(kernels: Sequence[Kernel], L: Functional) -> Tensor:
    """Return the prior variances Var ℓ_i(u), (n,), in O(n); see `functional_gram`."""
    _check(kernels, L)
    total = L[0].X.new_zeros(len(L[0].coefficient))
    for i, left in enumerate(L):
        for j, right in enumerate(L[: i + 1]):
            if left.field == right.field:
                kernel = kernels[left.field]
                X1, X2 = left.X.unsqueeze(-2), right.X.unsqueeze(-2)
                value = derivative_gram(kernel, X1, X2, left.index, right.index)[:, 0, 0]
                total = total + (1 if i == j else 2) * value * left.coefficient * right.coefficient
    return total


def _symmetric(kernels: Sequence[Kernel], L: Functional) -> Tensor:
    """Return the lower half of the sum over pairs of terms, and its transpose."""
    n = len(L[0].coefficient)
    total = L[0].X.new_zeros(n, n)
    known: dict[tuple, Tensor] = {}
    for i, left in enumerate(L):
        for j, right in enumerate(L[: i + 1]):
            if left.field == right.field:
                value = _weighted(_block(kernels, left, right, known), left, right)
                total = total + (0.5 * value if i == j else value)
    return total + total.mT


def _block(kernels: Sequence[Kernel], left: Term, right: Term, known: dict[tuple, Tensor]) -> Tensor:
    """Return Cov(∂^α u(x_i), ∂^β u(x′_j)), evaluated once for each pair of points and indices."""
    key = (left.field, id(left.X), id(right.X), left.index, right.index)
    if key not in known:
        kernel = kernels[left.field]
        known[key] = derivative_gram(kernel, left.X, right.X, left.index, right.index)
    return known[key]


def _weighted(block: Tensor, left: Term, right: Term) -> Tensor:
    return left.coefficient.unsqueeze(-1) * block * right.coefficient


def _check(kernels: Sequence[Kernel], L: Functional) -> None:
    if not L:
        raise ValueError("a functional has at least one term.")
    n, d = L[0].X.shape
    for term in L:
        if term.X.dtype != torch.float64 or term.coefficient.dtype != torch.float64:
            raise TypeError(
                f"functionals are computed in float64, got {term.X.dtype} and {term.coefficient.dtype}: fourth "
                "derivatives of fast waves leave float32 no correct digit. Convert X and coefficients with .double()."
            )
        if term.X.shape != (n, d) or term.coefficient.shape != (n,):
            raise ValueError(
                f"all terms of a functional have the same rows: X {(n, d)} and coefficient {(n,)}, got "
                f"{tuple(term.X.shape)} and {tuple(term.coefficient.shape)}."
            )
        if not 0 <= term.field < len(kernels):
            raise ValueError(f"field {term.field} has no kernel; there are {len(kernels)}.")
