"""Power expectation propagation: sites that match moments of the tilted distributions, all rows at once.

A row of weight w is w equal replicates, so each replicate's site has natural parameters λ/w. Removing the
fraction η of one replicate gives the cavity N(m₋, v₋); log Ẑ = log ∫ p(y|f)^η N(f; m₋, v₋) df and its slopes give
the new site. Everything is written with 1 − τv and 1 + v₋s, never 1/v, so small variances do no harm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from mercer._typing import Data, Info, Sites
from mercer.inference.anderson import extrapolate, remember
from mercer.inference.base import State, zero_sites
from mercer.inference.objective import envelope
from mercer.linalg.cholesky import NotPositiveDefiniteError

if TYPE_CHECKING:
    from mercer.model import Model

_HALVINGS = 10
_SMALLEST_STEP = 1e-3


class _Cavity(NamedTuple):
    """Mean and variance of the cavities of g, (*b, n), and which of them are proper."""

    mean: Tensor
    variance: Tensor
    proper: Tensor


@dataclass(frozen=True)
class PowerEP:
    """Power expectation propagation for likelihoods that read one latent function.

    Parameters
    ----------
    power : float
        η in (0, 1]: 1 is expectation propagation, η → 0 tends to the variational fixed point. A row of
        weight below 1 has its own power, η times its weight, so that no cavity loses more than its site.
    damping : float
        First step size ρ in (0, 1] of λ ← (1−ρ) λ + ρ λ_new; it is halved while the residual grows.
    memory : int
        How many past steps the acceleration combines; 0 gives plain damped steps.

    References
    ----------
    Minka (2004), Power EP; Bui, Yan and Turner (2017), eq. 17, for its evidence.
    """

    power: float = 1.0
    damping: float = 1.0
    memory: int = 5
    name: ClassVar[str] = "power_ep"
    evidence: ClassVar[str] = "approximation"

    def __post_init__(self) -> None:
        for parameter in ("power", "damping"):
            value = getattr(self, parameter)
            if not 0.0 < value <= 1.0:
                raise ValueError(f"{parameter} must be in (0, 1], got {value}.")

    def init(self, model: Model, plan: Any, data: Data, sites: Sites | None = None) -> State:
        """Condition on warm-start sites, or on none."""
        start = zero_sites(model, data) if sites is None else sites
        try:
            return self._state(model, data, start, model.family.condition(model.prior, plan, start), self.damping)
        except NotPositiveDefiniteError:
            if sites is None:
                raise
            return self.init(model, plan, data)  # sites that this prior cannot bear

    def step(self, model: Model, plan: Any, state: State, data: Data) -> tuple[State, Info]:
        """Make one damped move towards matched moments, accelerated while that lowers the residual."""
        target = state.target
        assert target is not None
        before = _residual(state)
        notes = self._notes(model, state, data)
        tol = 1e-2 * model.policy.tol**0.5
        if before < tol:
            return state, {"converged": True, "change": 0.0, "residual": before, "notes": notes}
        predicted = extrapolate(state.history, state.sites, target)
        history = remember(state.history, state.sites, target, self.memory)
        if predicted is not None:
            reached = self._try(model, state, predicted, data, state.step_size, history)
            if reached is not None and _residual(reached) < before:
                return reached, self._info(state, reached, notes)
        step_size = state.step_size
        for _ in range(_HALVINGS):
            reached = self._try(model, state, state.sites.blend(target, step_size), data, step_size, history)
            if reached is not None and (_residual(reached) < 2.0 * before or step_size < _SMALLEST_STEP):
                growing = _residual(reached) > before
                next_size = 0.5 * step_size if growing else min(1.0, 1.2 * step_size)
                moved = State(reached.sites, reached.posterior, reached.value, next_size, reached.target, history)
                return moved, self._info(state, moved, notes)
            step_size *= 0.5
        return state, {"converged": False, "stalled": True, "change": 0.0, "residual": before, "notes": notes}

    @staticmethod
    def _info(before: State, after: State, notes: tuple[str, ...]) -> Info:
        change = abs(after.value - before.value)
        return {"converged": False, "change": change, "residual": _residual(after), "notes": notes}

    def _try(
        self, model: Model, state: State, sites: Sites, data: Data, step_size: float, history: Any
    ) -> State | None:
        """Return the state at ``sites``, or None if the posterior or all that matters of it is improper."""
        if model.likelihood.log_concave:
            sites = Sites(sites.linear, sites.precision.clamp_min(0.0))
        try:
            reached = self._state(model, data, sites, state.posterior.with_sites(sites), step_size, history)
        except NotPositiveDefiniteError:
            return None
        return reached if reached.value == reached.value else None

    def _state(
        self, model: Model, data: Data, sites: Sites, posterior: Any, step_size: float, history: Any = ()
    ) -> State:
        """Return the state at ``sites`` with its evidence and the sites that would match moments."""
        power = self._power(data)
        log_z, m, v = posterior.site_terms()
        cavity = _cavity(sites, m, v, data.weight, power)
        with torch.enable_grad():
            mean, variance = cavity.mean.requires_grad_(), cavity.variance.requires_grad_()
            log_tilted = self._log_tilted(model, data, mean, variance, power)
            alpha, half = torch.autograd.grad(log_tilted.sum(), (mean, variance))
        mean, variance, log_tilted = mean.detach(), variance.detach(), log_tilted.detach()
        curvature = 2.0 * half - alpha.square()
        usable = cavity.proper & (1.0 + variance * curvature > 0.0)
        share = data.weight / power / (1.0 + variance * curvature)
        target = Sites(
            torch.where(usable, share * (alpha - mean * curvature), sites.linear),
            torch.where(usable, -share * curvature, sites.precision),
        )
        ratio = log_tilted - _log_site_mass(sites, mean, variance, data.weight, power)
        value = float(log_z.sum() + (data.weight / power * ratio.where(cavity.proper, 0.0 * ratio)).sum())
        return State(sites, posterior, value, step_size, target, history)

    def _power(self, data: Data) -> Tensor:
        return self.power * data.weight.clamp_max(1.0)

    @staticmethod
    def _log_tilted(model: Model, data: Data, mean: Tensor, variance: Tensor, power: Tensor) -> Tensor:
        prior_mean = model.prior.mean_at(data.X)
        likelihood: Any = model.likelihood
        return likelihood.log_tilted(data.y, mean + prior_mean, variance, power, **data.side)

    def _notes(self, model: Model, state: State, data: Data) -> tuple[str, ...]:
        _, m, v = state.posterior.site_terms()
        improper = ~_cavity(state.sites, m, v, data.weight, self._power(data)).proper
        count = int(improper.sum())
        return (f"{count} cavities were improper; their sites were kept as they were",) if count else ()

    def objective(self, model: Model, plan: Any, state: State, data: Data) -> Tensor:
        """Return the power-EP evidence at the fixed point, with its gradient in θ.

        The evidence is stationary in the sites there, so the cavities are held while θ moves.
        """
        if not torch.is_grad_enabled():
            return data.X.new_tensor(state.value)
        power = self._power(data)
        with torch.no_grad():
            _, m, v = state.posterior.site_terms()
            cavity = _cavity(state.sites, m, v, data.weight, power)
        log_tilted = self._log_tilted(model, data, cavity.mean, cavity.variance, power)
        data_term = (data.weight / power * log_tilted.where(cavity.proper, 0.0 * log_tilted)).sum()
        return envelope(model, state.posterior, data, state.value, data_term)


def _cavity(sites: Sites, m: Tensor, v: Tensor, weight: Tensor, power: Tensor) -> _Cavity:
    """Remove the fraction ``power`` of one replicate's site from N(m, v); improper cavities become the marginal."""
    linear, precision = power * sites.linear / weight, power * sites.precision / weight
    left = 1.0 - precision * v
    proper = left > torch.finfo(v.dtype).eps
    left = left.where(proper, torch.ones_like(left))
    return _Cavity(((m - linear * v) / left).where(proper, m), v / left, proper)


def _log_site_mass(sites: Sites, m: Tensor, v: Tensor, weight: Tensor, power: Tensor) -> Tensor:
    """Return log ∫ N(g; m, v) exp(ν g − ½ τ g²) dg for the removed fraction (ν, τ) of a site."""
    nu, tau = power * sites.linear / weight, power * sites.precision / weight
    grown = 1.0 + tau * v
    return (nu * m + 0.5 * nu.square() * v - 0.5 * tau * m.square()) / grown - 0.5 * grown.log()


def _residual(state: State) -> float:
    """Return the largest relative distance of the sites from those that match moments."""
    target = state.target
    assert target is not None
    linear = (target.linear - state.sites.linear).abs().max() / (1.0 + target.linear.abs().max())
    precision = (target.precision - state.sites.precision).abs().max() / (1.0 + target.precision.abs().max())
    return float(torch.maximum(linear, precision))
