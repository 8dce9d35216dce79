"""Spectral measures of kernels, and prior sample paths from random Fourier features.

A stationary kernel is the characteristic function of a probability on frequencies (Bochner).
``sample_frequencies`` draws from it, one registered rule per kernel type; ``prior_paths`` expands an
expression into summands of products and builds a function of X per draw. Products add independent
frequencies; a linear factor multiplies by a random slope.

References
----------
Rahimi and Recht (2007), Random features for large-scale kernel machines. Wilson, Borovitskiy, Terenin,
Mostowsky and Deisenroth (2020), Efficiently sampling functions from Gaussian process posteriors, section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import singledispatch

import torch
from gpytorch.kernels import (
    AdditiveKernel,
    ConstantKernel,
    CosineKernel,
    Kernel,
    LinearKernel,
    MaternKernel,
    PeriodicKernel,
    ProductKernel,
    RBFKernel,
    RQKernel,
    ScaleKernel,
    SpectralMixtureKernel,
)
from torch import Tensor

from mercer.policy import NumericalPolicy


@singledispatch
def sample_frequencies(kernel: Kernel, d: int, n: int, generator: torch.Generator) -> Tensor:
    """Draw angular frequencies ω with k(x, x′) = k(0)·E cos(ωᵀ(x − x′)).

    Register a rule for a new stationary kernel with ``@sample_frequencies.register``.

    Parameters
    ----------
    kernel : gpytorch Kernel without scale, sum or product
    d : int
        Number of columns that the leaf sees.
    n : int
        Number of draws.
    generator : torch.Generator
        Source of randomness, on the CPU.

    Returns
    -------
    Tensor
        (n, d), float64 on the CPU, in radians per unit of X.

    Raises
    ------
    TypeError
        The kernel type has no rule.
    """
    name = type(kernel).__name__
    raise TypeError(f"kernel {name} has no spectral rule; register one with sample_frequencies.")


@sample_frequencies.register
def _(kernel: RBFKernel, d: int, n: int, generator: torch.Generator) -> Tensor:
    return _normal(n, d, generator) / _row(kernel.lengthscale)


@sample_frequencies.register
def _(kernel: MaternKernel, d: int, n: int, generator: torch.Generator) -> Tensor:
    # Multivariate t with 2ν degrees of freedom, Rasmussen and Williams (2006), eq. 4.15.
    degrees = round(2 * kernel.nu)
    chi_square = _normal(n, degrees, generator).square().sum(-1, keepdim=True)
    return _normal(n, d, generator) * (degrees / chi_square).sqrt() / _row(kernel.lengthscale)


@sample_frequencies.register
def _(kernel: RQKernel, d: int, n: int, generator: torch.Generator) -> Tensor:
    # (1 + r²/2α)^−α = E exp(−τ r²/2), τ gamma with shape and rate α; Rasmussen and Williams (2006), eq. 4.20.
    alpha = kernel.alpha.detach().double().cpu().reshape(1, 1)
    precision = torch._standard_gamma(alpha.expand(n, 1).contiguous(), generator=generator) / alpha
    return _normal(n, d, generator) * precision.sqrt() / _row(kernel.lengthscale)


@sample_frequencies.register
def _(kernel: PeriodicKernel, d: int, n: int, generator: torch.Generator) -> Tensor:
    # exp(−2 sin²(πΔ/p)/ℓ) = Σ_j e^−κ I_j(κ) cos(2πjΔ/p) with κ = 1/ℓ: the harmonic j is the difference of two
    # Poisson variables of mean κ/2 (Skellam distribution).
    rate = (0.5 / _row(kernel.lengthscale)).expand(n, d).contiguous()
    harmonic = torch.poisson(rate, generator=generator) - torch.poisson(rate, generator=generator)
    return 2 * math.pi * harmonic / _row(kernel.period_length)


@sample_frequencies.register
def _(kernel: CosineKernel, d: int, n: int, generator: torch.Generator) -> Tensor:
    if d != 1:
        raise TypeError("CosineKernel of a distance is a covariance in one dimension only; use active_dims.")
    return math.pi / _row(kernel.period_length) * _signs(n, d, generator)


@sample_frequencies.register
def _(kernel: SpectralMixtureKernel, d: int, n: int, generator: torch.Generator) -> Tensor:
    # gpytorch multiplies one mixture per column, so that each column draws its own component.
    weights = kernel.mixture_weights.detach().double().cpu()
    means = kernel.mixture_means.detach().double().cpu().squeeze(-2)
    scales = kernel.mixture_scales.detach().double().cpu().squeeze(-2)
    component = torch.multinomial(weights, n * d, replacement=True, generator=generator).reshape(n, d)
    column = torch.arange(d).expand(n, d)
    cycles = means[component, column] + scales[component, column] * _normal(n, d, generator)
    return 2 * math.pi * cycles * _signs(n, d, generator)


def has_spectral(kernel: Kernel) -> bool:
    """Say whether :func:`prior_paths` knows every part of an expression."""
    if len(kernel.batch_shape):
        return False
    if isinstance(kernel, ScaleKernel):
        return has_spectral(kernel.base_kernel)
    if isinstance(kernel, (AdditiveKernel, ProductKernel)):
        return all(has_spectral(part) for part in kernel.kernels)
    if isinstance(kernel, CosineKernel):
        return kernel.active_dims is not None and len(kernel.active_dims) == 1
    # Exact types: a subclass may mean another covariance.
    return type(kernel) in (LinearKernel, ConstantKernel, *sample_frequencies.registry)


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
    The covariance of the paths errs by O(1/√n_features); linear and constant summands are exact.
    """
    summands = _expand(kernel, torch.arange(d))
    features = [summand.draw(d, n_paths, n_features // len(summands), generator) for summand in summands]
    return PriorPaths([feature.to(dtype, torch.device(device)) for feature in features])


class PriorPaths:
    """Functions drawn from a prior, deterministic once drawn; see :func:`prior_paths`."""

    def __init__(self, features: list[_Features]) -> None:
        self.features = features
        self.n_paths = features[0].weights.shape[0]

    def __call__(self, X: Tensor, policy: NumericalPolicy | None = None) -> Tensor:
        """Evaluate all functions at X (n, d); (n_paths, n), differentiable in X."""
        width = max(feature.weights.shape[-1] for feature in self.features)
        rows = (policy or NumericalPolicy()).chunk_rows(width)
        return torch.cat([self._evaluate(part) for part in X.split(rows)], -1)

    def _evaluate(self, X: Tensor) -> Tensor:
        total = self.features[0](X)
        for feature in self.features[1:]:
            total = total + feature(X)
        return total


@dataclass
class _Features:
    """One summand: f(x) = Σ_j w_j φ_j(x), φ = amplitude · Π_l(x·slope_l) · [cos(xω), sin(xω)], or Π alone."""

    slopes: list[Tensor]
    frequencies: Tensor | None
    weights: Tensor
    amplitude: float

    def to(self, dtype: torch.dtype, device: torch.device) -> _Features:
        frequencies = None if self.frequencies is None else self.frequencies.to(device, dtype)
        slopes = [slope.to(device, dtype) for slope in self.slopes]
        return _Features(slopes, frequencies, self.weights.to(device, dtype), self.amplitude)

    def __call__(self, X: Tensor) -> Tensor:
        product = X.new_full((X.shape[0], 1), self.amplitude)
        for slope in self.slopes:
            product = product * (X @ slope.mT)
        if self.frequencies is not None:
            angle = X @ self.frequencies.mT
            product = torch.cat([product * angle.cos(), product * angle.sin()], -1)
        return self.weights @ product.mT


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
                _scatter(torch.diag(_row(leaf.variance).sqrt()[0].expand(len(columns))), columns, d)
                for leaf, columns in linear
            ]
            size = slopes[0].shape[0] if slopes else 1
            return _Features(slopes, None, _normal(n_paths, size, generator), math.sqrt(self.variance))
        n = max(1, n_features // 2 if waves else n_features)
        slopes = [
            _scatter(_normal(n, len(columns), generator) * _row(leaf.variance).sqrt(), columns, d)
            for leaf, columns in linear
        ]
        frequencies = torch.zeros(n, d, dtype=torch.float64)
        for leaf, columns in waves:
            frequencies += _scatter(sample_frequencies(leaf, len(columns), n, generator), columns, d)
        weights = _normal(n_paths, 2 * n if waves else n, generator)
        return _Features(slopes, frequencies if waves else None, weights, math.sqrt(self.variance / n))


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
    return [_Summand(variance, [(kernel, columns)])]


def _scatter(values: Tensor, columns: Tensor, d: int) -> Tensor:
    """Place values for some columns among all d."""
    return values.new_zeros(values.shape[0], d).index_add_(1, columns, values)


def _normal(n: int, d: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, d, generator=generator, dtype=torch.float64)


def _signs(n: int, d: int, generator: torch.Generator) -> Tensor:
    """Make a one-sided measure symmetric, so that its transform is real and products stay right."""
    return 2.0 * torch.randint(2, (n, d), generator=generator) - 1.0


def _row(parameter: Tensor) -> Tensor:
    """Return a (1, 1, d) parameter as (1, d), detached, where the drawing happens."""
    return parameter.detach().double().cpu().reshape(1, -1)
