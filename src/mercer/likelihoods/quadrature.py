"""Expectations under one-dimensional Gaussian marginals by Gauss–Hermite quadrature.

One rule decides everything here: value, first and second derivative are averaged over the *same* nodes
m + √v x, and gradients in m and v come from the theorems of Bonnet and Price, ∂E[g]/∂m = E[g'] and
∂E[g]/∂v = ½E[g'']. So nothing is ever divided by √v and v = 0 is an ordinary value. Nodes sit on the last
axis: temporaries are n × nodes, so a caller bounds memory by chunking rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from scipy.special import roots_hermitenorm
from torch import Tensor
from torch.autograd.function import once_differentiable

from mercer.likelihoods.base import ExpectedLogProb, Likelihood, LogProbDerivatives, fill_missing, masked

Slopes = Callable[[Tensor], tuple[Tensor, Tensor]]

_REACH = 8.7  # standard deviations at which a Gaussian factor is below double precision
BISECTIONS = 30  # halvings of the bracket around the mode of an adaptive rule: 1e-9 of its width


@lru_cache(maxsize=32)
def _hermite(n_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    # NumPy's rule overflows from 371 nodes on
    nodes, weights = roots_hermitenorm(n_nodes)
    return nodes, weights / weights.sum()


def gauss_hermite(n_nodes: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return nodes and weights for averages under N(0, 1), in the dtype and on the device of ``like``.

    Parameters
    ----------
    n_nodes : int ≥ 1
        Number of nodes; exact for polynomials of degree 2 n_nodes − 1.
    like : Tensor
        Supplies dtype and device.

    Returns
    -------
    nodes, weights : (n_nodes,), dimensionless
        The weights sum to one.
    """
    nodes, weights = _hermite(n_nodes)
    return torch.as_tensor(nodes).to(like), torch.as_tensor(weights).to(like)


def elementwise_derivatives(fn: Callable[[Tensor], Tensor], f: Tensor, order: int) -> list[Tensor]:
    """Return fn(f), fn'(f), …, up to ``order``, for a function that acts on every element of f by itself.

    The results carry gradients only when autograd is recording.
    """
    recording = torch.is_grad_enabled()
    with torch.enable_grad():
        f = f if f.requires_grad and recording else f.detach().requires_grad_()
        found = [fn(f)]
        for k in range(order):
            last = found[-1]
            if not last.requires_grad:
                found.append(torch.zeros_like(f))
                continue
            keep = recording or k + 1 < order
            (slope,) = torch.autograd.grad(last.sum(), f, create_graph=keep, retain_graph=True, materialize_grads=True)
            found.append(slope)
    return found if recording else [item.detach() for item in found]


class _AttachMoments(torch.autograd.Function):
    """Give a number its known gradients (α, −½β) in (m, v), beside those that it has in the parameters."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, m: Tensor, v: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        ctx.save_for_backward(alpha, beta)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        alpha, beta = ctx.saved_tensors
        per_latent = grad if grad.dim() == alpha.dim() else grad.unsqueeze(-2)
        return grad, per_latent * alpha, -0.5 * per_latent * beta, None, None


def attach(value: Tensor, m: Tensor, v: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Return ``value`` with ∂/∂m = α and ∂/∂v = −½β; a second derivative raises instead of being wrong.

    Parameters
    ----------
    value : (*b', n)
        May carry a graph to likelihood parameters, but not to m and v.
    m, v, alpha, beta : broadcastable to one shape, (*b', n) or with C latents (*b', C, n)
    """
    shape = torch.broadcast_shapes(m.shape, v.shape, alpha.shape, beta.shape)
    alpha, beta = alpha.detach().expand(shape), beta.detach().expand(shape)
    return _AttachMoments.apply(value, m.expand(shape), v.expand(shape), alpha, beta)  # type: ignore[no-untyped-call]


def _nodes(m: Tensor, v: Tensor, n_nodes: int) -> tuple[Tensor, Tensor]:
    x, weight = gauss_hermite(n_nodes, m)
    # A variance of −1e-18 is round-off and means 0.
    spread = v.detach().clamp_min(0).sqrt()
    return m.detach().unsqueeze(-1) + spread.unsqueeze(-1) * x, weight


