"""Sums of windowed cosines and their derivatives in the lag, with a hand-written adjoint.

k(d) = Σ_q w_q Π_j g(d_j; ℓ_qj) cos(ω_qj d_j), g a Gaussian or a Matérn-5/2 window. Every derivative is written out,
because autograd through |d| takes the second derivative at d = 0 for zero. Blocks are computed again in the adjoint, so
that neither direction keeps more than one n × n matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of one temporary: small enough for the last-level cache of a CPU, large enough for a GPU
_CACHE_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}
_LEAST_GRID = 32  # rows; of fewer the matrix is made as fast as the lags
HIGHEST_ORDER: dict[str, float] = {"gaussian": math.inf, "student": 4}


def mixture_gram(
    spectrum: str,
    X1: Tensor,
    X2: Tensor,
    weight: Tensor,
    lengthscale: Tensor,
    frequency: Tensor | None,
    orders: Sequence[int],
) -> Tensor:
    """Return Σ_q w_q Π_j ∂^{n_j} [g(d; ℓ_qj) cos(2π μ_qj d)] at the lags d = X1[i, j] − X2[k, j].

    Parameters
    ----------
    spectrum : {"gaussian", "student"}
        The window: exp(−d²/2ℓ²), or Matérn-5/2 in one dimension.
    X1, X2 : (*b, n1, d), (*b, n2, d)
    weight : (Q,)
        In units of f².
    lengthscale, frequency : (Q, d)
        In units of X, and in cycles per unit of X; None where all frequencies are zero.
    orders : sequence of d integers
        Order n_j of the derivative in each column's lag, ≥ 0; at most ``HIGHEST_ORDER[spectrum]``.

    Returns
    -------
    (*b, n1, n2), in units of f² over those of X to the orders. Differentiable once in all tensors.

    Notes
    -----
    O(n1 n2 Q d) time for each order. With cos(ω(x − x′)) from products of cosines and sines of ωx the matrix of one
    component is that of two functions times a window, and stays positive semi-definite to the last digit.
    Derivatives: Leibniz' rule, k⁽ⁿ⁾ = Σ_m C(n, m) g⁽ⁿ⁻ᵐ⁾ ωᵐ cos(ωd + mπ/2).
    """
    batch = torch.broadcast_shapes(X1.shape[:-2], X2.shape[:-2])
    # lags do not change with the origin; phases near it are accurate
    centre = X2.detach().mean(-2, keepdim=True) if X2.shape[-2] else 0.0
    n_sets = math.prod(batch)
    flat = [(X - centre).expand(*batch, *X.shape[-2:]).reshape(n_sets, *X.shape[-2:]) for X in (X1, X2)]
    values = _MixtureGram.apply(spectrum, tuple(orders), *flat, weight, lengthscale, frequency)
    return values.reshape(*batch, X1.shape[-2], X2.shape[-2])


def toeplitz_gram(spectrum: str, X: Tensor, *parameters: Tensor | None, orders: Sequence[int]) -> Tensor | None:
    """Return `mixture_gram` of a uniform grid with itself from its 2n − 1 lags, or None where X is no such grid.

    Parameters
    ----------
    X : (n, 1)
        A grid where its rows are uniform to the last digits; gradients in X are not wanted.
    parameters : weight, lengthscale, frequency
    orders : sequence of one integer
    """
    n = len(X)
    if X.dim() != 2 or X.shape[1] != 1 or n < _LEAST_GRID or X.requires_grad:
        return None
    step = (X[-1] - X[0]) / (n - 1)
    index = torch.arange(1 - n, n, device=X.device).to(X).unsqueeze(-1)
    rounding = 8 * torch.finfo(X.dtype).eps * X.abs().max()
    if bool((X - X[0] - step * index[n - 1 :]).abs().max() > rounding) or float(step) == 0:
        return None
    weight, lengthscale, frequency = parameters
    assert weight is not None and lengthscale is not None
    zero = torch.zeros_like(X[:1])
    lags = mixture_gram(spectrum, step * index, zero, weight, lengthscale, frequency, orders)[:, 0]
    # K[i, j] = κ((i − j) step), which is lag n − 1 + i − j
    return lags.unfold(0, n, 1).flip(1)


def windows(spectrum: str, d: Tensor, lengthscale: Tensor, top: int) -> list[Tensor]:
    """Return g, g′, …, g^(top) at the lags d; the fifth derivative of "student" jumps at 0, where it is taken for 0."""
    if spectrum == "gaussian":
        square = lengthscale.square()
        values = [(d.square() / square).mul_(-0.5).exp_()]
        for k in range(top):  # Hermite's recurrence: ℓ² g⁽ᵏ⁺¹⁾ = −d g⁽ᵏ⁾ − k g⁽ᵏ⁻¹⁾
            step = d * values[k]
            if k:
                step = step.add_(values[k - 1], alpha=k)
            values.append(step.div_(-square))
        return values
    alpha = math.sqrt(5) / lengthscale
    a = alpha * d.abs()
    decay = torch.exp(-a)
    third, a2 = alpha.square() / 3, a.square()
    terms: list[Callable[[], Tensor]] = [
        lambda: 1 + a + a2 / 3,
        lambda: -third * d * (1 + a),
        lambda: -third * (1 + a - a2),
        lambda: third * alpha.square() * d * (3 - a),
        lambda: third * alpha.square() * (3 - 5 * a + a2),
        lambda: third * alpha**3 * d.sign() * (7 * a - a2 - 8),
    ]
    return [term() * decay for term in terms[: top + 1]]


def wave(g: Sequence[Tensor], omega: Tensor | None, cosine: Tensor, sine: Tensor, n: int, *, by: str = "") -> Tensor:
    """Return the n-th derivative of g(d) cos(ωd), or with ``by="omega"`` its derivative in ω without that of cos(ωd).

    ``by="quadrature"`` puts cos(ωd + π/2) in the place of cos(ωd), which is the rest of the derivative in ω over d.
    """
    if omega is None:
        return g[n]
    parts: list[Tensor | None] = [None, None]
    for m in range(n + 1):
        coefficient = math.comb(n, m) * (-1) ** ((m + 1) // 2)  # of cos(ωd) for even m, of sin(ωd) for odd m
        if by == "omega":
            if m == 0:
                continue
            term = g[n - m] * (coefficient * m * omega ** (m - 1))
        else:
            term = g[n - m] * (coefficient * omega**m) if m else g[n]
        held = parts[m % 2]
        parts[m % 2] = term if held is None else held.add(term)
    even, odd = parts
    if by == "quadrature":
        cosine, sine = -sine, cosine
    if even is None:
        return torch.zeros_like(g[0]) if odd is None else odd * sine
    value = even * cosine
    return value if odd is None else value.addcmul_(odd, sine)


class _Column:
    """One column's factor of all components on one block of rows: (Q, b, r, n2) tensors, made when asked for."""

    def __init__(self, spectrum: str, x1: Tensor, x2: Tensor, ell: Tensor, omega: Tensor | None, n: int, more: int):
        self.n = n
        self.ell = ell[:, None, None, None]
        self.omega = None if omega is None else omega[:, None, None, None]
        self.d = x1.unsqueeze(-1) - x2.unsqueeze(-2)
        self.g = windows(spectrum, self.d.unsqueeze(0), self.ell, n + more)
        self.cosine = self.sine = self.d
        if omega is not None:
            first, second = omega[:, None, None] * x1, omega[:, None, None] * x2
            c1, s1 = first.cos().unsqueeze(-1), first.sin().unsqueeze(-1)
            c2, s2 = second.cos().unsqueeze(-2), second.sin().unsqueeze(-2)
            self.cosine = (c1 * c2).addcmul_(s1, s2)
            if n + more > 0:
                self.sine = (s1 * c2).addcmul_(c1, s2, value=-1)

    def value(self, more: int = 0) -> Tensor:
        return wave(self.g, self.omega, self.cosine, self.sine, self.n + more)

    def by_log_lengthscale(self) -> Tensor:
        # g(d; ℓ) depends on d/ℓ, so that ℓ ∂g⁽ʲ⁾/∂ℓ = −j g⁽ʲ⁾ − d g⁽ʲ⁺¹⁾
        moved = [(self.d * self.g[j + 1]).add_(self.g[j], alpha=j).neg_() for j in range(self.n + 1)]
        return wave(moved, self.omega, self.cosine, self.sine, self.n)

    def by_omega(self) -> Tensor:
        turned = wave(self.g, self.omega, self.cosine, self.sine, self.n, by="quadrature").mul_(self.d)
        return turned.add_(wave(self.g, self.omega, self.cosine, self.sine, self.n, by="omega"))


