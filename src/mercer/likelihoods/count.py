"""Counts with a log link: Poisson in closed form, negative binomial by quadrature."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mercer.likelihoods.base import ExpectedLogProb, Predictive, fill_missing, masked
from mercer.likelihoods.quadrature import QuadratureLikelihood

MAX_EXPONENT = 30.0  # e³⁰ ≈ 1e13 events per unit of exposure; beyond it rates are held
FEWEST_EVENTS = 0.5  # a data set without events starts at half an event in all, or per row if it weighs less than one


def capped_exp(z: Tensor) -> Tensor:
    """Return e^z up to z = 30 and e³⁰ beyond."""
    return z.clamp_max(MAX_EXPONENT).exp()


def _linear_exp(z: Tensor) -> Tensor:
    """Return the integral of ``capped_exp``: e^z, continued by its tangent beyond z = 30."""
    return capped_exp(z) * (1 + (z - MAX_EXPONENT).clamp_min(0))


class _Count(QuadratureLikelihood):
    """Abstract log-link count model, mean μ = e · exp(f) with exposure e."""

    support = "count"
    side_names = ("exposure",)

    n_capped: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n_capped", torch.zeros((), dtype=torch.int64), persistent=False)

    def _note_capped(self, exponent: Tensor) -> None:
        """Count capped exponents without waiting for the device; fit reports read ``n_capped``."""
        hits = (exponent.detach() > MAX_EXPONENT).sum()
        self.n_capped = self.n_capped.to(hits.device) + hits

    @staticmethod
    def _log_exposure(like: Tensor, side: dict[str, Tensor]) -> Tensor:
        exposure = side.get("exposure")
        return like.new_zeros(()) if exposure is None else exposure.to(like).log()

    def initialise(self, y: Tensor, weight: Tensor, **side: Tensor) -> Tensor | float:
        """Validate y and return log(Σ w y / Σ w e), the log of the overall rate, with shape y.shape[:-1]."""
        self.validate(y, **side)
        filled, observed = fill_missing(y, torch.zeros((), dtype=torch.float64, device=y.device), 0.0)
        w = masked(weight.to(filled).expand_as(filled), observed)
        exposed = (w * self._log_exposure(filled, side).exp()).sum(-1)
        events = (w * filled).sum(-1)
        events = torch.where(events > 0, events, FEWEST_EVENTS * w.sum(-1).clamp_max(1.0))
        return torch.where(exposed > 0, events / exposed, torch.ones_like(events)).log()

    def _rate_moments(self, m: Tensor, v: Tensor, side: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return E μ, E μ² and Var μ for f ~ N(m, v)."""
        m, v = torch.broadcast_tensors(m, v)
        self._note_capped(m + 0.5 * v)
        mean = capped_exp(m + 0.5 * v) * self._log_exposure(m, side).exp()
        growth = v.clamp_max(MAX_EXPONENT)
        return mean, mean.square() * growth.exp(), mean.square() * torch.expm1(growth)


