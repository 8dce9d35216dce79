"""Vecchia's approximation of the residual of inducing points under Gaussian sites, for any likelihood.

The prior of the centred latent g = Φ u + r is that of `mercer.families.hybrid_plan`, r ~ N(0, (U Uᵀ)⁻¹) with U of R.
Given u the sites leave r the precision A = U Uᵀ + diag(λ2), sparse; all that u adds is of rank M. With G = Φ − A⁻¹ D Φ,
D = diag(λ2), and C = I + Φᵀ D G,

    Cov(u) = C⁻¹,  E u = C⁻¹ Gᵀ λ1,  E g = A⁻¹ λ1 + G E u,  Cov(g) = A⁻¹ + G C⁻¹ Gᵀ,
    log Z = ½ λ1ᵀ E g − ½ (log|A| − log|U Uᵀ| + log|C|).

These are Woodbury's identity for the precision (Φ Φᵀ + (U Uᵀ)⁻¹)⁻¹ + D, arranged such that nothing cancels where an
inducing point leaves no residual and U Uᵀ is huge. The determinant of A and its inverse's diagonal are those of the
incomplete factor V, as in plain sparse inverse Cholesky.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mercer._typing import Sites
from mercer.families.base import Prior
from mercer.families.hybrid import RowTable, chunk_rows, columns_of_new, factors_of_new
from mercer.families.hybrid_plan import HybridPlan, Points, Residual
from mercer.kernels.evaluate import diag
from mercer.linalg.cholesky import NotPositiveDefiniteError
from mercer.linalg.sic import column_factors, logdet, solve
from mercer.linalg.sic_posterior import PosteriorPrecision

_SMALLEST_PIVOT = 1e3  # times ε: a conditional variance below, relative to the prior's, is rounding
_FEW_SIDES = 8  # right-hand sides that are solved for at once even where they are many rows


class HybridPrior:
    """Φ and U at the planned rows, with gradients in the hyperparameters.

    Attributes
    ----------
    points : Points
        Planned rows with Φ, (n, M).
    val : (n, w)
        U of R with a nugget.
    jitter : float
        The nugget, relative to the mean prior variance: the first of the policy with which all conditional variances
        are more than rounding, added to the diagonal of R everywhere; 0 as a rule.
    """

    def __init__(self, prior: Prior, plan: HybridPlan):
        self.kernel, self.plan = prior.kernel, plan
        self.residual = Residual(prior.kernel, plan.Z, plan.policy)
        self.points = self.residual.points(plan.X)
        self.size = diag(prior.kernel, plan.X).mean()
        reason = NotPositiveDefiniteError("The policy has no jitter.")
        for jitter in plan.policy.jitter_ladder or (0.0,):
            try:
                self.val, self.jitter = self._factor(jitter), jitter
                return
            except NotPositiveDefiniteError as failure:
                reason = failure
        raise reason

    def _factor(self, jitter: float) -> Tensor:
        pattern, table = self.plan.pattern, RowTable(self.points.features)

        def of_chunk(nugget: Tensor, chunk: Tensor) -> Tensor:
            index = pattern.columns[chunk].clamp_min(0)
            near = Points(self.plan.X[index], table.rows(index))
            added = torch.diag_embed(nugget.expand(index.shape))
            return column_factors(self.residual.between(near) + added, pattern.padding[chunk])

        width, rows = pattern.columns.shape[-1], torch.arange(pattern.n, device=self.size.device)
        chunks = rows.split(chunk_rows(self.plan.policy, width, len(self.plan.Z), self.size.unsqueeze(-1)))
        nugget = jitter * self.size
        val = torch.cat(
            [checkpoint(of_chunk, nugget, chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
        )
        smallest = _SMALLEST_PIVOT * torch.finfo(val.dtype).eps * self.size.detach()
        if bool((val.detach()[:, -1].square() * smallest > 1.0).any()):
            raise NotPositiveDefiniteError("A row is so close to its neighbours that only rounding is left of it.")
        return val


class HybridPosterior:
    """A Gaussian process with a hybrid prior, conditioned on sites at n rows; the prior mean is left to the caller.

    Parameters
    ----------
    prior : Prior
    plan : HybridPlan
    sites : Sites
        λ1 and λ2, (*b, n), of the centred latent g = f − μ, in the order of the data.
    factors : HybridPrior, optional
        When the caller has it already.
    """

    def __init__(self, prior: Prior, plan: HybridPlan, sites: Sites, factors: HybridPrior | None = None):
        self.prior, self.plan, self.sites = prior, plan, sites
        self.factors = HybridPrior(prior, plan) if factors is None else factors
        self.linear, site_precision = sites.linear[..., plan.order], sites.precision[..., plan.order]
        self.precision = PosteriorPrecision(plan.pattern, self.factors.val, site_precision)
        self._phi = self.factors.points.features
        self._site_precision = site_precision

    def with_sites(self, sites: Sites) -> HybridPosterior:
        """Return the posterior under the same prior and rows with other sites; U and Φ are shared."""
        return HybridPosterior(self.prior, self.plan, sites, self.factors)

    @cached_property
    def _solved(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A⁻¹ λ1 (*b, n), G (*b, n, M), the factor L of C (*b, M, M) and L⁻¹ Gᵀ λ1 (*b, M)."""
        with torch.enable_grad():  # whoever asks first, all share it
            batch = self.precision.factor.shape[:-1]
            sides = self._site_precision * self._phi.mT.reshape(-1, *[1] * (len(batch) - 1), batch[-1])
            # the gradient of a solve holds an entry of U for each side
            at_once = max(_FEW_SIDES, self.plan.policy.chunk_rows(2 * self.precision.factor.numel()))
            solved = [self.precision.mean(some) for some in sides.split(at_once)] if len(sides) else [sides]
            G = self._phi - torch.cat(solved).movedim(0, -1)
            C = self._phi.mT @ (self._site_precision.unsqueeze(-1) * G)
            L, info = torch.linalg.cholesky_ex(0.5 * (C + C.mT) + torch.eye(C.shape[-1]).to(C))
            if bool(info.any()):
                raise NotPositiveDefiniteError("Negative sites outweigh the prior of the inducing points.")
            inside = torch.linalg.solve_triangular(L, G.mT @ self.linear.unsqueeze(-1), upper=False).squeeze(-1)
            return self.precision.mean(self.linear), G, L, inside

    def _reduce(self, pull: Tensor) -> tuple[Tensor, Tensor]:
        """Return pull E u (*b, q), and a root (*b, q, M) of its covariance, for pull (*b, q, M)."""
        _, _, L, inside = self._solved
        root = torch.linalg.solve_triangular(L, pull.mT, upper=False).mT
        return (root @ inside.unsqueeze(-1)).squeeze(-1), root

    def site_terms(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return log Z (*b,), and the mean and variance of g at the data (*b, n), all differentiable.

        Mean and variance are the derivatives of log Z in the sites, with |V Vᵀ| for |A|.
        """
        apart, G, L, _ = self._solved
        by_u, root = self._reduce(G)
        mean = apart + by_u
        of_A, variance = self.precision.logdet_and_variance()
        of_C = 2.0 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_z = 0.5 * (self.linear * mean).sum(-1) - 0.5 * (of_A - logdet(self.factors.val) + of_C)
        return log_z, self._as_data(mean), self._as_data(variance + root.square().sum(-1))

    def _as_data(self, values: Tensor) -> Tensor:
        """Return values (*b, n) in the order of the data."""
        return torch.empty_like(values).index_copy(-1, self.plan.order, values)

    @torch.no_grad()
    def covariance_product(self, vectors: Tensor) -> Tensor:
        """Return Cov(g) times vectors (*b, n) at the training rows."""
        _, G, L, _ = self._solved
        x = vectors[..., self.plan.order]
        by_u = (G @ torch.cholesky_solve(G.mT @ x.unsqueeze(-1), L)).squeeze(-1)
        return self._as_data(self.precision.solve(x.expand(by_u.shape)).value + by_u)

    # ---- prediction: g* = Φ* u + U_**⁻ᵀ (ε − U_o*ᵀ r), and r = A⁻¹ λ1 + (G − Φ) u + noise of precision A

    @torch.no_grad()
    def marginals(self, X: Tensor, n_neighbors: int = 60) -> tuple[Tensor, Tensor]:
        """Return mean and variance of g at X (q, d), each (*b, q), given u and the nearest latent residuals."""
        rows = chunk_rows(self.plan.policy, min(n_neighbors, len(self.plan.X)) + 1, len(self.plan.Z), self.linear)
        parts = [self._marginals(chunk, n_neighbors) for chunk in X.split(rows)]
        return torch.cat([m for m, _ in parts], -1), torch.cat([v for _, v in parts], -1)

    def _marginals(self, X: Tensor, n_neighbors: int) -> tuple[Tensor, Tensor]:
        new = self.factors.residual.points(X)
        near, _ = self.plan.nearest(self.factors.residual, new, self.factors.points, n_neighbors)
        own = len(self.plan.X) + torch.arange(len(X), device=X.device).unsqueeze(-1)
        u, push = self._factors_of_new(new, torch.cat([near, own], -1))
        scale = u[:, -1:]
        weights = -u[:, :-1] / scale
        apart, G, _, _ = self._solved
        pull = new.features + push / scale + (weights.unsqueeze(-2) @ G[..., near, :]).squeeze(-2)
        by_u, root = self._reduce(pull)
        variance = scale.squeeze(-1) ** -2 + self.precision.quadratic_forms(near, weights) + root.square().sum(-1)
        return by_u + (weights * apart[..., near]).sum(-1), variance.expand_as(by_u)

    def _factors_of_new(self, new: Points, columns: Tensor) -> tuple[Tensor, Tensor]:
        prior, rows = self.factors, len(self.plan.X) + len(new.X)
        # the nugget of the data, or more where new rows need it
        return factors_of_new(
            prior.residual, prior.points, new, columns, lambda jitter: (jitter * prior.size).expand(rows), prior.jitter
        )

    @torch.no_grad()
    def joint(self, X: Tensor, n_neighbors: int = 60) -> tuple[Tensor, Tensor]:
        """Return mean (*b, q) and covariance (*b, q, q) of g at X, each row given data and rows before it.

        O(q n (m + M)) operations and O(q n) memory.
        """
        new, T, push, S = self._spread(X, n_neighbors)
        apart, G, _, _ = self._solved
        by_u, root = self._reduce(new.features + T @ push + S @ G)
        sides = S.reshape(len(X), *[1] * (self.linear.dim() - 1), S.shape[-1])
        batch = self.precision.factor.shape[:-1]
        white = solve(self.plan.pattern, self.precision.factor, sides.expand(-1, *batch)).movedim(0, -2)
        mean = by_u + (S @ apart.unsqueeze(-1)).squeeze(-1)
        return mean, T @ T.mT + white @ white.mT + root @ root.mT

    def _spread(self, X: Tensor, n_neighbors: int) -> tuple[Points, Tensor, Tensor, Tensor]:
        """Return new rows, T = U_**⁻ᵀ (q, q), U_o*ᵀ Φ (q, M) and S = −T U_o*ᵀ (q, n)."""
        n, q = len(self.plan.X), len(X)
        new = self.factors.residual.points(X)
        columns = columns_of_new(self.plan, self.factors.residual, self.factors.points, new, n_neighbors)
        u, push = self._factors_of_new(new, columns)
        rows = u.new_zeros(q, n + q).scatter_add(-1, columns.clamp_min(0), u.masked_fill(columns < 0, 0.0))
        eye = torch.eye(q, dtype=u.dtype, device=u.device)
        T = torch.linalg.solve_triangular(rows[:, n:], eye, upper=False)
        return new, T, push, -T @ rows[:, :n]

    @torch.no_grad()
    def sample(self, X: Tensor, n_samples: int, generator: torch.Generator, n_neighbors: int = 60) -> Tensor:
        """Draw g at X jointly: (n_samples, *b, q)."""
        new, T, _, S = self._spread(X, n_neighbors)
        apart, G, L, inside = self._solved
        batch, (n, M) = self.linear.shape[:-1], self._phi.shape

        def normal(size: int) -> Tensor:
            draw = torch.randn(
                (n_samples, *batch, size), generator=generator, dtype=torch.float64, device=generator.device
            )
            return draw.to(X)

        u = torch.linalg.solve_triangular(L.mT, (inside + normal(M)).unsqueeze(-1), upper=True)
        r = apart + ((G - self._phi) @ u).squeeze(-1) + self.precision.draws(normal(n))
        return u.squeeze(-1) @ new.features.mT + r @ S.mT + normal(len(X)) @ T.mT
