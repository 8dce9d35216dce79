"""What inducing points leave over: the residual covariance, and the order and neighbours of rows under it.

The prior is f = μ + Φ u + r: u ~ N(0, I) of M inducing points Z, Φ = K_·Z L⁻ᵀ with L Lᵀ = K_ZZ, and a residual r of
covariance R = K − Φ Φᵀ. Few neighbours say little in many dimensions, where smooth functions are however nearly of low
rank. Φ u has that part exactly; only r, which is correlated over less, is left to the neighbours.

Gyger, Furrer and Sigrist (2025), "Vecchia-inducing-points full-scale approximations for Gaussian processes",
arXiv 2507.05064.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mercer.families.base import Prior
from mercer.families.nearness import Nearness
from mercer.families.sic_plan import Nugget, SicPlan, spread_in_lengthscales
from mercer.geometry.inducing import choose_inducing
from mercer.kernels import Kernel
from mercer.kernels.evaluate import diag, gram, scaled_inputs
from mercer.linalg.cholesky import NotPositiveDefiniteError
from mercer.linalg.sic import Pattern
from mercer.policy import NumericalPolicy

_MOST_PAIRS = 20_000  # rows whose n² residual correlations are worth looking at
_CANDIDATES = 4  # beyond, so many times m rows that are near under the kernel are ranked by them


@dataclass(frozen=True)
class Points:
    """Rows X (*b, n, d) with their low-rank features Φ (*b, n, M)."""

    X: Tensor
    features: Tensor

    def __getitem__(self, index: Any) -> Points:
        return Points(self.X[index], self.features[index])


class Residual:
    """The covariance R = K − Φ Φᵀ, with gradients in the hyperparameters.

    Parameters
    ----------
    kernel : gpytorch Kernel
    Z : (M, d)
        Inducing points; none leave R = K.
    policy : NumericalPolicy

    Notes
    -----
    K_ZZ always has a jitter of √ε times its mean diagonal. Φ Φᵀ + R is K whatever the jitter; the jitter keeps R
    further from indefinite than the rounding of Φ, ε cond(L), could make it.
    """

    def __init__(self, kernel: Kernel, Z: Tensor, policy: NumericalPolicy):
        self.kernel, self.Z, self.policy = kernel, Z, policy
        self.jitter = math.sqrt(torch.finfo(Z.dtype).eps)
        if len(Z) == 0:
            return
        K = gram(kernel, Z, policy=policy)
        self.L, info = torch.linalg.cholesky_ex(K + self.jitter * K.diagonal().mean() * torch.eye(len(Z)).to(K))
        if bool(info):
            raise NotPositiveDefiniteError("The covariance of the inducing points is not positive definite.")

    def detached(self) -> Residual:
        """Return the same without what only gradients in the hyperparameters need."""
        other = copy.copy(self)
        if len(self.Z):
            other.L = self.L.detach()
        return other

    def points(self, X: Tensor) -> Points:
        """Return the rows X (n, d) with Φ."""
        if len(self.Z) == 0:
            return Points(X, X.new_zeros(len(X), 0))
        cross = gram(self.kernel, self.Z, X, policy=self.policy)
        return Points(X, torch.linalg.solve_triangular(self.L, cross, upper=False).mT)

    def between(self, A: Points, B: Points | None = None) -> Tensor:
        """Return R of A (*b, a) and B (*b, c), or of A alone: (*b, a, c)."""
        K = gram(self.kernel, A.X, None if B is None else B.X, policy=self.policy)
        return K - A.features @ (A if B is None else B).features.mT

    def variance(self, A: Points) -> Tensor:
        """Return the diagonal of R, (*b, a)."""
        return (diag(self.kernel, A.X) - A.features.square().sum(-1)).clamp_min(0.0)

    @torch.no_grad()
    def squared(self, A: Points, B: Points) -> Tensor:
        """Return the squared distance 1 − |ρ|, ρ the correlation under R, (*b, a, c)."""
        # at an inducing point nothing is left but jitter and rounding, which is correlated with nothing
        floors = [10 * self.jitter * diag(self.kernel, each.X) for each in (A, B)]
        a, b = (torch.maximum(self.variance(each), floor) for each, floor in zip((A, B), floors, strict=True))
        scale = (a.unsqueeze(-1) * b.unsqueeze(-2)).clamp_min(torch.finfo(a.dtype).tiny).rsqrt()
        return (1.0 - (self.between(A, B) * scale).abs()).clamp_min(0.0)

    @torch.no_grad()
    def nearest(
        self, new: Points, data: Points | None, m: int, candidates: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the m rows of ``data`` nearest to each row of ``new``, and their squared distances, nearest first.

        Parameters
        ----------
        new : (q, d) Points
        data : (n, d) Points or None
            None for the *earlier* rows of ``new``.
        m : int
        candidates : (q, c) int array, optional
            Look at these rows only, −1 for none.

        Returns
        -------
        index, squared : (q, min(m, n))
            −1 and ∞ where there are fewer.
        """
        others = new if data is None else data
        own = torch.arange(len(new.X), device=new.X.device)
        width = len(others.X) if candidates is None else candidates.shape[-1]
        rank = 0 if candidates is None else len(self.Z)
        found, squared = [], []
        for rows in own.split(self.policy.chunk_rows(width * (3 + rank))):
            if candidates is None:
                index = torch.arange(width, device=own.device).expand(len(rows), -1)
                away = self.squared(new[rows], others)
            else:
                index = torch.as_tensor(candidates[rows.cpu().numpy()], device=own.device)
                away = self.squared(new[rows.unsqueeze(-1)], others[index.clamp_min(0)]).squeeze(-2)
                away = away.masked_fill(index < 0, torch.inf)
            if data is None:
                away = away.masked_fill(index >= rows.unsqueeze(-1), torch.inf)
            values, places = away.topk(min(m, width), dim=-1, largest=False)
            found.append(index.gather(-1, places).masked_fill(values.isinf(), -1))
            squared.append(values)
        return torch.cat(found), torch.cat(squared)


