"""One axis of a grid: its nodes, and what a kernel knows about a function that is given on them.

A product kernel over a grid factorises, so that derivatives and interpolation are matrices of one axis at a time. With
C = K + εI, ∂ⁿ of the interpolant at the nodes is D_n = K⁽ⁿ⁾ C⁻¹. Points off the nodes are predicted with a nugget of
their own: values that solve an equation are known to some error only, which C⁻¹ would magnify by 1/ε.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mercer.kernels import Kernel, derivative_gram, has_derivatives
from mercer.linalg.cholesky import NotPositiveDefiniteError
from mercer.linalg.kronecker import kron_cholesky, kron_matvec

NUGGET = 1e-12  # of derivatives at nodes, relative to the prior variance
_NUGGETS = 10.0 ** -torch.arange(2.0, 15.0, dtype=torch.float64)  # tried for predictions, the smoothest first
_RAISES = 6  # of the nugget
_UNIFORM = 1e-9  # of the spacing
_AS_GOOD = 1.5  # times the least squared error
_COLUMNS = 256  # of values along an axis that choose its nugget


class Axis:
    """Nodes of one axis with a kernel of one column.

    Parameters
    ----------
    nodes : (N,), float64
        In order, at least three.
    kernel : gpytorch Kernel
        Sees one column; differentiable as often as it will be asked to be.
    nugget : float
        ε relative to k(0), raised tenfold until C can be factored (``nugget`` is the one used).
    number : int
        Which axis it is, for messages.

    Raises
    ------
    TypeError
        Nodes are not float64, or the kernel has no derivatives.
    ValueError
        The kernel has several columns.
    NotPositiveDefiniteError
        The kernel is too smooth for so many nodes, even with a millionfold nugget.
    """

    def __init__(self, nodes: Tensor, kernel: Kernel, nugget: float = NUGGET, number: int = 0):
        if nodes.dtype != torch.float64:
            raise TypeError(f"nodes must be float64, got {nodes.dtype}: fast waves leave float32 no digit of u''.")
        if not has_derivatives(kernel):
            raise TypeError(f"kernel {type(kernel).__name__} has no rule for derivatives; use GaussianMixture or RBF.")
        self.nodes, self.kernel = nodes, kernel
        self._known: dict[int, Tensor] = {}
        with torch.no_grad():
            try:
                K = self.gram(0)
            except ValueError as error:
                raise ValueError(f"a grid takes one kernel of one column per axis; axis {number}: {error}") from None
            self.scale = float(K.diagonal().mean())
            for power in range(_RAISES + 1):
                self.nugget = nugget * 10.0**power
                try:
                    self.factor = factor(K, self.nugget, number)
                    break
                except NotPositiveDefiniteError:
                    if power == _RAISES:
                        raise

    def __len__(self) -> int:
        return len(self.nodes)

    def gram(self, order: int) -> Tensor:
        """Return Cov(∂ⁿ u(x_i), u(x_j)) at the nodes, (N, N), differentiable in the hyperparameters."""
        return node_gram(self.kernel, self.nodes, order)

    def cross(self, points: Tensor, order: int) -> Tensor:
        """Return Cov(∂ⁿ u(x*_i), u(x_j)) for points (M,), (M, N)."""
        return derivative_gram(self.kernel, points[:, None], self.nodes[:, None], (order,), (0,))

    @torch.no_grad()
    def derivative(self, order: int) -> Tensor:
        """Return D_n = K⁽ⁿ⁾ C⁻¹, (N, N); the identity for order 0."""
        if order not in self._known:
            if order == 0:
                self._known[0] = torch.eye(len(self), dtype=torch.float64, device=self.nodes.device)
            else:
                self._known[order] = torch.cholesky_solve(self.gram(order).mT, self.factor).mT
        return self._known[order]


def factor(K: Tensor, nugget: float, number: int) -> Tensor:
    """Return the lower factor of K + ε I of one axis, ε relative to the mean of K's diagonal; differentiable in K."""
    eye = torch.eye(len(K), dtype=K.dtype, device=K.device)
    try:
        (L,) = kron_cholesky([K + nugget * K.diagonal().mean() * eye])
    except NotPositiveDefiniteError:
        raise NotPositiveDefiniteError(
            f"the covariance along axis {number} cannot be factored with a nugget of {nugget:g} k(0): its {len(K)} "
            "nodes are nearly the same to so smooth a kernel. Take fewer nodes there, or a rougher or shorter kernel."
        ) from None
    return L


def node_gram(kernel: Kernel, nodes: Tensor, order: int) -> Tensor:
    """Return Cov(∂ⁿ u(x_i), u(x_j)) at nodes (N,), (N, N); of a stationary kernel at even nodes from N lags."""
    x, spacing = nodes[:, None], nodes.diff()
    step = (nodes[-1] - nodes[0]) / (len(nodes) - 1)
    even = bool((spacing - step).abs().max() <= _UNIFORM * step.abs())
    if not even or not bool(getattr(kernel, "is_stationary", False)):
        return derivative_gram(kernel, x, x, (order,), (0,))
    lags = derivative_gram(kernel, x - x[:1], torch.zeros_like(x[:1]), (order,), (0,))[:, 0]
    return toeplitz(lags, order)


