"""The Laplace engine: Newton's method to the mode of p(f | y), and the Gaussian with its curvature there.

At latents g the likelihood is expanded to second order, which makes sites λ2 = −w ∂² log p, λ1 = w ∂ log p + λ2 g;
conditioning on them is one Newton step. The evidence is the integral of that expansion at the mode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from mercer._typing import Data, Info, Sites
from mercer.inference.base import State, zero_sites
from mercer.likelihoods.base import LogProbDerivatives
from mercer.linalg.cholesky import NotPositiveDefiniteError

if TYPE_CHECKING:
    from mercer.model import Model

_HALVINGS = 15
_SLACK = 1e-12  # relative fall of the log posterior density that still counts as rounding


@dataclass(frozen=True)
class Laplace:
    """Laplace approximation for likelihoods that read one latent function.

    The state's sites always have the current point g as their posterior mean; its ``value`` is
    log p(y | g) + log p(g), up to a constant, which a step may not lower.

    References
    ----------
    Rasmussen and Williams (2006), algorithms 3.1 and 5.1: the same mode and evidence, with the gradient by the
    implicit function theorem.
    """

    name: ClassVar[str] = "laplace"
    evidence: ClassVar[str] = "approximation"

    def init(self, model: Model, plan: Any, data: Data, sites: Sites | None = None) -> State:
        """Start from the mean under warm-start sites, or from g = 0."""
        start = zero_sites(model, data) if sites is None else sites
        try:
            posterior = model.family.condition(model.prior, plan, start)
            return State(start, posterior, _log_joint(model, data, start, posterior))
        except NotPositiveDefiniteError:
            if sites is None:
                raise
            return self.init(model, plan, data)  # negative sites that another prior could bear

    def step(self, model: Model, plan: Any, state: State, data: Data) -> tuple[State, Info]:
        """Make one Newton step, shortened until log p(y | f) + log p(f) does not fall."""
        g = state.posterior.mean_at_data
        expansion = _derivatives(model, data, g)
        newton = _expand(expansion, g, data.weight)
        # at the mode the prior's pull equals the likelihood's push
        pull = state.sites.linear - state.sites.precision * g
        push = data.weight * expansion.d1
        residual = float((pull - push).abs().max() / (1.0 + push.abs().max()))
        target: Sites = newton
        notes: tuple[str, ...] = ()
        accepted = self._search(model, state, newton, pull, data)
        if accepted is None and bool((newton.precision < 0).any()):
            # the mode is the same fixed point with any curvature; without negative ones steps always exist
            precision = newton.precision.clamp_min(0.0)
            target = Sites(push + precision * g, precision)
            notes = ("negative curvature was clamped on the way to the mode",)
            accepted = self._search(model, state, target, pull, data)
        tol = model.policy.tol
        if accepted is None:
            return state, {"converged": residual < tol**0.5, "stalled": True, "change": 0.0, "residual": residual}
        change = abs(accepted.value - state.value)
        converged = residual < 1e-2 * tol**0.5
        if converged and target is not newton:
            notes = ("the posterior has no maximum with negative definite curvature: clamped sites are reported",)
        return accepted, {"converged": converged, "change": change, "residual": residual, "notes": notes}

    @staticmethod
    def _search(model: Model, state: State, target: Sites, pull: Tensor, data: Data) -> State | None:
        """Return the first state on the way to the Newton point at which the log joint density does not fall."""
        try:
            posterior = state.posterior.with_sites(target)
            end = posterior.mean_at_data
        except NotPositiveDefiniteError:
            return None
        g = state.posterior.mean_at_data
        end_pull = target.linear - target.precision * end
        step_size = 1.0
        for _ in range(_HALVINGS + 1):
            sites = target
            if step_size < 1.0:  # sites of the same curvature whose mean is the point reached
                point, point_pull = torch.lerp(g, end, step_size), torch.lerp(pull, end_pull, step_size)
                sites = Sites(point_pull + target.precision * point, target.precision)
                posterior = state.posterior.with_sites(sites)
            value = _log_joint(model, data, sites, posterior)
            if value >= state.value - _SLACK * max(1.0, abs(state.value)):  # False for NaN
                return State(sites, posterior, value, step_size)
            step_size *= 0.5
        return None

    def objective(self, model: Model, plan: Any, state: State, data: Data) -> Tensor:
        """Return the Laplace evidence at the mode ĝ, with its total gradient in θ.

        log ∫ p(g) exp Σ w [ℓ(ĝ) + ℓ'(g−ĝ) + ½ℓ''(g−ĝ)²] dg. Its derivative in ĝ is ½ w v ℓ''' (only the curvature
        is not stationary), and dĝ/dθ is that of one Newton step started at ĝ.
        """
        g = state.posterior.mean_at_data.detach()
        expansion = _derivatives(model, data, g)
        sites = _expand(expansion, g, data.weight)
        local = data.weight * (expansion.value - expansion.d1 * g) - 0.5 * sites.precision * g.square()
        if not torch.is_grad_enabled():
            return local.sum() + state.posterior.with_sites(sites).log_normaliser()[0].sum()
        posterior = state.posterior.with_sites(sites)
        log_normaliser, newton = posterior.log_normaliser()
        slope = 0.5 * data.weight * posterior.variance_at_data * expansion.d3.detach()
        implicit = (slope * newton).sum()
        return local.sum() + log_normaliser.sum() + (implicit - implicit.detach())


def _derivatives(model: Model, data: Data, g: Tensor) -> LogProbDerivatives:
    """Return log p(y | f) and its derivatives at f = μ + g."""
    return model.likelihood.log_prob_derivatives(data.y, g + model.prior.mean_at(data.X), **data.side)


def _expand(expansion: LogProbDerivatives, g: Tensor, weight: Tensor) -> Sites:
    """Return the sites of the second-order expansion at g."""
    precision = -weight * expansion.d2
    return Sites(weight * expansion.d1 + precision * g, precision)


def _log_joint(model: Model, data: Data, sites: Sites, posterior: Any) -> float:
    """Return Σ w log p(y | μ + g) − ½ gᵀK⁻¹g at the posterior mean g of ``sites``."""
    g = posterior.mean_at_data
    log_prob = model.likelihood.log_prob(data.y, g + model.prior.mean_at(data.X), **data.side)
    pull = sites.linear - sites.precision * g
    return float((data.weight * log_prob).sum() - 0.5 * (g * pull).sum())
