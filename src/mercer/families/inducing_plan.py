"""What is planned for inducing points: rows, places, and sites of other rows that are known already."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mercer._typing import Hyperparameter
from mercer.families.tied import TiedSites
from mercer.policy import NumericalPolicy

_SHARE = 0.8


@dataclass(frozen=True)
class InducingPlan:
    """Rows, inducing points, and what is known already.

    Parameters
    ----------
    X, Z : (n, d), (m, d)
    policy : NumericalPolicy
    learned : bool
        Whether Z is a parameter.
    rest : TiedSites, optional
        Sites of other rows: they are part of the posterior, and no data of it.
    """

    X: Tensor
    Z: Tensor
    policy: NumericalPolicy
    learned: bool = False
    rest: TiedSites | None = None

    def __post_init__(self) -> None:
        if self.learned and not isinstance(self.Z, torch.nn.Parameter):
            object.__setattr__(self, "Z", torch.nn.Parameter(self.Z.detach().clone()))

    def over(self, X: Tensor, policy: NumericalPolicy) -> InducingPlan:
        """Return the plan with the same inducing points for other rows X (n', d), or those in another precision."""
        return replace(self, X=X, Z=self.Z.detach().to(X), policy=policy)

    def given(self, rest: TiedSites | None) -> InducingPlan:
        """Return the plan with other ``rest``."""
        return replace(self, rest=rest)

    def learnable(self) -> list[Hyperparameter]:
        """Return the inducing points as coordinates to be learned, if they are."""
        if not self.learned:
            return []
        parameter: Any = self.Z
        # a point of m is responsible for one of m parts of the data, in which it may move about
        spacing = _SHARE * len(parameter) ** 0.5 * self._apart()
        return [Hyperparameter("Z", parameter, _identity, _identity, -math.inf, math.inf, False, scale=spacing)]

    @torch.no_grad()
    def _apart(self) -> Tensor:
        """Return how far inducing points are from their neighbours in each column, (d,), units of X, on the CPU."""
        spread = self.X.double().std(0).cpu()
        units = torch.where(spread > 0, spread, torch.ones_like(spread))
        points = self.Z.detach().double().cpu() / units
        nearest = torch.cdist(points, points).fill_diagonal_(math.inf).amin(-1)
        apart = nearest[nearest.isfinite() & (nearest > 0)]
        typical = apart.log().mean().exp() if len(apart) else torch.ones((), dtype=torch.float64)
        return units * typical / len(units) ** 0.5


def _identity(value: Tensor) -> Tensor:
    return value
