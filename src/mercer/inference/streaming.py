"""Engines that go on from rows which are gone: what those said is held by sites tied at the inducing points.

The objective is J = Σ_rows w E_q[log p(y|f)] + E_q[log t_past(u)] − KL[q(u) ‖ p(u)]: rows at hand by their likelihood,
all others by their sites, nothing twice. With sites that do not change this is the usual bound under the prior
p(u) t_past(u), so that other engines than the conjugate one need nothing but the family's plan. There the noise
variance is learned too, and what past rows say changes with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from mercer._typing import Data, Info, Sites
from mercer.families.moments import tied_from_white, whitened_moments
from mercer.families.tied import GaussianStatistics, inducing_factor
from mercer.inference.base import State
from mercer.inference.conjugate import Conjugate
from mercer.inference.objective import conjugate_evidence
from mercer.kernels.evaluate import diag, gram

if TYPE_CHECKING:
    from mercer.model import Model


@dataclass(frozen=True)
class Unexplained:
    """How the prior variance that u leaves of past rows changes with hyperparameters, told from a sample of them.

    Without it that variance, a part of what the noise has to account for, would be for ever what it was when rows came
    in, and the noise variance of a stream that has learned since would be too large.

    Parameters
    ----------
    Z : (m, d)
        Inducing points at which the past is known; what further ones explain of past rows was not kept.
    rows : (M, d)
    weight : (M,)
        One over the probability that a row is in the sample.
    before : () tensor
        Σ weight · variance at the hyperparameters where the past was last accounted for.
    """

    Z: Tensor
    rows: Tensor
    weight: Tensor
    before: Tensor

    @classmethod
    def at(cls, model: Model, Z: Tensor, rows: Tensor, weight: Tensor) -> Unexplained | None:
        """Return it for the model's present hyperparameters; None where nothing is left unexplained."""
        with torch.no_grad():
            before = cls(Z, rows, weight, Z.new_ones(())).sum(model)
        return cls(Z, rows, weight, before) if float(before) > 0 else None

    def sum(self, model: Model) -> Tensor:
        """Return Σ weight · Var(f | u) at the model's hyperparameters, differentiable."""
        kernel = model.prior.kernel
        L, _ = inducing_factor(model.prior, self.Z, model.policy)
        W = torch.linalg.solve_triangular(L, gram(kernel, self.Z, self.rows, policy=model.policy), upper=False)
        return (self.weight * (diag(kernel, self.rows) - W.square().sum(-2)).clamp_min(0.0)).sum()

    def ratio(self, model: Model) -> Tensor:
        """Return how many times the variance is what it was before."""
        return self.sum(model) / self.before


@dataclass(frozen=True)
class ConjugateStream:
    """Closed-form inference for Gaussian noise of one variance, given the statistics of past rows.

    Parameters
    ----------
    past : GaussianStatistics
        At the plan's inducing points.
    unexplained : Unexplained, optional
        Makes ``past.residual`` a function of the hyperparameters.
    offset : float
        Nats that the past rows' densities have beside those in model units, where y has other units for the user.

    References
    ----------
    Bui, Nguyen and Turner (2017), "Streaming sparse Gaussian process approximations", for a past that is all there is.
    """

    past: GaussianStatistics
    unexplained: Unexplained | None = None
    offset: float = 0.0
    name: ClassVar[str] = "conjugate"
    evidence: ClassVar[str] = "exact"

    def init(self, model: Model, plan: Any, data: Data, sites: Sites | None = None) -> State:
        """Condition on the rows and on the past at the present noise variance."""
        sites = Conjugate.sites(model, data)
        given = plan.given(self.past.tied(noise_variance(model, self.past.count)))
        return State(sites, model.family.condition(model.prior, given, sites), float("nan"))

    def step(self, model: Model, plan: Any, state: State, data: Data) -> tuple[State, Info]:
        """Do nothing: the starting sites are exact."""
        return state, {"converged": True, "change": 0.0}

    def objective(self, model: Model, plan: Any, state: State, data: Data) -> Tensor:
        """Return J, in nats, differentiable in kernel and noise: Titsias's bound for all rows if u never moved."""
        past = self.past
        posterior = self.init(model, plan, data).posterior if torch.is_grad_enabled() else state.posterior
        noise = noise_variance(model, past.count)
        residual = past.residual
        if self.unexplained is not None:
            residual = residual * self.unexplained.ratio(model)
        scale = -0.5 * past.count * (2 * math.pi * noise).log() - 0.5 * (past.squares + residual) / noise
        return conjugate_evidence(model, posterior, data) + scale.sum() + self.offset


def noise_variance(model: Model, like: Tensor) -> Tensor:
    """Return the noise variance of each output, in the shape (*b,) of ``like``."""
    value = model.likelihood.value_of("noise_variance", like)
    return value.expand(like.shape) if value.numel() == 1 else value.reshape(like.shape)


@torch.no_grad()
def gaussian_statistics(model: Model, Z: Tensor, L: Tensor, data: Data) -> GaussianStatistics:
    """Return the statistics of rows whose noise has one variance.

    Parameters
    ----------
    model : Model
    Z, L : (m, d), (m, m)
        Inducing points and the Cholesky factor of their covariance.
    data : Data
    """
    kernel, policy = model.prior.kernel, model.policy
    centred = data.y - model.prior.mean_at(data.X)
    seen = ~centred.isnan()
    weight = data.weight * seen
    target = torch.where(seen, centred, 0.0)
    pull, products = whitened_moments(kernel, data.X, Z, L, weight * target, weight, policy)
    unexplained = (weight * diag(kernel, data.X)).sum(-1) - products.diagonal(dim1=-2, dim2=-1).sum(-1)
    sums = tied_from_white(L, pull, products)
    return GaussianStatistics(sums, weight.sum(-1), (weight * target.square()).sum(-1), unexplained.clamp_min(0.0))
