"""Kernel matrices: ``gram`` and ``diag``, the only places where a gpytorch kernel becomes numbers.

This file decides how a kernel expression is walked (scales passed down, sums added, products multiplied,
columns selected) and which leaves take the fused path of :mod:`mercer.kernels.stationary`. A leaf that it
does not know is evaluated by its own ``forward`` and differentiated by autograd. No gpytorch, linear_operator
or botorch setting is consulted: ``forward`` of the leaf is called directly, never a lazy operator's
algorithm.
"""

from __future__ import annotations

from typing import Any

import torch
from gpytorch.kernels import (
    AdditiveKernel,
    Kernel,
    MaternKernel,
    ProductKernel,
    RBFKernel,
    RQKernel,
    ScaleKernel,
)
from linear_operator import to_dense
from torch import Tensor

from mercer.kernels.stationary import PROFILES, stationary_gram
from mercer.policy import NumericalPolicy

_MATERN = {0.5: "matern12", 1.5: "matern32", 2.5: "matern52"}


def gram(kernel: Kernel, X1: Tensor, X2: Tensor | None = None, policy: NumericalPolicy | None = None) -> Tensor:
    """Return the dense covariance K[i, j] = k(X1[i], X2[j]).

    Parameters
    ----------
    kernel : gpytorch Kernel
        Any kernel expression; its ``batch_shape`` broadcasts with the batch dimensions of X.
    X1 : (*b, n1, d)
        Inputs; d counts all columns, ``active_dims`` are selected node by node.
    X2 : (*b, n2, d), optional
        Second inputs; None means X1, and then the result is exactly symmetric where the kernel is stationary.
    policy : NumericalPolicy, optional
        Gives the largest temporary, ``chunk_elements``.

    Returns
    -------
    Tensor
        (*b, n1, n2), units of f². Differentiable once in the hyperparameters, X1 and X2.

    Raises
    ------
    ValueError
        X has fewer columns than the kernel addresses, or a number of columns other than that of its
        lengthscales.

    Notes
    -----
    O(n1 n2 d) time. A (scaled) stationary leaf needs no n1 × n2 buffer beside the result, forward or
    backward.
    """
    limit = (policy or NumericalPolicy()).chunk_elements
    X1, X2 = _select(kernel, X1, X2)
    return _gram(kernel, X1, X2, None, limit)


def diag(kernel: Kernel, X: Tensor) -> Tensor:
    """Return the prior variances k(X[i], X[i]) in O(n).

    Parameters
    ----------
    kernel : gpytorch Kernel
        Any kernel expression.
    X : (*b, n, d)
        Inputs, all columns.

    Returns
    -------
    Tensor
        (*b, n), units of f².
    """
    X, _ = _select(kernel, X, None)
    return _diag(kernel, X)


@torch.no_grad()
def scaled_inputs(kernel: Kernel, X: Tensor) -> Tensor | None:
    """Return inputs over lengthscales, in which the correlation falls with Euclidean distance alone.

    Parameters
    ----------
    kernel : gpytorch Kernel
        Any kernel expression.
    X : (n, d)
        Inputs, all columns.

    Returns
    -------
    (n, d') tensor or None
        Dimensionless; None where the kernel is not one (scaled) stationary leaf without batch dimensions.
    """
    X, _ = _select(kernel, X, None)
    if type(kernel) is ScaleKernel:
        return scaled_inputs(kernel.base_kernel, X)
    if leaf_profile(kernel) is None or kernel.batch_shape:
        return None
    _check_columns(kernel, X)
    return X / kernel.lengthscale.to(X)


def leaf_profile(kernel: Kernel) -> str | None:
    """Return the row of ``PROFILES`` that describes a leaf, or None where it has no fused path.

    The type must match exactly: a subclass (such as gpytorch's ``RBFKernelGrad``) may mean something else.
    """
    if type(kernel) is RBFKernel:
        return "rbf"
    if type(kernel) is MaternKernel:
        return _MATERN[kernel.nu]
    if type(kernel) is RQKernel:
        return "rq"
    return None


