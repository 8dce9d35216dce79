"""A kernel meets the columns of X: names, one lengthscale per column, an amplitude on every summand.

This file decides structure only; values and units are :mod:`mercer.kernels.units`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy

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

from mercer.kernels.mixture import MixtureKernel

# Leaves with a variance of their own.
_CARRIES_AMPLITUDE = (ScaleKernel, LinearKernel, ConstantKernel, SpectralMixtureKernel, MixtureKernel)


def prepare(kernel: Kernel, n_features: int, feature_names: Sequence[str] | None = None) -> tuple[Kernel, list[str]]:
    """Return a copy of the kernel that fits the columns of X.

    Column names are resolved, deferred lengthscales get one entry per active column, and every summand
    without an amplitude of its own gets one.

    Parameters
    ----------
    kernel : gpytorch Kernel
        Left untouched.
    n_features : int
        Number of columns of X.
    feature_names : sequence of str, optional
        Column names, if X had any.

    Returns
    -------
    kernel : gpytorch Kernel
        float64 copy.
    notes : list of str
        What was added, one sentence each.

    Raises
    ------
    ValueError
        A column does not exist, or lengthscales and columns differ in number.
    """
    kernel = deepcopy(kernel).to(torch.float64)
    notes: list[str] = []
    _untie(kernel, set(), notes)
    _fit_columns(kernel, list(range(n_features)), feature_names)
    return _with_amplitude(kernel, notes), notes


def _untie(kernel: Kernel, seen: set[int], notes: list[str]) -> None:
    """Give each place of an expression its own kernel: two places may need different units and columns."""
    places: list[tuple[torch.nn.Module, str]] = []
    if isinstance(kernel, ScaleKernel):
        places = [(kernel, "base_kernel")]
    elif isinstance(kernel, (AdditiveKernel, ProductKernel)):
        places = [(kernel.kernels, str(index)) for index in range(len(kernel.kernels))]
    for owner, name in places:
        part = owner.get_submodule(name)
        if id(part) in seen:
            part = deepcopy(part)
            setattr(owner, name, part)
            notes.append(f"{type(part).__name__} appears twice; its parameters are learned separately.")
        seen.add(id(part))
        _untie(part, seen, notes)


def _fit_columns(kernel: Kernel, visible: list[int], names: Sequence[str] | None) -> None:
    """Resolve names and sizes and check them; ``visible`` holds the columns of X that the node sees."""
    wanted = getattr(kernel, "active_columns", None)
    if wanted is not None:
        kernel.active_dims = torch.tensor([_position(kernel, name, visible, names) for name in wanted])
        del kernel.active_columns
    if isinstance(kernel, ScaleKernel):
        base = kernel.base_kernel
        # gpytorch evaluates the base on the columns that the scale selects, so the two must agree.
        selected = _selected(kernel, visible) if base.active_dims is None else visible
        _fit_columns(base, selected, names)
        if base.active_dims is not None:
            kernel.active_dims = base.active_dims
        return
    visible = _selected(kernel, visible)
    for part in getattr(kernel, "kernels", []):
        _fit_columns(part, visible, names)
    n_columns = len(visible)
    if getattr(kernel, "ard_deferred", False):
        kernel.ard_deferred = False
        if isinstance(kernel, MixtureKernel):
            kernel.resize(n_columns)
        kernel.ard_num_dims = kernel.ard_num_dims or n_columns
        for leaf in ("raw_lengthscale", "raw_period_length", "raw_variance"):
            parameter = getattr(kernel, leaf, None)
            if isinstance(parameter, torch.nn.Parameter) and parameter.shape[-1] == 1:
                parameter.data = parameter.data.expand(*parameter.shape[:-1], n_columns).clone()
    if kernel.ard_num_dims is not None and kernel.ard_num_dims != n_columns:
        if isinstance(kernel, MixtureKernel):
            raise ValueError(
                f"kernel {kernel.short_name} has lengthscales and frequencies for {kernel.ard_num_dims} column(s) but "
                f"sees {n_columns} columns of X; give {n_columns} of each per component, or choose the columns with "
                "active_dims."
            )
        raise ValueError(
            f"kernel {type(kernel).__name__} has {kernel.ard_num_dims} lengthscales but sees {n_columns} "
            "columns of X; give one per column, one number for all, or choose the columns with active_dims."
        )


def _selected(kernel: Kernel, visible: list[int]) -> list[int]:
    if kernel.active_dims is None:
        return visible
    chosen = kernel.active_dims.tolist()
    if not chosen or max(chosen) >= len(visible) or min(chosen) < 0:
        raise ValueError(f"kernel {type(kernel).__name__} has active_dims={chosen} but X has {len(visible)} columns.")
    return [visible[index] for index in chosen]


def _position(kernel: Kernel, name: str, visible: list[int], names: Sequence[str] | None) -> int:
    """Return the position of a named column among those that the node sees."""
    if names is None:
        raise ValueError(
            f"kernel {type(kernel).__name__} selects the column {name!r} by name, but X has no column names; "
            "fit on a DataFrame or give active_dims as integers."
        )
    known = [names[index] for index in visible]
    if name not in known:
        raise ValueError(f"kernel {type(kernel).__name__}: X has no column {name!r}; it has {known}.")
    return known.index(name)


def has_amplitude(kernel: Kernel) -> bool:
    """Say whether the kernel has a variance parameter: each summand of a sum, some factor of a product."""
    combine: Callable[..., bool]
    if isinstance(kernel, (AdditiveKernel, ProductKernel)):
        combine = all if isinstance(kernel, AdditiveKernel) else any
        return combine(has_amplitude(part) for part in kernel.kernels)
    return isinstance(kernel, _CARRIES_AMPLITUDE)


def _with_amplitude(kernel: Kernel, notes: list[str]) -> Kernel:
    """Return the kernel with an amplitude on every summand."""
    if isinstance(kernel, (AdditiveKernel, ProductKernel)):
        for index, part in enumerate(kernel.kernels):
            if isinstance(kernel, AdditiveKernel) or isinstance(part, AdditiveKernel):
                kernel.kernels[index] = _with_amplitude(part, notes)
    if has_amplitude(kernel):
        return kernel
    notes.append(f"Added an outputscale to {type(kernel).__name__}.")
    return ScaleKernel(kernel).to(torch.float64)
