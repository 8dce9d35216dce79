"""Heavy-tailed noise: Student-t, the likelihood that is not log-concave."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mercer.likelihoods.base import Predictive, fill_missing, masked
from mercer.likelihoods.gaussian import LOG_2PI, START_NOISE
from mercer.likelihoods.quadrature import QuadratureLikelihood

MIXTURE_NODES = 96


class StudentT(QuadratureLikelihood):
    """y = f + s t, t ~ Student-t with ν degrees of freedom.

    Parameters
    ----------
    df : float, default=4.0
        ν > 0, dimensionless. The variance of y is infinite for ν ≤ 2.
    scale : float, optional
        s, in units of y. When absent it starts at 1 and ``initialise`` sets it from the median absolute
        deviation of y.
    learn_scale : bool, default=True
    learn_df : bool, default=False
    bounds : (float, float), default=(1e-4, 1e2)
        Bounds of s, in units of y.
    n_nodes : int, default=64
        Gauss–Hermite nodes; raise it when √v is much larger than s √ν.

    Notes
    -----
    β = E[(ν+1)(νs² − r²)/(νs² + r²)²], r = y − f, is negative for outliers. The predictive density uses the
    Gaussian scale mixture, ∫ N(y; m, v + s²/λ) Gamma(λ; ν/2, ν/2) dλ, by the trapezoidal rule in log λ: it is
    accurate for every ratio s²/v and has no √v. Lange, Little and Taylor (1989), §2.
    """

    log_concave = False

    def __init__(
        self,
        df: float = 4.0,
        scale: float | None = None,
        learn_scale: bool = True,
        learn_df: bool = False,
        bounds: tuple[float, float] = (1e-4, 1e2),
        n_nodes: int = 64,
    ) -> None:
        super().__init__()
        self._given = scale is not None
        self.n_nodes = n_nodes
        self._positive("scale", 1.0 if scale is None else scale, bounds, learn_scale)
        self._positive("df", df, (1.0, 1e3), learn_df)

    def initialise(self, y: Tensor, weight: Tensor, **side: Tensor) -> Tensor | float:
        """Validate y and set s = √0.1 · 1.4826 · MAD(y): the share of noise a Gaussian would start from.

        Where more than half of the targets agree the MAD says nothing; the standard deviation then takes its place.
        """
        self.validate(y, **side)
        if not self._given:
            observed = ~torch.isnan(y)
            w = weight.expand_as(y)[observed].double()
            if w.numel():
                values = y[observed].double()
                deviation = 1.4826 * weighted_median_deviation(values, w)
                if not bool(deviation > self._bounds["scale"][0]):
                    centre = (w * values).sum() / w.sum()
                    deviation = ((w * (values - centre).square()).sum() / w.sum()).sqrt()
                self._set("scale", math.sqrt(START_NOISE) * deviation)
        return 0.0

    def _density(self, y: Tensor, f: Tensor, **side: Tensor) -> Tensor:
        df, scale = self.value_of("df", f), self.value_of("scale", f)
        constant = torch.lgamma(0.5 * (df + 1)) - torch.lgamma(0.5 * df) - 0.5 * (df * math.pi).log()
        return constant - scale.log() - 0.5 * (df + 1) * torch.log1p(((y - f) / scale).square() / df)

    def _slopes(self, y: Tensor, f: Tensor, **side: Tensor) -> tuple[Tensor, Tensor]:
        df, scale = self.value_of("df", f), self.value_of("scale", f)
        residual = y - f
        inner = df * scale.square()
        weight = (df + 1) / (inner + residual.square())
        return weight * residual, -weight * (inner - residual.square()) / (inner + residual.square())

    def predictive(self, m: Tensor, v: Tensor, **side: Tensor) -> Predictive:
        m, v = torch.broadcast_tensors(m, v)
        df, scale = self.value_of("df", m), self.value_of("scale", m)
        noise = torch.where(df > 2, scale.square() * df / (df - 2).clamp_min(torch.finfo(m.dtype).tiny), torch.inf)
        return Predictive(m, v + noise)

    def log_predictive_density(self, y: Tensor, m: Tensor, v: Tensor, **side: Tensor) -> Tensor:
        y, observed = fill_missing(y, m)
        y, m, v = (item.unsqueeze(-1) for item in torch.broadcast_tensors(y, m, v))
        df, scale = self.value_of("df", m), self.value_of("scale", m)
        squares = (y - m).square()
        with torch.no_grad():
            # Beyond these ends the integrand in log λ is below 1e-15 of its peak, for v = 0 and for v = ∞.
            low = -(72 / (df + 1) + (144 / df).sqrt()) - torch.log1p(squares / (df * scale.square()))
            high = torch.log1p(80 / df + (160 / df).sqrt())
            step = (high - low) / (MIXTURE_NODES - 1)
            log_precision = low + step * torch.arange(MIXTURE_NODES, dtype=m.dtype, device=m.device)
        shape = 0.5 * df
        log_gamma = shape * (shape.log() + log_precision - log_precision.exp()) - torch.lgamma(shape)
        total = v + scale.square() * (-log_precision).exp()
        log_normal = -0.5 * (LOG_2PI + total.log() + squares / total)
        return masked(torch.logsumexp(step.log() + log_gamma + log_normal, -1), observed)

    def log_tilted(self, y: Tensor, m: Tensor, v: Tensor, power: float | Tensor = 1.0, **side: Tensor) -> Tensor:
        """Return log ∫ p(y|f)^power N(f; m, v) df, in nats: by the mixture at power one, else by Gauss–Hermite."""
        whole = torch.as_tensor(power, device=m.device) == 1.0
        if bool(whole.all()):
            return self.log_predictive_density(y, m, v, **side)
        found = super().log_tilted(y, m, v, power, **side)
        return torch.where(whole, self.log_predictive_density(y, m, v, **side), found) if bool(whole.any()) else found

    def sample(self, f: Tensor, generator: torch.Generator | None = None, **side: Tensor) -> Tensor:
        df, scale = self.value_of("df", f).detach(), self.value_of("scale", f).detach()
        normal = torch.randn(f.shape, generator=generator, dtype=f.dtype, device=f.device)
        gamma = torch._standard_gamma((0.5 * df).expand(f.shape).contiguous(), generator=generator)
        return f + scale * normal * (0.5 * df / gamma).sqrt()


def weighted_median(values: Tensor, weight: Tensor) -> Tensor:
    """Return the median of ``values`` (n,) when value i was seen ``weight[i]`` times."""
    order = values.argsort()
    values, reached = values[order], weight[order].cumsum(0)
    half = 0.5 * reached[-1]
    slack = 1e-12 * half
    lower = values[torch.searchsorted(reached, half - slack).clamp_max(len(values) - 1)]
    upper = values[torch.searchsorted(reached, half + slack).clamp_max(len(values) - 1)]
    return 0.5 * (lower + upper)


def weighted_median_deviation(values: Tensor, weight: Tensor) -> Tensor:
    """Return the median absolute deviation from the median, with replication weights."""
    return weighted_median((values - weighted_median(values, weight)).abs(), weight)
