"""Sites of new observations: what targets at a few more rows push, given everything that a process already knows.

A Gaussian likelihood has them in closed form. For any other one the sites at the new rows alone take natural-gradient
steps within the process's N(m, C) at those rows, thousands of small problems at once, each with step control. Sites of
the training rows stay as they are. At the fixed point λ = F(λ; m, C, y) the derivative follows from the implicit
function theorem, (I − ∂F/∂λ)⁻¹ ∂F, so that no step is unrolled and none needs to be kept.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from mercer._typing import Sites
from mercer.families.conditioned import latent_dims
from mercer.families.sets import lined_up
from mercer.families.update import Update
from mercer.likelihoods.base import Likelihood
from mercer.likelihoods.quadrature import gauss_hermite

_STEPS = 300
_TOLERANCE = 1e-11  # relative change of sites at which they have converged
_FAR = 1e-4  # the same, at which the user is warned
_SLACK = 1e-10  # relative fall of the bound that still counts as rounding
_SMALLEST_STEP = 1e-6
_NODES = 32  # of a likelihood without a rule of its own


def sites_of(likelihood: Likelihood, process: Any, X: Tensor, y: Tensor, **side: Tensor) -> Sites:
    """Return the sites that targets y ask for at new rows X of a process.

    Parameters
    ----------
    likelihood : Likelihood
    process : Process
        A posterior, or one conditioned on more already.
    X : (*t, Q, d)
        Rows, of which each t is a set by itself.
    y : (*p, *s, *t, Q), in units of y
        Targets of outputs *p (none for a likelihood of several latents), NaN where missing; *s are alternatives, such
        as fantasies.
    **side : broadcastable to y
        What the likelihood reads per row (``noise_variance``, ``exposure``).

    Returns
    -------
    Sites
        λ1 (*b, *s, *t, Q) of the centred latent g = f − μ, *b being the latents where the likelihood has several; λ2
        of Gaussian noise lacks dimensions on which it does not depend. Differentiable in X and y.

    Warns
    -----
    UserWarning
        Steps ended before they had converged.
    """
    n_latents = latent_dims(process)
    if likelihood.conjugate:
        return _gaussian(likelihood, process, X, y, n_latents, side)
    n_sets = y.dim() - 1 - (n_latents if likelihood.n_latents == 1 else 0)
    mean, C = process.joint(X)
    mean, C = lined_up(mean, n_latents, n_sets, 1), lined_up(C, n_latents, n_sets, 2)
    problem = _Problem(likelihood, mean, C, y, side)
    with torch.no_grad():
        found = _converge(problem)
    if torch.is_grad_enabled() and any(each.requires_grad for each in (mean, C, y)):
        found = _differentiable(problem, found)
    linear, precision = found
    return Sites(linear + precision * (mean - process.prior.mean_at(X)), precision)


def expected_precision(likelihood: Likelihood, m: Tensor, v: Tensor, **side: Tensor) -> Tensor:
    """Return E β, what an observation that is not made yet is expected to add to the precision of f.

    Parameters
    ----------
    likelihood : Likelihood
    m, v : (*b, *t, Q)
        Mean and variance of f.

    Returns
    -------
    (*b, *t, Q)
        In units of 1/f², differentiable in m and v. Over classes it is the average, otherwise that at the expected y.
    """
    if likelihood.n_latents > 1:  # the curvature of a softmax does not depend on the class
        return _push(likelihood, torch.zeros_like(m[0]), m, v, side)[1]
    found = likelihood.predictive(m, v, **side)
    if likelihood.support != "classes" or found.probs is None:
        return _push(likelihood, found.mean, m, v, side)[1]
    classes = [torch.full_like(m, float(c)) for c in range(found.probs.shape[-1])]
    return (found.probs * torch.stack([_push(likelihood, y, m, v, side)[1] for y in classes], -1)).sum(-1)


def _gaussian(likelihood: Any, process: Any, X: Tensor, y: Tensor, n_latents: int, side: dict[str, Tensor]) -> Sites:
    """Return λ2 = 1/σ² and λ1 = λ2 (y − μ); alternatives share λ2."""
    outputs, q = y.shape[:n_latents], y.shape[-1]
    like = side["noise_variance"] if side else y.new_zeros(*outputs, q)
    precision = likelihood.sites(torch.zeros_like(like), y.new_ones(q), **side).precision
    if not side and precision.dim() > 1:
        precision = lined_up(precision, n_latents, y.dim() - 1 - n_latents, 1)
    observed = ~torch.isnan(y)
    if not bool(observed.all()):
        precision = torch.where(observed, precision, 0.0)
    return Sites(precision * (torch.where(observed, y, 0.0) - process.prior.mean_at(X)), precision)


class _State(NamedTuple):
    """Per problem the bound, in nats, and whether there is a Gaussian; and sites that the likelihood asks for."""

    value: Tensor
    proper: Tensor
    target: Tensor


class _Problem:
    """Problems of a few rows each: y ~ likelihood(m + h), h ~ N(0, C), and sites λ (2, *b, *s, Q) of h."""

    def __init__(self, likelihood: Likelihood, mean: Tensor, C: Tensor, y: Tensor, side: dict[str, Tensor]):
        self.likelihood, self.mean, self.C, self.y, self.side = likelihood, mean, C, y, side
        self.coupled = likelihood.n_latents > 1

    def no_sites(self) -> Tensor:
        """Return sites that say nothing."""
        if not self.coupled:
            return self.mean.new_zeros(2, *torch.broadcast_shapes(self.mean.shape, self.y.shape))
        sets = torch.broadcast_shapes(self.mean.shape[1:], self.y.shape)
        return self.mean.new_zeros(2, len(self.mean), *sets)

    def over_latents(self, value: Tensor) -> Tensor:
        """Return (*b, *s) as one number for each problem."""
        return value.sum(0) if self.coupled else value

    def state(self, sites: Tensor) -> _State:
        """Return where the problems stand."""
        linear, precision = sites
        update = Update.of(self.C, precision)
        h, v = update.shift(update.residual(linear)), update.variance()
        pushed = 0.5 * linear * h - 0.5 * precision * (v + h.square())
        kl = pushed.sum(-1) + 0.5 * update.logdet
        m, v = (self.mean + h).expand(linear.shape), v.expand(linear.shape)
        if self.coupled:
            m, v = m.movedim(0, -2), v.movedim(0, -2)
        value, alpha, beta = self.likelihood.expected_log_prob(self.y, m, v, **self.side)
        if self.coupled:
            alpha, beta = alpha.movedim(-2, 0), beta.movedim(-2, 0)
        proper = self.over_latents((~update.proper).to(kl)) == 0
        return _State(value.sum(-1) - self.over_latents(kl), proper, torch.stack([alpha + beta * h, beta]))

    def image(self, sites: Tensor, mean: Tensor, C: Tensor, y: Tensor) -> Tensor:
        """Return the same target as a differentiable function."""
        linear, precision = sites
        update = Update.of(C, precision)
        h = update.shift(update.residual(linear))
        alpha, beta = _push(self.likelihood, y, mean + h, update.variance().expand(linear.shape), self.side)
        return torch.stack([alpha + beta * h, beta])


def _converge(problem: _Problem) -> Tensor:
    """Return the sites to which natural-gradient steps lead, each problem with a step size of its own."""
    resolution = problem.likelihood.resolution
    tolerance = max(_TOLERANCE, 1e-2 * resolution)
    sites = problem.no_sites()
    if sites.numel() == 0:
        return sites
    state, step = problem.state(sites), torch.ones(())
    for _ in range(_STEPS):
        gap = _largest(problem, state.target - sites) / (1.0 + _largest(problem, state.target))
        step = step.to(gap).expand_as(gap)
        if not bool(((gap > tolerance) & (step > _SMALLEST_STEP)).any()):
            break
        trial = torch.lerp(sites, state.target, step.unsqueeze(-1))
        reached = problem.state(trial)
        slack = _SLACK * state.value.abs().clamp_min(1.0) + resolution * sites.shape[-1]
        better = reached.proper & (reached.value >= state.value - slack)  # False for NaN
        sites = torch.where(better.unsqueeze(-1), trial, sites)
        target = torch.where(better.unsqueeze(-1), reached.target, state.target)
        state = _State(torch.where(better, reached.value, state.value), state.proper, target)
        step = torch.where(better, (1.5 * step).clamp_max(1.0), 0.5 * step)
    if bool((gap > _FAR).any()):
        warnings.warn("sites of new observations did not converge; treat their effect with care.", stacklevel=3)
    return sites


def _largest(problem: _Problem, sites: Tensor) -> Tensor:
    """Return the largest entry of λ in absolute value, one number for each problem."""
    largest = sites.abs().amax((0, -1))
    return largest.amax(0) if problem.coupled else largest


def _differentiable(problem: _Problem, sites: Tensor) -> Tensor:
    """Return the fixed point with its derivative in m, C and y."""
    image = problem.image(sites, problem.mean, problem.C, problem.y)
    with torch.enable_grad():
        start = sites.clone().requires_grad_()
        inner = problem.image(start, *(each.detach() for each in (problem.mean, problem.C, problem.y)))

    def solve(grad: Tensor) -> Tensor:
        """Return (I − ∂F/∂λ)⁻ᵀ grad by the iteration that found the fixed point, transposed."""
        found, step, before = grad, 1.0, float("inf")
        for _ in range(_STEPS):
            (pulled,) = torch.autograd.grad(inner, start, found, retain_graph=True)
            change = grad + pulled - found
            size = float(change.abs().max())
            if size <= _TOLERANCE * (1.0 + float(found.abs().max())):
                break
            step = 0.5 * step if size > before else step
            found, before = found + step * change, size
        return found

    image.register_hook(solve)  # type: ignore[no-untyped-call]
    return sites + (image - image.detach())


def _push(likelihood: Any, y: Tensor, m: Tensor, v: Tensor, side: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return α and β of `Likelihood.expected_log_prob`, (*b, *t, Q), as differentiable functions of y, m and v."""
    if likelihood.n_latents > 1:
        m, v = m.movedim(0, -2), v.movedim(0, -2)
        observed = ~torch.isnan(y)
        hot = one_hot(torch.where(observed, y, 0.0).long(), likelihood.n_latents).movedim(-1, -2)
        alpha = torch.where(observed.unsqueeze(-2), hot - likelihood.predictive(m, v).probs.mT, 0.0)
        beta = likelihood.coupling(y, m, v, **side).diagonal(dim1=-2, dim2=-1).mT
        return alpha.movedim(-2, 0), beta.movedim(-2, 0)
    nodes, weight = gauss_hermite(getattr(likelihood, "n_nodes", _NODES), m)
    wide = v > torch.finfo(v.dtype).eps ** 0.5
    spread = torch.where(wide, v, torch.finfo(v.dtype).eps).sqrt()
    f = m.unsqueeze(-1) + spread.unsqueeze(-1) * nodes
    side = {name: value.unsqueeze(-1) for name, value in side.items()}
    slopes = likelihood.log_prob_derivatives(y.unsqueeze(-1), f, **side)
    # the derivative of the rule itself where that divides no rounding errors, as in `mercer.likelihoods.quadrature`
    beta = torch.where(wide, -(slopes.d1 @ (nodes * weight)) / spread, -(slopes.d2 @ weight))
    return slopes.d1 @ weight, beta
