"""Sparse inverse Cholesky: p̂ is Vecchia's approximation of the prior, for 10⁴ to 10⁶ rows and any likelihood.

Under Gaussian sites the posterior precision is Λ = U Uᵀ + diag(λ2). Its mean is solved for by conjugate gradients; the
incomplete factor V of Λ on the pattern of U stands for it in determinants and covariances, so that
q(f) = N(Λ⁻¹λ1, (V Vᵀ)⁻¹). Noisy Gaussian data have a second, cheaper form, in which each is given other data.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from mercer._typing import Sites
from mercer.families.base import Confession, Prior
from mercer.families.nearness import Nearness
from mercer.families.sic_confession import confess
from mercer.families.sic_plan import SicPlan, plan_columns
from mercer.families.vecchia import Appended, append, columns_of, prior_factor, response_log_likelihood
from mercer.linalg.cholesky import NotPositiveDefiniteError
from mercer.linalg.incomplete import precision_entries
from mercer.linalg.sic_posterior import PosteriorPrecision
from mercer.policy import NumericalPolicy

_NOISY = 0.005  # noise over prior variance from which the latent form is clearly the more accurate
_UNSEEN = 1e10  # noise over prior variance of a row without a target


@dataclass(frozen=True)
class SparseInverseCholesky:
    """Gaussian-process family with a sparse inverse Cholesky (Vecchia) prior.

    Parameters
    ----------
    n_neighbors : int, default=30
        m, how many earlier rows each row is given.
    n_neighbors_predict : int, default=60
        How many rows a new row is given.
    pattern : {"knn", "ball"}, default="knn"
        The m nearest earlier rows, or those within ``rho`` maximin distances (at most m).
    rho : float, default=2.0
        Radius of "ball", ≥ 1.
    form : {"auto", "response", "latent"}, default="auto"
        What Vecchia's approximation is made of where the likelihood is Gaussian: of the noisy data, or of the latent
        function, which is more accurate for noisy data and costs more. "auto" learns hyperparameters from the
        response form and predicts from the latent one where noise is above 5 % of the prior variance. Evidence lower
        bounds of other likelihoods always have the latent form.
    variational : {"sites", "free"}, default="sites"
        "free" is the published family with a free mean and factor, `mercer.families.dklgp.DoubleKL`, which is trained
        by Adam and takes the place of this one.

    Notes
    -----
    O(n m³) operations for one evidence with its gradient, O(n m) memory. The approximation improves with m and worsens
    with the dimension of the inputs, counted in lengthscales.

    References
    ----------
    Vecchia (1988); Schäfer, Katzfuss and Owhadi (2021); Katzfuss, Guinness and Lawrence (2022), scaled Vecchia;
    Cao, Kang, Jimenez, Sang, Schäfer and Katzfuss (2023), DKLGP.
    """

    n_neighbors: int = 30
    n_neighbors_predict: int = 60
    pattern: str = "knn"
    rho: float = 2.0
    form: str = "auto"
    variational: str = "sites"
    name: ClassVar[str] = "sic"
    stage_growth: ClassVar[int] = 4
    evidence_of: ClassVar[str] = "under Vecchia's approximation"

    def __post_init__(self) -> None:
        if self.pattern not in ("knn", "ball"):
            raise ValueError(f"pattern must be 'knn' or 'ball', got {self.pattern!r}.")
        if self.form not in ("auto", "response", "latent"):
            raise ValueError(f"form must be 'auto', 'response' or 'latent', got {self.form!r}.")
        if self.variational not in ("sites", "free"):
            raise ValueError(f"variational must be 'sites' or 'free', got {self.variational!r}.")
        if self.n_neighbors_predict < 1:
            raise ValueError(f"n_neighbors_predict must be at least 1, got {self.n_neighbors_predict}.")

    @property
    def sums_over_columns(self) -> bool:
        """Whether the evidence of Gaussian data is a sum over columns."""
        return self.form != "latent"

    def plan(self, prior: Prior, X: Tensor, policy: NumericalPolicy) -> SicPlan:
        """Order the rows X (n, d) and find their neighbours at the prior's present lengthscales."""
        return self.plan_some(prior, X, policy, None)

    def plan_some(self, prior: Prior, X: Tensor, policy: NumericalPolicy, rows: Tensor | None) -> SicPlan:
        """Return a plan by which the response evidence is estimated from the columns of ``rows`` (r,) alone."""
        rho = self.rho if self.pattern == "ball" else None
        return plan_columns(prior, X, policy, self.n_neighbors, rho, rows, lengths=rho is not None)

    def stale(self, prior: Prior, plan: SicPlan) -> bool:
        """Whether the plan should be made anew for the prior's present lengthscales."""
        return plan.stale(prior)

    def condition(self, prior: Prior, plan: SicPlan, sites: Sites) -> SicPosterior:
        """Return the posterior of ``prior`` under ``sites`` at the planned rows."""
        return SicPosterior(prior, plan, sites, self)


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

    @staticmethod
    def _white_noise_of_new(new: Appended) -> Tensor:
        """Return U_**⁻ᵀ, (*b, q, q): the new rows' shares in white noise."""
        q, batch = new.factor.shape[-2], new.factor.dim() - 2
        eye = torch.eye(q, dtype=new.factor.dtype, device=new.factor.device)
        # each column is one right-hand side
        return new.spread(eye.reshape(q, *[1] * batch, q)).movedim(0, -1)

    def _shares(self, new: Appended, root: Tensor) -> Tensor:
        """Return what each new row takes of the data, (*b, q, n), once it is traced back to those."""
        near = new.near.clamp_min(0)
        kept = new.weights.masked_fill(new.near < 0, 0.0)
        pulls = kept.new_zeros(*kept.shape[:-1], len(self.plan.X))
        return root @ pulls.scatter_add(-1, near.expand(kept.shape), kept)

    def _covariance_of_shares(self, shares: Tensor) -> Tensor:
        """Return S (V Vᵀ)⁻¹ Sᵀ, (*b, q, q), for shares S (q, n)."""
        q, n = shares.shape
        factor = self.precision.factor
        rhs = shares.reshape(q, *[1] * (factor.dim() - 2), n)
        white = self.precision.whiten(rhs.expand(q, *factor.shape[:-1])).movedim(0, -2)
        return white @ white.mT

    @staticmethod
    def _normal(shape: tuple[int, ...], X: Tensor, generator: torch.Generator) -> Tensor:
        draw = torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)
        return draw.to(X)


