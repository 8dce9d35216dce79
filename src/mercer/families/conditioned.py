"""Any posterior, conditioned on Gaussian sites at more rows: new observations, or many fantasies of some at once.

With C the base process's covariance at the rows X, m its mean of the centred latent g = f − μ there and sites λ1, λ2,
Gaussian conditioning within the base process gives mean' = mean + c r and covariance' = covariance − c M cᵀ, c the
base's covariance between new rows and X (`mercer.families.update` has M and r). For exact Gaussian regression that is
what a refit on all rows gives. Fantasies that differ in λ1 alone share C, M and c; only r differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mercer._typing import Sites
from mercer.families.base import Prior
from mercer.families.pathwise import Anchor, CorrectedPaths, standard_normal
from mercer.families.sets import covariance_of_sets, lined_up
from mercer.families.update import Update
from mercer.kernels.evaluate import gram
from mercer.linalg.cholesky import NotPositiveDefiniteError, cholesky
from mercer.policy import NumericalPolicy


class ConditionedPosterior:
    """A process conditioned on sites at rows X, set by set; itself a process that can be conditioned further.

    Parameters
    ----------
    base : Process
        A posterior of any family, or another one of these.
    X : (*t, Q, d)
        Rows, of which each t is a set by itself.
    sites : Sites
        λ1 (*b, *s, *t, Q) of the centred latent g = f − μ; λ2 broadcasts with it. Where λ2 lacks dimensions of *s its
        factor is shared by them.

    Attributes
    ----------
    sets : torch.Size
        (*s, *t). X in what follows is (*t', q, d), and its sets broadcast with these: `joint` returns
        (*b, *sets, q) and (*b, *sets, q, q).

    Raises
    ------
    NotPositiveDefiniteError
        Negative precisions outweigh the process.

    Notes
    -----
    Differentiable in X, the sites and the rows of evaluation, not in hyperparameters. O(Q³ + Q² q) operations for a
    set beside those of the base, which are those of its mean and of q rows where it has ``covariance_weights``, and
    of its joint at Q + q rows elsewhere.

    References
    ----------
    Maddox, Stanton and Wilson (2021), "Conditioning sparse variational Gaussian processes for online decision-making",
    whose result this is for a posterior with inducing points.
    """

    def __init__(self, base: Any, X: Tensor, sites: Sites):
        shared = [1] * (sites.linear.dim() - sites.precision.dim())
        sites = Sites(sites.linear, sites.precision.reshape(*shared, *sites.precision.shape))
        self.base, self.X, self.sites = base, X, sites
        follows = any(each.requires_grad for each in (X, sites.linear, sites.precision))
        with torch.set_grad_enabled(follows):
            mean, C = base.joint(X)
            nested = isinstance(base, ConditionedPosterior)
            self.n_latents: int = base.n_latents if nested else mean.dim() - (X.dim() - 1)
            shapes = (each.shape[self.n_latents : -1] for each in (sites.linear, mean))
            self.sets: torch.Size = torch.broadcast_shapes(*shapes)
            self.update = Update.of(self._lined(C, 2), sites.precision)
            if not bool(self.update.proper.all()):
                raise NotPositiveDefiniteError("Negative sites outweigh the process: the posterior is not a Gaussian.")
            self.mean_at_rows = self._lined(mean - self.prior.mean_at(X), 1)
            self.residual = self.update.residual(sites.linear - sites.precision * self.mean_at_rows)
            self._anchor = anchor(base, X)

    def __reduce__(self) -> tuple[Any, ...]:
        # what is computed from them may carry a graph, which neither pickles nor copies
        sites = Sites(self.sites.linear.detach(), self.sites.precision.detach())
        return ConditionedPosterior, (self.base, self.X.detach(), sites)

    @property
    def prior(self) -> Prior:
        """The prior of the base."""
        return self.base.prior

    @property
    def policy(self) -> NumericalPolicy:
        """The numerical policy of the base."""
        return self.base.policy if isinstance(self.base, ConditionedPosterior) else self.base.plan.policy

    @property
    def row_elements(self) -> int:
        """Elements of temporaries per new row."""
        rows = 1 if self._anchor is not None else 1 + self.X.shape[-2]
        return rows * self.base.row_elements + 3 * self.sites.linear.numel()

    def _lined(self, value: Tensor, trailing: int, n_sets: int | None = None) -> Tensor:
        return lined_up(value, self.n_latents, len(self.sets) if n_sets is None else n_sets, trailing)

    # ---- moments

    def joint(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean (*b, *sets, q) and covariance (*b, *sets, q, q) of f at X (*t', q, d)."""
        if self._anchor is not None:
            mean, covariance = self.base.joint(X)
            cross = self._anchor.covariance(X)
        else:
            mean, covariance, cross = self._split_joint(X)
        n_sets = max(len(self.sets), X.dim() - 2)
        cross = self._lined(cross, 2, n_sets)
        T, D = self._update(n_sets).reduce(cross)
        covariance = self._lined(covariance, 2, n_sets) - T.mT @ T
        covariance = covariance if D is None else covariance + D.mT @ D
        mean = self._moved(mean, cross, n_sets)
        return mean, covariance.expand(*mean.shape, X.shape[-2])

    def _split_joint(self, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the base's mean and covariance at X, and that of the own rows with X, all from one joint.

        Where covariances are approximations, that is what keeps the difference positive definite.
        """
        Q = self.X.shape[-2]
        sets = torch.broadcast_shapes(self.X.shape[:-2], X.shape[:-2])
        both = torch.cat([rows.expand(*sets, *rows.shape[-2:]) for rows in (self.X, X)], -2)
        mean, covariance = self.base.joint(both)
        return mean[..., Q:], covariance[..., Q:, Q:], covariance[..., :Q, Q:]

    def _update(self, n_sets: int) -> Update:
        """Return the update with ``n_sets`` dimensions of sets."""
        own = self.update
        downdate = None if own.downdate is None else self._lined(own.downdate, 2, n_sets)
        return own._replace(
            root=self._lined(own.root, 1, n_sets), chol=self._lined(own.chol, 2, n_sets), downdate=downdate
        )

    def _moved(self, mean: Tensor, cross: Tensor, n_sets: int) -> Tensor:
        residual = self._lined(self.residual, 1, n_sets).unsqueeze(-1)
        return self._lined(mean, 1, n_sets) + (cross.mT @ residual).squeeze(-1)

    def mean(self, X: Tensor) -> Tensor:
        """Return the mean of f at X (*t', n, d): (*b, *sets, n)."""
        return torch.cat([self._marginals(rows, variance=False)[0] for rows in self._chunks(X)], -1)

    def marginals(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of f at X (*t', n, d), each (*b, *sets, n), in units of f and f²."""
        parts = [self._marginals(rows, variance=True) for rows in self._chunks(X)]
        return torch.cat([m for m, _ in parts], -1), torch.cat([v for _, v in parts], -1)

    def _chunks(self, X: Tensor) -> tuple[Tensor, ...]:
        return X.split(self.policy.chunk_rows(self.row_elements * max(1, X.shape[:-2].numel())), -2)

    def _marginals(self, X: Tensor, variance: bool) -> tuple[Tensor, Tensor]:
        """Return mean and variance, or zero for it where it is not wanted."""
        n_sets = max(len(self.sets), X.dim() - 2)
        if self._anchor is None:  # each row is a set by itself
            missing = [1] * (n_sets - (X.dim() - 2))
            alone = X.movedim(-2, 0).unsqueeze(-2)
            mean, covariance = self.joint(alone.reshape(len(alone), *missing, *alone.shape[1:]))
            axis = self.n_latents
            return mean.squeeze(-1).movedim(axis, -1), covariance.flatten(-3).movedim(axis, -1)
        cross = self._lined(self._anchor.covariance(X), 2, n_sets)
        at_rows = X if isinstance(self.base, ConditionedPosterior) else X.reshape(-1, X.shape[-1])
        sizes = X.shape[-2:-1] if at_rows is X else X.shape[:-1]
        if not variance:
            mean = self._moved(self.base.mean(at_rows).unflatten(-1, sizes), cross, n_sets)
            return mean, torch.zeros_like(mean)
        mean, before = (each.unflatten(-1, sizes) for each in self.base.marginals(at_rows))
        mean = self._moved(mean, cross, n_sets)
        T, D = self._update(n_sets).reduce(cross)
        after = self._lined(before, 1, n_sets) - T.square().sum(-2)
        after = after if D is None else after + D.square().sum(-2)
        return mean, after.clamp_min(0.0).expand_as(mean)

    # ---- samples

    @property
    def pathwise(self) -> bool:
        """Whether samples are functions (consistent at any X) or joint draws at the given X only."""
        alone = self._anchor is not None and not self.sets and self.update.downdate is None
        return alone and self.base.pathwise

    def paths(self, n_samples: int, generator: torch.Generator) -> CorrectedPaths:
        """Draw ``n_samples`` functions for each latent; for a single set on a base that has functions."""
        assert self._anchor is not None
        functions = self.base.paths(n_samples, generator)
        g = functions(self.X) - self.prior.mean_at(self.X)
        # each draw's own data are off by noise of variance 1/λ2
        noise = self.update.root * standard_normal(g.shape, g, generator)
        pull = self.sites.linear - self.sites.precision * g - noise
        return CorrectedPaths(functions, self._anchor, self.update.residual(pull))

    def sample(self, X: Tensor, n_samples: int, generator: torch.Generator) -> Tensor:
        """Draw the latent f at X (n, d): (n_samples, *b, *sets, n), as functions where `pathwise`."""
        if self.pathwise:
            return self.paths(n_samples, generator)(X)
        mean, covariance = self.joint(X)
        L = cholesky(covariance, self.policy, "posterior covariance").value
        noise = standard_normal((n_samples, *mean.shape), X, generator)
        return mean + (L @ noise.unsqueeze(-1)).squeeze(-1)


def latent_dims(process: Any) -> int:
    """Return how many dimensions *b the latents of a process have."""
    return process.n_latents if isinstance(process, ConditionedPosterior) else process.sites.linear.dim() - 1


def has_cross_covariances(process: Any) -> bool:
    """Whether covariances with given rows come without a joint of both; means are then those of each row alone."""
    if isinstance(process, ConditionedPosterior):
        return process._anchor is not None
    return hasattr(process, "covariance_weights")


def condition_further(process: Any, X: Tensor, sites: Sites) -> ConditionedPosterior:
    """Condition on sites at more rows; what follows single observations, one after the other, stays one conditioning.

    Parameters
    ----------
    process : Process
    X : (*t, Q, d)
    sites : Sites
        As in `ConditionedPosterior`.
    """
    single = isinstance(process, ConditionedPosterior) and not process.sets and X.dim() == 2
    if not single or sites.linear.dim() != process.sites.linear.dim():
        return ConditionedPosterior(process, X, sites)
    both = (process.sites, sites)
    precision = torch.cat([each.precision.expand(each.linear.shape) for each in both], -1)
    merged = Sites(torch.cat([each.linear for each in both], -1), precision)
    return ConditionedPosterior(process.base, torch.cat([process.X, X], -2), merged)


def anchor(process: Any, X: Tensor) -> Anchor | None:
    """Return covariances of ``process`` with f(X), or None where only its joint has them."""
    if not has_cross_covariances(process):
        return None
    if isinstance(process, ConditionedPosterior):
        first = anchor(process.base, X)
        assert first is not None
        return _Chained(first, process, X)
    rows, weights = process.covariance_weights(X)
    return _Linear(process.prior.kernel, X, rows, weights, process.plan.policy)


@dataclass(frozen=True)
class _Linear:
    """k(X, x) − Wᵀ k(R, x)."""

    kernel: Any
    X: Tensor
    rows: Tensor
    weights: Tensor
    policy: NumericalPolicy

    def covariance(self, X_new: Tensor) -> Tensor:
        n_latents, n_sets = self.weights.dim() - self.X.dim(), max(self.X.dim(), X_new.dim()) - 2
        prior = covariance_of_sets(self.kernel, self.X, X_new, self.policy)
        K = gram(self.kernel, self.rows, X_new.reshape(-1, X_new.shape[-1]), policy=self.policy)
        K = K.unflatten(-1, X_new.shape[:-1]).movedim(K.dim() - 2, -2)
        k = len(self.kernel.batch_shape)
        prior, K = (each.reshape(*[1] * (n_latents - k), *each.shape) for each in (prior, K))
        weights, K = lined_up(self.weights, n_latents, n_sets, 2), lined_up(K, n_latents, n_sets, 2)
        return prior - weights.mT @ K


class _Chained:
    """The same given the sites of a conditioned process: c₀(x) − (M c(X))ᵀ c(x)."""

    def __init__(self, first: Anchor, process: ConditionedPosterior, X: Tensor):
        self.first, self.process = first, process
        assert process._anchor is not None
        n_sets = max(len(process.sets), X.dim() - 2)
        cross = process._lined(process._anchor.covariance(X), 2, n_sets)
        self.weights = process._update(n_sets).weights(cross)

    def covariance(self, X_new: Tensor) -> Tensor:
        process = self.process
        assert process._anchor is not None
        parts = [self.first.covariance(X_new), self.weights, process._anchor.covariance(X_new)]
        n_sets = max(each.dim() for each in parts) - 2 - process.n_latents
        first, weights, own = (process._lined(each, 2, n_sets) for each in parts)
        return first - weights.mT @ own
