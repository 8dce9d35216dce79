"""Check points and observations of a differential equation, in the user's words."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mercer.estimators._validation import to_numpy
from mercer.pde.domain import Box
from mercer.pde.problem import Sensors

_SHORT = (torch.float32, torch.float16, torch.bfloat16, np.dtype(np.float32), np.dtype(np.float16))


def check_points(X: Any, domain: Box, device: torch.device | None, extrapolate: bool = False) -> Tensor:
    """Return points (n, d) as a float64 tensor.

    Raises
    ------
    TypeError
        Single precision.
    ValueError
        Another number of columns than the domain has axes, NaN, or points off the domain without ``extrapolate``.
    """
    _refuse_single(X, "X")
    points = X if isinstance(X, Tensor) else torch.as_tensor(np.asarray(to_numpy(X), dtype=np.float64))
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
    """Return (X, y), (X, y, noise), Sensors or a sequence of Sensors as sensors with float64 tensors.

    Raises
    ------
    TypeError, ValueError
        As in `check_points`; y or noise of another shape, not finite, or not positive.
    """
    if observations is None:
        return []
    if isinstance(observations, Sensors):
        observations = [observations]
    elif isinstance(observations, tuple) and not all(isinstance(part, Sensors) for part in observations):
        if len(observations) not in (2, 3):
            raise ValueError(f"observations are (X, y, noise), got a tuple of {len(observations)}.")
        observations = [Sensors(*observations)]
    return [_checked(sensor, domain, device) for sensor in observations]


def _checked(sensor: Sensors, domain: Box, device: torch.device | None) -> Sensors:
    _refuse_single(sensor.y, "y")
    X = check_points(sensor.X, domain, device)
    y = torch.as_tensor(np.asarray(to_numpy(sensor.y), dtype=np.float64), device=X.device)
    if y.shape != (len(X),) or not bool(torch.isfinite(y).all()):
        raise ValueError(f"y must be ({len(X)},) finite numbers, one per row of X; got {tuple(y.shape)}.")
    noise = sensor.noise
    if noise is not None:
        noise = torch.as_tensor(np.asarray(to_numpy(noise), dtype=np.float64), device=X.device)
        if noise.shape not in ((), (len(X),)) or not bool((noise > 0).all()):
            raise ValueError("noise must be positive standard deviations, one number or one per row of X.")
    return Sensors(X, y, noise, sensor.field, sensor.derivative)


def _refuse_single(values: Any, name: str) -> None:
    if getattr(values, "dtype", None) in _SHORT:
        raise TypeError(f"{name} is in {values.dtype}; equations are solved in float64 only. Convert it first.")
