"""The dual engine: natural-gradient (conjugate-computation) updates of per-datum sites with step control.

λ1 ← (1−ρ) λ1 + ρ w (α + β∘m), λ2 ← (1−ρ) λ2 + ρ w β, a natural-gradient step of size ρ on the evidence lower
bound in its expectation parameters. A step is accepted when the posterior exists and the bound does not fall;
otherwise ρ is halved. Since this is a fixed-point iteration, each step first tries the combination of the last
few that Anderson's method predicts, under the same acceptance test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from mercer._typing import Data, Info, Sites
from mercer.inference.anderson import extrapolate, remember
from mercer.inference.base import State, zero_sites
from mercer.inference.coupled import newton_sites
from mercer.inference.objective import bound_and_slopes, coupling, envelope, expected_log_prob
from mercer.likelihoods.base import ExpectedLogProb
from mercer.linalg.cholesky import NotPositiveDefiniteError

if TYPE_CHECKING:
    from mercer.model import Model

_HALVINGS = 30
_SLACK = 1e-10  # relative fall of the bound that still counts as rounding
_SMALLEST_PRECISION = 1e-8


@dataclass(frozen=True)
class Dual:
    """Variational inference by natural gradients in the dual (site) parameters.

    Parameters
    ----------
    step_size : float
        First ρ, in (0, 1]. Any larger value is tamed by the step control.
    memory : int
        How many past steps the acceleration combines; 0 gives plain natural-gradient steps.

    References
    ----------
    Khan and Lin (2017), conjugate-computation variational inference; Adam, Chang, Khan and Solin (2021), dual
    parameterization of sparse variational Gaussian processes; `mercer.inference.anderson` for the acceleration.
    """

    step_size: float = 1.0
    memory: int = 5
    name: ClassVar[str] = "dual"
    evidence: ClassVar[str] = "lower bound"

    def init(self, model: Model, plan: Any, data: Data, sites: Sites | None = None) -> State:
        """Condition on warm-start sites, or on none."""
        cold = sites is None
        sites = zero_sites(model, data) if sites is None else sites
        try:
            posterior = model.family.condition(model.prior, plan, sites)
            value, m, expected = bound_and_slopes(model, posterior, data)
        except NotPositiveDefiniteError:
            if cold:
                raise
            return self.init(model, plan, data)  # negative sites that another prior could bear
        return State(sites, posterior, float(value), self.step_size, self._target(model, posterior, m, expected, data))

    def step(self, model: Model, plan: Any, state: State, data: Data) -> tuple[State, Info]:
        """Make one accepted step; ``Info`` reports halvings, the residual and whether β had to be clamped."""
        target = state.target
        assert target is not None
        gap = target.linear - state.sites.linear
        residual = float(gap.abs().max() / (1.0 + target.linear.abs().max()))
        halvings = 0
        notes: tuple[str, ...] = ()
        accepted = self._accelerate(model, state, target, data)
        if accepted is None:
            accepted, halvings = self._search(model, state, target, data)
        if accepted is None:
            clamped = Sites(target.linear, target.precision.clamp_min(_SMALLEST_PRECISION))
            accepted, more = self._search(model, state, clamped, data)
            halvings += more
            notes = ("negative curvature was clamped to keep the posterior proper: the fixed point is biased",)
        n_eff = max(1.0, float(data.weight.sum()))
        # a likelihood that averages over draws knows its own value, and so the fixed point, only so well
        tol = max(model.policy.tol, 1e-2 * model.likelihood.resolution)
        if accepted is None:
            small = residual < tol**0.5
            return state, {"converged": small, "stalled": True, "change": 0.0, "residual": residual}
        change = abs(accepted.value - state.value)
        return accepted, {
            "converged": (change < tol * n_eff and residual < max(1e-2, 10 * tol**0.5)) or residual < tol**0.5,
            "change": change,
            "residual": residual,
            "halvings": halvings,
            "notes": notes,
        }

    @staticmethod
    def _target(model: Model, posterior: Any, m: Tensor, expected: ExpectedLogProb, data: Data) -> Sites:
        """Return the sites (w (α + β m), w β) that the likelihood asks for at means m.

        Where it couples its latents the means move by Newton's method instead, towards the same fixed point.
        """
        pull, precision = data.weight * expected.alpha, data.weight * expected.beta
        if model.likelihood.n_latents == 1:
            return Sites(pull + precision * m, precision)
        weighted = data.weight[:, None, None] * coupling(model, data, m, posterior.variance_at_data)
        return newton_sites(posterior, m, pull, precision, weighted)

    def _accelerate(self, model: Model, state: State, target: Sites, data: Data) -> State | None:
        """Try Anderson's combination of the last steps; None if it fails the acceptance test."""
        sites = extrapolate(state.history, state.sites, target)
        if sites is None:
            return None
        if model.likelihood.log_concave:
            sites = Sites(sites.linear, sites.precision.clamp_min(0.0))
        return self._try(model, state, target, sites, state.step_size, data)

    def _search(self, model: Model, state: State, target: Sites, data: Data) -> tuple[State | None, int]:
        """Halve ρ until the bound does not fall; return the accepted state (or None) and the halvings."""
        step_size = state.step_size
        for halvings in range(_HALVINGS + 1):
            accepted = self._try(model, state, target, state.sites.blend(target, step_size), step_size, data)
            if accepted is not None:
                return accepted, halvings
            step_size *= 0.5
        return None, _HALVINGS

    def _try(
        self, model: Model, state: State, target: Sites, sites: Sites, step_size: float, data: Data
    ) -> State | None:
        """Return the state at ``sites`` if the posterior exists and the bound does not fall."""
        resolution = model.likelihood.resolution * float(data.weight.sum())
        try:
            posterior = state.posterior.with_sites(sites)
            bound, m, expected = bound_and_slopes(model, posterior, data)
        except NotPositiveDefiniteError:
            return None
        value = float(bound)
        if not value >= state.value - _SLACK * max(1.0, abs(state.value)) - resolution:  # False for NaN
            return None
        history = remember(state.history, state.sites, target, self.memory)
        next_target = self._target(model, posterior, m, expected, data)
        return State(sites, posterior, value, min(1.0, 1.5 * step_size), next_target, history)

    def objective(self, model: Model, plan: Any, state: State, data: Data) -> Tensor:
        """Return the evidence lower bound at the converged sites, with its gradient in θ."""
        _, m, v = _frozen_terms(state)
        value = state.value
        if not torch.is_grad_enabled():
            return data.X.new_tensor(value)
        data_term = (data.weight * expected_log_prob(model, data, m, v).value).sum()
        return envelope(model, state.posterior, data, value, data_term)


@torch.no_grad()
def _frozen_terms(state: State) -> tuple[Tensor, Tensor, Tensor]:
    return state.posterior.site_terms()