class _MixtureGram(torch.autograd.Function):
    """K (B, n1, n2) of rows (B, n1, d) and (B, n2, d)."""

    @staticmethod
    def forward(ctx: Any, spectrum: str, orders: tuple[int, ...], *tensors: Any) -> Tensor:
        ctx.spectrum, ctx.orders = spectrum, orders
        ctx.save_for_backward(*tensors)
        X1, X2, weight, lengthscale, frequency = tensors
        K = X1.new_empty(X1.shape[0], X1.shape[1], X2.shape[1])
        for block in _blocks(X1, X2, len(weight)):
            product = _product(_columns(spectrum, orders, X1[block], X2[block[0]], lengthscale, frequency, 0))
            K[block] = (weight @ product.reshape(len(weight), -1)).reshape(product.shape[1:])
        return K

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        X1, X2, weight, lengthscale, frequency = ctx.saved_tensors
        by_x1, by_x2, by_weight, by_lengthscale = (torch.zeros_like(value) for value in ctx.saved_tensors[:4])
        by_frequency = None if frequency is None else torch.zeros_like(frequency)
        moves = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        for block in _blocks(X1, X2, len(weight)):
            columns = _columns(ctx.spectrum, ctx.orders, X1[block], X2[block[0]], lengthscale, frequency, 1)
            factors = [column.value() for column in columns]
            for j, column in enumerate(columns):
                others = grad[block]
                for other in factors[:j] + factors[j + 1 :]:
                    others = others * other
                if j == 0:
                    by_weight += _dot(others, factors[0])
                by_lengthscale[:, j] += weight * _dot(others, column.by_log_lengthscale()) / lengthscale[:, j]
                if by_frequency is not None and ctx.needs_input_grad[6]:
                    by_frequency[:, j] += 2 * math.pi * weight * _dot(others, column.by_omega())
                if moves:
                    slope = torch.tensordot(weight, others * column.value(1), 1)
                    by_x1[(*block, j)] += slope.sum(-1)
                    by_x2[block[0], :, j] -= slope.sum(-2)
        return None, None, by_x1, by_x2, by_weight, by_lengthscale, by_frequency


