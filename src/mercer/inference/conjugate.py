"""The conjugate engine: a Gaussian likelihood is its own site, one step is exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from mercer._typing import Data, Info, Sites
from mercer.inference.base import State
from mercer.inference.objective import conjugate_evidence

if TYPE_CHECKING:
    from mercer.model import Model


@dataclass(frozen=True)
class Conjugate:
    """Closed-form inference for a Gaussian likelihood; the objective is the exact log evidence."""

    name: ClassVar[str] = "conjugate"
    evidence: ClassVar[str] = "exact"

    def init(self, model: Model, plan: Any, data: Data, sites: Sites | None = None) -> State:
        """Condition on λ = (w (y − μ)/σ², w/σ²)."""
        sites = self.sites(model, data)
        return State(sites, model.family.condition(model.prior, plan, sites), float("nan"))

    def step(self, model: Model, plan: Any, state: State, data: Data) -> tuple[State, Info]:
        """Do nothing: the starting sites are exact."""
        return state, {"converged": True, "change": 0.0}

    def objective(self, model: Model, plan: Any, state: State, data: Data) -> Tensor:
        """Return log p(y | θ) in nats, differentiable in kernel, mean and noise."""
        posterior = state.posterior
        if torch.is_grad_enabled():
            posterior = model.family.condition(model.prior, plan, self.sites(model, data))
        return conjugate_evidence(model, posterior, data)

    @staticmethod
    def sites(model: Model, data: Data) -> Sites:
        """Return the sites of the likelihood, differentiable in mean and noise."""
        centred = data.y - model.prior.mean_at(data.X)
        likelihood: Any = model.likelihood  # resolve made sure that it is Gaussian
        return likelihood.sites(centred, data.weight, **data.side)
