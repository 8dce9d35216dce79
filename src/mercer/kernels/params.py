"""Kernel parameters as plain numbers under scikit-learn's nested names, and a kernel as one line of text.

A parameter path is the attribute path with ``__`` between its parts, ``raw_`` left out:
``"base_kernel__lengthscale"``, ``"kernels__0__outputscale"``. A parameter that was never set (gpytorch stores
exact zeros) has the value None: it is chosen when the estimator is fitted.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import singledispatch
from typing import Any

import gpytorch
import torch
from gpytorch.kernels import AdditiveKernel, Kernel, MaternKernel, ProductKernel, RQKernel, ScaleKernel
from torch import Tensor

from mercer.kernels.hyperparameters import to_raw

_SHORT = {"raw_period_length": "period"}
_MATERN_NAMES = {0.5: "Matern12", 1.5: "Matern32", 2.5: "Matern52"}
# Parameters with one entry per column of X, which the number of columns may resize.
_PER_COLUMN = ("lengthscale", "period_length", "variance")


def kernel_params(kernel: Kernel) -> dict[str, Any]:
    """Return the values of all parameters, by path.

    Parameters
    ----------
    kernel : gpytorch Kernel

    Returns
    -------
    dict of str to float, list or None
        Values as the kernel uses them (not raw): a float for one number, a list for one number per column,
        nested lists beyond, None where nothing was set. Of a mixture a list has one entry per component.
    """
    values: dict[str, Any] = {}
    for path, owner, leaf in _parameters(kernel):
        values[path] = read_param(owner, leaf)
    return values


def set_kernel_param(kernel: Kernel, path: str, value: Any) -> None:
    """Set one parameter in place.

    Parameters
    ----------
    kernel : gpytorch Kernel
    path : str
        A key of :func:`kernel_params`.
    value : float, array-like or None
        One number for all entries, or one per entry. A list for a lengthscale (period, linear variance)
        resizes it to one number per column, but of a mixture it has one entry per component. None forgets the value.

    Raises
    ------
    ValueError
        The path is unknown, the value breaks the parameter's constraint, or its length does not fit.
    """
    known = {known_path: (owner, leaf) for known_path, owner, leaf in _parameters(kernel)}
    if path not in known:
        raise ValueError(f"kernel has no parameter {path!r}; it has {', '.join(sorted(known)) or 'none'}.")
    write_param(*known[path], value)


@singledispatch
def read_param(owner: gpytorch.Module, leaf: str) -> Any:
    """Return one parameter of a module as `kernel_params` does; register what a class shows otherwise."""
    parameter = getattr(owner, leaf)
    if leaf.startswith("raw_") and is_unset(parameter):
        return None
    value = parameter_value(owner, leaf)
    if value.numel() == 1:
        return value.item()
    return (value.squeeze(0) if value.dim() == 2 and value.shape[0] == 1 else value).tolist()


@singledispatch
def write_param(owner: gpytorch.Module, leaf: str, value: Any) -> None:
    """Set one parameter of a module as `set_kernel_param` does; register what a class reads otherwise."""
    if value is None:
        getattr(owner, leaf).data.zero_()
    else:
        assign(owner, leaf, torch.as_tensor(value, dtype=getattr(owner, leaf).dtype))


def describe(kernel: Kernel) -> str:
    """Return the kernel as an expression with its values, on one line.

    Examples
    --------
    >>> from mercer.kernels import Matern52, Periodic
    >>> describe(Matern52([0.3, 1.2], outputscale=4.41) + Periodic(1.0, 1.3, outputscale=0.25))
    '2.1² * Matern52(lengthscale=[0.3, 1.2]) + 0.5² * Periodic(lengthscale=1.3, period=1)'
    """
    if isinstance(kernel, ScaleKernel):
        amplitude = "σ²" if is_unset(kernel.raw_outputscale) else f"{_text(kernel.outputscale.sqrt())}²"
        return f"{amplitude} * {_factor(kernel.base_kernel)}"
    if isinstance(kernel, AdditiveKernel):
        return " + ".join(describe(part) for part in kernel.kernels)
    if isinstance(kernel, ProductKernel):
        return " * ".join(_factor(part) for part in kernel.kernels)
    arguments = [
        f"{_SHORT.get(leaf, leaf.removeprefix('raw_'))}={_text(_shown(kernel, leaf))}"
        for leaf, parameter in kernel.named_parameters(recurse=False)
        if not is_unset(parameter)
    ]
    columns = getattr(kernel, "active_columns", None)
    if columns is None and kernel.active_dims is not None:
        columns = kernel.active_dims.tolist()
    if columns is not None:
        arguments.append(f"active_dims={list(columns)}")
    return f"{_name(kernel)}({', '.join(arguments)})"


def is_unset(parameter: Tensor) -> bool:
    """Say whether a raw parameter still holds the exact zeros that gpytorch initialises it with."""
    return not bool(parameter.detach().any())


def parameter_value(owner: gpytorch.Module, leaf: str) -> Tensor:
    """Return the value behind the raw parameter ``leaf`` of ``owner``, detached."""
    constraint = getattr(owner, f"{leaf}_constraint", None)
    parameter = getattr(owner, leaf).detach()
    return parameter if constraint is None else constraint.transform(parameter)


def assign(owner: gpytorch.Module, leaf: str, value: Tensor) -> None:
    """Store ``value`` in the raw parameter ``leaf`` of ``owner``, in place; the Parameter object stays the
    same.

    Parameters
    ----------
    owner : gpytorch Module
    leaf : str
        Name of the raw parameter, such as ``"raw_lengthscale"``.
    value : Tensor
        A shape that broadcasts to the parameter's, or (columns,) for a parameter with one entry per column.

    Raises
    ------
    ValueError
        The value breaks the constraint, or its shape does not fit.
    """
    parameter, name = getattr(owner, leaf), leaf.removeprefix("raw_")
    constraint = getattr(owner, f"{leaf}_constraint", None)
    title = f"{name} of {type(owner).__name__}"
    value = value.to(parameter)
    if constraint is not None and not (bool(value.isfinite().all()) and constraint.check(value)):
        low, high = constraint.lower_bound, constraint.upper_bound
        raise ValueError(f"{title} must lie between {_text(low)} and {_text(high)}, got {_text(value)}.")
    if constraint is not None and bool((value == 0).any()) and bool((constraint.lower_bound == 0).any()):
        raise ValueError(f"{title} must be positive, got {_text(value)}.")
    shape = parameter.shape
    columns = value.shape[-1] if value.dim() else 1
    if name in _PER_COLUMN and columns > 1 and shape[-1] != columns:
        if shape[-1] != 1:
            raise ValueError(f"{title} has {shape[-1]} entries, got {columns}.")
        shape = torch.Size([*shape[:-1], columns])
        owner.ard_num_dims = columns
    try:
        value = value.reshape(shape) if value.numel() == shape.numel() else value.expand(shape)
    except RuntimeError as error:
        raise ValueError(f"{title} has shape {tuple(shape)}, got {tuple(value.shape)}.") from error
    parameter.data = (value if constraint is None else to_raw(constraint, value)).clone()


def _parameters(kernel: Kernel) -> Iterator[tuple[str, Any, str]]:
    """Yield (path, owning module, attribute) of every parameter that a gpytorch module owns."""
    for dotted, _ in kernel.named_parameters():
        prefix, _, leaf = dotted.rpartition(".")
        owner = kernel.get_submodule(prefix)
        if isinstance(owner, gpytorch.Module):
            name = leaf.removeprefix("raw_")
            yield (f"{prefix}.{name}" if prefix else name).replace(".", "__"), owner, leaf


def _shown(kernel: Kernel, leaf: str) -> Tensor:
    """Return a parameter as the kernel uses it, entries included that are fixed by its structure."""
    value = getattr(kernel, leaf.removeprefix("raw_"), None)
    return value if isinstance(value, Tensor) else parameter_value(kernel, leaf)


def _name(kernel: Kernel) -> str:
    if isinstance(kernel, MaternKernel):
        return _MATERN_NAMES[kernel.nu]
    if hasattr(kernel, "short_name"):
        return kernel.short_name
    return "RationalQuadratic" if isinstance(kernel, RQKernel) else type(kernel).__name__.removesuffix("Kernel")


def _factor(kernel: Kernel) -> str:
    text = describe(kernel)
    return f"({text})" if isinstance(kernel, AdditiveKernel) else text


def _text(value: Tensor) -> str:
    numbers = [f"{number:.3g}" for number in value.detach().reshape(-1).tolist()]
    return numbers[0] if len(numbers) == 1 else f"[{', '.join(numbers)}]"