def toeplitz(lags: Tensor, order: int) -> Tensor:
    """Return the matrix of a covariance's n-th derivative from its values at lags 0, h, 2h, …: (−1)ⁿ below zero."""
    place = torch.arange(len(lags), device=lags.device)
    lag = place[:, None] - place
    return lags[lag.abs()] * lag.sign() if order % 2 else lags[lag.abs()]


class Interpolant:
    """A function on a box from its values on a grid, with the nugget that predicts them best.

    Parameters
    ----------
    axes : sequence of D Axis
    values : (N_1, …, N_D)
    nuggets : sequence of D floats, optional
        Relative to k(0); by leave-one-out along each axis if not given.

    Attributes
    ----------
    nuggets : tuple of float

    Notes
    -----
    The nugget should be at least (error of the values / amplitude)². That error is not known, but what it does is:
    values left out one at a time are predicted the worse the more C⁻¹ magnifies it.
    """

    @torch.no_grad()
    def __init__(self, axes: Sequence[Axis], values: Tensor, nuggets: Sequence[float] | None = None):
        self.axes, self.values = tuple(axes), values
        given = [None] * len(self.axes) if nuggets is None else nuggets
        self._bases = [
            _smoother(axis, values.movedim(j, 0).reshape(len(axis), -1), given[j]) for j, axis in enumerate(axes)
        ]
        self.nuggets = tuple(float(basis.nugget / axis.scale) for axis, basis in zip(axes, self._bases, strict=True))

    @torch.no_grad()
    def at(self, X: Tensor, index: Sequence[int], chunk: int = 2048) -> Tensor:
        """Return ∂^index u at points X (n, D), (n,)."""
        if not len(X):
            return self.values.new_zeros(0)
        rows, places = zip(*(self._rows(j, X[:, j], n) for j, n in enumerate(index)), strict=True)
        parts = []
        for block in zip(*(place.split(chunk) for place in places), strict=True):
            rest = self.values
            for j in reversed(range(len(self.axes))):
                P = rows[j][block[j]]
                # the first contraction shares its matrix product, those after it are row by row
                rest = rest @ P.mT if j == len(self.axes) - 1 else torch.einsum("...kn,nk->...n", rest, P)
            parts.append(rest)
        return torch.cat(parts)

    @torch.no_grad()
    def on(self, points: Sequence[Tensor], index: Sequence[int]) -> Tensor:
        """Return ∂^index u on the product of D sets of points (M_j,), (M_1, …, M_D)."""
        found = [self._rows(j, x, n) for j, (x, n) in enumerate(zip(points, index, strict=True))]
        return kron_matvec([rows[place] for rows, place in found], self.values)

    def _rows(self, j: int, x: Tensor, order: int) -> tuple[Tensor, Tensor]:
        """Return K⁽ⁿ⁾(x*, x) C⁻¹ for the different coordinates, and which of them each point has.

        These rows are of the size of one whatever the nugget. C⁻¹u is not: first that and then K would leave no digit.
        """
        unique, place = torch.unique(x, return_inverse=True)
        basis = self._bases[j]
        turned = self.axes[j].cross(unique, order) @ basis.vectors
        return (turned / (basis.values + basis.nugget)) @ basis.vectors.mT, place


class InterpolantSum:
    """The sum of interpolants of the same box."""

    def __init__(self, parts: Sequence[Interpolant]):
        self.parts = list(parts)
        self.nuggets = self.parts[0].nuggets

    def at(self, X: Tensor, index: Sequence[int]) -> Tensor:
        """Return ∂^index u at points X (n, D), (n,)."""
        return torch.stack([part.at(X, index) for part in self.parts]).sum(0)

    def on(self, points: Sequence[Tensor], index: Sequence[int]) -> Tensor:
        """Return ∂^index u on the product of D sets of points (M_j,), (M_1, …, M_D)."""
        return torch.stack([part.on(points, index) for part in self.parts]).sum(0)


class _Smoother(NamedTuple):
    """K = V Λ Vᵀ of one axis, and the η of predictions in the units of K."""

    values: Tensor
    vectors: Tensor
    nugget: Tensor


def _smoother(axis: Axis, columns: Tensor, given: float | None) -> _Smoother:
    """Choose η, unless given, by the leave-one-out error of columns of values (N, m).

    With one value left out its error is [C⁻¹u]_i / [C⁻¹]_ii. Ends are not counted: there it would be extrapolation.
    """
    values, vectors = torch.linalg.eigh(axis.gram(0))
    values = values.clamp_min(0.0)
    if given is not None:
        return _Smoother(values, vectors, values.new_tensor(given * axis.scale))
    turned = vectors.mT @ columns[:, :: max(1, columns.shape[1] // _COLUMNS)]
    ladder = _NUGGETS.to(values) * axis.scale
    losses = []
    for nugget in ladder:
        inverse = 1 / (values + nugget)
        error = (vectors @ (inverse[:, None] * turned)) / (vectors.square() @ inverse)[:, None]
        losses.append(error[1:-1].square().mean())
    loss = torch.stack(losses)
    # losses level off where the kernel has no more to say; the largest η there is the safest
    return _Smoother(values, vectors, ladder[(loss <= _AS_GOOD * loss.min()).nonzero()[0, 0]])
