"""Classes: Bernoulli with a probit or logit link, and softmax over C latents.

The softmax couples its latents, so Gauss–Hermite nodes do not reach it; it averages over fixed
quasi-Monte-Carlo draws instead, the same for value, α and β.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot
from torch.quasirandom import SobolEngine

from mercer.likelihoods.base import (
    ExpectedLogProb,
    Likelihood,
    LogProbDerivatives,
    Predictive,
    class_moments,
    fill_missing,
    masked,
)
from mercer.likelihoods.quadrature import QuadratureLikelihood, attach

FAR_TAIL = 50.0  # beyond it r(z) + z cancels and its asymptotic series is exact to 1e-11
BLOCK_ELEMENTS = 2**22  # elements of one softmax temporary, 32 MiB in float64
DRAW_SEED = 20211103


def log_ndtr(z: Tensor) -> Tensor:
    """Return log Φ(z), with a gradient that is exact in the left tail.

    ``torch.special.log_ndtr`` differentiates through exp(−z²/2 − log Φ), which is wrong by 1e-6 at z = −1e5
    and infinite at −1e10; here log Φ = log ½erfcx(−z/√2) − z²/2 for z < −1.
    """
    left = z.clamp_max(-1.0)
    tail = torch.log(0.5 * torch.special.erfcx(left * -math.sqrt(0.5))) - 0.5 * left.square()
    return torch.where(z < -1.0, tail, torch.special.log_ndtr(z.clamp_min(-1.0)))


def probit_slopes(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return r = ∂ log Φ(z) and h = −∂² log Φ(z) = r (r + z), both positive for every z.

    Notes
    -----
    r = √(2/π) / erfcx(−z/√2) has no cancellation. r + z does, below −50, and is there taken from Laplace's
    series of the Mills ratio, r + z = 1/t − 2/t³ + 10/t⁵ − 74/t⁷ with t = −z.
    """
    largest = 35.0 if z.dtype == torch.float64 else 12.5  # erfcx overflows beyond
    r = math.sqrt(2 / math.pi) / torch.special.erfcx(z.clamp_max(largest) * -math.sqrt(0.5))
    u = 1 / (-z).clamp_min(FAR_TAIL)
    u2 = u.square()
    series = u * (1 - u2 * (2 - u2 * (10 - 74 * u2)))
    return r, r * torch.where(z < -FAR_TAIL, series, r + z)


class Bernoulli(QuadratureLikelihood):
    """y ∈ {0, 1}, P(y = 1) = Φ(f) (probit) or 1/(1 + e^{−f}) (logit).

    Parameters
    ----------
    link : {"probit", "logit"}, default="probit"
        Inverse link from f to the probability of class 1.

    Notes
    -----
    Probit predictions are closed: P(y* = 1) = Φ(m/√(1+v)) (Rasmussen and Williams 2006, eq. 3.82). The rest
    is Gauss–Hermite with 32 nodes.
    """

    support = "classes"
    n_classes = 2

    def __init__(self, link: str = "probit") -> None:
        super().__init__()
        if link not in ("probit", "logit"):
            raise ValueError(f"link must be 'probit' or 'logit', got {link!r}.")
        self.link = link

    def extra_repr(self) -> str:
        return f"link={self.link!r}"

    def _density(self, y: Tensor, f: Tensor, **side: Tensor) -> Tensor:
        z = (2 * y - 1) * f
        return log_ndtr(z) if self.link == "probit" else logsigmoid(z)

    def _slopes(self, y: Tensor, f: Tensor, **side: Tensor) -> tuple[Tensor, Tensor]:
        sign = 2 * y - 1
        if self.link == "probit":
            r, h = probit_slopes(sign * f)
            return sign * r, -h
        return sign * torch.sigmoid(-sign * f), -torch.sigmoid(f) * torch.sigmoid(-f)

    def predictive(self, m: Tensor, v: Tensor, **side: Tensor) -> Predictive:
        m, v = torch.broadcast_tensors(m, v)
        classes = torch.zeros_like(m), torch.ones_like(m)
        logs = torch.stack([self.log_predictive_density(y, m, v) for y in classes], -1)
        return class_moments(torch.softmax(logs, -1))

    def log_predictive_density(self, y: Tensor, m: Tensor, v: Tensor, **side: Tensor) -> Tensor:
        if self.link == "logit":
            return self.log_tilted(y, m, v)
        return self.log_prob(y, m * torch.rsqrt(1 + v))

    def sample(self, f: Tensor, generator: torch.Generator | None = None, **side: Tensor) -> Tensor:
        p = torch.special.ndtr(f) if self.link == "probit" else torch.sigmoid(f)
        return torch.bernoulli(p, generator=generator)


