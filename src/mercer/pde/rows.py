"""What is known of the unknown functions, as rows of linear functionals, and what any posterior of them can be asked.

Equations, conditions and sensors are the same thing here: ℓ(u) = y + ε. Solvers differ in how they condition on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mercer.kernels.functionals import Functional, Term


@dataclass(frozen=True)
class Rows:
    """n values ℓ_i(u) = y_i + ε_i.

    Parameters
    ----------
    functional : Functional of n rows
    target : (n,)
        y, in units of u over those of X to the orders.
    kind : {"equation", "condition", "sensor"}
    noise_variance : (n,) or None
        Var ε_i, in units of y²; None for rows that hold exactly, but for the nugget.
    """

    functional: Functional
    target: Tensor
    kind: str = "equation"
    noise_variance: Tensor | None = None

    def __len__(self) -> int:
        return len(self.target)

    def noise(self) -> Tensor:
        """Return the variances of the noise, (n,), zeros for exact rows."""
        return torch.zeros_like(self.target) if self.noise_variance is None else self.noise_variance

    def part(self, rows: slice) -> Rows:
        """Return some of the rows."""
        noise = None if self.noise_variance is None else self.noise_variance[rows]
        return Rows(cut(self.functional, rows), self.target[rows], self.kind, noise)


class Posterior(Protocol):
    """A Gaussian process conditioned on rows; every quantity is that of a Functional of it."""

    log_evidence: float
    surprise: float
    nugget: float
    noise_variance: Tensor  # of each row, nuggets included

    @property
    def scale(self) -> float: ...

    def mean(self, L: Functional) -> Tensor: ...

    def marginals(self, L: Functional) -> tuple[Tensor, Tensor]: ...

    def joint(self, L: Functional) -> tuple[Tensor, Tensor]: ...

    def sample(self, L: Functional, n_samples: int, generator: torch.Generator) -> Tensor: ...

    def backward(self, rows: Sequence[Rows]) -> Tensor: ...


def derivative(X: Tensor, index: Sequence[int], field: int = 0) -> Functional:
    """Return the functional ∂^index u_field at each row of X (n, d)."""
    return (Term(X.new_ones(len(X)), X, tuple(index), field),)


def cut(L: Functional, rows: slice) -> Functional:
    """Return some rows of a functional; terms that shared their points still do."""
    points: dict[int, Tensor] = {}
    for term in L:
        points.setdefault(id(term.X), term.X[rows])
    return tuple(Term(term.coefficient[rows], points[id(term.X)], term.index, term.field) for term in L)


def draw(mean: Tensor, covariance: Tensor, n_samples: int, generator: torch.Generator) -> Tensor:
    """Return draws (n, n_samples) of a Gaussian whose covariance (n, n) may be singular."""
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp_min(0.0).sqrt()
    white = torch.randn(len(mean), n_samples, generator=generator, dtype=torch.float64).to(mean.device)
    return mean[:, None] + root @ white


def gaussian_constant(n: int) -> float:
    """Return −½ n log 2π."""
    return -0.5 * n * math.log(2 * math.pi)


def amplitude(posterior: Any) -> float:
    """Return ŝ² times ``surprise``, or 1: where noise has units of its own, and where all data are zero."""
    if not posterior.calibrated or posterior.quadratic == 0:
        return 1.0
    return posterior.scale * posterior.surprise


def calibrates(rows: Sequence[Rows]) -> bool:
    """Say whether the common amplitude can be profiled: nothing has noise in units of its own."""
    return all(part.noise_variance is None for part in rows)
