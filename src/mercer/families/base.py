"""The family contract: Gaussian structure only.

A family says what p̂ is in q(f) ∝ p̂(f) ∏ᵢ exp(λ1ᵢ fᵢ − ½ λ2ᵢ fᵢ²). It plans once (integers and orderings, no
gradients) and conditions often. It never sees a likelihood: sites are numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from mercer._typing import Sites
from mercer.policy import NumericalPolicy


@dataclass(frozen=True)
class Prior:
    """A Gaussian-process prior: a gpytorch ``Kernel`` and ``Mean`` (None is the zero mean)."""

    kernel: Any
    mean: Any = None

    def mean_at(self, X: Tensor) -> Tensor:
        """Return μ(X), shape (*t, n), for X (*t, n, d)."""
        return X.new_zeros(X.shape[:-1]) if self.mean is None else self.mean(X)


@dataclass(frozen=True)
class Confession:
    """What a posterior has to say of its own approximation: ``notes`` for the report, ``warnings`` for the user too."""

    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Marginals:
    """Mean and variance of the latent g* = f* − μ* plus its prior mean: shapes (*b, n)."""

    mean: Tensor
    variance: Tensor


@runtime_checkable
class Process(Protocol):
    """A Gaussian process that can be evaluated. ``mean``s include the prior mean μ; units are those of f.

    What it returns is differentiable in X. ``row_elements`` is how large the temporaries are that one new row takes,
    for callers that split rows themselves.
    """

    row_elements: int

    def mean(self, X: Tensor) -> Tensor:
        """Return the posterior mean only, (*b, n), for X (n, d); chunked, O(n) memory."""

    def marginals(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance, each (*b, n), for X (n, d); chunked."""

    def joint(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean (*b, *t, q) and covariance (*b, *t, q, q) for X (*t, q, d).

        Each t is a set of q rows by itself: what is returned for it is what it would give alone. With approximations
        that give each row some of the rows before it, the first rows' moments do not depend on those that follow.
        """

    def sample(self, X: Tensor, n_samples: int, generator: torch.Generator) -> Tensor:
        """Return draws (n_samples, *b, n) of the latent process at X (n, d)."""


@runtime_checkable
class Posterior(Process, Protocol):
    """A process that is a prior conditioned on sites at training rows, and knows both.

    Conditioning it on sites at further rows gives a process again (`mercer.families.conditioned`). Where
    Cov(f(X), f(x)) is linear in the kernel it may say so by ``covariance_weights``, which makes that cheap.
    """

    prior: Prior
    sites: Sites

    def at_data(self) -> tuple[Tensor, Tensor]:
        """Return mean and variance at the training rows, each (*b, n)."""

    def kl(self) -> Tensor:
        """Return KL[q(f) ‖ p(f)] in nats, shape (*b,)."""

    def confess(self) -> Confession:
        """Say how far the approximation can be wrong; may take as long as one evaluation of the evidence."""


@runtime_checkable
class Family(Protocol):
    """Gaussian structure of prior and posterior.

    ``sums_over_columns`` says that the evidence of noisy Gaussian data is a sum that random terms estimate; the family
    then has ``plan_some(prior, X, policy, rows)``, which plans for the terms of these rows alone. ``stage_growth`` is
    how many times more rows each stage of learning looks at: the less the cost grows with rows, the more; none looks
    at fewer than ``stage_rows``.
    ``dense`` says that its work is LAPACK's on n × n matrices, which decides who gets the threads. ``evidence_of`` ends
    the sentence "the evidence is that …" where it is not the prior's own.
    """

    name: ClassVar[str]
    sums_over_columns: bool
    stage_growth: int
    stage_rows: int
    evidence_of: str
    dense: bool

    def plan(self, prior: Prior, X: Tensor, policy: NumericalPolicy) -> Any:
        """Choose orderings, neighbours or inducing points for the rows X. No gradients."""

    def stale(self, prior: Prior, plan: Any) -> bool:
        """Whether the plan should be made anew, because the prior's hyperparameters have moved since."""

    def condition(self, prior: Prior, plan: Any, sites: Sites) -> Posterior:
        """Return the posterior under the prior and the sites."""