def _gram(kernel: Kernel, X1: Tensor, X2: Tensor | None, scale: Tensor | None, limit: int) -> Tensor:
    """Evaluate ``scale`` * kernel on columns that are already selected for this node."""
    if type(kernel) is ScaleKernel:
        # As in gpytorch, the node has selected the columns for its base too.
        outer = kernel.outputscale if scale is None else scale * kernel.outputscale
        return _gram(kernel.base_kernel, X1, X2, outer, limit)
    if type(kernel) is AdditiveKernel:
        terms = (_gram(part, *_select(part, X1, X2), scale, limit) for part in kernel.kernels)
        total = next(terms)
        for term in terms:
            total = total + term
        return total
    if type(kernel) is ProductKernel:
        # The scale multiplies one factor only.
        first, *others = kernel.kernels
        product = _gram(first, *_select(first, X1, X2), scale, limit)
        for part in others:
            product = product * _gram(part, *_select(part, X1, X2), None, limit)
        return product
    profile = leaf_profile(kernel)
    if profile is None:
        dense = to_dense(kernel.forward(X1, X1 if X2 is None else X2))
        return dense if scale is None else dense * _trailing(scale.to(dense), 2)
    _check_columns(kernel, X1)
    lengthscale = kernel.lengthscale.to(X1)
    shape = _trailing(kernel.alpha.to(X1).squeeze(-1), 2) if PROFILES[profile].has_shape else None
    # Distances do not change with the origin; a common centre keeps |x|², and so the rounding of d², small.
    centre = (X1 if X2 is None else X2).detach().mean(-2, keepdim=True)
    x1 = (X1 - centre) / lengthscale
    x2 = None if X2 is None else (X2 - centre) / lengthscale
    scale = X1.new_ones(()) if scale is None else scale.to(X1)
    return stationary_gram(profile, x1, x2, _trailing(scale, 2), shape, limit)


def _diag(kernel: Kernel, X: Tensor) -> Tensor:
    if type(kernel) is ScaleKernel:
        inner = _diag(kernel.base_kernel, X)
        return inner * kernel.outputscale.to(inner).unsqueeze(-1)
    if type(kernel) in (AdditiveKernel, ProductKernel):
        terms = [_diag(part, _select(part, X, None)[0]) for part in kernel.kernels]
        total = terms[0]
        for term in terms[1:]:
            total = total + term if type(kernel) is AdditiveKernel else total * term
        return total
    n = X.shape[-2]
    expected = (*torch.broadcast_shapes(kernel.batch_shape, X.shape[:-2]), n)
    if leaf_profile(kernel) is not None:
        _check_columns(kernel, X)
        return X.new_ones(expected)
    value = to_dense(kernel.forward(X, X, diag=True))
    # Some kernels ignore ``diag`` and answer with the whole matrix.
    if value.shape != expected and value.shape[-2:] == (n, n):
        return value.diagonal(dim1=-1, dim2=-2)
    return value


def _select(kernel: Kernel, X1: Tensor, X2: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Keep the columns that a node of the expression looks at."""
    columns: Any = kernel.active_dims
    if columns is None:
        return X1, X2
    if int(columns.max()) >= X1.shape[-1]:
        raise ValueError(
            f"kernel addresses column {int(columns.max())} (active_dims) but X has {X1.shape[-1]} columns."
        )
    columns = columns.to(X1.device)
    return X1.index_select(-1, columns), None if X2 is None else X2.index_select(-1, columns)


def _check_columns(kernel: Kernel, X: Tensor) -> None:
    known = kernel.lengthscale.shape[-1]
    if known not in (1, X.shape[-1]):
        raise ValueError(
            f"kernel {type(kernel).__name__} has {known} lengthscales but sees {X.shape[-1]} columns of X; "
            "give one lengthscale per column, or choose the columns with active_dims."
        )


def _trailing(value: Tensor, count: int) -> Tensor:
    """Append ``count`` dimensions of size one."""
    return value.reshape(*value.shape, *[1] * count)
