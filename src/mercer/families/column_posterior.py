"""What posteriors made of sparse columns share: data order, pseudo-data, evidence and chunks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mercer._typing import Sites
from mercer.families.base import Confession, Prior
from mercer.families.nearness import Nearness
from mercer.families.sets import joint_of_sets
from mercer.families.sic_plan import SicPlan
from mercer.families.vecchia import Appended
from mercer.linalg.cholesky import NotPositiveDefiniteError
from mercer.linalg.incomplete import precision_entries
from mercer.linalg.sic_posterior import PosteriorPrecision

_UNSEEN = 1e10  # noise over prior variance of a row without a target


class ColumnPosterior(ABC):
    """What posteriors share whose prior, or a part of it, has a sparse inverse Cholesky factor U.

    Parameters
    ----------
    prior : Prior
    plan : SicPlan
        Its order is that of the rows of U; sites, and what comes back, are in the order of the data.
    sites : Sites
        λ1 and λ2, (*b, n), of the centred latent g = f − μ.
    family : Family
        Its options.
    like : ColumnPosterior, optional
        One of the same prior and plan, whose U is shared.

    Attributes
    ----------
    jitter : float
        Relative nugget that the latent prior needed; 0 as a rule.
    """

    pathwise = False

    def __init__(self, prior: Prior, plan: SicPlan, sites: Sites, family: Any, like: ColumnPosterior | None = None):
        self.prior, self.plan, self.sites, self.family = prior, plan, sites, family
        self._prior_factor: tuple[Tensor, Tensor] | None = None if like is None else like._prior_factor
        self.jitter: float = 0.0 if like is None else like.jitter

    # ---- what a posterior has to say for itself

    @property
    @abstractmethod
    def latent(self) -> bool:
        """Whether predictions come from the latent form."""

    @abstractmethod
    def _factor_prior(self) -> tuple[Tensor, float]:
        """Return U, (n, w), differentiable in the hyperparameters, and the relative nugget that it has."""

    @abstractmethod
    def _terms_at_data(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return log |I + K̂ D| (*b,), D = diag(λ2), and mean and variance of g in the plan's order, each (*b, n)."""

    @property
    @abstractmethod
    def _mean_in_order(self) -> Tensor:
        """Mean of g at the data in the plan's order, (*b, n), without gradients."""

    @abstractmethod
    def _response_log_likelihood(self, target: Tensor, noise: Tensor) -> Tensor:
        """Return log p̂ (*b,) of targets (*b, n) with that noise variance."""

    @abstractmethod
    def confess(self) -> Confession:
        """Say how far the approximation can be wrong."""

    @abstractmethod
    def _mean(self, X: Tensor) -> Tensor: ...

    @abstractmethod
    def _marginals(self, X: Tensor) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _joint(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean (*b, *t, q) and covariance (..., *t, q, q), which latents may share, for X (*t, q, d)."""

    @property
    @abstractmethod
    def row_elements(self) -> int:
        """Elements of temporaries per new row."""

    # ---- the prior's factor U and the posterior's V, rows in the plan's order

    @property
    def U(self) -> Tensor:
        """Factor of the prior, (n, w), differentiable."""
        return self._prior_parts[0]

    @property
    def _prior_parts(self) -> tuple[Tensor, Tensor]:
        """U and the entries of U Uᵀ on its pattern."""
        if self._prior_factor is None:
            with torch.enable_grad():
                U, self.jitter = self._factor_prior()
                self._prior_factor = U, precision_entries(self.plan.pattern, U)
        return self._prior_factor

    @cached_property
    def precision(self) -> PosteriorPrecision:
        """Λ = U Uᵀ + D and its incomplete factor V."""
        with torch.enable_grad():
            precision = self._ordered(self.sites.precision)
            while True:
                try:
                    U, entries = self._prior_parts
                    return PosteriorPrecision(self.plan.pattern, U, precision, shifting=False, prior_entries=entries)
                except NotPositiveDefiniteError as failure:
                    if self._is_for_want_of_a_prior(precision):
                        self.plan.nugget.raise_after(failure)
                        self._prior_factor = None
                        continue
                    raise

    def _is_for_want_of_a_prior(self, precision: Tensor) -> bool:
        """Whether a factor that broke down would have done so without negative sites: rows are nearly the same."""
        if not bool((precision < 0).any()):
            return True
        try:
            PosteriorPrecision(self.plan.pattern, self.U.detach(), precision.clamp_min(0.0), shifting=False)
        except NotPositiveDefiniteError:
            return True
        return False

    @cached_property
    def _are_data(self) -> bool:
        """Whether the sites are noisy data or nothing at all, as the response form needs them."""
        linear, precision = self.sites.linear, self.sites.precision
        return bool(((precision > 0) | ((precision == 0) & (linear == 0))).all())

    @cached_property
    def _prior_variance(self) -> Tensor:
        return self.plan.prior_variance(self.prior)

    def _ordered(self, values: Tensor) -> Tensor:
        return values[..., self.plan.order]

    def _as_data(self, values: Tensor) -> Tensor:
        """Return values (*b, n) in the order of the data."""
        out = torch.empty_like(values)
        return out.index_copy(-1, self.plan.order, values)

    def _targets(self) -> tuple[Tensor, Tensor]:
        """Return pseudo-data λ1/λ2 and their noise 1/λ2, (*b, n); a row without a site is pure noise."""
        linear, precision = self.sites.linear, self.sites.precision
        seen = precision > 0
        floor = 1.0 / (_UNSEEN * self._prior_variance)
        noise = 1.0 / torch.where(seen, precision, floor)
        return torch.where(seen, linear * noise, 0.0), noise

    @property
    def noise_in_order(self) -> Tensor:
        """Noise variances of the pseudo-data that the sites are, (*b, n), in the plan's order."""
        return self._ordered(self._targets()[1])

    # ---- evidence and marginals at the data: differentiable in the hyperparameters

    def log_evidence(self) -> Tensor:
        """Return log ∫ p̂(g) ∏ exp(−½ λ2 (λ1/λ2 − g)²) dg per batch element, in nats.

        In the response form, unless the family has the latent one or the sites are not like noisy data.
        """
        if self.family.form == "latent" or not self._are_data:
            ratio, mean, _ = self._terms_at_data()
            linear, precision = self._ordered(self.sites.linear), self._ordered(self.sites.precision)
            target = torch.where(precision != 0, linear / precision.where(precision != 0, 1.0), 0.0)
            return -0.5 * (target * (linear - precision * mean)).sum(-1) - 0.5 * ratio
        target, noise = self._targets()
        constant = 0.5 * (2 * math.pi * noise).log().expand(*noise.shape[:-1], len(self.plan.X)).sum(-1)
        return self._response_log_likelihood(target, noise) + constant

    def site_terms(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return log Z (*b,), and the mean and variance of g at the data (*b, n), all differentiable.

        Z is ∫ p̂(g) ∏ t(g) dg with |V Vᵀ| for |Λ|. Mean and variance are its derivatives in the sites: what a bound
        made of all three says of its own slope is true to rounding, whatever V misses.
        """
        return self._site_terms() if torch.is_grad_enabled() else self._plain_site_terms

    def _site_terms(self) -> tuple[Tensor, Tensor, Tensor]:
        ratio, mean, variance = self._terms_at_data()
        log_z = 0.5 * (self._ordered(self.sites.linear) * mean).sum(-1) - 0.5 * ratio
        return log_z, self._as_data(mean), self._as_data(variance)

    @cached_property
    def _plain_site_terms(self) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            return self._site_terms()

    def log_normaliser(self) -> tuple[Tensor, Tensor]:
        """Return log Z (*b,), in nats, and the mean of g at the data (*b, n), as `site_terms` does."""
        return self.site_terms()[:2]

    @cached_property
    def mean_at_data(self) -> Tensor:
        """Mean of the centred latent g at the training rows, (*b, n); not differentiable."""
        return self._as_data(self._mean_in_order)

    @cached_property
    def variance_at_data(self) -> Tensor:
        """Variance of g at the training rows, (*b, n), in units of f²; not differentiable."""
        return self._plain_site_terms[2]

    def at_data(self) -> tuple[Tensor, Tensor]:
        """Return mean (prior mean included) and variance of f at the training rows, each (*b, n)."""
        mean = self.mean_at_data + self.prior.mean_at(self.plan.in_data_order)
        return mean, self.variance_at_data.expand_as(mean)

    def kl(self) -> Tensor:
        """Return KL[q(f) ‖ p̂(f)] = E_q[log t] − log Z per batch element, in nats."""
        log_z, m, v = self.site_terms()
        return self.expected_log_sites(m, v) - log_z

    def expected_log_sites(self, m: Tensor, v: Tensor) -> Tensor:
        """Return E_q[Σ λ1 g − ½ λ2 g²] for marginals N(m, v) of g, per batch element."""
        return (self.sites.linear * m - 0.5 * self.sites.precision * (v + m.square())).sum(-1)

    # ---- prediction

    @cached_property
    def _nearness(self) -> Nearness:
        return Nearness(self.prior.kernel, self.plan.X, self.plan.policy)

    def _chunks(self, X: Tensor) -> tuple[Tensor, ...]:
        return X.split(self.plan.policy.chunk_rows(self.row_elements))

    def mean(self, X: Tensor) -> Tensor:
        """Return the mean of f at X (q, d): (*b, q)."""
        return torch.cat([self._mean(chunk) for chunk in self._chunks(X)], -1)

    def marginals(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of f at X (q, d), each (*b, q), in units of f and f².

        Each new row is given its nearest rows only, with all correlations of those under the posterior.
        """
        parts = [self._marginals(chunk) for chunk in self._chunks(X)]
        return torch.cat([m for m, _ in parts], -1), torch.cat([v for _, v in parts], -1)

    def joint(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean (*b, *t, q) and covariance (*b, *t, q, q) of f at X (*t, q, d), sets of rows each by itself.

        O(q n m) operations and O(q n) memory for a set if latent, and M for m more with M inducing points.
        """
        return joint_of_sets(self._joint, X, self.row_elements + 2 * len(self.plan.X), self.plan.policy)

    def _shares(self, new: Appended, root: Tensor) -> Tensor:
        """Return what each new row takes of the data, (*b, *t, q, n), once it is traced back to those."""
        near = new.near.clamp_min(0)
        kept = new.weights.masked_fill(new.near < 0, 0.0)
        pulls = kept.new_zeros(*kept.shape[:-1], len(self.plan.X))
        pulls = pulls.scatter_add(-1, near.expand(kept.shape), kept)
        return root @ pulls.reshape(*root.shape[:-1], -1)

    def _covariance_of_shares(self, shares: Tensor) -> Tensor:
        """Return S (V Vᵀ)⁻¹ Sᵀ, (*b, *t, q, q), for shares S (*t, q, n)."""
        sides, factor = shares.shape[:-1], self.precision.factor
        rhs = shares.reshape(sides.numel(), *[1] * (factor.dim() - 2), shares.shape[-1])
        white = self.precision.whiten(rhs.expand(sides.numel(), *factor.shape[:-1]))
        white = white.movedim(0, -2).unflatten(-2, sides)
        return white @ white.mT

    @staticmethod
    def _normal(shape: tuple[int, ...], X: Tensor, generator: torch.Generator) -> Tensor:
        draw = torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)
        return draw.to(X)
