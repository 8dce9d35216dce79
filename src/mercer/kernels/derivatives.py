"""Covariances of derivatives: one registered rule per kernel type.

``derivative_gram`` walks an expression (scales multiply, sums add, products follow Leibniz' rule, columns are selected)
and asks ``derivative_leaf`` for what a leaf alone can know. All rules are closed forms, because autograd through the
distance of a row from itself takes second derivatives for zero.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import singledispatch

import torch
from gpytorch.kernels import (
    AdditiveKernel,
    ConstantKernel,
    Kernel,
    LinearKernel,
    MaternKernel,
    ProductKernel,
    RBFKernel,
    RQKernel,
    ScaleKernel,
)
from torch import Tensor

from mercer.kernels.evaluate import gram
from mercer.kernels.mixture import MixtureKernel
from mercer.kernels.mixture_gram import HIGHEST_ORDER, mixture_gram

Order = tuple[int, ...]


def derivative_gram(kernel: Kernel, X1: Tensor, X2: Tensor, a: Sequence[int], b: Sequence[int]) -> Tensor:
    """Return Cov(∂^a f(X1[i]), ∂^b f(X2[j])) for f with covariance ``kernel``: ∂^a in x and ∂^b in x′ of k(x, x′).

    Parameters
    ----------
    kernel : gpytorch Kernel
        Any expression whose leaves have a rule; a part without one may be there as long as it is not differentiated.
    X1 : (*b, n1, d)
        Inputs, all columns.
    X2 : (*b, n2, d)
    a, b : sequence of d integers
        Order of the derivative in each column, ≥ 0.

    Returns
    -------
    (*b, n1, n2), in units of f² over those of X to the orders. Differentiable once in the hyperparameters.

    Raises
    ------
    ValueError
        The kernel is not smooth enough, or there is not one order per column.
    TypeError
        A kernel type has no rule; register one with ``derivative_leaf.register``.
    """
    orders = (_order(a, X1.shape[-1]), _order(b, X1.shape[-1]))
    return _walk(kernel, X1, X2, *orders)


@singledispatch
def derivative_leaf(kernel: Kernel, X1: Tensor, X2: Tensor, a: Order, b: Order) -> Tensor:
    """Return the matrix of `derivative_gram` for one leaf, on the columns that it sees.

    Register a rule for a new kernel with ``@derivative_leaf.register``.
    """
    name = type(kernel).__name__
    raise TypeError(
        f"kernel {name} has no rule for derivatives; use RBF, GaussianMixture or Matern52, or register one with "
        "derivative_leaf."
    )


@derivative_leaf.register
def _(kernel: MixtureKernel, X1: Tensor, X2: Tensor, a: Order, b: Order) -> Tensor:
    lags = _sum(a, b)
    limit = HIGHEST_ORDER[kernel.spectrum]
    if max(lags) > limit:
        _refuse("a mixture of Student-t lines", max(lags), int(limit), "GaussianMixture or RBF")
    return _signed(kernel.orders_gram(X1, X2, lags), b)


@derivative_leaf.register
def _(kernel: RBFKernel, X1: Tensor, X2: Tensor, a: Order, b: Order) -> Tensor:
    lags = _sum(a, b)
    ell = _lengthscale(kernel, X1).expand(1, X1.shape[-1])
    return _signed(mixture_gram("gaussian", X1, X2, X1.new_ones(1), ell, None, lags), b)


@derivative_leaf.register
def _(kernel: MaternKernel, X1: Tensor, X2: Tensor, a: Order, b: Order) -> Tensor:
    total, limit = sum(a) + sum(b), round(2 * kernel.nu) - 1
    if total > limit:
        cure = "GaussianMixture or RBF" if kernel.nu == 2.5 else "Matern52 (up to order 4 in all) or RBF"
        _refuse(f"Matérn-{round(2 * kernel.nu)}/2", total, limit, cure)
    u, scale = _scaled_lags(kernel, X1, X2, _sum(a, b))
    square = u.square().sum(-1)
    # so near that r⁻⁴ would overflow is at r = 0
    apart = square > 4 * math.sqrt(torch.finfo(square.dtype).tiny)
    r = torch.where(apart, square, 1.0).sqrt()
    root = math.sqrt(2 * kernel.nu)
    decay = torch.where(apart, torch.exp(-root * r), 1.0)
    # D = (1/r) d/dr, to the n-th power. What diverges at r = 0 meets powers of u, which are zero there
    if kernel.nu == 0.5:
        chain = [decay]
    elif kernel.nu == 1.5:
        chain = [decay * (1 + root * r.where(apart, 0.0)), -(root**2) * decay, root**3 * decay / r]
    else:
        a0 = root * r.where(apart, 0.0)
        chain = [decay * (1 + a0 + a0.square() / 3), -(root**2) / 3 * decay * (1 + a0), root**4 / 3 * decay]
        # one r after the other, so that the adjoint overflows no sooner
        chain += [-(root**5) / 3 * (decay / r), root**5 / 3 * (decay * (1 + a0) / r / r / r)]
    return _radial(u, chain, a, b) * scale


@derivative_leaf.register
def _(kernel: RQKernel, X1: Tensor, X2: Tensor, a: Order, b: Order) -> Tensor:
    u, scale = _scaled_lags(kernel, X1, X2, _sum(a, b))
    alpha = kernel.alpha.to(X1).reshape(())
    base = 1 + u.square().sum(-1) / (2 * alpha)
    chain = [base**-alpha]
    for n in range(sum(a) + sum(b)):
        chain.append(-chain[n] * (alpha + n) / (alpha * base))
    return _radial(u, chain, a, b) * scale


@derivative_leaf.register
def _(kernel: LinearKernel, X1: Tensor, X2: Tensor, a: Order, b: Order) -> Tensor:
    d = X1.shape[-1]
    left, right = (_line(X, order) for X, order in ((X1, a), (X2, b)))
    return (left * kernel.variance.to(X1).reshape(-1).expand(d)) @ right.mT


@derivative_leaf.register
def _(kernel: ConstantKernel, X1: Tensor, X2: Tensor, a: Order, b: Order) -> Tensor:
    batch = torch.broadcast_shapes(X1.shape[:-2], X2.shape[:-2])
    value = kernel.constant.to(X1) if not any(a + b) else X1.new_zeros(())
    return value.reshape(()).expand(*batch, X1.shape[-2], X2.shape[-2])


def has_derivatives(kernel: Kernel) -> bool:
    """Say whether every leaf of an expression has a rule; how often it can be differentiated is another matter."""
    if isinstance(kernel, ScaleKernel):
        return has_derivatives(kernel.base_kernel)
    if isinstance(kernel, (AdditiveKernel, ProductKernel)):
        return all(has_derivatives(part) for part in kernel.kernels)
    # exact types: a subclass may mean another covariance
    return type(kernel) in derivative_leaf.registry


def _walk(kernel: Kernel, X1: Tensor, X2: Tensor, a: Order, b: Order) -> Tensor:
    """Select the columns of a node and evaluate it."""
    if not any(a + b) and not has_derivatives(kernel):
        return gram(kernel, X1, X2)
    if len(kernel.batch_shape):
        raise TypeError("derivatives of a kernel with a batch shape are not known; take its members one by one.")
    if kernel.active_dims is not None:
        columns = kernel.active_dims.tolist()
        if max(columns) >= X1.shape[-1]:
            raise ValueError(f"kernel addresses column {max(columns)} (active_dims) but X has {X1.shape[-1]} columns.")
        chosen = [tuple(order[j] for j in columns) for order in (a, b)]
        if sum(chosen[0] + chosen[1]) < sum(a + b):
            return _zeros(X1, X2)
        X1, X2, a, b = X1[..., columns], X2[..., columns], chosen[0], chosen[1]
    return _walk_selected(kernel, X1, X2, a, b)


def _walk_selected(kernel: Kernel, X1: Tensor, X2: Tensor, a: Order, b: Order) -> Tensor:
    if type(kernel) is ScaleKernel:
        # as in gpytorch, the node has selected the columns for its base too
        return kernel.outputscale.to(X1) * _walk_selected(kernel.base_kernel, X1, X2, a, b)
    if type(kernel) is AdditiveKernel:
        first, *others = (_walk(part, X1, X2, a, b) for part in kernel.kernels)
        return sum(others, first)
    if type(kernel) is ProductKernel:
        return _product(list(kernel.kernels), X1, X2, a, b)
    rule = derivative_leaf.dispatch(type(kernel) if has_derivatives(kernel) else object)
    return rule(kernel, X1, X2, a, b)


def _product(factors: list[Kernel], X1: Tensor, X2: Tensor, a: Order, b: Order) -> Tensor:
    """Leibniz: ∂^a ∂^b Π k sums over all ways to share the orders out, the first factor against the others."""
    first, *others = factors
    if not others:
        return _walk(first, X1, X2, a, b)
    every = list(range(X1.shape[-1]))
    here, there = _seen(first, every), set().union(*(_seen(other, every) for other in others))
    total: Tensor | None = None
    for part_a, rest_a, count_a in _shares(a, here, there):
        for part_b, rest_b, count_b in _shares(b, here, there):
            term = _walk(first, X1, X2, part_a, part_b) * _product(others, X1, X2, rest_a, rest_b)
            term = term * (count_a * count_b)
            total = term if total is None else total + term
    return _zeros(X1, X2) if total is None else total


def _shares(order: Order, here: set[int], there: set[int]) -> Iterator[tuple[Order, Order, int]]:
    """Yield the parts of an order that go to columns ``here``, what is left for ``there``, and Π C(order, part)."""
    for part in itertools.product(*(range(n + 1) for n in order)):
        rest = tuple(n - k for n, k in zip(order, part, strict=True))
        if {j for j, n in enumerate(part) if n} <= here and {j for j, n in enumerate(rest) if n} <= there:
            yield part, rest, math.prod(math.comb(n, k) for n, k in zip(order, part, strict=True))


def _seen(kernel: Kernel, visible: list[int], selected: bool = False) -> set[int]:
    """Return the columns that a draw depends on; ``selected`` says that an outer scale has chosen them already."""
    if kernel.active_dims is not None and not selected:
        visible = [visible[j] for j in kernel.active_dims.tolist()]
    if isinstance(kernel, ScaleKernel):
        return _seen(kernel.base_kernel, visible, selected=True)
    if isinstance(kernel, (AdditiveKernel, ProductKernel)):
        return set().union(*(_seen(part, visible) for part in kernel.kernels))
    return set() if isinstance(kernel, ConstantKernel) else set(visible)


def _radial(u: Tensor, chain: Sequence[Tensor], a: Order, b: Order) -> Tensor:
    """Return ∂^a_u ∂^b_u′ k(|u − u′|) from the chain Dⁿk, D = (1/r) d/dr, at the scaled lags u (*b, n1, n2, d).

    One column's rule, over and over: ∂ⁿ F(u²/2 + c) = Σ_k n!/(k! (n−2k)! 2ᵏ) uⁿ⁻²ᵏ F⁽ⁿ⁻ᵏ⁾(u²/2 + c).
    """
    by_level: dict[int, Tensor | float] = {0: 1.0}  # polynomials in u that multiply D^level k
    for j, n in enumerate(_sum(a, b)):
        found: dict[int, Tensor | float] = {}
        for k in range(n // 2 + 1):
            count = math.factorial(n) / (math.factorial(k) * math.factorial(n - 2 * k) * 2**k)
            power = count * u[..., j] ** (n - 2 * k) if n > 2 * k else count
            for level, polynomial in by_level.items():
                found[level + n - k] = polynomial * power + found.get(level + n - k, 0.0)
        by_level = found
    return _signed(sum((chain[level] * polynomial for level, polynomial in by_level.items()), torch.zeros(())), b)


def _scaled_lags(kernel: Kernel, X1: Tensor, X2: Tensor, total: Order) -> tuple[Tensor, Tensor]:
    """Return the lags in lengthscales (*b, n1, n2, d), and the factor Π ℓ_j⁻ⁿ that derivatives in them leave out."""
    ell = _lengthscale(kernel, X1).expand(X1.shape[-1])
    u = (X1.unsqueeze(-2) - X2.unsqueeze(-3)) / ell
    return u, (ell ** -torch.tensor(total, device=ell.device)).prod()


def _lengthscale(kernel: Kernel, X: Tensor) -> Tensor:
    ell = kernel.lengthscale.to(X).reshape(-1)
    if len(ell) not in (1, X.shape[-1]):
        raise ValueError(f"kernel {type(kernel).__name__} has {len(ell)} lengthscales but sees {X.shape[-1]} columns.")
    return ell


def _line(X: Tensor, order: Order) -> Tensor:
    """Return ∂^order of every column's own function x_j, (*b, n, d)."""
    if not any(order):
        return X
    slope = torch.tensor([float(n == 1 and sum(order) == 1) for n in order]).to(X)
    return slope.expand_as(X)


def _sum(a: Order, b: Order) -> Order:
    return tuple(i + j for i, j in zip(a, b, strict=True))


def _signed(values: Tensor, b: Order) -> Tensor:
    """Return derivatives in the lag as derivatives in x and x′: the b-th in x′ has the sign (−1)^b."""
    return -values if sum(b) % 2 else values


def _zeros(X1: Tensor, X2: Tensor) -> Tensor:
    return X1.new_zeros(*torch.broadcast_shapes(X1.shape[:-2], X2.shape[:-2]), X1.shape[-2], X2.shape[-2])


def _order(order: Sequence[int], d: int) -> Order:
    found = tuple(int(n) for n in order)
    if len(found) != d or min(found, default=0) < 0 or any(n != m for n, m in zip(found, order, strict=True)):
        raise ValueError(f"an order of derivation has one integer ≥ 0 for each of {d} columns, got {tuple(order)}.")
    return found


def _refuse(name: str, order: int, limit: int, cure: str) -> None:
    raise ValueError(
        f"{name} has derivatives up to order {limit} of its covariance, both arguments together, and {order} are asked "
        f"for: f has derivatives up to order {limit // 2}; use a smoother kernel: {cure}."
    )