@dataclass(frozen=True)
class HybridPlan(SicPlan):
    """Inducing points ``Z`` (M, d), with order and neighbours as in `SicPlan`, found without gradients."""

    Z: Tensor = field(kw_only=True)

    @torch.no_grad()
    def nearest(
        self, residual: Residual, nearness: Nearness, new: Points, data: Points, m: int
    ) -> tuple[Tensor, Tensor]:
        """Return the m planned rows nearest to new rows, as `Residual.nearest` does; candidates first where many.

        ``nearness`` is one for the planned rows, which can be kept from one call to the next.
        """
        candidates = None
        if len(self.X) > _MOST_PAIRS:
            candidates, _ = nearness.nearest(self.X, new.X.detach(), _CANDIDATES * m)
        return residual.nearest(new, data, m, candidates)


@torch.no_grad()
def plan_hybrid(
    prior: Prior,
    X: Tensor,
    policy: NumericalPolicy,
    n_inducing: int = 200,
    n_neighbors: int = 30,
    Z: Tensor | None = None,
    seed: int = 0,
) -> HybridPlan:
    """Choose inducing points, order the rows of X, and give each row its neighbours among those before it.

    Parameters
    ----------
    prior : Prior
    X : (n, d)
    policy : NumericalPolicy
    n_inducing : int ≥ 0
        M, at most; by k-means of the inputs over lengthscales.
    n_neighbors : int ≥ 1
        m earlier rows that are most correlated in the residual.
    Z : (M, d), optional
        Inducing points to take instead.
    seed : int
        Of k-means.

    Returns
    -------
    HybridPlan

    Notes
    -----
    O(n² M) operations for neighbours of up to 20 000 rows; beyond, 4 m candidates of each row are looked at, which
    the notes say.
    """
    if n_neighbors < 1:
        raise ValueError(f"n_neighbors must be at least 1, got {n_neighbors}.")
    if prior.kernel.batch_shape:
        raise ValueError(
            f"kernel has a batch shape {tuple(prior.kernel.batch_shape)}, and rows can have one set of neighbours "
            "only; use family='exact', or one estimator for each kernel."
        )
    if Z is None:
        Z = _inducing(prior.kernel, X, n_inducing, seed)
    nearness, residual = Nearness(prior.kernel, X, policy), Residual(prior.kernel, Z, policy)
    order, distance = (torch.as_tensor(each, device=X.device) for each in nearness.maximin(X, lengths=False))
    data = residual.points(X[order])
    m, candidates = min(n_neighbors, max(1, len(X) - 1)), None
    notes = [] if nearness.note is None else [nearness.note]
    if len(X) > _MOST_PAIRS:
        candidates = nearness.nearest_earlier(data.X, _CANDIDATES * m)
        notes.append(
            f"{len(X)} rows are too many for all residual correlations: neighbours are the most correlated of the "
            f"{_CANDIDATES * m} rows that are nearest under the kernel"
        )
    found, _ = residual.nearest(data, None, m, candidates)
    scale, nugget = spread_in_lengthscales(prior, X), Nugget(X.dtype)
    return HybridPlan(order, data.X, Pattern(found), distance, policy, scale, tuple(notes), nugget=nugget, Z=Z)


def _inducing(kernel: Kernel, X: Tensor, n_inducing: int, seed: int) -> Tensor:
    scaled = scaled_inputs(kernel, X)
    coordinates = None if scaled is None else scaled.double().cpu().numpy()
    # without lengthscales a column may be a label, and only rows of X are sure to be inputs
    method = "kmeans++" if scaled is None else "kmeans"
    return torch.as_tensor(choose_inducing(X.cpu().numpy(), n_inducing, coordinates, method, seed)).to(X)
