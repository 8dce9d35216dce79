"""Units of a kernel: those of the user's data, and those of the standardised data that models work on.

Users write lengthscales in the units of X and variances in units of y²; models work on standardised data.
This file decides the exact change of units, type by type (``rescale_leaf`` is open to registration), and the
values of parameters that nobody set.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import singledispatch

import gpytorch
import torch
from gpytorch.kernels import (
    AdditiveKernel,
    ConstantKernel,
    Kernel,
    LinearKernel,
    MaternKernel,
    PeriodicKernel,
    PiecewisePolynomialKernel,
    ProductKernel,
    RBFKernel,
    RQKernel,
    ScaleKernel,
    SpectralMixtureKernel,
)
from torch import Tensor

from mercer.kernels.adapt import has_amplitude
from mercer.kernels.hyperparameters import unwrapped
from mercer.kernels.mixture import MixtureKernel
from mercer.kernels.params import assign, is_unset, parameter_value


def to_model_units(kernel: Kernel, input_scale: Tensor, output_scale: float) -> list[str]:
    """Convert a prepared kernel from user units to standardised units, in place; fill in what was not set.

    Parameters
    ----------
    kernel : gpytorch Kernel
        From :func:`mercer.kernels.adapt.prepare`. Parameters that were set are in units of X and y².
    input_scale : (d,)
        Standard deviation of each column of X.
    output_scale : float
        Standard deviation of y.

    Returns
    -------
    list of str
        One sentence per thing that could not be converted and is therefore read in standardised units, or that
        has more entries than before.

    Notes
    -----
    Defaults, in standardised units: lengthscale √d clipped to [1, 8] for d active columns, period 1, α 1, and
    amplitudes that add up to one over the summands.
    """
    unset = {id(p): p for p in kernel.parameters() if is_unset(p)}
    sizes = {name: p.numel() for name, p in kernel.named_parameters()}
    unconverted = rescale(kernel, 1.0 / torch.as_tensor(input_scale), 1.0 / output_scale, skip=unset)
    summands = list(kernel.kernels) if isinstance(kernel, AdditiveKernel) else [kernel]
    for summand in summands:
        _set_defaults(summand, len(input_scale), 1.0 / len(summands), unset)
    notes = [f"The parameters of {name} are in standardised units." for name in unconverted]
    notes += [
        f"{name.replace('raw_', '')} was one number and is now one per column: the columns have different scales."
        for name, parameter in kernel.named_parameters()
        if parameter.numel() != sizes[name]
    ]
    notes += [f"The prior {name} applies to the value in standardised units." for name, *_ in kernel.named_priors()]
    return notes


def rescale(kernel: Kernel, input_scale: Tensor, output_scale: float, *, skip: Collection[int] = ()) -> list[str]:
    """Change units in place: k_new(X) = output_scale² · k_old(X / input_scale).

    Parameters
    ----------
    kernel : gpytorch Kernel
        Its parameters keep their identity; one lengthscale for all columns becomes one per column where the
        columns change by different factors.
    input_scale : (d,)
        Factor of each column of X, > 0.
    output_scale : float
        Factor of f, > 0.
    skip : collection of int
        ``id`` of the parameters to leave alone.

    Returns
    -------
    list of str
        Names of kernels without a rule, left in the old units.
    """
    scale = torch.as_tensor(input_scale, dtype=torch.float64).detach().cpu()
    return _rescale(unwrapped(kernel), scale, float(output_scale) ** 2, skip)


@singledispatch
def rescale_leaf(kernel: Kernel, scale: Tensor, variance: float, skip: Collection[int]) -> bool:
    """Change the units of one leaf; return whether that was possible.

    Register a rule for a new kernel with ``@rescale_leaf.register``. ``scale`` (d_active,) holds the factors
    of the columns that the leaf sees, ``variance`` the factor of f², which is 1 where an outer scale has
    taken it.
    """
    return all(id(p) in skip for p in kernel.parameters()) and variance == 1.0


@rescale_leaf.register(RBFKernel)
@rescale_leaf.register(MaternKernel)
@rescale_leaf.register(RQKernel)
@rescale_leaf.register(PiecewisePolynomialKernel)
def _(kernel: Kernel, scale: Tensor, variance: float, skip: Collection[int]) -> bool:
    _multiply(kernel, "raw_lengthscale", scale, skip)
    return variance == 1.0


@rescale_leaf.register
def _(kernel: PeriodicKernel, scale: Tensor, variance: float, skip: Collection[int]) -> bool:
    # The lengthscale divides sin², so it is dimensionless.
    _multiply(kernel, "raw_period_length", scale, skip)
    return variance == 1.0


@rescale_leaf.register
def _(kernel: LinearKernel, scale: Tensor, variance: float, skip: Collection[int]) -> bool:
    _multiply(kernel, "raw_variance", variance / scale.square(), skip)
    return True


@rescale_leaf.register
def _(kernel: ConstantKernel, scale: Tensor, variance: float, skip: Collection[int]) -> bool:
    _multiply(kernel, "raw_constant", torch.as_tensor([variance], dtype=scale.dtype), skip)
    return True


@rescale_leaf.register
def _(kernel: SpectralMixtureKernel, scale: Tensor, variance: float, skip: Collection[int]) -> bool:
    # Means and scales are frequencies. gpytorch multiplies the mixtures of the columns, weights included.
    _multiply(kernel, "raw_mixture_means", 1.0 / scale, skip)
    _multiply(kernel, "raw_mixture_scales", 1.0 / scale, skip)
    share = torch.as_tensor([variance ** (1.0 / len(scale))], dtype=scale.dtype)
    _multiply(kernel, "raw_mixture_weights", share, skip)
    return True


@rescale_leaf.register
def _(kernel: MixtureKernel, scale: Tensor, variance: float, skip: Collection[int]) -> bool:
    _multiply(kernel, "raw_weight", torch.as_tensor([variance], dtype=scale.dtype), skip)
    _multiply(kernel, "raw_lengthscale", scale, skip)
    if kernel.raw_frequency.numel():
        _multiply(kernel, "raw_frequency", (1.0 / scale).expand(kernel.moving.shape)[kernel.moving.cpu()], skip)
    return True


def _rescale(kernel: Kernel, scale: Tensor, variance: float, skip: Collection[int]) -> list[str]:
    """Walk the expression; ``variance`` is the factor still to be applied at or below this node."""
    if kernel.active_dims is not None:
        scale = scale[kernel.active_dims.cpu()]
    return _rescale_selected(kernel, scale, variance, skip)


def _rescale_selected(kernel: Kernel, scale: Tensor, variance: float, skip: Collection[int]) -> list[str]:
    if isinstance(kernel, ScaleKernel):
        _multiply(kernel, "raw_outputscale", torch.as_tensor([variance], dtype=scale.dtype), skip)
        # gpytorch has selected the columns of the base here already.
        return _rescale_selected(kernel.base_kernel, scale, 1.0, skip)
    if isinstance(kernel, AdditiveKernel):
        return [name for part in kernel.kernels for name in _rescale(part, scale, variance, skip)]
    if isinstance(kernel, ProductKernel):
        carrier = variance_carrier(kernel, skip)
        return [
            name
            for part in kernel.kernels
            for name in _rescale(part, scale, variance if part is carrier else 1.0, skip)
        ]
    return [] if rescale_leaf(kernel, scale, variance, skip) else [type(kernel).__name__]


def variance_carrier(product: ProductKernel, unset: Collection[int]) -> Kernel:
    """Choose the factor that carries the variance of a product: the first whose amplitude was set, if any.

    ``unset`` holds the ``id`` of the parameters that have no value yet.
    """
    carriers = [part for part in product.kernels if has_amplitude(part)] or list(product.kernels)
    explicit = [part for part in carriers if not _amplitude_unset(part, unset)]
    return (explicit or carriers)[0]


def _amplitude_unset(kernel: Kernel, unset: Collection[int]) -> bool:
    """Say whether no amplitude of the kernel was set."""
    if isinstance(kernel, (AdditiveKernel, ProductKernel)):
        return all(_amplitude_unset(part, unset) for part in kernel.kernels if has_amplitude(part))
    if isinstance(kernel, MixtureKernel):  # its lengthscales and frequencies say nothing of the variance
        return id(kernel.raw_weight) in unset
    return all(id(parameter) in unset for parameter in kernel.parameters(recurse=False))


def _multiply(owner: gpytorch.Module, leaf: str, factor: Tensor, skip: Collection[int]) -> None:
    """Multiply a parameter, and the bounds of its constraint, by one factor per column."""
    if id(getattr(owner, leaf)) in skip:
        # The bounds were written in user units even so; one common factor keeps the number of parameters.
        _scale_bounds(owner, leaf, factor.log().mean().exp())
        return
    parameter = getattr(owner, leaf)
    if bool((factor == factor[0]).all()):
        factor = factor[0]
    factor = factor.to(parameter)
    value = parameter_value(owner, leaf) * factor
    _scale_bounds(owner, leaf, factor)
    constraint = getattr(owner, f"{leaf}_constraint")
    # A value on its bound may leave it by one rounding.
    assign(owner, leaf, value.maximum(constraint.lower_bound).minimum(constraint.upper_bound))


def _scale_bounds(owner: gpytorch.Module, leaf: str, factor: Tensor) -> None:
    constraint = getattr(owner, f"{leaf}_constraint")
    for name in ("lower_bound", "upper_bound"):
        bound = getattr(constraint, name)
        if bool(((bound != 0) & bound.isfinite()).any()):
            setattr(constraint, name, bound * factor.to(bound))


def _set_defaults(kernel: Kernel, n_features: int, share: float, unset: dict[int, Tensor]) -> None:
    """Give every unset parameter its default; ``share`` is the prior variance that this node should have."""
    n_columns = n_features if kernel.active_dims is None else len(kernel.active_dims)
    if isinstance(kernel, ScaleKernel):
        _default(kernel, "raw_outputscale", share, unset)
        base = kernel.base_kernel
        parts = list(base.kernels) if isinstance(base, AdditiveKernel) else [base]
        for part in parts:
            _set_defaults(part, n_columns, 1.0 / len(parts), unset)
    elif isinstance(kernel, AdditiveKernel):
        for part in kernel.kernels:
            _set_defaults(part, n_columns, share / len(kernel.kernels), unset)
    elif isinstance(kernel, ProductKernel):
        carrier = variance_carrier(kernel, unset)
        for part in kernel.kernels:
            _set_defaults(part, n_columns, share if part is carrier else 1.0, unset)
    else:
        periodic = isinstance(kernel, PeriodicKernel)
        lengthscale = 1.0 if periodic else min(8.0, max(1.0, math.sqrt(n_columns)))
        _default(kernel, "raw_lengthscale", lengthscale, unset)
        _default(kernel, "raw_period_length", 1.0, unset)
        _default(kernel, "raw_alpha", 1.0, unset)
        _default(kernel, "raw_variance", share / n_columns, unset)
        _default(kernel, "raw_constant", share, unset)
        if isinstance(kernel, MixtureKernel):
            _default(kernel, "raw_weight", share / kernel.n_components, unset)
            if id(kernel.raw_frequency) in unset and kernel.raw_frequency.numel():
                # a period of one standard deviation, two, …; equal components would stay equal
                kernel.frequency = torch.arange(kernel.n_components).unsqueeze(-1).expand(kernel.moving.shape) / 2.0


def _default(owner: gpytorch.Module, leaf: str, value: float, unset: dict[int, Tensor]) -> None:
    parameter = getattr(owner, leaf, None)
    if parameter is None or id(parameter) not in unset:
        return
    constraint = getattr(owner, f"{leaf}_constraint")
    low, high = constraint.lower_bound, constraint.upper_bound
    # An own constraint that excludes the default moves it inside.
    inside = torch.as_tensor(value, dtype=low.dtype)
    middle = torch.where(high.isfinite(), (low + high) / 2, 2 * low + 1)
    inside = torch.where((inside > low) & (inside < high), inside, middle)
    assign(owner, leaf, inside)
