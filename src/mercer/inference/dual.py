"""The dual engine: natural-gradient (conjugate-computation) updates of per-datum sites with step control.

λ1 ← (1−ρ) λ1 + ρ w (α + β∘m), λ2 ← (1−ρ) λ2 + ρ w β, a natural-gradient step of size ρ on the evidence lower
bound in its expectation parameters. A step is accepted when the posterior exists and the bound does not fall;
otherwise ρ is halved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mercer._typing import Data, Info, Sites
from mercer.inference.base import State, zero_sites
from mercer.inference.objective import envelope, evidence_lower_bound, expected_log_prob
from mercer.linalg.cholesky import NotPositiveDefiniteError

if TYPE_CHECKING:
    from mercer.model import Model

_HALVINGS = 10
_SLACK = 1e-6  # relative fall of the bound that still counts as rounding
_SMALLEST_PRECISION = 1e-8


@dataclass(frozen=True)
class Dual:
    """Variational inference by natural gradients in the dual (site) parameters.

    Parameters
    ----------
    step_size : float
        First ρ, in (0, 1]. Any larger value is tamed by the step control.

    References
    ----------
    Khan and Lin (2017), conjugate-computation variational inference; Adam, Chang, Khan and Solin (2021), dual
    parameterization of sparse variational Gaussian processes.
    """

    step_size: float = 1.0
    name: str = "dual"
    evidence: str = "lower bound"

    def init(self, model: Model, plan: Any, data: Data, sites: Sites | None = None) -> State:
        """Condition on warm-start sites, or on none."""
        cold = sites is None
        sites = zero_sites(model, data) if sites is None else sites
        try:
            posterior = model.family.condition(model.prior, plan, sites)
            value = float(evidence_lower_bound(model, posterior, data))
        except NotPositiveDefiniteError:
            if cold:
                raise
            return self.init(model, plan, data)  # negative sites that another prior could bear
        return State(sites, posterior, value, self.step_size)

    def step(self, model: Model, plan: Any, state: State, data: Data) -> tuple[State, Info]:
        """Make one accepted step; ``Info`` reports halvings, the residual and whether β had to be clamped."""
        target = self._target(model, state.posterior, data)
        gap = target.linear - state.sites.linear
        residual = float(gap.abs().max() / (1.0 + target.linear.abs().max()))
        accepted, halvings = self._search(model, state, target, data)
        notes: tuple[str, ...] = ()
        if accepted is None:
            clamped = Sites(target.linear, target.precision.clamp_min(_SMALLEST_PRECISION))
            accepted, more = self._search(model, state, clamped, data)
            halvings += more
            notes = ("negative curvature was clamped to keep the posterior proper: the fixed point is biased",)
        tol, n_eff = model.policy.tol, float(data.weight.sum())
        if accepted is None:
            info = {"converged": residual < tol**0.5, "stalled": True, "change": 0.0, "residual": residual}
            return state, info
        change = abs(accepted.value - state.value)
        small = change < tol * max(n_eff, 1.0) and halvings == 0
        return accepted, {
            "converged": small or residual < tol,
            "change": change,
            "residual": residual,
            "halvings": halvings,
            "notes": notes,
        }

    def _target(self, model: Model, posterior: Any, data: Data) -> Sites:
        """Return the sites (w (α + β m), w β) that the likelihood asks for at the current marginals."""
        _, m, v = posterior.site_terms()
        _, alpha, beta = expected_log_prob(model, data, m, v)
        return Sites(data.weight * (alpha + beta * m), data.weight * beta)

    def _search(self, model: Model, state: State, target: Sites, data: Data) -> tuple[State | None, int]:
        """Halve ρ until the bound does not fall; return the accepted state (or None) and the halvings."""
        step_size = state.step_size
        floor = state.value - _SLACK * max(1.0, abs(state.value))
        for halvings in range(_HALVINGS + 1):
            sites = state.sites.blend(target, step_size)
            try:
                posterior = state.posterior.with_sites(sites)
                value = float(evidence_lower_bound(model, posterior, data))
            except NotPositiveDefiniteError:
                value = float("nan")
            if value >= floor:  # False for NaN
                return State(sites, posterior, value, min(1.0, 1.5 * step_size)), halvings
            step_size *= 0.5
        return None, _HALVINGS

    def objective(self, model: Model, plan: Any, state: State, data: Data) -> Tensor:
        """Return the evidence lower bound at the converged sites, with its gradient in θ."""
        _, m, v = _frozen_terms(state)
        value = state.value
        if not torch.is_grad_enabled():
            return data.X.new_tensor(value)
        data_term = (data.weight * expected_log_prob(model, data, m, v).value).sum()
        posterior = model.family.condition(model.prior, plan, state.sites)
        return envelope(model, posterior, data, value, data_term)


@torch.no_grad()
def _frozen_terms(state: State) -> tuple[Tensor, Tensor, Tensor]:
    return state.posterior.site_terms()
