"""The posterior that inducing points give, in the coordinates L⁻¹u in which its precision is B ⪰ I."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mercer._typing import Sites
from mercer.families.base import Confession, Prior
from mercer.families.inducing_plan import InducingPlan
from mercer.families.moments import chunks_of, moments_of, tied_from_white, whitened_moments
from mercer.families.pathwise import KernelPaths
from mercer.families.sets import covariance_of_sets, joint_of_sets
from mercer.families.tied import TiedSites, inducing_factor
from mercer.kernels.evaluate import diag, gram
from mercer.kernels.paths import prior_paths
from mercer.kernels.spectral import has_spectral
from mercer.linalg.cholesky import NotPositiveDefiniteError, cholesky

_KEPT = 4  # temporaries of one chunk
_POORLY = 0.5  # of the prior variance at the data


@dataclass(frozen=True)
class WhitenedState:
    """q in the coordinates L⁻¹u: precision B = ``root`` ``root``ᵀ (*c, m, m), mean and root⁻¹ pull (*b, m).

    ``explained`` (*c,) is Σ λ2ᵢ wᵢᵀwᵢ over the rows.
    """

    root: Tensor
    mean: Tensor
    white: Tensor
    explained: Tensor

    def detached(self) -> WhitenedState:
        """Return the same without gradients."""
        return WhitenedState(*(each.detach() for each in (self.root, self.mean, self.white, self.explained)))


class InducingPosterior:
    """A Gaussian process conditioned through its values at inducing points.

    Parameters
    ----------
    prior : Prior
    plan : InducingPlan
    sites : Sites
        λ1 (*b, n) and λ2 (*b, n), or fewer batch dimensions, of the centred latent g = f − μ.
    like : InducingPosterior, optional
        One of the same prior and plan, whose factor is shared.
    """

    def __init__(self, prior: Prior, plan: InducingPlan, sites: Sites, like: InducingPosterior | None = None):
        self.prior, self.plan, self.sites = prior, plan, sites
        self._prior_parts: tuple[Tensor, float] | None = None if like is None else like._prior_parts
        self._kept: Tensor | None = None if like is None else like._kept

    def with_sites(self, sites: Sites) -> InducingPosterior:
        """Return the posterior under the same prior and rows with other sites."""
        return InducingPosterior(self.prior, self.plan, sites, self)

    def release(self) -> InducingPosterior:
        """Compute what predictions need, then forget what only gradients need."""
        _ = self.state
        self._prior_parts = (self.L.detach(), self.jitter)
        self.plan, self._kept = replace(self.plan, Z=self.plan.Z.detach(), learned=False), None
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = {k: v for k, v in self.__dict__.items() if k in ("prior", "plan", "sites", "state")}
        parts = None if self._prior_parts is None else (self._prior_parts[0].detach(), self._prior_parts[1])
        return {**state, "_prior_parts": parts, "_kept": None}

    # ---- factors

    @property
    def _factored(self) -> tuple[Tensor, float]:
        if self._prior_parts is None:
            with torch.enable_grad():
                self._prior_parts = inducing_factor(self.prior, self.plan.Z, self.plan.policy)
        return self._prior_parts

    @property
    def L(self) -> Tensor:
        """Cholesky factor of K_uu, (m, m), differentiable."""
        return self._factored[0]

    @property
    def jitter(self) -> float:
        """Relative jitter that K_uu needed beyond its share; 0 as a rule."""
        return self._factored[1]

    def _solve(self, X: Tensor) -> Tensor:
        """Return L⁻¹ k(Z, X), (m, q)."""
        K = gram(self.prior.kernel, self.plan.Z, X, policy=self.plan.policy)
        return torch.linalg.solve_triangular(self.L, K, upper=False)

    @property
    def _white(self) -> Tensor | None:
        """L⁻¹ K_uf, (m, n), kept for other sites where it is no larger than a few temporaries; no gradients flow."""
        plan = self.plan
        if torch.is_grad_enabled() or len(plan.X) * len(plan.Z) > _KEPT * plan.policy.chunk_elements:
            return None
        if self._kept is None:
            self._kept = self._solve(plan.X)
        return self._kept

    def _condition(self) -> WhitenedState:
        """Return B's factor and what comes with it, differentiable."""
        plan, L, sites = self.plan, self.L, self.sites
        if (W := self._white) is not None:
            pull, precision = moments_of(W, sites.linear, sites.precision, plan.policy)
        else:
            moments = (sites.linear, sites.precision, plan.policy)
            pull, precision = whitened_moments(self.prior.kernel, plan.X, plan.Z, L, *moments)
        explained = precision.diagonal(dim1=-2, dim2=-1).sum(-1)
        if plan.rest is not None:
            pull = pull + (L.mT @ plan.rest.linear.to(L).unsqueeze(-1)).squeeze(-1)
            precision = precision + L.mT @ plan.rest.precision.to(L) @ L
        B = precision + torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
        root, info = torch.linalg.cholesky_ex(0.5 * (B + B.mT))
        if bool(info.any()) or not bool(root.diagonal(dim1=-2, dim2=-1).isfinite().all()):
            raise NotPositiveDefiniteError("Negative sites outweigh the prior: the posterior is not a Gaussian.")
        white = torch.linalg.solve_triangular(root, pull.unsqueeze(-1), upper=False)
        mean = torch.linalg.solve_triangular(root.mT, white, upper=True).squeeze(-1)
        return WhitenedState(root, mean, white.squeeze(-1), explained)

    @cached_property
    def state(self) -> WhitenedState:
        """Factor of B and the mean of L⁻¹u; no gradients flow."""
        with torch.no_grad():
            return self._condition().detached()

    # ---- evidence and marginals at the data: differentiable in the hyperparameters and Z

    def _log_partition(self, state: WhitenedState) -> Tensor:
        """Return log ∫ p(u) ∏ exp(E_{p(f|u)} log t) du, (*b,)."""
        logdet = state.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        prior = diag(self.prior.kernel, self.plan.X)
        unexplained = (self.sites.precision * prior).sum(-1) - state.explained
        return 0.5 * state.white.square().sum(-1) - logdet - 0.5 * unexplained

    def _live_state(self) -> WhitenedState:
        if not torch.is_grad_enabled():
            return self.state
        if self._prior_parts is not None and not self.L.requires_grad:
            self._prior_parts = None  # released or read from a file, which leaves its graph behind
        return self._condition()

    def log_evidence(self) -> Tensor:
        """Return a lower bound of log ∫ p(g) ∏ exp(−½ λ2 (λ1/λ2 − g)²) dg per batch element, in nats.

        Titsias's collapsed bound (2009, eq. 9) but for the scale of the noise; times the share of ``plan.rest``.
        """
        linear, precision = self.sites.linear, self.sites.precision
        seen = precision != 0
        squares = torch.where(seen, linear.square() / precision.where(seen, torch.ones_like(precision)), 0.0)
        return self._log_partition(self._live_state()) - 0.5 * squares.sum(-1)

    def log_normaliser(self) -> tuple[Tensor, Tensor]:
        """Return the lower bound of log Z = log ∫ p(g) ∏ t(g) dg (*b,), in nats, and the mean of g at data (*b, n)."""
        state = self._live_state()
        mean = self._over_rows(self._mean_chunk, state.mean) if torch.is_grad_enabled() else self.mean_at_data
        return self._log_partition(state), mean

    def site_terms(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return `log_normaliser`'s bound (*b,), and the mean and variance of g at the data (*b, n), differentiable."""
        if not torch.is_grad_enabled():
            return self._log_partition(self.state), self.mean_at_data, self.variance_at_data
        state = self._live_state()
        mean, variance = self._over_rows(self._moment_chunk, state.mean, state.root)
        return self._log_partition(state), mean, variance

    def _over_rows(self, function: Any, *arguments: Tensor) -> Any:
        """Evaluate chunks of rows, again for the gradient, and join what they give along the rows."""
        plan, W = self.plan, self._white
        parts = []
        for rows in chunks_of(len(plan.X), len(plan.Z), arguments[0].shape[:-1].numel(), plan.policy):
            X = plan.X[rows]
            if torch.is_grad_enabled():
                part = checkpoint(function, X, None, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                part = function(X, None if W is None else W[..., rows], *arguments)
            parts.append(part)
        if not parts:
            parts = [function(plan.X, None, *arguments)]
        if isinstance(parts[0], Tensor):
            return torch.cat(parts, -1)
        return tuple(torch.cat(each, -1) for each in zip(*parts, strict=True))

    def _mean_chunk(self, X: Tensor, W: Tensor | None, mean: Tensor) -> Tensor:
        return _pull(mean, self._solve(X) if W is None else W)

    def _moment_chunk(self, X: Tensor, W: Tensor | None, mean: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
        W = self._solve(X) if W is None else W
        V = torch.linalg.solve_triangular(root, W, upper=False)
        left = diag(self.prior.kernel, X) - W.square().sum(-2)
        return _pull(mean, W), left.clamp_min(0.0) + V.square().sum(-2)

    @cached_property
    def _plain_moments(self) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return self._over_rows(self._moment_chunk, self.state.mean, self.state.root)

    @property
    def mean_at_data(self) -> Tensor:
        """Mean of the centred latent g at the training rows, (*b, n); not differentiable."""
        return self._plain_moments[0]

    @property
    def variance_at_data(self) -> Tensor:
        """Variance of g at the training rows, (*b, n), in units of f²; not differentiable."""
        return self._plain_moments[1]

    @property
    @torch.no_grad()
    def unexplained_at_data(self) -> Tensor:
        """Prior variance that u leaves of the training rows, (n,), in units of f²."""
        explained = self._over_rows(
            lambda X, W, _: (self._solve(X) if W is None else W).square().sum(-2), self.state.mean
        )
        return (diag(self.prior.kernel, self.plan.X) - explained).clamp_min(0.0)

    @torch.no_grad()
    def covariance_product(self, vectors: Tensor) -> Tensor:
        """Return the covariance of aᵢᵀu, the part of g that the sites act on, times vectors (*b, n)."""
        plan, root, W = self.plan, self.state.root, self._white
        if W is not None:
            total = _pull(vectors, W.mT)
        else:
            chunks = chunks_of(len(plan.X), len(plan.Z), root.shape[:-2].numel(), plan.policy)
            total = torch.stack([_pull(vectors[..., rows], self._solve(plan.X[rows]).mT) for rows in chunks]).sum(0)
        white = torch.linalg.solve_triangular(root, total.unsqueeze(-1), upper=False)
        turned = torch.linalg.solve_triangular(root.mT, white, upper=True).squeeze(-1)
        return self._over_rows(self._mean_chunk, turned)

    def at_data(self) -> tuple[Tensor, Tensor]:
        """Return mean (prior mean included) and variance of f at the training rows, each (*b, n)."""
        mean = self.mean_at_data + self.prior.mean_at(self.plan.X)
        return mean, self.variance_at_data.expand_as(mean)

    def kl(self) -> Tensor:
        """Return KL[q(u) ‖ p(u)] per batch element, in nats, with a ``rest`` as part of p."""
        log_z, m, v = self.site_terms()
        return self.expected_log_sites(m, v) - log_z

    def expected_log_sites(self, m: Tensor, v: Tensor) -> Tensor:
        """Return E_q[Σ λ1 g − ½ λ2 g²] over the rows for marginals N(m, v) of g, per batch element."""
        return (self.sites.linear * m - 0.5 * self.sites.precision * (v + m.square())).sum(-1)

    def tied(self, rows: Tensor | None = None) -> TiedSites:
        """Return the sites of ``rows`` (r,), or of all rows, tied at Z; without ``plan.rest``."""
        plan, index = self.plan, slice(None) if rows is None else rows
        with torch.no_grad():
            linear, precision = self.sites.linear[..., index], self.sites.precision[..., index]
            moments = whitened_moments(self.prior.kernel, plan.X[index], plan.Z, self.L, linear, precision, plan.policy)
            return tied_from_white(self.L, *moments)

    @torch.no_grad()
    def confess(self) -> Confession:
        """Say how much of the prior the inducing points carry."""
        prior = diag(self.prior.kernel, self.plan.X)
        if len(prior) == 0 or len(self.plan.Z) == 0:
            return Confession()
        left = self.unexplained_at_data
        share = float(1.0 - left.sum() / prior.sum())
        lost = float(0.5 * (left * self.sites.precision).sum())
        m = len(self.plan.Z)
        note = (
            f"{m} inducing points carry {100 * share:.1f} % of the prior variance at the data; what they leave costs "
            f"{lost:.3g} nats of the bound"
        )
        warning = (
            f"{m} inducing points carry only {100 * share:.0f} % of the prior variance at the data: raise n_inducing, "
            "or use family='sic'"
        )
        return Confession((note,), (warning,) if share < _POORLY else ())

    # ---- prediction

    @property
    def row_elements(self) -> int:
        """Elements of temporaries per new row."""
        return 3 * max(1, self.state.mean.shape[:-1].numel()) * len(self.plan.Z)

    def _chunks(self, X: Tensor) -> tuple[Tensor, ...]:
        return X.split(self.plan.policy.chunk_rows(self.row_elements))

    def mean(self, X: Tensor) -> Tensor:
        """Return the mean of f at X (q, d): (*b, q)."""
        weights = torch.linalg.solve_triangular(self.L.mT, self.state.mean.unsqueeze(-1), upper=True).squeeze(-1)
        kernel, Z, policy = self.prior.kernel, self.plan.Z, self.plan.policy
        parts = [_pull(weights, gram(kernel, Z, x, policy=policy)) + self.prior.mean_at(x) for x in self._chunks(X)]
        return torch.cat(parts, -1)

    def marginals(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of f at X (q, d), each (*b, q), in units of f and f²."""
        means, variances = [], []
        for x in self._chunks(X):
            mean, variance = self._moment_chunk(x, None, self.state.mean, self.state.root)
            means.append(mean + self.prior.mean_at(x))
            variances.append(variance.expand_as(mean))
        return torch.cat(means, -1), torch.cat(variances, -1)

    def joint(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean (*b, *t, q) and covariance (*b, *t, q, q) of f at X (*t, q, d), sets of rows each by itself."""
        return joint_of_sets(self._joint, X, self.row_elements, self.plan.policy)

    def _joint(self, X: Tensor) -> tuple[Tensor, Tensor]:
        W = self._solve(X.reshape(-1, X.shape[-1]))
        V = torch.linalg.solve_triangular(self.state.root, W, upper=False)
        mean = _pull(self.state.mean, W).unflatten(-1, X.shape[:-1]) + self.prior.mean_at(X)
        W, V = _by_sets(W, X), _by_sets(V, X)
        prior = covariance_of_sets(self.prior.kernel, X, None, self.plan.policy)
        return mean, prior - W.mT @ W + V.mT @ V

    def covariance_weights(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Return Z and weights w (*b, *t, m, q) for X (*t, q, d): Cov(f(X), f(x)) = k(X, x) − wᵀ k(Z, x).

        Latents that share them are of size one.
        """
        W, root = self._solve(X.reshape(-1, X.shape[-1])), self.state.root
        V = torch.linalg.solve_triangular(root, W, upper=False)
        known = W - torch.linalg.solve_triangular(root.mT, V, upper=True)
        weights = torch.linalg.solve_triangular(self.L.mT, known, upper=True)
        shared = self.state.mean.dim() + 1 - weights.dim()
        return self.plan.Z, _by_sets(weights.reshape(*[1] * shared, *weights.shape), X)

    @property
    def pathwise(self) -> bool:
        """Whether samples are functions (consistent at any X) or joint draws at the given X only."""
        return has_spectral(self.prior.kernel)

    def paths(self, n_samples: int, generator: torch.Generator) -> KernelPaths:
        """Draw ``n_samples`` functions for each latent, of a kernel whose spectrum is known.

        Prior functions from random features, corrected at Z so that their values there are draws of q(u) (Wilson et
        al., 2020, eq. 13).
        """
        plan, state, Z = self.plan, self.state, self.plan.Z
        batch = torch.broadcast_shapes(state.mean.shape[:-1], state.root.shape[:-2])
        where: dict[str, Any] = {"d": Z.shape[-1], "dtype": Z.dtype, "device": Z.device}
        functions = prior_paths(self.prior.kernel, n_samples * batch.numel(), 2048, generator, **where)
        noise = self._normal((n_samples, *batch, len(Z), 1), Z, generator)
        drawn = state.mean + torch.linalg.solve_triangular(state.root.mT, noise, upper=True).squeeze(-1)
        at_inducing = functions(Z).reshape(n_samples, *batch, -1, 1)
        apart = drawn.unsqueeze(-1) - torch.linalg.solve_triangular(self.L, at_inducing, upper=False)
        weights = torch.linalg.solve_triangular(self.L.mT, apart, upper=True).squeeze(-1)
        return KernelPaths(self.prior, functions, Z, weights, plan.policy)

    def sample(self, X: Tensor, n_samples: int, generator: torch.Generator) -> Tensor:
        """Draw the latent f at X (q, d): (n_samples, *b, q): `paths`, or joint draws where there are none."""
        if self.pathwise:
            return self.paths(n_samples, generator)(X)
        mean, covariance = self.joint(X)
        root = cholesky(covariance, self.plan.policy, "posterior covariance").value
        noise = self._normal((n_samples, *mean.shape), X, generator)
        return mean + (root @ noise.unsqueeze(-1)).squeeze(-1)

    @staticmethod
    def _normal(shape: tuple[int, ...], X: Tensor, generator: torch.Generator) -> Tensor:
        draw = torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)
        return draw.to(X)


def _by_sets(columns: Tensor, X: Tensor) -> Tensor:
    """Return (*b, m, rows) as (*b, *t, m, q)."""
    return columns.unflatten(-1, X.shape[:-1]).movedim(columns.dim() - 2, -2)


def _pull(weights: Tensor, values: Tensor) -> Tensor:
    """Return weightsᵀ values, (*b, q), for weights (*b, m) and values (*k, m, q)."""
    return weights @ values if values.dim() == 2 else (weights.unsqueeze(-2) @ values).squeeze(-2)
