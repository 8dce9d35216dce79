"""Sparse inverse Cholesky: p̂ is Vecchia's approximation of the prior, for 10⁴ to 10⁶ rows and any likelihood.

Under Gaussian sites the posterior precision is Λ = U Uᵀ + diag(λ2). Its mean is solved for by conjugate gradients; the
incomplete factor V of Λ on the pattern of U stands for it in determinants and covariances, so that
q(f) = N(Λ⁻¹λ1, (V Vᵀ)⁻¹). Noisy Gaussian data have a second, cheaper form, in which each is given other data.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor

from mercer._typing import Sites
from mercer.families.base import Confession, Prior
from mercer.families.column_posterior import ColumnPosterior
from mercer.families.sic_confession import confess
from mercer.families.sic_plan import SicPlan, plan_columns
from mercer.families.vecchia import Appended, append, columns_of, prior_factor, response_log_likelihood
from mercer.policy import NumericalPolicy

_NOISY = 0.005  # noise over prior variance from which the latent form is clearly the more accurate


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
    stage_rows: ClassVar[int] = 200
    dense: ClassVar[bool] = False
    evidence_of: ClassVar[str] = "under Vecchia's approximation"

    def __post_init__(self) -> None:
        if self.pattern not in ("knn", "ball"):
            raise ValueError(f"pattern must be 'knn' or 'ball', got {self.pattern!r}.")
        if self.form not in ("auto", "response", "latent"):
            raise ValueError(f"form must be 'auto', 'response' or 'latent', got {self.form!r}.")
        if self.variational not in ("sites", "free"):
            raise ValueError(f"variational must be 'sites' or 'free', got {self.variational!r}.")
        for name in ("n_neighbors", "n_neighbors_predict"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name} must be at least 1 and an integer, got {value!r}.")

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
        signal_to_noise = self.sites.precision * self._prior_variance.detach()
        return self.family.form == "auto" and bool(signal_to_noise.median() < 1.0 / _NOISY)

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

    def _joint(self, X: Tensor) -> tuple[Tensor, Tensor]:
        new, values = self._append(X, joint=True)
        mean = new.spread(new.pull(values)).unflatten(-1, X.shape[:-1]) + self.prior.mean_at(X)
        root = new.white_noise(X.shape[:-1])
        covariance = root @ root.mT
        if self.latent:
            covariance = covariance + self._covariance_of_shares(self._shares(new, root))
        return mean, covariance

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
