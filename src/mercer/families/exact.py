"""The exact family: p̂ is the prior itself, conditioned densely through B = I + W½ K W½.

O(n³) time and O(n²) memory. Batch dimensions are latents or outputs that share the kernel (or have their own, if
the kernel carries a batch shape).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from mercer._typing import Sites
from mercer.families.base import Confession, Prior
from mercer.families.pathwise import KernelPaths, standard_normal
from mercer.families.sets import covariance_of_sets, joint_of_sets
from mercer.kernels.evaluate import diag, gram
from mercer.kernels.paths import prior_paths
from mercer.kernels.spectral import has_spectral
from mercer.linalg.cholesky import cholesky
from mercer.linalg.conditioning import ConditionOnSites, SiteFactor, factor_sites
from mercer.policy import NumericalPolicy


@dataclass(frozen=True)
class ExactPlan:
    """The training rows and the policy; nothing else needs planning."""

    X: Tensor
    policy: NumericalPolicy


@dataclass(frozen=True)
class Exact:
    """Dense Gaussian-process family, the reference for all others.

    References
    ----------
    Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, chapters 2 and 3.
    """

    name: ClassVar[str] = "exact"
    sums_over_columns: ClassVar[bool] = False
    stage_growth: ClassVar[int] = 2
    stage_rows: ClassVar[int] = 200
    dense: ClassVar[bool] = True
    evidence_of: ClassVar[str] = ""

    def stale(self, prior: Prior, plan: ExactPlan) -> bool:
        """Return False: rows are rows."""
        return False

    def plan(self, prior: Prior, X: Tensor, policy: NumericalPolicy) -> ExactPlan:
        """Keep the rows X, shape (n, d)."""
        return ExactPlan(X, policy)

    def condition(self, prior: Prior, plan: ExactPlan, sites: Sites) -> ExactPosterior:
        """Return the posterior of ``prior`` under ``sites`` at the planned rows."""
        return ExactPosterior(prior, plan, sites)


class ExactPosterior:
    """A Gaussian process conditioned on sites at n rows.

    Parameters
    ----------
    prior : Prior
    plan : ExactPlan
    sites : Sites
        λ1 and λ2, (*b, n), of the centred latent g = f − μ.
    K : (*b, n, n), optional
        The Gram matrix, when the caller has it already.
    """

    def __init__(self, prior: Prior, plan: ExactPlan, sites: Sites, K: Tensor | None = None):
        self.prior, self.plan, self.sites = prior, plan, sites
        self._K = K

    def __getstate__(self) -> dict[str, Any]:
        # the Gram matrix is cheap to rebuild; the factor is kept so that predictions survive bit for bit
        return {**self.__dict__, "_K": None}

    def with_sites(self, sites: Sites) -> ExactPosterior:
        """Return the posterior under the same prior and rows with other sites; the Gram matrix is shared."""
        return ExactPosterior(self.prior, self.plan, sites, self.K)

    def release(self) -> ExactPosterior:
        """Factor, then forget the Gram matrix: what a fitted model keeps is one n × n factor."""
        _ = self.factor
        self._K = None
        return self

    @property
    def K(self) -> Tensor:
        """Gram matrix of the training rows, units of f²; differentiable, so that sites and evidence share it."""
        if self._K is None:
            with torch.enable_grad():
                self._K = gram(self.prior.kernel, self.plan.X, policy=self.plan.policy)
        return self._K

    @cached_property
    def factor(self) -> SiteFactor:
        """Factor of B; not differentiable in the hyperparameters."""
        with torch.no_grad():
            return factor_sites(self.K, self.sites.linear, self.sites.precision, self.plan.policy)

    @property
    def jitter(self) -> float:
        """Relative jitter that the factorisation of B needed; 0 as a rule."""
        return self.factor.jitter

    # ---- evidence and marginals at the data: differentiable in the hyperparameters

    def _conditioned(self, variance: bool) -> tuple[Tensor, Tensor, Tensor]:
        found = self.__dict__.get("factor")
        sites = self.sites
        out = ConditionOnSites.apply(self.K, sites.linear, sites.precision, self.plan.policy, variance, found)
        self.__dict__.setdefault("variance_at_data", out[2].detach().clamp_min(0.0))  # a by-product
        return out

    def log_evidence(self) -> Tensor:
        """Return log ∫ p(g) ∏ exp(−½ λ2 (λ1/λ2 − g)²) dg per batch element, in nats.

        It is −½ ỹᵀr − ½ log|B| with pseudo-targets ỹ = λ1/λ2, free of the cancellation in log Z.
        """
        linear, precision = self.sites.linear, self.sites.precision
        if torch.is_grad_enabled():
            residual, logdet, _ = self._conditioned(variance=False)
        else:
            residual, logdet = self.factor.residual, self.factor.logdet
        seen = precision != 0
        target = torch.where(seen, linear / precision.where(seen, torch.ones_like(precision)), 0.0)
        return -0.5 * (target * residual).sum(-1) - 0.5 * logdet

    def log_normaliser(self) -> tuple[Tensor, Tensor]:
        """Return log Z = log ∫ p(g) ∏ t(g) dg (*b,), in nats, and the mean of g at the data (*b, n).

        Both are differentiable in the hyperparameters and the sites; no variances are computed for it.
        """
        if torch.is_grad_enabled():
            residual, logdet, _ = self._conditioned(variance=False)
            mean = (self.K @ residual.unsqueeze(-1)).squeeze(-1)
        else:
            mean, logdet = self.mean_at_data, self.factor.logdet
        return 0.5 * (self.sites.linear * mean).sum(-1) - 0.5 * logdet, mean

    def site_terms(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return log Z (*b,), and the mean and variance of g at the data (*b, n), all differentiable."""
        if not torch.is_grad_enabled():
            return (*self.log_normaliser(), self.variance_at_data)
        residual, logdet, variance = self._conditioned(variance=True)
        mean = (self.K @ residual.unsqueeze(-1)).squeeze(-1)
        return 0.5 * (self.sites.linear * mean).sum(-1) - 0.5 * logdet, mean, variance

    @cached_property
    def mean_at_data(self) -> Tensor:
        """Mean of the centred latent g at the training rows, (*b, n); not differentiable."""
        with torch.no_grad():
            return (self.K @ self.factor.residual.unsqueeze(-1)).squeeze(-1)

    @cached_property
    def variance_at_data(self) -> Tensor:
        """Variance of g at the training rows, (*b, n), in units of f²; not differentiable."""
        with torch.no_grad():
            return self.factor.variance_at_sites(self.K, self.sites.precision).clamp_min(0.0)

    def covariance_product(self, vectors: Tensor) -> Tensor:
        """Return Cov(g) times vectors (*b, n) at the training rows, in O(n²); not differentiable."""
        return self.factor.covariance_product(self.K, vectors)

    def at_data(self) -> tuple[Tensor, Tensor]:
        """Return mean (prior mean included) and variance of f at the training rows, each (*b, n)."""
        mean = self.mean_at_data + self.prior.mean_at(self.plan.X)
        return mean, self.variance_at_data.expand_as(mean)

    def kl(self) -> Tensor:
        """Return KL[q(f) ‖ p(f)] = E_q[log t] − log Z per batch element, in nats."""
        log_z, m, v = self.site_terms()
        return self.expected_log_sites(m, v) - log_z

    def confess(self) -> Confession:
        """Return nothing: there is no approximation."""
        return Confession()

    def expected_log_sites(self, m: Tensor, v: Tensor) -> Tensor:
        """Return E_q[Σ λ1 g − ½ λ2 g²] for marginals N(m, v) of g, per batch element."""
        return (self.sites.linear * m - 0.5 * self.sites.precision * (v + m.square())).sum(-1)

    # ---- prediction: four separate paths, chunked over test rows

    @property
    def row_elements(self) -> int:
        """Elements of temporaries per new row."""
        return 4 * max(1, self.sites.linear.shape[:-1].numel()) * self.plan.X.shape[-2]

    def _chunks(self, X: Tensor, arrays: int) -> list[Tensor]:
        latents = max(1, self.sites.linear.shape[:-1].numel())
        return list(X.split(self.plan.policy.chunk_rows(arrays * latents * self.plan.X.shape[-2])))

    def mean(self, X: Tensor) -> Tensor:
        """Return the mean of f at X (n*, d): (*b, n*), in O(n) memory per row of a chunk."""
        return torch.cat([self._mean(chunk) for chunk in self._chunks(X, 1)], dim=-1)

    def _mean(self, X: Tensor) -> Tensor:
        Ksf = gram(self.prior.kernel, X, self.plan.X, policy=self.plan.policy)
        residual = self.factor.residual
        if Ksf.dim() == 2:
            return residual @ Ksf.mT + self.prior.mean_at(X)
        return (Ksf @ residual.unsqueeze(-1)).squeeze(-1) + self.prior.mean_at(X)

    def marginals(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of f at X (n*, d), each (*b, n*), in units of f and f²."""
        parts = [self._marginals(chunk) for chunk in self._chunks(X, 2)]
        return torch.cat([m for m, _ in parts], -1), torch.cat([v for _, v in parts], -1)

    def _marginals(self, X: Tensor) -> tuple[Tensor, Tensor]:
        Kfs = gram(self.prior.kernel, self.plan.X, X, policy=self.plan.policy)
        mean = (self.factor.residual.unsqueeze(-2) @ Kfs).squeeze(-2) + self.prior.mean_at(X)
        variance = diag(self.prior.kernel, X) - self.factor.reduction(Kfs)
        return mean, variance.clamp_min(0.0).expand_as(mean)

    def joint(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean (*b, *t, q) and covariance (*b, *t, q, q) of f at X (*t, q, d), sets of rows each by itself."""
        return joint_of_sets(self._joint, X, self.row_elements, self.plan.policy)

    def _joint(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and covariance, the latter once for outputs that share it."""
        Kfs = self._cross(X)
        mean = (self.factor.residual.unsqueeze(-2) @ Kfs).squeeze(-2).unflatten(-1, X.shape[:-1])
        T, D = self.factor.reduce(Kfs)
        T = self._by_sets(T, X)
        covariance = covariance_of_sets(self.prior.kernel, X, None, self.plan.policy) - T.mT @ T
        if D is not None:
            D = self._by_sets(D, X)
            covariance = covariance + D.mT @ D
        return mean + self.prior.mean_at(X), covariance

    def _cross(self, X: Tensor) -> Tensor:
        """Return k(data, rows) for all rows of X (*t, q, d), one set after the other."""
        return gram(self.prior.kernel, self.plan.X, X.reshape(-1, X.shape[-1]), policy=self.plan.policy)

    @staticmethod
    def _by_sets(columns: Tensor, X: Tensor) -> Tensor:
        """Return (*b, k, rows) as (*b, *t, k, q)."""
        return columns.unflatten(-1, X.shape[:-1]).movedim(columns.dim() - 2, -2)

    def covariance_weights(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows R (r, d) and weights W with Cov(f(X), f(x)) = k(X, x) − Wᵀ k(R, x), set by set.

        W is (*b, *t, r, q) for X (*t, q, d), with size one where latents share it.
        """
        Kfs, factor = self._cross(X), self.factor
        T, D = factor.reduce(Kfs)
        weights = factor.root.unsqueeze(-1) * torch.linalg.solve_triangular(factor.chol.mT, T, upper=True)
        if D is not None and factor.downdate is not None:
            weights = weights - factor.downdate @ D
        shared = self.sites.linear.dim() + 1 - weights.dim()
        return self.plan.X, self._by_sets(weights.reshape(*[1] * shared, *weights.shape), X)

    # ---- samples

    @property
    def pathwise(self) -> bool:
        """Whether samples are functions (consistent at any X) or joint draws at the given X only."""
        return has_spectral(self.prior.kernel) and self.factor.downdate is None

    def paths(self, n_samples: int, generator: torch.Generator) -> KernelPaths:
        """Draw ``n_samples`` functions for each latent, of a kernel whose spectrum is known.

        A prior function from random features plus the exact update for the sites (Wilson et al., 2020, eq. 12).
        """
        X = self.plan.X
        batch = torch.broadcast_shapes(self.sites.linear.shape[:-1], self.factor.root.shape[:-1])
        n_paths = n_samples * batch.numel()
        where: dict[str, Any] = {"d": X.shape[-1], "dtype": X.dtype, "device": X.device}
        functions = prior_paths(self.prior.kernel, n_paths, 2048, generator, **where)
        at_data = functions(X).reshape(n_samples, *batch, -1)
        noise = standard_normal(at_data.shape, X, generator)
        # prior draw's own residual s B⁻¹ (s g + η), η ~ N(0, I): the noise of site i has variance 1/λ2ᵢ
        root = self.factor.root
        weights = self.factor.residual - root * self.factor.solve(root * at_data + noise)
        return KernelPaths(self.prior, functions, X, weights, self.plan.policy)

    def sample(self, X: Tensor, n_samples: int, generator: torch.Generator) -> Tensor:
        """Draw the latent f at X: (n_samples, *b, n*).

        With a kernel whose spectrum is known the draws are `paths`, so equal generators give the same functions at
        any X. Otherwise they are joint draws at X.
        """
        if self.pathwise:
            return self.paths(n_samples, generator)(X)
        mean, covariance = self._joint(X)
        L = cholesky(covariance, self.plan.policy, "posterior covariance").value
        noise = standard_normal((n_samples, *mean.shape), X, generator)
        return mean + (L @ noise.unsqueeze(-1)).squeeze(-1)
