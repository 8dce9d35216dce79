"""q(u) while rows come by: a sum in the coordinates L⁻¹u that batches change, and what a batch sees of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mercer._typing import Data, Sites
from mercer.families.inducing_plan import InducingPlan
from mercer.families.moments import moments_of
from mercer.families.tied import TiedSites, inducing_factor
from mercer.kernels.evaluate import diag, gram

if TYPE_CHECKING:
    from mercer.model import Model


@dataclass(frozen=True)
class WhitenedSum:
    """q in the coordinates L⁻¹u: precision B = I + Σ λ2ᵢ wᵢ wᵢᵀ = ``root`` ``root``ᵀ and ``pull`` Σ λ1ᵢ wᵢ.

    Shapes (*b, m, m) and (*b, m), with wᵢ = L⁻¹ k(Z, xᵢ).
    """

    pull: Tensor
    precision: Tensor
    root: Tensor

    @classmethod
    def of(cls, pull: Tensor, precision: Tensor) -> WhitenedSum:
        """Factor; where that fails the numbers mean nothing, and `where_proper` says so."""
        return cls(pull, precision, torch.linalg.cholesky_ex(precision)[0])

    @classmethod
    def of_tied(cls, L: Tensor, batch: tuple[int, ...], tied: TiedSites | None) -> WhitenedSum:
        """Return the sum that tied sites stand for, by default none, for latents of shape ``batch``."""
        m = L.shape[-1]
        eye = torch.eye(m).to(L)
        if tied is None:
            return cls.of(L.new_zeros(*batch, m), eye.expand(*batch, m, m))
        precision = L.mT @ tied.precision.to(L) @ L
        pull = (L.mT @ tied.linear.to(L).unsqueeze(-1)).squeeze(-1)
        return cls.of(pull, (eye + 0.5 * (precision + precision.mT)).expand(*batch, m, m))

    @property
    def mean(self) -> Tensor:
        """Mean of L⁻¹u, (*b, m)."""
        return torch.cholesky_solve(self.pull.unsqueeze(-1), self.root).squeeze(-1)

    def where_proper(self, before: WhitenedSum) -> tuple[WhitenedSum, Tensor]:
        """Return this one where it is finite and proper, ``before`` elsewhere, and where that was, (*b,).

        Decided on the device: a host that waited for each batch would cost a GPU more than the batch.
        """
        diagonal = self.root.diagonal(dim1=-2, dim2=-1)
        proper = (diagonal.isfinite() & (diagonal > 0) & self.pull.isfinite()).all(-1)
        one, two = proper.unsqueeze(-1), proper[..., None, None]
        kept = WhitenedSum(
            torch.where(one, self.pull, before.pull),
            torch.where(two, self.precision, before.precision),
            torch.where(two, self.root, before.root),
        )
        return kept, proper


@dataclass(frozen=True)
class Seen:
    """Rows of a batch under q, as `mercer.inference.target` reads a posterior.

    ``W`` (m, |b|) is L⁻¹ k(Z, X); ``mean_at_data`` and ``variance_at_data`` (*b, |b|) are those of g = f − μ, of which
    variance u leaves ``left`` (|b|,).
    """

    W: Tensor
    q: WhitenedSum
    sites: Sites
    mean_at_data: Tensor
    variance_at_data: Tensor
    left: Tensor

    @classmethod
    def of(cls, model: Model, q: WhitenedSum, X: Tensor, W: Tensor, sites: Sites) -> Seen:
        """Return the rows X (|b|, d) with their sites (*b, |b|)."""
        V = torch.linalg.solve_triangular(q.root, W, upper=False)
        left = (diag(model.prior.kernel, X) - W.square().sum(-2)).clamp_min(0.0)
        return cls(W, q, sites, _pull(q.mean, W), left + V.square().sum(-2), left)

    def bound(self, data_term: Tensor) -> Tensor:
        """Return Σ_b w E_q[log p(y|f)] + E_q[log t of all other rows] − KL[q ‖ p], in nats but for a constant.

        ``data_term`` is the first of these, a scalar. With all other sites as they are, this is what a batch can raise.
        """
        sites, m, q = self.sites, self.mean_at_data, self.q
        second = self.variance_at_data - self.left + m.square()
        own = (sites.linear * m - 0.5 * sites.precision * second).sum()
        log_z = 0.5 * (q.pull * q.mean).sum() - q.root.diagonal(dim1=-2, dim2=-1).log().sum()
        return data_term - own + log_z

    def covariance_product(self, vectors: Tensor) -> Tensor:
        """Return the covariance of the wᵢᵀL⁻¹u, the part of g that sites act on, times vectors (*b, |b|)."""
        pulled = self.W @ vectors.unsqueeze(-1)
        return _pull(torch.cholesky_solve(pulled, self.q.root).squeeze(-1), self.W)


class Whites:
    """L⁻¹ k(Z, X) of slices of rows, kept for the next epoch where all of them fit in one temporary."""

    def __init__(self, model: Model, plan: InducingPlan, X: Tensor):
        self.model, self.plan, self.X = model, plan, X
        self.L, _ = inducing_factor(model.prior, plan.Z, model.policy)
        self._keep = len(X) * len(plan.Z) <= model.policy.chunk_elements
        self._kept: dict[int, Tensor] = {}

    def __getitem__(self, rows: slice) -> Tensor:
        found = self._kept.get(rows.start)
        if found is None:
            found = whitened(self.model, self.L, self.plan.Z, self.X[rows])
            if self._keep:
                self._kept[rows.start] = found
        return found

    def sum(self, batches: list[slice], sites: Sites) -> WhitenedSum:
        """Return q under sites (*b, n), summed anew."""
        start = WhitenedSum.of_tied(self.L, tuple(sites.linear.shape[:-1]), None)
        pull, precision = start.pull, start.precision
        for rows in batches:
            some = (sites.linear[..., rows], sites.precision[..., rows])
            more, weighted = moments_of(self[rows], *some, self.model.policy)
            pull, precision = pull + more, precision + weighted
        return WhitenedSum.of(pull, precision)


def whitened(model: Model, L: Tensor, Z: Tensor, X: Tensor) -> Tensor:
    """Return L⁻¹ k(Z, X), (m, q)."""
    return torch.linalg.solve_triangular(L, gram(model.prior.kernel, Z, X, policy=model.policy), upper=False)


def some_rows(data: Data, rows: slice) -> Data:
    """Return consecutive rows, without copying them."""
    side = {name: value[..., rows] for name, value in data.side.items()}
    return Data(data.X[rows], data.y[..., rows], data.weight[rows], side)


def _pull(weights: Tensor, values: Tensor) -> Tensor:
    """Return weightsᵀ values, (*b, q), for weights (*b, m) and values (*k, m, q)."""
    return (weights.unsqueeze(-2) @ values).squeeze(-2)