class Poisson(_Count):
    """y ~ Poisson(e · exp(f)).

    Attributes
    ----------
    n_capped : Tensor, int64
        How often an exponent was held at 30 so far; it is non-zero when latent values ran away.

    Notes
    -----
    E[log p] = y (m + log e) − e · exp(m + v/2) − log y!, in closed form. The side tensor ``exposure`` (n,),
    > 0, dimensionless or in units of time or area, defaults to 1. Beyond exponent 30 the expectation is
    continued by its tangent, so that value, α and β stay derivatives of each other.
    """

    def _density(self, y: Tensor, f: Tensor, **side: Tensor) -> Tensor:
        log_exposure = self._log_exposure(f, side)
        events = y * (f + log_exposure) - torch.lgamma(y + 1)
        return events - log_exposure.exp() * _linear_exp(f)

    def _slopes(self, y: Tensor, f: Tensor, **side: Tensor) -> tuple[Tensor, Tensor]:
        rate = self._log_exposure(f, side).exp() * capped_exp(f)
        return y - rate, -rate

    def expected_log_prob(self, y: Tensor, m: Tensor, v: Tensor, **side: Tensor) -> ExpectedLogProb:
        y, observed = fill_missing(y, m)
        y, m, v = torch.broadcast_tensors(y, m, v)
        exponent = m + 0.5 * v
        self._note_capped(exponent)
        log_exposure = self._log_exposure(m, side)
        rate = log_exposure.exp() * capped_exp(exponent.detach())
        loss = log_exposure.exp() * _linear_exp(exponent)
        value = y * (m + log_exposure) - torch.lgamma(y + 1) - loss
        return ExpectedLogProb(masked(value, observed), masked(y - rate, observed), masked(rate, observed))

    def predictive(self, m: Tensor, v: Tensor, **side: Tensor) -> Predictive:
        """Return E y* = E μ and Var y* = E μ + Var μ."""
        mean, _, spread = self._rate_moments(m, v, side)
        return Predictive(mean, mean + spread)

    def sample(self, f: Tensor, generator: torch.Generator | None = None, **side: Tensor) -> Tensor:
        return torch.poisson(capped_exp(f) * self._log_exposure(f, side).exp(), generator=generator)


class NegativeBinomial(_Count):
    """y with mean μ = e · exp(f) and variance μ + a μ²: a Poisson count whose rate varies.

    Parameters
    ----------
    dispersion : float, default=1.0
        a > 0, dimensionless; a → 0 is Poisson. This is the NB2 form with r = 1/a failures.
    learn_dispersion : bool, default=True
        Whether a is a hyperparameter.
    bounds : (float, float), default=(1e-4, 1e2)
        Bounds of a.

    Notes
    -----
    With η = f + log(e a) and r = 1/a: log p = log Γ(y+r)/(Γ(r) y!) + y log σ(η) + r log σ(−η), which is
    concave in f and cannot overflow. Cameron and Trivedi (2013), §3.3.
    """

    def __init__(
        self,
        dispersion: float = 1.0,
        learn_dispersion: bool = True,
        bounds: tuple[float, float] = (1e-4, 1e2),
    ) -> None:
        super().__init__()
        self._positive("dispersion", dispersion, bounds, learn_dispersion)

    def _density(self, y: Tensor, f: Tensor, **side: Tensor) -> Tensor:
        r = torch.exp(-self.get_parameter("log_dispersion")).to(f.device)
        # Differences of large lgamma values: float64 whatever the dtype of f.
        y64 = y.double()
        log_choose = torch.lgamma(y64 + r) - torch.lgamma(r) - torch.lgamma(y64 + 1)
        logit = f + self._log_exposure(f, side) - r.log().to(f)
        return log_choose.to(f) + y * logsigmoid(logit) + r.to(f) * logsigmoid(-logit)

    def _slopes(self, y: Tensor, f: Tensor, **side: Tensor) -> tuple[Tensor, Tensor]:
        dispersion = self.value_of("dispersion", f)
        logit = f + self._log_exposure(f, side) + dispersion.log()
        up, down = torch.sigmoid(logit), torch.sigmoid(-logit)
        return y * down - up / dispersion, -(y + 1 / dispersion) * up * down

    def predictive(self, m: Tensor, v: Tensor, **side: Tensor) -> Predictive:
        """Return E y* = E μ and Var y* = E μ + a E μ² + Var μ."""
        mean, second, spread = self._rate_moments(m, v, side)
        return Predictive(mean, mean + self.value_of("dispersion", mean) * second + spread)

    def sample(self, f: Tensor, generator: torch.Generator | None = None, **side: Tensor) -> Tensor:
        dispersion = self.value_of("dispersion", f).detach()
        frailty = torch._standard_gamma((1 / dispersion).expand(f.shape).contiguous(), generator=generator)
        mean = capped_exp(f) * self._log_exposure(f, side).exp()
        return torch.poisson(mean * dispersion * frailty, generator=generator)
