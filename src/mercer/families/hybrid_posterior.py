"""Vecchia's approximation of the residual of inducing points under Gaussian sites.

The prior of the centred latent g = Φ u + r is that of `mercer.families.hybrid_plan`, r ~ N(0, (U Uᵀ)⁻¹) with U of R.
Given u the sites leave r the precision A = U Uᵀ + diag(λ2), sparse; all that u adds is of rank M. With J = A⁻¹ D Φ,
D = diag(λ2), G = Φ − J and C = I + Φᵀ D G,

    Cov(u) = C⁻¹,  E u = C⁻¹ Gᵀ λ1,  E g = A⁻¹ λ1 + G E u,  Cov(g) = A⁻¹ + G C⁻¹ Gᵀ,
    log Z = ½ λ1ᵀ E g − ½ (log|A| − log|U Uᵀ| + log|C|).

These are Woodbury's identity for the precision (Φ Φᵀ + (U Uᵀ)⁻¹)⁻¹ + D, arranged such that nothing cancels where an
inducing point leaves no residual and U Uᵀ is huge. The determinant of A and its inverse's diagonal are those of the
incomplete factor V, as in plain sparse inverse Cholesky. In the response form noisy data take the place of r.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mercer._typing import Sites
from mercer.families.base import Confession, Prior
from mercer.families.column_posterior import ColumnPosterior
from mercer.families.hybrid import append, residual_factor, response_log_likelihood, response_sums, tile_elements
from mercer.families.hybrid_plan import HybridPlan, Points, Residual
from mercer.families.vecchia import Appended
from mercer.linalg.cholesky import NotPositiveDefiniteError
from mercer.linalg.sic import logdet

if TYPE_CHECKING:
    from mercer.families.inducing_vecchia import InducingVecchia

_FEW_SIDES = 8  # right-hand sides that are solved for at once even where they are many rows
_PROBES, _SEED = 4, 20230131  # of the estimate of what the incomplete factor misses
_RESIDUAL = 1e-6


@dataclass(frozen=True)
class Known:
    """What the sites say: residuals (or noisy data less Φ u) are ``values`` − ``lift`` u, plus noise of precision A.

    Attributes
    ----------
    values : (*b, n)
        In the plan's order, as all rows here: A⁻¹ λ1, or targets.
    lift : (*b, n, M)
        J, or Φ.
    L : (*b, M, M)
        L Lᵀ = Cov(u)⁻¹.
    inside : (*b, M)
        Lᵀ E u.
    """

    values: Tensor
    lift: Tensor
    L: Tensor
    inside: Tensor

    def detached(self) -> Known:
        """Return the same without gradients."""
        return Known(self.values.detach(), self.lift.detach(), self.L.detach(), self.inside.detach())

    def root(self, pull: Tensor) -> Tensor:
        """Return a root (*b, q, M) of the covariance of pull u, for pull (*b, q, M)."""
        return torch.linalg.solve_triangular(self.L, pull.mT, upper=False).mT

    def unwhitened(self, white: Tensor) -> Tensor:
        """Return L⁻ᵀ times white (*c, *b, M)."""
        return torch.linalg.solve_triangular(self.L.mT, white.unsqueeze(-1), upper=True).squeeze(-1)

    def residuals(self, u: Tensor) -> Tensor:
        """Return values − lift u, (*c, *b, n), for u (*c, *b, M)."""
        return self.values - (self.lift @ u.unsqueeze(-1)).squeeze(-1)


class HybridPosterior(ColumnPosterior):
    """A Gaussian process with inducing points and a sparse factor of the residual, conditioned on sites at n rows.

    Parameters
    ----------
    prior : Prior
    plan : HybridPlan
    sites : Sites
        λ1 and λ2, (*b, n), of the centred latent g = f − μ, in the order of the data.
    family : InducingVecchia
        Its options.
    like : HybridPosterior, optional
        One of the same prior and plan, whose Φ and U are shared.
    """

    plan: HybridPlan

    def __init__(
        self,
        prior: Prior,
        plan: HybridPlan,
        sites: Sites,
        family: InducingVecchia,
        like: HybridPosterior | None = None,
    ):
        super().__init__(prior, plan, sites, family, like)
        self._features: tuple[Residual, Points] | None = None if like is None else like._features
        solved = None if like is None else like.__dict__.get("_solved")
        self._near: Tensor | None = solved.lift.detach() if solved else None if like is None else like._near

    def with_sites(self, sites: Sites) -> HybridPosterior:
        """Return the posterior under the same prior and rows with other sites; Φ and U are shared."""
        return HybridPosterior(self.prior, self.plan, sites, self.family, self)

    def release(self) -> HybridPosterior:
        """Compute what predictions need, then forget what only gradients need."""
        kept = self._kept()
        self.__dict__.clear()
        self.__dict__.update(kept)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self._kept()

    def _kept(self) -> dict[str, Any]:
        names = ("prior", "plan", "sites", "family", "latent", "_known", "_rows")
        state: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.latent:
            state |= {"precision": self.precision.released(), "_solved": self._known}
        # what was computed may have raised the jitter
        return {**state, "jitter": self.jitter, "_prior_factor": None, "_features": None, "_near": None}

    # ---- the prior and what the sites make of it, rows in the plan's order

    @cached_property
    def latent(self) -> bool:
        """Whether predictions come from the latent form."""
        return self.family.form == "latent" or not self._are_data

    def _with_features(self) -> tuple[Residual, Points]:
        """Return the residual's covariance and the rows with Φ, differentiable."""
        if self._features is None:
            with torch.enable_grad():
                residual = Residual(self.prior.kernel, self.plan.Z, self.plan.policy)
                self._features = residual, residual.points(self.plan.X)
        return self._features

    @cached_property
    def _rows(self) -> tuple[Residual, Points]:
        """The same without gradients in the hyperparameters, for predictions."""
        residual, data = self._with_features()
        return residual.detached(), Points(data.X, data.features.detach())

    def _factor_prior(self) -> tuple[Tensor, float]:
        return residual_factor(self.prior, self.plan, *self._with_features())

    @cached_property
    def _solved(self) -> Known:
        """What the sites say in the latent form."""
        with torch.enable_grad():  # whoever asks first, all share it
            phi = self._with_features()[1].features
            linear, precision = self._ordered(self.sites.linear), self._ordered(self.sites.precision)
            batch = self.precision.factor.shape[:-1]
            sides = precision * phi.mT.reshape(-1, *[1] * (len(batch) - 1), batch[-1])
            start = None if self._near is None else self._near.movedim(-1, 0)
            start = start if start is not None and start.shape == sides.shape else torch.zeros_like(sides.detach())
            # the gradient of a solve holds an entry of U for each side
            at_once = max(_FEW_SIDES, self.plan.policy.chunk_rows(2 * self.precision.factor.numel()))
            pairs = zip(sides.split(at_once), start.split(at_once), strict=True)
            solved = [self.precision.mean(*pair) for pair in pairs] if len(sides) else [sides]
            lift = torch.cat(solved).movedim(0, -1)
            C = phi.mT @ (precision.unsqueeze(-1) * (phi - lift))
            L, info = torch.linalg.cholesky_ex(0.5 * (C + C.mT) + torch.eye(C.shape[-1]).to(C))
            if bool(info.any()):
                raise NotPositiveDefiniteError("Negative sites outweigh the prior of the inducing points.")
            pushed = (phi - lift).mT @ linear.unsqueeze(-1)
            inside = torch.linalg.solve_triangular(L, pushed, upper=False).squeeze(-1)
            return Known(self.precision.mean(linear), lift, L, inside)

    @cached_property
    def _known(self) -> Known:
        """What the sites say, for predictions."""
        if self.latent:
            return self._solved.detached()
        with torch.no_grad():
            target, noise = (self._ordered(each) for each in self._targets())
            residual, data = self._rows
            return Known(target, data.features, *response_sums(self.plan, residual, data, target, noise).solved())

    # ---- at the data

    def _response_log_likelihood(self, target: Tensor, noise: Tensor) -> Tensor:
        return response_log_likelihood(self.prior, self.plan, target, noise)

    def _terms_at_data(self) -> tuple[Tensor, Tensor, Tensor]:
        solved = self._solved
        root = solved.root(self._with_features()[1].features - solved.lift)
        mean = solved.values + (root @ solved.inside.unsqueeze(-1)).squeeze(-1)
        of_A, variance = self.precision.logdet_and_variance()
        of_C = 2.0 * solved.L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return of_A - logdet(self.U) + of_C, mean, variance + root.square().sum(-1)

    @cached_property
    def _mean_in_order(self) -> Tensor:
        with torch.no_grad():
            solved = self._solved
            u = solved.unwhitened(solved.inside)
            return solved.residuals(u) + (self._rows[1].features @ u.unsqueeze(-1)).squeeze(-1)

    def covariance_product(self, vectors: Tensor) -> Tensor:
        """Return Cov(g) times vectors (*b, n) at the training rows; not differentiable."""
        with torch.no_grad():
            x = self._ordered(vectors)
            G = self._rows[1].features - self._solved.lift
            by_u = (G @ torch.cholesky_solve(G.mT @ x.unsqueeze(-1), self._solved.L)).squeeze(-1)
            return self._as_data(self.precision.solve(x.expand(by_u.shape)).value + by_u)

    def confess(self) -> Confession:
        """Say what the approximation is and, in the latent form, what its incomplete factor misses."""
        form = "latent function" if self.latent else "noisy data"
        notes, warnings = list(self.plan.notes), []
        notes.append(
            f"{len(self.plan.Z)} inducing points, and Vecchia's approximation of what they leave of the {form}, "
            f"{self.plan.pattern.columns.shape[-1] - 1} neighbours a row"
        )
        if self.latent:
            shape = (_PROBES, *self.precision.factor.shape[:-1])
            probes = torch.randn(shape, generator=torch.Generator().manual_seed(_SEED), dtype=torch.float64).sign()
            with torch.no_grad():
                missing = float(self.precision.missing_logdet(probes.to(self.precision.factor)).abs().max())
            notes.append(f"its incomplete factor is off by {0.5 * missing:.2g} nats in the evidence")
            if self.precision.residual > _RESIDUAL:
                warnings.append(
                    f"conjugate gradients stopped at a relative residual of {self.precision.residual:.1g}: means may "
                    "be off; look for near-duplicate rows"
                )
        return Confession(tuple(notes), tuple(warnings))

    # ---- prediction: g* = Φ* u + U_**⁻ᵀ (ε − U_o*ᵀ r)

    @property
    def row_elements(self) -> int:
        """Elements of temporaries per new row."""
        width, rank = 1 + min(self.family.n_neighbors_predict, len(self.plan.X)), len(self.plan.Z)
        return tile_elements(width, rank, self.sites.precision) + self.sites.precision.shape[:-1].numel() * width * rank

    def _append(self, X: Tensor, joint: bool) -> tuple[Appended, Tensor, Known]:
        """Return the columns of new rows, their features (q, M), and what is known of the data."""
        known = self._known  # which may raise the nugget
        noise = None if self.latent else self.noise_in_order.detach()
        m = self.family.n_neighbors_predict
        return *append(self.prior, self.plan, *self._rows, X, noise, m, joint, self.jitter, self._nearness), known

    @cached_property
    def _expected(self) -> tuple[Tensor, Tensor]:
        """E u, (*b, M), and the residuals of the data given that, (*b, n)."""
        u = self._known.unwhitened(self._known.inside)
        return u, self._known.residuals(u)

    def _mean_of(self, new: Appended, features: Tensor, X: Tensor) -> Tensor:
        u, residuals = self._expected
        mean = u @ features.mT + new.spread(new.pull(residuals))
        return mean.unflatten(-1, X.shape[:-1]) + self.prior.mean_at(X)

    def _mean(self, X: Tensor) -> Tensor:
        new, features, _ = self._append(X, joint=False)
        return self._mean_of(new, features, X)

    def _marginals(self, X: Tensor) -> tuple[Tensor, Tensor]:
        new, features, known = self._append(X, joint=False)
        own = new.factor[..., -1]
        weights = new.weights / own.unsqueeze(-1)
        lifted = (weights.unsqueeze(-2) @ known.lift[..., new.near.clamp_min(0), :]).squeeze(-2)
        variance = own.reciprocal().square() + known.root(features - lifted).square().sum(-1)
        if self.latent:
            variance = variance + self.precision.quadratic_forms(new.near, weights)
        mean = self._mean_of(new, features, X)
        return mean, variance.expand_as(mean)

    def _joint(self, X: Tensor) -> tuple[Tensor, Tensor]:
        new, features, known = self._append(X, joint=True)
        sets = X.shape[:-1]
        root = new.white_noise(sets)
        shares = self._shares(new, root)
        lifted = (shares.flatten(-len(sets) - 1, -2) @ known.lift).unflatten(-2, sets)
        pull = features.unflatten(-2, sets) - lifted
        low_rank = known.root(pull.flatten(-len(sets) - 1, -2)).unflatten(-2, sets)
        covariance = root @ root.mT + low_rank @ low_rank.mT
        if self.latent:
            covariance = covariance + self._covariance_of_shares(shares)
        return self._mean_of(new, features, X), covariance

    def sample(self, X: Tensor, n_samples: int, generator: torch.Generator) -> Tensor:
        """Draw the latent f at X: (n_samples, *b, q), jointly at these rows.

        Draws of inducing values, then of residuals at the data, continued to the new rows one by one.
        """
        with torch.no_grad():
            new, features, known = self._append(X, joint=True)
            batch, (n, M) = self.sites.linear.shape[:-1], self._rows[1].features.shape
            u = known.unwhitened(known.inside + self._normal((n_samples, *batch, M), X, generator))
            residuals = known.residuals(u)
            if self.latent:
                residuals = residuals + self.precision.draws(self._normal((n_samples, *batch, n), X, generator))
            white = self._normal((n_samples, *batch, len(X)), X, generator)
            return u @ features.mT + new.spread(new.pull(residuals) + white) + self.prior.mean_at(X)
