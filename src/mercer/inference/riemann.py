"""Natural-gradient steps that stay inside the cone of precisions, whatever the curvature of the likelihood.

In natural parameters a step is a straight line, N ← N + ρG with G = N̂ − N, and leaves the cone where negative curvature
outweighs the rest. The second-order term of the geodesic makes it

    P ← P + ρG + ½ρ² G P⁻¹ G = ½ [P + (P + ρG) P⁻¹ (P + ρG)] ≻ 0,   P = K⁻¹ + N,

with the same fixed point, where G = 0. It acts on the values u at inducing points and is no sum over rows. Here it is
a factor exp(rᵀu − ½ uᵀR u) of its own beside the sites of the rows, a product of Gaussians around the means that q
had, which later steps let go of: R ← (1−ρ) R + ½ρ² G P⁻¹ G.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mercer._typing import Sites
from mercer.families.inducing_plan import InducingPlan
from mercer.families.inducing_posterior import InducingPosterior
from mercer.families.moments import tied_from_white, whitened_moments
from mercer.families.tied import TiedSites


def second_order(root: Tensor, change: Tensor, step_size: float) -> Tensor:
    """Return ½ρ² G B⁻¹ G, (*b, m, m), for B = ``root`` ``root``ᵀ and G = ``change``.

    References
    ----------
    Lin, Schmidt and Khan (2020), "Handling the positive-definite constraint in the Bayesian learning rule".
    """
    half = torch.linalg.solve_triangular(root, change, upper=False)
    return 0.5 * step_size**2 * (half.mT @ half)


class Geodesic:
    """Steps from a posterior towards target sites, of any size ρ.

    Parameters
    ----------
    posterior : InducingPosterior
        Under its sites and, after such a step, the factor (r, R) beside ``plan.rest``.
    plan : InducingPlan
        Without that factor.
    target : Sites
        (*b, n)
    """

    def __init__(self, posterior: InducingPosterior, plan: InducingPlan, target: Sites):
        self.posterior, self.plan, self.target = posterior, plan, target

    @cached_property
    def _before(self) -> tuple[Tensor, Tensor]:
        """r and R in the coordinates L⁻¹u."""
        return _in_white(self.posterior, damping(self.posterior, self.plan))

    @cached_property
    def _change(self) -> Tensor:
        """G in the coordinates L⁻¹u, one pass over the rows."""
        plan, posterior = self.plan, self.posterior
        gap = self.target.precision - posterior.sites.precision
        nothing = torch.zeros_like(gap)
        L, kernel = posterior.L.detach(), posterior.prior.kernel
        return whitened_moments(kernel, plan.X, plan.Z, L, nothing, gap, plan.policy)[1] - self._before[1]

    @torch.no_grad()
    def step(self, step_size: float) -> InducingPosterior:
        """Return the posterior after a step of size ρ, proper for every ρ but for rounding."""
        posterior, plan, state = self.posterior, self.plan, self.posterior.state
        curved = second_order(state.root, self._change, step_size)
        r, R = self._before
        r = (1 - step_size) * r + (curved @ state.mean.unsqueeze(-1)).squeeze(-1)
        added = tied_from_white(posterior.L.detach(), r, (1 - step_size) * R + curved)
        rest = added if plan.rest is None else plan.rest + added
        sites = posterior.sites.blend(self.target, step_size)
        return InducingPosterior(posterior.prior, plan.given(rest), sites, like=posterior)


def damping(posterior: InducingPosterior, plan: InducingPlan) -> TiedSites | None:
    """Return the factor (r, R) that steps left beside ``plan.rest``; None where there is none."""
    rest = posterior.plan.rest
    if rest is None or rest is plan.rest:
        return None
    return rest if plan.rest is None else rest - plan.rest


def undamped(posterior: InducingPosterior, plan: InducingPlan, sites: Sites) -> InducingPosterior:
    """Return the posterior under other sites and without that factor."""
    return InducingPosterior(posterior.prior, plan, sites, like=posterior)


@torch.no_grad()
def expected_log_damping(posterior: InducingPosterior, plan: InducingPlan) -> Tensor:
    """Return E_q[rᵀu − ½ uᵀR u], a scalar in nats: what a bound that takes the factor for prior has too much."""
    r, R = _in_white(posterior, damping(posterior, plan))
    state = posterior.state
    second = torch.cholesky_solve(R, state.root).diagonal(dim1=-2, dim2=-1).sum(-1)
    second = second + (state.mean * (R @ state.mean.unsqueeze(-1)).squeeze(-1)).sum(-1)
    return ((r * state.mean).sum(-1) - 0.5 * second).sum()


def _in_white(posterior: Any, tied: TiedSites | None) -> tuple[Tensor, Tensor]:
    """Return tied sites in the coordinates L⁻¹u."""
    L, mean = posterior.L.detach(), posterior.state.mean
    if tied is None:
        return torch.zeros_like(mean), torch.zeros_like(posterior.state.root)
    return (L.mT @ tied.linear.unsqueeze(-1)).squeeze(-1), L.mT @ tied.precision @ L
