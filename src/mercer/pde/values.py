"""Numbers and functions of coordinates, as users give them for right sides and conditions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Value = float | Callable[..., Tensor]


def evaluate(
    value: Value, columns: Sequence[Tensor], n: int, like: Tensor, name: str, coordinates: Sequence[str] | None = None
) -> Tensor:
    """Return a number or a function of coordinates as a tensor (n,) in float64.

    Errors name its owner, ``name``, and the ``coordinates`` that a function is given.
    """
    arguments = f"{len(columns)} coordinates" if coordinates is None else ", ".join(coordinates) or "no coordinate"
    given = _call(value, columns, name, arguments) if callable(value) else value
    if isinstance(given, (Tensor, np.ndarray)):
        found = torch.as_tensor(given, device=like.device)
    else:
        try:
            found = torch.as_tensor(given, dtype=torch.float64, device=like.device)
        except (TypeError, ValueError, RuntimeError):
            what = "return one number per point" if callable(value) else "be a number or a function"
            raise TypeError(f"{name} must {what}, got {type(given).__name__}.") from None
    if not callable(value) and found.numel() != 1:
        what = f"one number or a function of {arguments}"
        raise ValueError(f"{name} must be {what}, got shape {tuple(found.shape)}.")
    if found.is_complex():
        raise TypeError(f"{name} is complex; equations are solved in real numbers.")
    if found.dtype != torch.float64:
        if found.dtype == torch.float32 and found.dim() > 0:
            raise TypeError(f"{name} is in float32; equations are solved in float64 only.")
        found = found.double()
    if found.dim() > 1 or (found.dim() == 1 and len(found) not in (1, n)):
        raise ValueError(f"{name} must return one number per point, ({n},), got shape {tuple(found.shape)}.")
    if not bool(torch.isfinite(found).all()):
        raise ValueError(f"{name} is not finite at some points.")
    return found.expand(n)


def _call(function: Callable[..., Any], columns: Sequence[Tensor], name: str, arguments: str) -> Any:
    """Call a user's function of coordinates; TypeError if it does not take as many as there are."""
    check_takes(function, len(columns), name, arguments if columns else f"{arguments}, so that a number says it")
    return function(*columns)


def check_takes(function: Callable[..., Any], n: int, name: str, arguments: str) -> None:
    """Raise TypeError if a user's function, ``name``, does not take n arguments, which ``arguments`` describes."""
    if not callable(function):
        raise TypeError(f"{name} must be a function of {arguments}, got {type(function).__name__}.")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # compiled functions may have none
        return
    try:
        signature.bind(*range(n))
    except TypeError:
        raise TypeError(f"{name} is a function of {arguments}; got one that takes {signature}.") from None