@lru_cache(maxsize=32)
def _draws(n_draws: int, n_latents: int) -> Tensor:
    """Return antithetic standard normal draws (C, n_draws) with mean zero and second moment I exactly.

    Exact moments make the rule exact for quadratic functions, coupled latents included. They need more pairs
    than latents; with fewer, only the variances are made exact.
    """
    points = SobolEngine(n_latents, scramble=True, seed=DRAW_SEED).draw(n_draws // 2, dtype=torch.float64)
    half = torch.special.ndtri(points.clamp(1e-12, 1 - 1e-12)).T
    half = half / half.square().mean(-1, keepdim=True).sqrt()
    if half.shape[1] > 2 * n_latents:
        L = torch.linalg.cholesky(half @ half.T / half.shape[1])
        half = torch.linalg.solve_triangular(L, half, upper=False)
    return torch.cat([half, -half], -1)


class Softmax(Likelihood):
    """P(y = c) = exp(f_c) / Σ_k exp(f_k), with one independent latent per class.

    Parameters
    ----------
    n_classes : int ≥ 2
        C. Latents, means and variances have shape (*b', C, n), targets (*b', n) with values 0, …, C − 1.
    n_draws : int, default=128
        Draws of the quasi-Monte-Carlo rule; even, because they come in antithetic pairs.

    Notes
    -----
    value = m_y − E[log Σ exp f], α_c = 1[y=c] − E π_c, and β_c is −2 ∂value/∂v_c of the same draws, E[x_c π_c]/√v_c,
    so that value and slopes agree. Sampled, that can come out negative or lost in noise; the equal and always
    positive E[π_c (1 − π_c)] takes over where it does. For a factorised q this is the exact natural gradient,
    because the off-diagonal Hessian does not enter. The draws are scrambled Sobol points with a fixed seed,
    cached, and never touch the global generator; blocks of draws bound the memory.
    """

    support = "classes"
    resolution = 1e-5
    # what sets of 128 draws, which all rows share, disagree by on differences between θ (sd; on the level, 4e-3)
    sampling_error = 1e-3

    def __init__(self, n_classes: int, n_draws: int = 128) -> None:
        super().__init__()
        if n_classes < 2:
            raise ValueError(f"n_classes must be at least 2, got {n_classes}; the data hold a single class.")
        if n_draws < 2 or n_draws % 2:
            raise ValueError(f"n_draws must be even and at least 2, got {n_draws}.")
        self.n_classes = n_classes
        self.n_latents = n_classes
        self.n_draws = n_draws

    def extra_repr(self) -> str:
        return f"n_classes={self.n_classes}, n_draws={self.n_draws}"

    def _log_softmax_blocks(self, m: Tensor, spread: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (x, log Σ exp f, log π) for blocks of draws: (C, s), (*b', n, s) and (*b', C, n, s)."""
        x = _draws(self.n_draws, self.n_classes).to(m)
        for block in x.split(max(1, BLOCK_ELEMENTS // max(1, m.numel())), -1):
            f = m.unsqueeze(-1) + spread.unsqueeze(-1) * block.unsqueeze(-2)
            total = torch.logsumexp(f, -3)
            yield block, total, f - total.unsqueeze(-3)

    def _one_hot(self, y: Tensor) -> Tensor:
        return one_hot(y.long(), self.n_classes).movedim(-1, -2)

    def log_prob(self, y: Tensor, f: Tensor, **side: Tensor) -> Tensor:
        y, observed = fill_missing(y, f)
        return masked((torch.log_softmax(f, -2) * self._one_hot(y)).sum(-2), observed)

    def log_prob_derivatives(self, y: Tensor, f: Tensor, **side: Tensor) -> LogProbDerivatives:
        """Refuse: the Hessian in f is not diagonal."""
        raise TypeError(
            "likelihood=Softmax couples its latents and has no elementwise derivatives, so engine='laplace' "
            "cannot use it; choose engine='dual' (or Bernoulli for two classes)."
        )

    def expected_log_prob(self, y: Tensor, m: Tensor, v: Tensor, **side: Tensor) -> ExpectedLogProb:
        y, observed = fill_missing(y, m)
        m, v = torch.broadcast_tensors(m, v)
        with torch.no_grad():
            hot = self._one_hot(y).to(m)
            value, direct, slope = (hot * m).sum(-2), torch.zeros_like(m), torch.zeros_like(m)
            spread = v.clamp_min(0).sqrt()
            alpha = hot.expand(torch.broadcast_shapes(hot.shape, m.shape)).clone()
            for x, total, log_pi in self._log_softmax_blocks(m, spread):
                pi = log_pi.exp()
                value = value - total.sum(-1) / self.n_draws
                alpha = alpha - pi.sum(-1) / self.n_draws
                direct = direct + (pi * -torch.expm1(log_pi)).sum(-1) / self.n_draws
                slope = slope + (pi * x.unsqueeze(-2)).sum(-1) / self.n_draws
            # below √eps the division by √v amplifies rounding, and the direct form is exact anyway
            slope = slope / spread.clamp_min(torch.finfo(m.dtype).eps ** 0.25)
            usable = (v > torch.finfo(m.dtype).eps ** 0.5) & (slope > 0.1 * direct)
            beta = torch.where(usable, slope, direct)
            per_latent = observed.unsqueeze(-2)
            alpha, beta = masked(alpha, per_latent), masked(beta, per_latent)
            value = masked(value, observed)
        return ExpectedLogProb(attach(value, m, v, alpha, beta), alpha, beta)

    def coupling(self, y: Tensor, m: Tensor, v: Tensor, **side: Tensor) -> Tensor:
        """Return W = −E ∂² log p / ∂f∂fᵀ = diag(E π) − E ππᵀ per row, (*b', n, C, C); 0 where y is missing."""
        _, observed = fill_missing(y, m)
        m, v = torch.broadcast_tensors(m, v)
        mass = torch.zeros_like(m.movedim(-2, -1))
        square = torch.zeros_like(torch.diag_embed(mass))
        for _, _, log_pi in self._log_softmax_blocks(m, v.clamp_min(0).sqrt()):
            pi = log_pi.exp().movedim(-3, -2)
            mass = mass + pi.sum(-1)
            square = square + pi @ pi.mT
        return masked((torch.diag_embed(mass) - square) / self.n_draws, observed[..., None, None])

    def predictive(self, m: Tensor, v: Tensor, **side: Tensor) -> Predictive:
        """Return class probabilities (*b', n, C) that sum to one, and moments of the class index."""
        m, v = torch.broadcast_tensors(m, v)
        # The floor keeps ∂√v finite; it moves a probability by less than 1e-12.
        blocks = self._log_softmax_blocks(m, v.clamp_min(1e-12).sqrt())
        mass = sum((log_pi.exp().sum(-1) for _, _, log_pi in blocks), torch.zeros_like(m)).movedim(-2, -1)
        return class_moments(mass / mass.sum(-1, keepdim=True))

    def log_predictive_density(self, y: Tensor, m: Tensor, v: Tensor, **side: Tensor) -> Tensor:
        y, observed = fill_missing(y, m)
        probs = self.predictive(m, v).probs
        assert probs is not None
        chosen = (probs * one_hot(y.long(), self.n_classes)).sum(-1)
        return masked(chosen.clamp_min(torch.finfo(chosen.dtype).tiny).log(), observed)

    def sample(self, f: Tensor, generator: torch.Generator | None = None, **side: Tensor) -> Tensor:
        # Gumbel's trick: argmax of f − log E with E exponential.
        noise = torch.empty_like(f).exponential_(generator=generator)
        return (f - noise.log()).argmax(-2).to(f)
