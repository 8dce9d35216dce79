"""The likelihood contract: how data push on latent values.

A likelihood holds its own parameters (as log-values) and three kinds of mathematics: the log density of y given
f, its expectation under a Gaussian marginal with the derivatives that inference needs, and the predictive
distribution of y. Everything is elementwise in rows; nothing here knows where the marginals come from.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mercer._typing import Hyperparameter


class ExpectedLogProb(NamedTuple):
    """ℓ = E[log p(y|f)] under N(m, v), with α = ∂ℓ/∂m and β = −2 ∂ℓ/∂v = −E[∂² log p] (Bonnet and Price)."""

    value: Tensor  # (*b', n), in nats: latents are summed out
    alpha: Tensor  # (*b, n), in 1/f
    beta: Tensor  # (*b, n), in 1/f²


class LogProbDerivatives(NamedTuple):
    """log p(y|f) and its derivatives in f at a point; all (*b, n). Single-latent likelihoods only."""

    value: Tensor
    d1: Tensor
    d2: Tensor
    d3: Tensor


class Predictive(NamedTuple):
    """Moments of y*, in units of y (and y²); ``probs`` (*, n, C) for discrete classes."""

    mean: Tensor
    variance: Tensor
    probs: Tensor | None = None


class Likelihood(nn.Module):
    """Base of all likelihoods p(y | f).

    Shapes: y ``(*b', n)``, latents f, means m and variances v ``(*b, n)``; a likelihood with C > 1 latents
    reads f as ``(*b', C, n)``. ``side`` holds per-row tensors such as ``exposure`` or ``noise_variance``.
    A y of NaN is a missing target: ``value`` is 0 and α = β = 0 there.
    """

    n_latents: int = 1
    log_concave: bool = True
    conjugate: bool = False
    side_names: tuple[str, ...] = ()

    def _positive(self, name: str, value: Any, bounds: tuple[float, float], learn: bool = True) -> None:
        """Register a positive parameter ``name``, stored as ``log_<name>``."""
        raw = torch.as_tensor(value, dtype=torch.float64).log()
        self.register_parameter(f"log_{name}", nn.Parameter(raw, requires_grad=learn))
        self._bounds = {**getattr(self, "_bounds", {}), name: bounds}

    def hyperparameters(self) -> list[Hyperparameter]:
        """List the learnable parameters with bounds in θ-space (θ is the log of a positive parameter)."""
        found = []
        for name, (low, high) in getattr(self, "_bounds", {}).items():
            parameter = getattr(self, f"log_{name}")
            if parameter.requires_grad:
                identity = _identity
                lower, upper = float(torch.tensor(low).log()), float(torch.tensor(high).log())
                found.append(Hyperparameter(name, parameter, identity, identity, lower, upper, True))
        return found

    def initialise(self, y: Tensor, weight: Tensor, **side: Tensor) -> Tensor | float:
        """Set data-dependent starting values of parameters in place; return the starting latent mean."""
        return 0.0

    def log_prob(self, y: Tensor, f: Tensor, **side: Tensor) -> Tensor:
        """Return log p(y | f), in nats."""
        raise NotImplementedError

    def log_prob_derivatives(self, y: Tensor, f: Tensor, **side: Tensor) -> LogProbDerivatives:
        """Return log p(y | f) and its first three derivatives in f."""
        raise NotImplementedError

    def expected_log_prob(self, y: Tensor, m: Tensor, v: Tensor, **side: Tensor) -> ExpectedLogProb:
        """Return E[log p(y|f)] under N(m, v) and (α, β); differentiable in m, v and the parameters."""
        raise NotImplementedError

    def predictive(self, m: Tensor, v: Tensor, **side: Tensor) -> Predictive:
        """Return the moments of y* when f* ~ N(m, v)."""
        raise NotImplementedError

    def log_predictive_density(self, y: Tensor, m: Tensor, v: Tensor, **side: Tensor) -> Tensor:
        """Return log ∫ p(y|f) N(f; m, v) df, in nats."""
        raise NotImplementedError

    def sample(self, f: Tensor, generator: torch.Generator | None = None, **side: Tensor) -> Tensor:
        """Draw y ~ p(y | f)."""
        raise NotImplementedError


def _identity(value: Tensor) -> Tensor:
    return value
