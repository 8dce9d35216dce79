"""The Gaussian likelihood: the conjugate case, whose sites do not depend on q.

It alone offers ``sites`` and ``log_scale``, from which the conjugate engine assembles the exact evidence.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mercer._typing import Sites
from mercer.likelihoods.base import (
    ExpectedLogProb,
    Likelihood,
    LogProbDerivatives,
    Predictive,
    fill_missing,
    masked,
)

LOG_2PI = math.log(2 * math.pi)
START_NOISE = 0.1  # starting noise variance as a fraction of the variance of y


class Gaussian(Likelihood):
    """y = f + ε, ε ~ N(0, σ²), with σ² learned or known row by row.

    Parameters
    ----------
    noise_variance : float or tensor, optional
        σ², in units of y²; shape (), or (p, 1) for p outputs with noise of their own. When absent it starts
        at 1 and ``initialise`` sets a tenth of the variance of y.
    learn_noise : bool, default=True
        Whether σ² is a hyperparameter.
    bounds : (float, float), default=(1e-8, 1e2)
        Bounds of σ² when it is learned, in units of y².

    Notes
    -----
    The side tensor ``noise_variance`` (n,), > 0, gives known noise; it *replaces* σ² wherever it is passed,
    and ``initialise`` then stops σ² from being learned.
    """

    conjugate = True
    side_names = ("noise_variance",)

    def __init__(
        self,
        noise_variance: Any = None,
        learn_noise: bool = True,
        bounds: tuple[float, float] = (1e-8, 1e2),
    ) -> None:
        super().__init__()
        self._given = noise_variance is not None
        self._positive("noise_variance", 1.0 if noise_variance is None else noise_variance, bounds, learn_noise)

    def with_noise_floor(self, floor: float) -> Gaussian:
        """Raise the lower bound of a learned σ² to ``floor``, in units of y²; returns self."""
        low, high = self._bounds["noise_variance"]
        self._bounds["noise_variance"] = (max(low, floor), high)
        return self

    def variance(self, y_like: Tensor, **side: Tensor) -> Tensor:
        """Return the noise variance of every row, in units of y², in the shape and dtype of ``y_like``."""
        known = side.get("noise_variance")
        noise = self.value_of("noise_variance", y_like) if known is None else known.to(y_like)
        return noise.expand(torch.broadcast_shapes(noise.shape, y_like.shape))

    def sites(self, y: Tensor, weight: Tensor, **side: Tensor) -> Sites:
        """Return the exact sites λ1 = w y/σ², λ2 = w/σ² (both 0 where y is missing).

        Parameters
        ----------
        y : (*b, n), in units of y
            Floating-point targets, NaN where missing.
        weight : (n,)
            Replication weights.

        Returns
        -------
        Sites
            λ1 (*b, n); λ2 (*b, n), or (n,) when all outputs agree on it. Differentiable in σ².
        """
        filled, observed = fill_missing(y, y, 0.0)
        if bool(observed.all()):
            # outputs that agree on every row share one precision, and so one factorisation
            row = filled[(0,) * (filled.dim() - 1)] if self._shared(**side) else filled
            precision = weight.to(filled) / self.variance(row, **side)
            return Sites(precision * filled, precision)
        precision = masked(weight.to(filled) / self.variance(filled, **side), observed)
        return Sites(precision * filled, precision)

    def _shared(self, **side: Tensor) -> bool:
        """Whether all outputs have the same noise in a row."""
        known = side.get("noise_variance")
        return self.get_parameter("log_noise_variance").numel() == 1 if known is None else known.dim() == 1

    def log_scale(self, y: Tensor, weight: Tensor, **side: Tensor) -> Tensor:
        """Return −½ Σ w log 2πσ² over the observed rows, in nats; shape (*b,).

        This is what the sites leave out: log evidence = E + log_scale, E = −½ yᵀ(K+R)⁻¹y − ½ log|B| with
        R = diag(σ²/w) and B = I + R^{-½} K R^{-½}. Weight 2 then equals the row twice.
        """
        filled, observed = fill_missing(y, y, 0.0)
        logs = weight.to(filled) * (LOG_2PI + self.variance(filled, **side).log())
        return -0.5 * masked(logs, observed).sum(-1)

    def initialise(self, y: Tensor, weight: Tensor, **side: Tensor) -> Tensor | float:
        self.validate(y, **side)
        if "noise_variance" in side:
            self.get_parameter("log_noise_variance").requires_grad_(False)
        elif not self._given:
            filled, observed = fill_missing(y, self.get_parameter("log_noise_variance"), 0.0)
            w = masked(weight.to(filled).expand_as(filled), observed)
            total = w.sum(-1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
            mean = (w * filled).sum(-1, keepdim=True) / total
            spread = (w * (filled - mean).square()).sum(-1, keepdim=True) / total
            if self.get_parameter("log_noise_variance").numel() == 1:
                spread = spread.mean()
            self._set("noise_variance", START_NOISE * spread)
        return 0.0

    def log_prob(self, y: Tensor, f: Tensor, **side: Tensor) -> Tensor:
        return self.log_prob_derivatives(y, f, **side).value

    def log_prob_derivatives(self, y: Tensor, f: Tensor, **side: Tensor) -> LogProbDerivatives:
        y, observed = fill_missing(y, f)
        y, f = torch.broadcast_tensors(y, f)
        noise = self.variance(f, **side)
        value = -0.5 * (LOG_2PI + noise.log() + (y - f).square() / noise)
        found = (value, (y - f) / noise, -1 / noise, torch.zeros_like(value))
        return LogProbDerivatives(*(masked(item, observed) for item in found))

    def expected_log_prob(self, y: Tensor, m: Tensor, v: Tensor, **side: Tensor) -> ExpectedLogProb:
        at_mean = self.log_prob_derivatives(y, m, **side)
        value = at_mean.value + 0.5 * v * at_mean.d2
        return ExpectedLogProb(value, at_mean.d1.detach(), -at_mean.d2.detach())

    def predictive(self, m: Tensor, v: Tensor, **side: Tensor) -> Predictive:
        m, v = torch.broadcast_tensors(m, v)
        return Predictive(m, v + self.variance(m, **side))

    def log_predictive_density(self, y: Tensor, m: Tensor, v: Tensor, **side: Tensor) -> Tensor:
        y, observed = fill_missing(y, m)
        mean, total, _ = self.predictive(m, v, **side)
        return masked(-0.5 * (LOG_2PI + total.log() + (y - mean).square() / total), observed)

    def log_tilted(self, y: Tensor, m: Tensor, v: Tensor, power: float | Tensor = 1.0, **side: Tensor) -> Tensor:
        """Return log ∫ p(y|f)^power N(f; m, v) df, power > 0, in nats: a Gaussian of variance σ²/power."""
        y, observed = fill_missing(y, m)
        noise = self.variance(m, **side)
        powers = torch.as_tensor(power).to(m)
        total = v + noise / powers
        rescale = (1 - powers) * (LOG_2PI + noise.log()) - powers.log()
        return masked(0.5 * (rescale - LOG_2PI - total.log() - (y - m).square() / total), observed)

    def sample(self, f: Tensor, generator: torch.Generator | None = None, **side: Tensor) -> Tensor:
        noise = torch.randn(f.shape, generator=generator, dtype=f.dtype, device=f.device)
        return f + self.variance(f, **side).sqrt() * noise
