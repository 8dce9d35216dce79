"""Every learnable parameter of a gpytorch module as a point θ on the real line.

This file decides the coordinate (logarithm for positive quantities), its default bounds, and the conversion
between θ and the raw tensor that gpytorch stores behind a constraint. Optimisers see θ only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gpytorch
import torch
from gpytorch.constraints import Interval
from torch import Tensor

from mercer._typing import Hyperparameter

# (last part of the name, bounds of the value). Inputs are standardised, so that lengthscales and periods are
# in units of the standard deviation of a column, and variances in units of the variance of y.
_BOUNDS: tuple[tuple[tuple[str, ...], tuple[float, float]], ...] = (
    (("lengthscale", "period_length", "period"), (1e-3, 1e4)),
    (("outputscale", "variance", "constant"), (1e-6, 1e6)),
    (("weight",), (1e-12, 1e6)),  # of one component among many, which may be pruned
    (("frequency",), (1e-4, 1e4)),
)
_OTHER_POSITIVE = (1e-5, 1e5)
_UNCONSTRAINED = (-1e3, 1e3)
# How far inside an open interval θ has to stay, relative to the bound or to the width.
_MARGIN = 1e-6


def hyperparameters(module: gpytorch.Module) -> list[Hyperparameter]:
    """List the learnable parameters of a kernel or mean in the order of ``named_parameters``.

    Parameters
    ----------
    module : gpytorch Module
        Parameters with ``requires_grad=False`` are fixed and left out; a shared parameter appears once.

    Returns
    -------
    list of Hyperparameter
        ``name`` is the dotted path without ``raw_``, such as ``"base_kernel.lengthscale"``. A parameter
        bounded below by zero or more has θ = log(value); one that may be negative has θ = value.
        ``log_prior`` evaluates the gpytorch prior registered for it at its present value, in nats.
    """
    found = []
    module = unwrapped(module)
    for path, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        prefix, _, leaf = path.rpartition(".")
        owner = module.get_submodule(prefix)
        name = f"{prefix}.{leaf.removeprefix('raw_')}".lstrip(".")
        constraint = getattr(owner, f"{leaf}_constraint", None)
        found.append(_hyperparameter(name, parameter, constraint, _log_prior(owner, leaf)))
    return found


def unwrapped(module: gpytorch.Module) -> gpytorch.Module:
    """Return the kernel or mean of f, where ``module`` is that of rows that observe derivatives too."""
    return getattr(module, "wrapped", module)


def inverse_softplus(value: Tensor) -> Tensor:
    """Invert torch's softplus, log(1 + eˣ), for values from 1e-300 on.

    torch replaces softplus(x) by x above its threshold 20; so does the inverse, which keeps the round trip
    exact.
    """
    return torch.where(value > 20.0, value, value + torch.log(-torch.expm1(-value)))


def _hyperparameter(
    name: str,
    parameter: torch.nn.Parameter,
    constraint: Interval | None,
    log_prior: Callable[[], Tensor] | None,
) -> Hyperparameter:
    if constraint is None:
        return Hyperparameter(name, parameter, _identity, _identity, *_UNCONSTRAINED, False, log_prior)
    low, high = constraint.lower_bound.detach(), constraint.upper_bound.detach()
    if bool((low >= 0).all()):
        lower, upper = _positive_bounds(name, low, high)
        return Hyperparameter(
            name,
            parameter,
            lambda storage: constraint.transform(storage).log(),
            lambda theta: to_raw(constraint, theta.exp()),
            _plain(lower.log()),
            _plain(upper.log()),
            True,
            log_prior,
        )
    width = torch.where((high - low).isfinite(), high - low, torch.ones_like(low))
    return Hyperparameter(
        name,
        parameter,
        constraint.transform,
        partial(to_raw, constraint),
        _plain((low + _MARGIN * width).clamp_min(_UNCONSTRAINED[0])),
        _plain((high - _MARGIN * width).clamp_max(_UNCONSTRAINED[1])),
        False,
        log_prior,
    )


def _positive_bounds(name: str, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return bounds of a positive value: the default range, inside the constraint."""
    default_low, default_high = _default_bounds(name)
    lower = (low * (1 + _MARGIN)).clamp_min(default_low)
    upper = (high * (1 - _MARGIN)).clamp_max(default_high)
    # A constraint that lies outside the default range replaces it.
    outside = lower >= upper
    own_lower = torch.where(low > 0, low * (1 + _MARGIN), 1e-6 * high)
    lower = torch.where(outside, own_lower, lower)
    upper = torch.where(outside, torch.minimum(high * (1 - _MARGIN), 1e6 * own_lower), upper)
    return lower, upper


def to_raw(constraint: Interval, value: Tensor) -> Tensor:
    """Invert ``constraint.transform`` without the cancellation of gpytorch's own inverse.

    Parameters
    ----------
    constraint : gpytorch Interval or a class derived from it
    value : Tensor
        Values of the parameter; those on a bound are stored as close to it as the dtype can say.

    Returns
    -------
    Tensor
        The raw tensor that gpytorch stores; differentiable.
    """
    if not constraint.enforced:
        return value
    low, high = constraint.lower_bound.to(value), constraint.upper_bound.to(value)
    tiny = torch.finfo(value.dtype).tiny
    if isinstance(constraint._transform, torch.nn.Softplus):
        if bool(high.isinf().all()):
            return inverse_softplus((value - low).clamp_min(tiny))
        return -inverse_softplus((high - value).clamp_min(tiny))
    if constraint._transform is torch.sigmoid:
        return (value - low).clamp_min(tiny).log() - (high - value).clamp_min(tiny).log()
    return constraint.inverse_transform(value)


def _log_prior(owner: Any, leaf: str) -> Callable[[], Tensor] | None:
    """Collect the priors that ``owner`` registers for one of its parameters.

    gpytorch names a prior after its parameter; one with a free name counts for the first parameter of its
    module.
    """
    plain = leaf.removeprefix("raw_")
    own = [name for name, _ in owner.named_parameters(recurse=False)]
    known = {f"{name.removeprefix('raw_')}_prior" for name in own} | {f"{name}_prior" for name in own}
    terms = [
        (prior, closure)
        for name, (prior, closure, _) in getattr(owner, "_priors", {}).items()
        if prior is not None and (name in (f"{plain}_prior", f"{leaf}_prior") or (name not in known and leaf == own[0]))
    ]
    if not terms:
        return None
    return lambda: torch.stack([prior.log_prob(closure(owner)).sum() for prior, closure in terms]).sum()


def _default_bounds(name: str) -> tuple[float, float]:
    last = name.rpartition(".")[2]
    for names, bounds in _BOUNDS:
        if last in names:
            return bounds
    return _OTHER_POSITIVE


def _identity(value: Tensor) -> Tensor:
    return value


def _plain(value: Tensor) -> float | Tensor:
    """Prefer a float to a tensor of one element."""
    return value.item() if value.numel() == 1 else value