def _slopes_at(fn: Callable[[Tensor], Tensor], slopes: Slopes | None, f: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        if slopes is not None:
            return slopes(f)
        _, d1, d2 = elementwise_derivatives(fn, f, 2)
        return d1, d2


def expectation(
    fn: Callable[[Tensor], Tensor], m: Tensor, v: Tensor, n_nodes: int = 32, slopes: Slopes | None = None
) -> ExpectedLogProb:
    """Average a scalar function over N(m, v), with its derivatives at the same nodes.

    value = Σ_q w_q g(f_q), α = Σ_q w_q g'(f_q), β = −Σ_q w_q x_q g'(f_q)/√v, f_q = m + √v x_q.

    This β is exactly −2 ∂value/∂v of the rule itself, so that a variational bound and its natural gradient agree
    even where the rule is coarse, and it is positive for concave g because the nodes are symmetric. As v → 0
    it would divide rounding errors by √v; the equal −Σ_q w_q g''(f_q) takes over there.

    Parameters
    ----------
    fn : callable
        g, elementwise on (*b, n, n_nodes); may carry a graph to parameters.
    m, v : (*b, n), in units of f and f²
        Means and variances; v = 0 is allowed.
    n_nodes : int, default=32
        Nodes of the rule. Poles of g at distance δ from the real axis need about (√v/δ)² nodes.
    slopes : callable, optional
        f ↦ (g', g''); elementwise autograd when absent.

    Returns
    -------
    ExpectedLogProb
        ``value``, ``alpha``, ``beta`` of shape (*b, n). The value has gradients α and −½β in m and v exactly,
        and flows to parameters through the nodes.

    Notes
    -----
    O(n · n_nodes) time and memory. Bonnet (1964) and Price (1958) for the gradients; see Opper and
    Archambeau (2009), eqs. 19–20, for their use in variational Gaussian inference.
    """
    m, v = torch.broadcast_tensors(m, v)
    f, weight = _nodes(m, v, n_nodes)
    d1, d2 = _slopes_at(fn, slopes, f)
    alpha, direct = d1 @ weight, -(d2 @ weight)
    wide = v > torch.finfo(v.dtype).eps ** 0.5
    deviation = v.detach().where(wide, torch.ones_like(v)).sqrt()
    x, _ = gauss_hermite(n_nodes, m)
    beta = torch.where(wide, -(d1 @ (x * weight)) / deviation, direct)
    return ExpectedLogProb(attach(fn(f) @ weight, m, v, alpha, beta), alpha, beta)


def log_expectation(
    fn: Callable[[Tensor], Tensor],
    m: Tensor,
    v: Tensor,
    n_nodes: int = 32,
    slopes: Slopes | None = None,
    adaptive: bool = False,
) -> Tensor:
    """Return log ∫ exp(g(f)) N(f; m, v) df.

    Parameters
    ----------
    fn : callable
        g, elementwise on (*b, n, n_nodes), of any sign and size: a log density, or a (fractional or
        negative) power of one.
    m, v : (*b, n), in units of f and f²
        Means and variances; v = 0 is allowed, and v < 0 is read as 0: reject negative cavities first.
    n_nodes : int, default=32
        Nodes of the rule.
    slopes : callable, optional
        f ↦ (g', g''); elementwise autograd when absent. It must also act on (*b, n, 1).
    adaptive : bool, default=False
        Centre and scale 2·n_nodes + 1 nodes at the mode of the integrand. Only right for concave g; then it keeps
        its accuracy when exp(g) is much narrower than N(m, v), or has a bend that is.

    Returns
    -------
    Tensor (*b, n), in nats
        Differentiable once in m, v (∂/∂m = E_p[g'], ∂/∂v = ½E_p[g'' + g'²], p ∝ exp(g) N) and in parameters.

    Notes
    -----
    Adaptive nodes live in the whitened variable u = (f − m)/√v, so that v → 0 is regular; their stretching is that
    of Takahasi and Mori (1974). For the logistic, v = 10 costs 1e-13 and v = 100 about 1e-5 of relative accuracy.
    """
    m, v = torch.broadcast_tensors(m, v)
    f, weight = _nodes(m, v, n_nodes)
    log_weight = weight.log()
    if adaptive:
        f, log_weight = _recentre(fn, slopes, m.detach(), v.detach().clamp_min(0).sqrt(), n_nodes)
    terms = log_weight + fn(f)
    d1, d2 = _slopes_at(fn, slopes, f)
    p = torch.softmax(terms.detach(), -1)
    alpha, beta = (p * d1).sum(-1), -(p * (d2 + d1.square())).sum(-1)
    if adaptive:
        # where exp(g) is the narrower factor its own slopes are large and cancel, and those of N(m, v) do not
        spread = v.detach().clamp_min(torch.finfo(v.dtype).tiny).sqrt()
        u = (f - m.detach().unsqueeze(-1)) / spread.unsqueeze(-1)
        first, second = (p * u).sum(-1), (p * u.square()).sum(-1)
        narrow = (second - first.square() < 0.5) & (v > torch.finfo(v.dtype).tiny)
        alpha = torch.where(narrow, first / spread, alpha)
        beta = torch.where(narrow, (1 - second) / spread.square(), beta)
    return attach(torch.logsumexp(terms, -1), m, v, alpha, beta)


@torch.no_grad()
def _recentre(
    fn: Callable[[Tensor], Tensor], slopes: Slopes | None, m: Tensor, spread: Tensor, n_nodes: int
) -> tuple[Tensor, Tensor]:
    """Return nodes around the mode of g(m + √v u) − ½u², and their log weights."""
    m, spread = m.unsqueeze(-1), spread.unsqueeze(-1)
    # √v g'(m + √v u) − u falls in u, so its root lies between 0 and its value at 0.
    near = torch.zeros_like(m)
    far = spread * _slopes_at(fn, slopes, m)[0]
    for _ in range(BISECTIONS):
        middle = 0.5 * (near + far)
        residual = spread * _slopes_at(fn, slopes, m + spread * middle)[0] - middle
        beyond = residual * far < 0
        near, far = torch.where(beyond, near, middle), torch.where(beyond, middle, far)
    mode = 0.5 * (near + far)
    curvature = -_slopes_at(fn, slopes, m + spread * mode)[1]
    scale = (1 + spread.square() * curvature.clamp_min(0)).rsqrt()
    # g may change over 1/√v of the width of N(m, v): u = mode + scale sinh t is fine at the mode and reaches the
    # tails, and the trapezoidal rule in t converges exponentially. Concave g falls at least as fast as −½(u−mode)².
    grid = torch.linspace(-1.0, 1.0, 2 * n_nodes + 1, dtype=m.dtype, device=m.device)
    reach = torch.asinh(_REACH / scale)
    t = reach * grid
    u = mode + scale * torch.sinh(t)
    step = reach / n_nodes
    log_weight = (step * scale * torch.cosh(t)).log() - 0.5 * (u.square() + math.log(2 * math.pi))
    return m + spread * u, log_weight


class QuadratureLikelihood(Likelihood):
    """Abstract single-latent likelihood: a density and its slopes; the expectations follow by quadrature.

    A subclass gives ``_density``, preferably ``_slopes``, and the predictive law and ``sample``. Its methods
    see targets without NaN, and y, f and side tensors that broadcast. Closed forms may replace any default.
    """

    n_nodes: int = 32

    def _density(self, y: Tensor, f: Tensor, **side: Tensor) -> Tensor:
        """Return log p(y | f) for observed y."""
        raise NotImplementedError

    def _slopes(self, y: Tensor, f: Tensor, **side: Tensor) -> tuple[Tensor, Tensor]:
        """Return ∂ log p and ∂² log p in f; by autograd unless overridden."""
        _, d1, d2 = elementwise_derivatives(lambda g: self._density(y, g, **side), f, 2)
        return d1, d2

    def _fill(self, y: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return fill_missing(y, like)

    def log_prob(self, y: Tensor, f: Tensor, **side: Tensor) -> Tensor:
        y, observed = self._fill(y, f)
        return masked(self._density(y, f, **_rows(side, f)), observed)

    def log_prob_derivatives(self, y: Tensor, f: Tensor, **side: Tensor) -> LogProbDerivatives:
        y, observed = self._fill(y, f)
        y, f = torch.broadcast_tensors(y, f)
        side = _rows(side, f)
        d1, d2 = self._slopes(y, f, **side)
        d3 = elementwise_derivatives(lambda g: self._slopes(y, g, **side)[1], f, 1)[1]
        found = (self._density(y, f, **side), d1, d2, d3)
        return LogProbDerivatives(*(masked(item, observed) for item in found))

    def _at_nodes(self, y: Tensor, side: dict[str, Tensor]) -> tuple[Callable[[Tensor], Tensor], Slopes]:
        y = y.unsqueeze(-1)
        side = {name: value.unsqueeze(-1) for name, value in side.items()}
        return (lambda f: self._density(y, f, **side)), (lambda f: self._slopes(y, f, **side))

    def expected_log_prob(self, y: Tensor, m: Tensor, v: Tensor, **side: Tensor) -> ExpectedLogProb:
        y, observed = self._fill(y, m)
        y, m, v = torch.broadcast_tensors(y, m, v)
        density, slopes = self._at_nodes(y, _rows(side, m))
        found = expectation(density, m, v, self.n_nodes, slopes)
        return ExpectedLogProb(*(masked(item, observed) for item in found))

    def log_tilted(self, y: Tensor, m: Tensor, v: Tensor, power: float | Tensor = 1.0, **side: Tensor) -> Tensor:
        """Return log ∫ p(y|f)^power N(f; m, v) df, in nats: the normaliser of power expectation propagation.

        ``power`` may be fractional, or negative to take a factor out. It has gradients in m, v, parameters.
        """
        y, observed = self._fill(y, m)
        y, m, v = torch.broadcast_tensors(y, m, v)
        density, slopes = self._at_nodes(y, _rows(side, m))

        powers = torch.as_tensor(power).to(m).unsqueeze(-1)

        def tempered(f: Tensor) -> tuple[Tensor, Tensor]:
            d1, d2 = slopes(f)
            return powers * d1, powers * d2

        concave = self.log_concave and bool((powers > 0).all())
        found = log_expectation(lambda f: powers * density(f), m, v, self.n_nodes, tempered, concave)
        return masked(found, observed)

    def log_predictive_density(self, y: Tensor, m: Tensor, v: Tensor, **side: Tensor) -> Tensor:
        return self.log_tilted(y, m, v, 1.0, **side)


def _rows(side: dict[str, Tensor], like: Tensor) -> dict[str, Tensor]:
    return {name: value.to(like) for name, value in side.items()}
