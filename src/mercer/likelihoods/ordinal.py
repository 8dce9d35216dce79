"""Ordered classes: one latent cut into intervals by learned thresholds."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mercer._typing import Hyperparameter
from mercer.likelihoods.base import Predictive, _identity, class_moments, fill_missing, masked
from mercer.likelihoods.categorical import log_ndtr, probit_slopes
from mercer.likelihoods.quadrature import QuadratureLikelihood

EDGE = 1e10  # stands for ±∞ in the outer classes; its square still fits float32
INCREMENT_BOUNDS = (1e-3, 1e2)
CUTPOINT_BOUND = 20.0


def _fold(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mirror intervals that lie mostly right of 0, so that Φ(upper) is never near one for both ends."""
    mirrored = lower + upper > 0
    return torch.where(mirrored, -upper, lower), torch.where(mirrored, -lower, upper), mirrored


def _log_interval(lower: Tensor, upper: Tensor) -> Tensor:
    """Return log(Φ(upper) − Φ(lower)) without cancellation in either tail."""
    lower, upper, _ = _fold(lower, upper)
    log_upper = log_ndtr(upper)
    gap = (log_ndtr(lower) - log_upper).clamp_max(-1e-30)
    near = torch.log(-torch.expm1(gap.clamp_min(-1.0)))
    far = torch.log1p(-gap.clamp_max(-0.5).exp())
    return log_upper + torch.where(gap > -math.log(2), near, far)


class Ordinal(QuadratureLikelihood):
    """y ∈ {0, …, C − 1}, P(y ≤ k) = Φ(c_k − f), with c_0 < … < c_{C−2}.

    Parameters
    ----------
    n_classes : int ≥ 2
        C, the number of ordered classes.
    learn_cutpoints : bool, default=True
        Whether the cutpoints are hyperparameters.

    Attributes
    ----------
    cutpoints : Tensor (C − 1,), in units of f
        Stored as the first value and the logarithms of the increments, so that their order cannot break.

    Notes
    -----
    The noise of the underlying normal variable has variance one: scale lives in the kernel. Chu and
    Ghahramani (2005), eqs. 4–5; predictions are closed, P(y* ≤ k) = Φ((c_k − m)/√(1+v)).
    """

    support = "classes"

    def __init__(self, n_classes: int, learn_cutpoints: bool = True) -> None:
        super().__init__()
        if n_classes < 2:
            raise ValueError(f"n_classes must be at least 2, got {n_classes}; the data hold a single class.")
        self.n_classes = n_classes
        start = torch.arange(n_classes - 1, dtype=torch.float64) - 0.5 * (n_classes - 2)
        self.first_cutpoint = nn.Parameter(start[0].clone(), requires_grad=learn_cutpoints)
        self.log_increments = nn.Parameter(start.diff().log(), requires_grad=learn_cutpoints)

    def extra_repr(self) -> str:
        return f"n_classes={self.n_classes}"

    @property
    def cutpoints(self) -> Tensor:
        steps = self.log_increments.exp().cumsum(0)
        return self.first_cutpoint + torch.cat([steps.new_zeros(1), steps])

    def hyperparameters(self) -> list[Hyperparameter]:
        if not self.first_cutpoint.requires_grad:
            return []
        first, rest = self.first_cutpoint, self.log_increments
        low, high = (math.log(bound) for bound in INCREMENT_BOUNDS)
        found = [Hyperparameter("first_cutpoint", first, _identity, _identity, -CUTPOINT_BOUND, CUTPOINT_BOUND, False)]
        if rest.numel():
            found.append(Hyperparameter("increments", rest, _identity, _identity, low, high, True))
        return found

    def initialise(self, y: Tensor, weight: Tensor, **side: Tensor) -> Tensor | float:
        """Validate y and set the cutpoints to the class frequencies of a latent of unit variance."""
        self.validate(y, **side)
        filled, observed = fill_missing(y, self.first_cutpoint, 0.0)
        w = masked(weight.to(filled).expand_as(filled), observed).reshape(-1)
        # Half an observation per class keeps empty classes apart.
        counts = w.new_full((self.n_classes,), 0.5).index_add(0, filled.reshape(-1).long(), w)
        below = (counts.cumsum(0) / counts.sum())[:-1]
        cuts = math.sqrt(2.0) * torch.special.ndtri(below)
        with torch.no_grad():
            self.first_cutpoint.copy_(cuts[0])
            self.log_increments.copy_(cuts.diff().clamp(*INCREMENT_BOUNDS).log())
        return 0.0

    def _interval(self, y: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        cuts = self.cutpoints
        edges = torch.cat([cuts.new_full((1,), -EDGE), cuts, cuts.new_full((1,), EDGE)]).to(like)
        index = y.long()
        return edges[index], edges[index + 1]

    def _density(self, y: Tensor, f: Tensor, **side: Tensor) -> Tensor:
        lower, upper = self._interval(y, f)
        return _log_interval(lower - f, upper - f)

    def _slopes(self, y: Tensor, f: Tensor, **side: Tensor) -> tuple[Tensor, Tensor]:
        # With folded ends l < u, δ = log Φ(l)/Φ(u), E = e^δ/(1 − e^δ) and r, h the slopes of log Φ:
        # Q' = r_u + E (r_u − r_l), Q'' = −h_u + E (h_l − h_u) − E (1 + E)(r_l − r_u)².
        lower, upper = self._interval(y, f)
        lower, upper, mirrored = _fold(lower - f, upper - f)
        gap = (log_ndtr(lower) - log_ndtr(upper)).clamp_max(-1e-30)
        odds = gap.exp() / -torch.expm1(gap)
        (r_low, h_low), (r_up, h_up) = probit_slopes(lower), probit_slopes(upper)
        slope = r_up + odds * (r_up - r_low)
        curvature = -h_up + odds * (h_low - h_up) - odds * (1 + odds) * (r_low - r_up).square()
        return torch.where(mirrored, slope, -slope), curvature

    def predictive(self, m: Tensor, v: Tensor, **side: Tensor) -> Predictive:
        m, v = torch.broadcast_tensors(m, v)
        classes = torch.arange(self.n_classes, dtype=m.dtype, device=m.device)
        logs = self.log_predictive_density(classes, m.unsqueeze(-1), v.unsqueeze(-1))
        return class_moments(torch.softmax(logs, -1))

    def log_predictive_density(self, y: Tensor, m: Tensor, v: Tensor, **side: Tensor) -> Tensor:
        y, observed = fill_missing(y, m)
        shrink = torch.rsqrt(1 + v)
        lower, upper = self._interval(y, m)
        return masked(_log_interval((lower - m) * shrink, (upper - m) * shrink), observed)

    def sample(self, f: Tensor, generator: torch.Generator | None = None, **side: Tensor) -> Tensor:
        noise = torch.randn(f.shape, generator=generator, dtype=f.dtype, device=f.device)
        cuts = self.cutpoints.detach().to(f)
        return ((f + noise).unsqueeze(-1) > cuts).sum(-1).to(f)
