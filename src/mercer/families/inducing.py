"""Inducing points: q(f) = ∫ p(f | u) q(u) du, u the values of g at m points Z, for any number of rows.

Sites of the rows act on u through their conditional mean aᵢᵀu; the prior variance that u leaves of a row counts as
Jensen's inequality has it, so that log ∫ p(u) ∏ exp(E_{p(f|u)} log tᵢ) du is a lower bound of the log evidence under
these sites: Titsias's collapsed bound where they are noisy data. All algebra is in the coordinates L⁻¹u, L Lᵀ = K_uu,
in which the posterior precision is B = I + Σ λ2ᵢ wᵢ wᵢᵀ ⪰ I with wᵢ = L⁻¹ k(Z, xᵢ).
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import ClassVar

import torch
from torch import Tensor

from mercer._typing import Sites
from mercer.families.base import Prior
from mercer.families.inducing_plan import InducingPlan
from mercer.families.inducing_posterior import InducingPosterior
from mercer.geometry.inducing import choose_inducing
from mercer.kernels.evaluate import scaled_inputs
from mercer.policy import NumericalPolicy


@dataclass(frozen=True)
class Inducing:
    """Sparse family of inducing points (SGPR, SVGP and t-SVGP in one).

    Parameters
    ----------
    n_inducing : int, default=512
        m, how many inducing points; fewer where there are fewer distinct rows.
    locations : {"learned", "fixed"}, default="learned"
        Whether their places are learned with the hyperparameters, or stay where they were put.
    placement : {"kmeans", "kmeans++"}, default="kmeans"
        Where they are put: means of clusters of rows, or rows far from one another, for inputs whose means say nothing.
    seed : int, default=0
        Of the placement.

    Notes
    -----
    O(n m²) operations for one evidence with its gradient and O(m²) memory beside the data and a few chunks.

    References
    ----------
    Titsias (2009), "Variational learning of inducing variables in sparse Gaussian processes"; Adam, Chang, Khan and
    Solin (2021), "Dual parameterization of sparse variational Gaussian processes".
    """

    n_inducing: int = 512
    locations: str = "learned"
    placement: str = "kmeans"
    seed: int = 0
    name: ClassVar[str] = "inducing"
    sums_over_columns: ClassVar[bool] = False
    stage_growth: ClassVar[int] = 4
    dense: ClassVar[bool] = False
    evidence_of: ClassVar[str] = "lower bound by inducing points"

    def __post_init__(self) -> None:
        if not isinstance(self.n_inducing, Integral) or self.n_inducing < 1:
            raise ValueError(f"n_inducing must be at least 1 and an integer, got {self.n_inducing!r}.")
        if self.locations not in ("learned", "fixed"):
            raise ValueError(f"locations must be 'learned' or 'fixed', got {self.locations!r}.")
        if self.placement not in ("kmeans", "kmeans++"):
            raise ValueError(f"placement must be 'kmeans' or 'kmeans++', got {self.placement!r}.")

    @property
    def stage_rows(self) -> int:
        """Fewest rows that a stage of learning looks at: fewer would each have a point of their own."""
        return 4 * self.n_inducing

    def plan(self, prior: Prior, X: Tensor, policy: NumericalPolicy) -> InducingPlan:
        """Place inducing points among the rows X (n, d), by distances over the prior's present lengthscales."""
        scaled = scaled_inputs(prior.kernel, X)
        coordinates = None if scaled is None else scaled.double().cpu().numpy()
        rows = X.double().cpu().numpy()
        Z = torch.as_tensor(choose_inducing(rows, self.n_inducing, coordinates, self.placement, self.seed)).to(X)
        # every row its own inducing point: there is no better place
        learned = self.locations == "learned" and len(Z) == self.n_inducing < len(X)
        return InducingPlan(X, Z, policy, learned)

    def stale(self, prior: Prior, plan: InducingPlan) -> bool:
        """Return False: learned points move, and fixed ones stay."""
        return False

    def condition(self, prior: Prior, plan: InducingPlan, sites: Sites) -> InducingPosterior:
        """Return the posterior of ``prior`` under ``sites`` at the planned rows and the plan's ``rest``."""
        return InducingPosterior(prior, plan, sites)
