"""Spectral measures of kernels: one registered rule per kernel type.

A stationary kernel is the characteristic function of a probability on frequencies (Bochner);
``sample_frequencies`` draws from it.

References
----------
Rahimi and Recht (2007), Random features for large-scale kernel machines.
"""

from __future__ import annotations

import math
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

from mercer.kernels.mixture import MixtureKernel


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
    return normal(n, d, generator) / row(kernel.lengthscale)


@sample_frequencies.register
def _(kernel: MaternKernel, d: int, n: int, generator: torch.Generator) -> Tensor:
    # Multivariate t with 2ν degrees of freedom, Rasmussen and Williams (2006), eq. 4.15.
    degrees = round(2 * kernel.nu)
    chi_square = normal(n, degrees, generator).square().sum(-1, keepdim=True)
    return normal(n, d, generator) * (degrees / chi_square).sqrt() / row(kernel.lengthscale)


@sample_frequencies.register
def _(kernel: RQKernel, d: int, n: int, generator: torch.Generator) -> Tensor:
    # (1 + r²/2α)^−α = E exp(−τ r²/2), τ gamma with shape and rate α; Rasmussen and Williams (2006), eq. 4.20.
    alpha = kernel.alpha.detach().double().cpu().reshape(1, 1)
    precision = torch._standard_gamma(alpha.expand(n, 1).contiguous(), generator=generator) / alpha
    return normal(n, d, generator) * precision.sqrt() / row(kernel.lengthscale)


@sample_frequencies.register
def _(kernel: PeriodicKernel, d: int, n: int, generator: torch.Generator) -> Tensor:
    # exp(−2 sin²(πΔ/p)/ℓ) = Σ_j e^−κ I_j(κ) cos(2πjΔ/p) with κ = 1/ℓ: the harmonic j is the difference of two
    # Poisson variables of mean κ/2 (Skellam distribution).
    rate = (0.5 / row(kernel.lengthscale)).expand(n, d).contiguous()
    harmonic = torch.poisson(rate, generator=generator) - torch.poisson(rate, generator=generator)
    return 2 * math.pi * harmonic / row(kernel.period_length)


@sample_frequencies.register
def _(kernel: CosineKernel, d: int, n: int, generator: torch.Generator) -> Tensor:
    if d != 1:
        raise TypeError("CosineKernel of a distance is a covariance in one dimension only; use active_dims.")
    return math.pi / row(kernel.period_length) * _signs(n, d, generator)


@sample_frequencies.register
def _(kernel: SpectralMixtureKernel, d: int, n: int, generator: torch.Generator) -> Tensor:
    # gpytorch multiplies one mixture per column, so that each column draws its own component.
    weights = kernel.mixture_weights.detach().double().cpu()
    means = kernel.mixture_means.detach().double().cpu().squeeze(-2)
    scales = kernel.mixture_scales.detach().double().cpu().squeeze(-2)
    component = torch.multinomial(weights, n * d, replacement=True, generator=generator).reshape(n, d)
    column = torch.arange(d).expand(n, d)
    cycles = means[component, column] + scales[component, column] * normal(n, d, generator)
    return 2 * math.pi * cycles * _signs(n, d, generator)


@sample_frequencies.register
def _(kernel: MixtureKernel, d: int, n: int, generator: torch.Generator) -> Tensor:
    component = torch.multinomial(kernel.weight.detach().double().cpu(), n, replacement=True, generator=generator)
    cycles, ell = (value.detach().double().cpu()[component] for value in (kernel.frequency, kernel.lengthscale))
    spread = normal(n, d, generator)
    if kernel.spectrum == "student":  # 5 degrees of freedom, in each column by itself
        spread = spread * (5 / normal(n * d, 5, generator).square().sum(-1)).sqrt().reshape(n, d)
    return spread / ell + 2 * math.pi * cycles * _signs(n, d, generator)


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


def normal(n: int, d: int, generator: torch.Generator) -> Tensor:
    """Return standard normal numbers (n, d) in float64."""
    return torch.randn(n, d, generator=generator, dtype=torch.float64)


def _signs(n: int, d: int, generator: torch.Generator) -> Tensor:
    """Make a one-sided measure symmetric, so that its transform is real and products stay right."""
    return 2.0 * torch.randint(2, (n, d), generator=generator) - 1.0


def row(parameter: Tensor) -> Tensor:
    """Return a (1, 1, d) parameter as (1, d), detached, where the drawing happens."""
    return parameter.detach().double().cpu().reshape(1, -1)
