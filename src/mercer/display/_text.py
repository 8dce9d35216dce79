"""A kernel as indented text, one part a line, in the units its parameters are stored in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

SHOWN = 8  # values of one parameter that are printed before the rest is summed up


def kernel_text(kernel: Any, names: Sequence[str] = ()) -> str:
    """Describe a kernel.

    Parameters
    ----------
    kernel : gpytorch Kernel or list of them
        A fitted ``kernel_``, in the user's units; a list holds one per latent.
    names : sequence of str
        Column names, to label one length scale per column.

    Returns
    -------
    str
        A tree: sums and products open a level, every other part shows its values.
    """
    if isinstance(kernel, list | tuple):
        parts = [f"latent {i}\n{kernel_text(one, names)}" for i, one in enumerate(kernel)]
        return "\n".join(parts)
    return "\n".join(_lines(kernel, list(names), 1))


def _lines(kernel: Any, names: list[str], depth: int) -> list[str]:
    """Return the lines of one part and of all below it."""
    label = {"AdditiveKernel": "sum of", "ProductKernel": "product of"}.get(type(kernel).__name__)
    values = [] if label else _values(kernel, names)
    label = label or type(kernel).__name__.removesuffix("Kernel") + _smoothness(kernel)
    out = ["  " * depth + "  ".join([label, *values])]
    below = getattr(kernel, "kernels", None)
    if below is None:
        below = [kernel.base_kernel] if hasattr(kernel, "base_kernel") else []
    for part in below:
        out += _lines(part, names, depth + 1)
    return out


def _smoothness(kernel: Any) -> str:
    """Return the ν of a Matérn kernel as it is usually written."""
    return {0.5: "12", 1.5: "32", 2.5: "52"}.get(getattr(kernel, "nu", 0.0), "")


def _values(kernel: Any, names: list[str]) -> list[str]:
    """Return ``name value`` for the parameters of this part alone."""
    found = []
    for path, _ in kernel.named_parameters(recurse=False):
        name = path.removeprefix("raw_")
        value = np.atleast_1d(getattr(kernel, name).detach().cpu().double().numpy())
        value = value.reshape(-1, value.shape[-1])
        found.append(f"{name} {_row(value, _labels(kernel, names, value.shape[-1]))}")
    if not found and getattr(kernel, "active_dims", None) is not None and names:
        found.append("on " + ", ".join(_labels(kernel, names, len(kernel.active_dims))))
    return found


def _labels(kernel: Any, names: list[str], size: int) -> list[str]:
    """Return the names of the columns a part sees, if they are as many as its values."""
    active = getattr(kernel, "active_dims", None)
    seen = names if active is None else [names[j] for j in active.tolist() if j < len(names)]
    return seen if len(seen) == size else []


def _row(value: np.ndarray, labels: list[str]) -> str:
    """Return the values as text; batches (latents, outputs) as ranges."""
    if len(value) > 1:
        return f"{value.min():.4g} to {value.max():.4g} over {len(value)} latents"
    numbers = [f"{v:.4g}" for v in value[0]]
    if len(numbers) == 1:
        return numbers[0]
    pairs = [f"{label}={v}" for label, v in zip(labels, numbers, strict=True)] if labels else numbers
    more = f", … {len(pairs) - SHOWN} more" if len(pairs) > SHOWN else ""
    return "[" + ", ".join(pairs[:SHOWN]) + more + "]"
