"""Value types that every layer shares: data, sites and hyperparameters.

Nothing here computes. Shapes are written ``(*b, n)``: batch dimensions (latents or outputs) first, rows last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Data:
    """Rows as the inference engines see them: tensors on one device, rows of zero weight already dropped.

    Parameters
    ----------
    X : (n, d)
        Inputs, standardised if the estimator standardises.
    y : (n,) or (p, n)
        Targets; the row axis is last. NaN marks a missing target.
    weight : (n,)
        Replication weights, > 0: weight w means that the row was seen w times.
    side : mapping of str to (n,) tensors
        What a likelihood needs to know per row beside y (``exposure``, ``noise_variance``).
    """

    X: Tensor
    y: Tensor
    weight: Tensor
    side: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def n_rows(self) -> int:
        return self.X.shape[-2]

    def rows(self, index: Tensor) -> Data:
        """Return the sub-sample of rows ``index``."""
        side = {name: value[..., index] for name, value in self.side.items()}
        return Data(self.X[index], self.y[..., index], self.weight[index], side)


@dataclass(frozen=True)
class Sites:
    """Gaussian sites t_i(f) = exp(λ1_i f − ½ λ2_i f²) in natural parameters.

    Parameters
    ----------
    linear : (*b, n)
        λ1, in units of 1/f.
    precision : (*b, n)
        λ2, in units of 1/f²; zero where a target is missing; may be negative for likelihoods that are not
        log-concave.
    """

    linear: Tensor
    precision: Tensor

    def double(self) -> Sites:
        """Return the same in float64."""
        return Sites(self.linear.double(), self.precision.double())

    def blend(self, other: Sites, step_size: float) -> Sites:
        """Return (1 − ρ) self + ρ other, the natural-gradient step of size ρ."""
        return Sites(
            torch.lerp(self.linear, other.linear, step_size),
            torch.lerp(self.precision, other.precision, step_size),
        )


@dataclass(frozen=True)
class Hyperparameter:
    """One named, learnable tensor and its coordinate θ on the real line.

    θ = ``to_theta(storage)`` is the logarithm for positive quantities and the value itself otherwise;
    ``to_storage`` is its differentiable inverse. ``lower``/``upper`` bound θ elementwise; ``scale``, a number or one
    per element, is how far it may move where the logarithm of another may move by one.
    """

    name: str
    parameter: torch.nn.Parameter
    to_theta: Callable[[Tensor], Tensor]
    to_storage: Callable[[Tensor], Tensor]
    lower: float | Tensor
    upper: float | Tensor
    log_scale: bool
    log_prior: Callable[[], Tensor] | None = None
    scale: float | Tensor = 1.0


Info = dict[str, Any]