def _columns(
    spectrum: str, orders: tuple[int, ...], X1: Tensor, X2: Tensor, ell: Tensor, mu: Tensor | None, more: int
) -> list[_Column]:
    return [
        _Column(spectrum, X1[..., j], X2[..., j], ell[:, j], None if mu is None else 2 * math.pi * mu[:, j], n, more)
        for j, n in enumerate(orders)
    ]


def _product(columns: list[_Column]) -> Tensor:
    product = columns[0].value()
    for column in columns[1:]:
        product = product * column.value()
    return product


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Return the sum of products per component, (Q,)."""
    return (left * right).flatten(1).sum(1)


def _blocks(X1: Tensor, X2: Tensor, n_components: int) -> Iterator[tuple[slice, slice]]:
    """Yield slices of sets and of rows of X1, so that temporaries stay small."""
    limit = _CACHE_ELEMENTS.get(X1.device.type, _CACHE_ELEMENTS["cuda"])
    n_sets, n1 = X1.shape[:2]
    row = max(1, n_components * X2.shape[1])
    rows = min(max(1, n1), max(1, limit // row))
    sets = max(1, limit // (row * rows))
    for first in range(0, n_sets, sets):
        for start in range(0, n1, rows):
            yield slice(first, first + sets), slice(start, start + rows)
