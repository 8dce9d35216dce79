"""Check what a solver of differential equations is given, in the user's words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from mercer.estimators._validation import to_numpy
from mercer.pde.conditions import Condition
from mercer.pde.domain import Box
from mercer.pde.problem import Sensors

_SHORT = (torch.float32, torch.float16, torch.bfloat16, np.dtype(np.float32), np.dtype(np.float16))
_FORMS = "observations are (X, y), (X, y, noise), Sensors, or a sequence of these"


def check_points(X: Any, domain: Box, device: torch.device | None, extrapolate: bool = False) -> Tensor:
    """Return points (n, d) as a float64 tensor; columns of a DataFrame are found by the names of the axes.

    Raises
    ------
    TypeError
        Single precision.
    ValueError
        Another number of columns than the domain has axes, names that are not those of the axes, NaN, or points off
        the domain without ``extrapolate``.
    """
    X = _in_order(X, domain)
    _refuse_single(X, "X")
    points = X if isinstance(X, Tensor) else _tensor(X)
    points = points.to(dtype=torch.float64, device=device or points.device).detach()
    if points.dim() != 2 or points.shape[1] != domain.d:
        raise ValueError(f"X must be (n, {domain.d}), one column per axis of {domain}; got {tuple(points.shape)}.")
    if not bool(torch.isfinite(points).all()):
        raise ValueError("Input X contains NaN or infinity.")
    off = domain.outside(points)
    if not extrapolate and bool(off.any()):
        raise ValueError(
            f"{int(off.sum())} of {len(points)} points lie off the domain {domain}, where the equation was not asked "
            "for; set extrapolate=True to predict there all the same."
        )
    return points


def check_observations(observations: Any, domain: Box, device: torch.device | None) -> list[Sensors]:
    """Return (X, y), (X, y, noise), Sensors or a sequence of these as sensors with float64 tensors.

    Raises
    ------
    TypeError, ValueError
        As in `check_points`; nothing observed; y or noise of another shape, not finite, or not positive; too few
        readings to learn the noise from.
    """
    if observations is None:
        return []
    return [_checked(reading, domain, device) for reading in readings(observations)]


def readings(observations: Any) -> list[Sensors]:
    """Return observations in any of their forms as Sensors, unchecked."""
    if isinstance(observations, Sensors):
        return [observations]
    if not isinstance(observations, (tuple, list)):
        raise TypeError(f"{_FORMS}; got {type(observations).__name__}.")
    if not observations:
        raise ValueError(f"observations are empty; leave them out, or give some. {_FORMS}.")
    if all(isinstance(part, Sensors) or _is_reading(part) for part in observations):
        return [part if isinstance(part, Sensors) else Sensors(*part) for part in observations]
    if len(observations) not in (2, 3) or any(isinstance(part, Sensors) for part in observations):
        raise ValueError(f"{_FORMS}; got a {type(observations).__name__} of {len(observations)} that is none of them.")
    return [Sensors(*observations)]


def check_conditions(conditions: Any) -> list[Condition]:
    """Return one condition or a sequence of them as a list; TypeError for anything else."""
    kinds = get_args(Condition)
    if isinstance(conditions, kinds):
        return [conditions]
    found = list(conditions) if isinstance(conditions, Sequence) and not isinstance(conditions, str) else [conditions]
    for condition in found:
        if not isinstance(condition, kinds):
            raise TypeError(
                f"conditions must be one condition of mercer.pde, such as a Dirichlet, or a sequence of them; got "
                f"{condition!r} among them."
            )
    return found


def check_counts(n_collocation: Any, domain: Box) -> int | tuple[int, ...] | None:
    """Return the nodes along each axis as plain integers, one for all or one each; None stays."""
    if n_collocation is None or _is_count(n_collocation, 2):
        return None if n_collocation is None else int(n_collocation)
    counts = list(n_collocation) if isinstance(n_collocation, (Sequence, np.ndarray)) else []
    if len(counts) != domain.d or not all(_is_count(n, 2) for n in counts):
        raise ValueError(
            f"n_collocation must be an integer of at least 2, or {domain.d} of them, one for each of the axes "
            f"{', '.join(domain.names)}; got {n_collocation!r}."
        )
    return tuple(int(n) for n in counts)


def check_steps(nugget: Any, max_steps: Any) -> None:
    """Raise ValueError for a nugget that is not positive or a number of steps that is not a count."""
    if nugget is not None and not (isinstance(nugget, (int, float, np.number)) and 0 < nugget < math.inf):
        raise ValueError(f"nugget must be a positive number, such as 1e-10, or None; got {nugget!r}.")
    if not _is_count(max_steps, 1):
        raise ValueError(f"max_steps must be an integer of at least 1, got {max_steps!r}.")


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= least)


def _in_order(X: Any, domain: Box) -> Any:
    """Return the columns of a DataFrame in the order of the axes; anything without named columns as it is."""
    names = [name for name in getattr(X, "columns", ()) if isinstance(name, str)]
    if not names:
        return X
    if sorted(names) != sorted(domain.names) or len(X.columns) != domain.d:
        raise ValueError(
            f"X has columns {', '.join(map(str, X.columns))}, and the axes are {', '.join(domain.names)}: rename the "
            "columns after the axes, or give an array with a column per axis in their order."
        )
    return X[list(domain.names)]


def _is_reading(part: Any) -> bool:
    """Say whether one part of a sequence is (X, y) or (X, y, noise) itself, and not an X, whose rows have no rows."""
    return isinstance(part, (tuple, list)) and len(part) in (2, 3) and np.ndim(part[0]) == 2


def _checked(sensor: Sensors, domain: Box, device: torch.device | None) -> Sensors:
    _refuse_single(sensor.y, "y")
    X = check_points(sensor.X, domain, device)
    if not len(X):
        raise ValueError("observations have no rows; leave them out, or give some.")
    y = _tensor(sensor.y).to(X.device)
    if y.shape != (len(X),) or not bool(torch.isfinite(y).all()):
        raise ValueError(f"y must be ({len(X)},) finite numbers, one per row of X; got {tuple(y.shape)}.")
    noise = sensor.noise
    if noise is None:
        if bool((y == y[0]).all()):
            raise ValueError("noise=None learns the noise, which takes two readings that differ; give noise=.")
    else:
        noise = _tensor(noise).to(X.device)
        if noise.shape not in ((), (len(X),)) or not bool(((noise > 0) & noise.isfinite()).all()):
            raise ValueError("noise must be positive standard deviations, one number or one per row of X.")
    return Sensors(X, y, noise, sensor.field, sensor.derivative)


def _tensor(values: Any) -> Tensor:
    """Return a copy: torch warns of arrays that must not be written to."""
    return torch.from_numpy(np.array(to_numpy(values), dtype=np.float64))


def _refuse_single(values: Any, name: str) -> None:
    if getattr(values, "dtype", None) in _SHORT:
        raise TypeError(f"{name} is in {values.dtype}; equations are solved in float64 only. Convert it first.")
