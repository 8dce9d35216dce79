"""Prior sample paths from random Fourier features.

``prior_paths`` expands an expression into summands of products and builds a function of X per draw. Products add
independent frequencies; a linear factor multiplies by a random slope.

References
----------
Wilson, Borovitskiy, Terenin, Mostowsky and Deisenroth (2020), Efficiently sampling functions from Gaussian process
posteriors, section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from gpytorch.kernels import (
    AdditiveKernel,
    ConstantKernel,
    Kernel,
    LinearKernel,
    ProductKernel,
    ScaleKernel,
    SpectralMixtureKernel,
)
from torch import Tensor

from mercer.kernels.mixture import MixtureKernel
from mercer.kernels.spectral import normal, row, sample_frequencies
from mercer.policy import NumericalPolicy

GROUPS = 32  # of paths with frequencies of their own


def prior_paths(
    kernel: Kernel,
    n_paths: int,
    n_features: int,
    generator: torch.Generator,
    *,
    d: int,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> PriorPaths:
    """Draw functions from the prior with mean zero.

    Parameters
    ----------
    kernel : gpytorch Kernel
        An expression for which :func:`has_spectral` holds; its parameters are read once, without gradient.
    n_paths : int
        Number of functions.
    n_features : int
        Number of random features, shared evenly by the summands; each frequency uses two (sine and cosine).
    generator : torch.Generator
        Source of randomness, on the CPU.
    d : int
        Number of columns of X.
    dtype, device : those of the X that the paths will meet

    Returns
    -------
    PriorPaths
        Call it on X (n, d) for values (n_paths, n), in units of f.

    Raises
    ------
    TypeError
        Some part has no spectral rule.

    Notes
    -----
    Up to ``GROUPS`` paths have frequencies of their own, more share them in so many groups. Over generators the
    covariance of paths is exact; the average over many paths of one call errs by O(1/√(GROUPS n_features)) of the
    prior variance. Linear and constant summands are exact.
    """
    summands = _expand(kernel, torch.arange(d))
    features = [summand.draw(d, n_paths, n_features // len(summands), generator) for summand in summands]
    return PriorPaths([feature.to(dtype, torch.device(device)) for feature in features])


class PriorPaths:
    """Functions drawn from a prior, deterministic once drawn; see :func:`prior_paths`."""

    def __init__(self, features: list[_Features]) -> None:
        self.features = features
        self.n_paths = features[0].n_paths

    def __call__(self, X: Tensor, policy: NumericalPolicy | None = None) -> Tensor:
        """Evaluate all functions at X (n, d); (n_paths, n), differentiable in X."""
        width = max(feature.width for feature in self.features)
        rows = (policy or NumericalPolicy()).chunk_rows(width)
        return torch.cat([self._evaluate(part) for part in X.split(rows)], -1)

    def _evaluate(self, X: Tensor) -> Tensor:
        total = self.features[0](X)
        for feature in self.features[1:]:
            total = total + feature(X)
        return total


@dataclass
class _Features:
    """One summand: f(x) = Σ_j w_j φ_j(x), φ = amplitude · Π_l(x·slope_l) · [cos(xω), sin(xω)], or Π alone.

    Random slopes and frequencies (G, n, d) and their weights (G, p, n or 2n) come in G groups of p paths, exact
    slopes (n, d) and weights (n_paths, n) in none.
    """

    n_paths: int
    slopes: list[Tensor]
    frequencies: Tensor | None
    weights: Tensor
    amplitude: float

    @property
    def width(self) -> int:
        """Elements of one row of features."""
        return self.weights.shape[-1] * self.weights.shape[:-2].numel()

    def to(self, dtype: torch.dtype, device: torch.device) -> _Features:
        frequencies = None if self.frequencies is None else self.frequencies.to(device, dtype)
        slopes = [slope.to(device, dtype) for slope in self.slopes]
        return _Features(self.n_paths, slopes, frequencies, self.weights.to(device, dtype), self.amplitude)

    def __call__(self, X: Tensor) -> Tensor:
        product = X.new_full((X.shape[0], 1), self.amplitude)
        for slope in self.slopes:
            product = product * (X @ slope.mT)
        if self.frequencies is not None:
            angle = X @ self.frequencies.mT
            product = torch.cat([product * angle.cos(), product * angle.sin()], -1)
        values = self.weights @ product.mT
        return values.reshape(-1, X.shape[0])[: self.n_paths]


@dataclass
class _Summand:
    """A product of leaves, each with the columns of X that it sees, times a variance."""

    variance: float = 1.0
    leaves: list[tuple[Kernel, Tensor]] = field(default_factory=list)

    def times(self, other: _Summand) -> _Summand:
        return _Summand(self.variance * other.variance, self.leaves + other.leaves)

    def draw(self, d: int, n_paths: int, n_features: int, generator: torch.Generator) -> _Features:
        """Draw frequencies, slopes and weights."""
        linear = [(leaf, columns) for leaf, columns in self.leaves if isinstance(leaf, LinearKernel)]
        waves = [(leaf, columns) for leaf, columns in self.leaves if not isinstance(leaf, LinearKernel)]
        if not waves and len(linear) <= 1:
            # A linear function has finitely many weights, one per column: no approximation.
            slopes = [
                _scatter(torch.diag(row(leaf.variance).sqrt()[0].expand(len(columns))), columns, d)
                for leaf, columns in linear
            ]
            size = slopes[0].shape[0] if slopes else 1
            return _Features(n_paths, slopes, None, normal(n_paths, size, generator), math.sqrt(self.variance))
        n = max(1, n_features // 2 if waves else n_features)
        groups = min(n_paths, GROUPS)
        total = groups * n
        slopes = [
            _scatter(normal(total, len(columns), generator) * row(leaf.variance).sqrt(), columns, d)
            for leaf, columns in linear
        ]
        frequencies = torch.zeros(total, d, dtype=torch.float64)
        for leaf, columns in waves:
            frequencies += _scatter(sample_frequencies(leaf, len(columns), total, generator), columns, d)
        size = -(-n_paths // groups)
        weights = normal(groups * size, 2 * n if waves else n, generator).reshape(groups, size, -1)
        return _Features(
            n_paths,
            [slope.reshape(groups, n, d) for slope in slopes],
            frequencies.reshape(groups, n, d) if waves else None,
            weights,
            math.sqrt(self.variance / n),
        )


def _expand(kernel: Kernel, columns: Tensor) -> list[_Summand]:
    """Multiply an expression out into summands; ``columns`` are those of X that the node may select from."""
    if kernel.active_dims is not None:
        columns = columns[kernel.active_dims.cpu()]
    return _expand_selected(kernel, columns)


def _expand_selected(kernel: Kernel, columns: Tensor) -> list[_Summand]:
    if len(kernel.batch_shape):
        raise TypeError("kernel has a batch shape; draw paths for each of its members.")
    if isinstance(kernel, ScaleKernel):
        scale = _Summand(kernel.outputscale.item())
        return [scale.times(summand) for summand in _expand_selected(kernel.base_kernel, columns)]
    if isinstance(kernel, AdditiveKernel):
        return [summand for part in kernel.kernels for summand in _expand(part, columns)]
    if isinstance(kernel, ProductKernel):
        product = [_Summand()]
        for part in kernel.kernels:
            product = [left.times(right) for left in product for right in _expand(part, columns)]
        return product
    if isinstance(kernel, ConstantKernel):
        return [_Summand(kernel.constant.item())]
    variance = 1.0
    if isinstance(kernel, SpectralMixtureKernel):
        variance = kernel.mixture_weights.sum().item() ** len(columns)
    if isinstance(kernel, MixtureKernel):
        variance = kernel.weight.sum().item()
    return [_Summand(variance, [(kernel, columns)])]


def _scatter(values: Tensor, columns: Tensor, d: int) -> Tensor:
    """Place values for some columns among all d."""
    return values.new_zeros(values.shape[0], d).index_add_(1, columns, values)