class SicPosterior(ColumnPosterior):
    """A Gaussian process with a sparse inverse Cholesky prior, conditioned on sites; see `ColumnPosterior`."""

    def __init__(
        self,
        prior: Prior,
        plan: SicPlan,
        sites: Sites,
        family: SparseInverseCholesky,
        like: SicPosterior | None = None,
    ):
        super().__init__(prior, plan, sites, family, like)
        self._near: Tensor | None = None if like is None else like.__dict__.get("_mean_in_order", like._near)

    def with_sites(self, sites: Sites) -> SicPosterior:
        """Return the posterior under the same prior and rows with other sites; U is shared."""
        return SicPosterior(self.prior, self.plan, sites, self.family, self)

    def release(self) -> SicPosterior:
        """Compute what predictions need, then forget what only gradients need."""
        if self.latent:
            _ = self._mean_in_order
            self._prior_factor = None
            self.precision = self.precision.released()
        return self

    def __getstate__(self) -> dict[str, Any]:
        kept = ("prior", "plan", "sites", "family", "jitter", "latent", "_mean_in_order")
        state = {name: value for name, value in self.__dict__.items() if name in kept}
        if "precision" in self.__dict__:
            state["precision"] = self.precision.released()
        return {**state, "_prior_factor": None, "_near": None}

    def _factor_prior(self) -> tuple[Tensor, float]:
        return prior_factor(self.prior, self.plan)

    @cached_property
    def latent(self) -> bool:
        """Whether predictions come from the latent form."""
        if self.family.form == "latent" or not self._are_data:
            return True
        noise_to_signal = 1.0 / (self.sites.precision * self._prior_variance.detach()).clamp_min(1.0 / _UNSEEN)
        return self.family.form == "auto" and bool(noise_to_signal.median() > _NOISY)

    @cached_property
    def _mean_in_order(self) -> Tensor:
        with torch.no_grad():
            return self.precision.mean(self._ordered(self.sites.linear), self._near)

    def _response_log_likelihood(self, target: Tensor, noise: Tensor) -> Tensor:
        return response_log_likelihood(self.prior, self.plan, target, noise)

    def response_columns(self, chunk: Tensor) -> tuple[Tensor, Tensor]:
        """Return columns ``chunk`` (B,) of the factor of K + noise, (*b, B, w), and their tiles (*b, B, w, w)."""
        return columns_of(self.prior, self.plan, self.noise_in_order, self.plan.pattern.columns[chunk])

    def _terms_at_data(self) -> tuple[Tensor, Tensor, Tensor]:
        logdet, variance = self.precision.logdet_and_variance()
        if torch.is_grad_enabled():
            near = self.__dict__.get("_mean_in_order", self._near)
            mean = self.precision.mean(self._ordered(self.sites.linear), near)
        else:
            mean = self._mean_in_order
        return logdet - 2.0 * self.U[:, -1].log().sum(), mean, variance

    def confess(self) -> Confession:
        """Say how far the prior is from the exact one, and the posterior from its own; see `sic_confession`."""
        return confess(self)

    def covariance_product(self, vectors: Tensor) -> Tensor:
        """Return Λ⁻¹ times vectors (*b, n) at the training rows; not differentiable."""
        with torch.no_grad():
            return self._as_data(self.precision.solve(self._ordered(vectors)).value)

    # ---- prediction

    def _append(self, X: Tensor, joint: bool) -> tuple[Appended, Tensor]:
        """Return the columns of new rows and the values of the data that they are given, (*b, n)."""
        m = self.family.n_neighbors_predict
        if self.latent:
            values = self._mean_in_order  # which may raise the nugget
            return append(self.prior, self.plan, X, None, m, joint, self.jitter, self._nearness), values
        target, noise = (self._ordered(each) for each in self._targets())
        return append(self.prior, self.plan, X, noise, m, joint, nearness=self._nearness), target

    @property
    def row_elements(self) -> int:
        """Elements of temporaries per new row."""
        width = 1 + min(self.family.n_neighbors_predict, len(self.plan.X))
        members = 1 if self.latent else max(1, self.sites.precision.shape[:-1].numel())
        return 4 * members * width**2

    def _mean(self, X: Tensor) -> Tensor:
        new, values = self._append(X, joint=False)
        return new.spread(new.pull(values)) + self.prior.mean_at(X)

    def _marginals(self, X: Tensor) -> tuple[Tensor, Tensor]:
        new, values = self._append(X, joint=False)
        own = new.factor[..., -1]
        mean = new.pull(values) / own + self.prior.mean_at(X)
        variance = own.reciprocal().square()
        if self.latent:
            variance = variance + self.precision.quadratic_forms(new.near, new.weights / own.unsqueeze(-1))
        return mean, variance.expand_as(mean)

    def joint(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean (*b, q) and covariance (*b, q, q) of f at X; O(q n m) operations and O(q n) memory if latent."""
        new, values = self._append(X, joint=True)
        mean = new.spread(new.pull(values)) + self.prior.mean_at(X)
        root = self._white_noise_of_new(new)
        covariance = root @ root.mT
        if self.latent:
            covariance = covariance + self._covariance_of_shares(self._shares(new, root))
        return mean, covariance.expand(*mean.shape, len(X))

    def sample(self, X: Tensor, n_samples: int, generator: torch.Generator) -> Tensor:
        """Draw the latent f at X: (n_samples, *b, q), jointly at these rows.

        Draws of q at the data, continued to the new rows one by one, each given data and new rows before it.
        """
        with torch.no_grad():
            new, values = self._append(X, joint=True)
            batch = self.sites.linear.shape[:-1]
            if self.latent:
                noise = self._normal((n_samples, *batch, len(self.plan.X)), X, generator)
                values = values + self.precision.draws(noise)
            white = self._normal((n_samples, *batch, len(X)), X, generator)
            return new.spread(new.pull(values) + white) + self.prior.mean_at(X)
