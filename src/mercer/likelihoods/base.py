"""The likelihood contract: how data push on latent values.

A likelihood holds its own parameters (as log-values) and three kinds of mathematics: the log density of y
given f, its expectation under a Gaussian marginal with the derivatives that inference needs, and the
predictive distribution of y. Everything is elementwise in rows; nothing here knows
where the marginals come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mercer._typing import Hyperparameter


class ExpectedLogProb(NamedTuple):
    """ℓ = E[log p(y|f)] under N(m, v), with α = ∂ℓ/∂m and β = −2 ∂ℓ/∂v = −E[∂² log p] (Bonnet and Price).

    ``value`` carries gradients to m, v and the likelihood's parameters, to first order; ``alpha`` and
    ``beta`` are numbers for the site updates and carry none.
    """

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
    A y of NaN is a missing target: ``value`` is 0 and α = β = 0 there. Parameters are stored in float64 and
    used in the dtype and on the device of m (or f).

    Attributes
    ----------
    n_latents : int
        Latent functions that one target reads.
    log_concave : bool
        Whether f ↦ log p(y | f) is concave, so that β > 0 everywhere.
    conjugate : bool
        Whether the sites do not depend on q (Gaussian only).
    support : {"real", "count", "classes", "other"}
        Where y lives: the line, {0, 1, 2, …}, {0, …, C − 1}, or elsewhere.
    side_names : tuple of str
        Names that ``side`` may hold.
    log_priors : dict of str to callable
        Optional log prior density of a named parameter, as a function of its value.
    """

    n_latents: int = 1
    log_concave: bool = True
    conjugate: bool = False
    #: how well α and β agree with the derivatives of ``value``, in nats per row
    resolution: float = 0.0
    #: standard error of differences of ``value`` between hyperparameters where it averages over draws, in nats per row
    sampling_error: float = 0.0
    support: str = "real"
    side_names: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self._bounds: dict[str, tuple[float, float]] = {}
        self.log_priors: dict[str, Callable[[Tensor], Tensor]] = {}

    def _positive(self, name: str, value: Any, bounds: tuple[float, float], learn: bool = True) -> None:
        """Register a positive parameter ``name``, stored as ``log_<name>``."""
        value = torch.as_tensor(value, dtype=torch.float64).detach()
        low, high = bounds
        if not bool((torch.isfinite(value) & (value > 0)).all()):
            raise ValueError(f"{name} must be positive and finite, got {value.tolist()}; pass a value > 0.")
        if not 0 < low < high:
            raise ValueError(f"bounds of {name} must satisfy 0 < low < high, got {bounds}; swap or raise them.")
        self.register_parameter(f"log_{name}", nn.Parameter(value.log(), requires_grad=learn))
        self._bounds[name] = (float(low), float(high))

    def value_of(self, name: str, like: Tensor) -> Tensor:
        """Return the positive parameter ``name`` in the dtype and on the device of ``like``."""
        return self.get_parameter(f"log_{name}").exp().to(like)

    def _set(self, name: str, value: Tensor | float) -> None:
        """Overwrite the positive parameter ``name`` in place, inside its bounds."""
        parameter = self.get_parameter(f"log_{name}")
        with torch.no_grad():
            value = torch.as_tensor(value).to(parameter).clamp(*self._bounds[name])
            parameter.copy_(value.log().expand_as(parameter))

    def hyperparameters(self) -> list[Hyperparameter]:
        """List the learnable parameters with bounds in θ-space (θ is the log of a positive parameter)."""
        found = []
        for name, (low, high) in self._bounds.items():
            parameter = self.get_parameter(f"log_{name}")
            if parameter.requires_grad:
                prior = self.log_priors.get(name)
                log_prior = None if prior is None else partial(_log_prior, prior, parameter)
                lower, upper = math.log(low), math.log(high)
                found.append(Hyperparameter(name, parameter, _identity, _identity, lower, upper, True, log_prior))
        return found

    def validate(self, y: Tensor, **side: Tensor) -> None:
        """Raise ValueError when an observed target lies outside the support, or a side name is unknown.

        Parameters
        ----------
        y : (*b', n), in units of y
            Targets, NaN where missing.
        **side : (n,)
            Side information, named as in ``side_names``; every value must be positive and finite.

        Raises
        ------
        ValueError
            Names ``y`` or the side name, says what was expected and what to do.
        """
        kind = type(self).__name__
        for name, value in side.items():
            if name not in self.side_names:
                known = ", ".join(self.side_names) or "nothing"
                raise ValueError(f"{kind} does not read {name!r}; it knows {known}. Remove it.")
            if not bool((torch.isfinite(value) & (value > 0)).all()):
                raise ValueError(f"{name} must be positive and finite in every row; repair the others.")
        observed = y[~torch.isnan(y)]
        if not bool(torch.isfinite(observed).all()):
            raise ValueError("y contains infinite values; mark missing targets with NaN.")
        if self.support not in ("count", "classes"):
            return
        n_classes = getattr(self, "n_classes", None)
        top = math.inf if n_classes is None else n_classes - 1
        if not bool(((observed >= 0) & (observed <= top) & (observed == observed.round())).all()):
            wanted = "integers ≥ 0" if n_classes is None else f"integers from 0 to {top}"
            raise ValueError(f"y must hold {wanted} for {kind}; recode y or choose another likelihood.")

    def initialise(self, y: Tensor, weight: Tensor, **side: Tensor) -> Tensor | float:
        """Set data-dependent starting values of parameters in place; return the starting latent mean.

        Statistics are weighted with replication semantics: weight 2 is the row twice. The targets are
        validated first (see ``validate``).
        """
        self.validate(y, **side)
        return 0.0

    def log_prob(self, y: Tensor, f: Tensor, **side: Tensor) -> Tensor:
        """Return log p(y | f), in nats."""
        raise NotImplementedError

    def log_prob_derivatives(self, y: Tensor, f: Tensor, **side: Tensor) -> LogProbDerivatives:
        """Return log p(y | f) and its first three derivatives in f."""
        raise NotImplementedError

    def expected_log_prob(self, y: Tensor, m: Tensor, v: Tensor, **side: Tensor) -> ExpectedLogProb:
        """Return E[log p(y|f)] under N(m, v) and (α, β); the value differentiates in m, v and parameters."""
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


def fill_missing(y: Tensor, like: Tensor, fill: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return y in the dtype of ``like`` with a harmless ``fill`` for NaN, and the mask of observed targets.

    Filling *before* the mathematics keeps gradients finite: a mask afterwards alone would give 0 · NaN.
    """
    y = y.to(like)
    observed = ~torch.isnan(y)
    return torch.where(observed, y, torch.full_like(y, fill)), observed


def masked(value: Tensor, observed: Tensor) -> Tensor:
    """Return ``value`` with zeros where the target is missing."""
    return torch.where(observed, value, torch.zeros_like(value))


def class_moments(probs: Tensor) -> Predictive:
    """Return the predictive of class probabilities (*, n, C), with mean and variance of the class index."""
    index = torch.arange(probs.shape[-1], dtype=probs.dtype, device=probs.device)
    mean = (probs * index).sum(-1)
    variance = (probs * (index - mean.unsqueeze(-1)).square()).sum(-1)
    return Predictive(mean, variance, probs)


def _identity(value: Tensor) -> Tensor:
    return value


def _log_prior(density: Callable[[Tensor], Tensor], log_value: Tensor) -> Tensor:
    return density(log_value.exp()).sum()
