"""Sites that many rows share: what data say of the values u at inducing points, as two numbers per pair of them.

t(u) = exp(νᵀu − ½ uᵀN u) stands for any number of rows. Such sites add, subtract and scale like the log densities
that they are, and move to other inducing points by projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mercer.families.base import Prior
from mercer.kernels.evaluate import diag, gram
from mercer.linalg.cholesky import NotPositiveDefiniteError, cholesky
from mercer.policy import NumericalPolicy

# variance that inducing values have of their own beside the prior's, relative to it: they are f(Z) to rounding
_JITTER = {torch.float64: 1e-10, torch.float32: 1e-6}


@dataclass(frozen=True)
class TiedSites:
    """t(u) = exp(νᵀu − ½ uᵀN u) in natural parameters of u = g(Z): posterior minus prior.

    Parameters
    ----------
    linear : (*b, m)
        ν = Σ aᵢ λ1ᵢ with aᵢ = K_uu⁻¹ k(Z, xᵢ), in units of 1/f.
    precision : (*b, m, m)
        N = Σ λ2ᵢ aᵢ aᵢᵀ, in units of 1/f²; may have fewer batch dimensions.

    References
    ----------
    Adam, Chang, Khan and Solin (2021); of the forms of dual parameters this one stays tight as hyperparameters move.
    """

    linear: Tensor
    precision: Tensor

    @classmethod
    def none(cls, Z: Tensor, batch: tuple[int, ...] = ()) -> TiedSites:
        """Return sites at Z (m, d) that say nothing."""
        return cls(Z.new_zeros(*batch, len(Z)), Z.new_zeros(*batch, len(Z), len(Z)))

    def __add__(self, other: TiedSites) -> TiedSites:
        return TiedSites(self.linear + other.linear, self.precision + other.precision)

    def __sub__(self, other: TiedSites) -> TiedSites:
        return TiedSites(self.linear - other.linear, self.precision - other.precision)

    def scale(self, factor: float | Tensor) -> TiedSites:
        """Return the sites to the power ``factor``, a number or one per batch element, (*b,)."""
        factor = torch.as_tensor(factor, dtype=self.linear.dtype, device=self.linear.device)
        return TiedSites(factor.unsqueeze(-1) * self.linear, factor[..., None, None] * self.precision)

    def project(self, move: Projection) -> TiedSites:
        """Return what the sites say of other inducing values: E_{p(u|u')}[log t(u)] but for `loss`."""
        P = move.matrix
        linear = (P.mT @ self.linear.unsqueeze(-1)).squeeze(-1)
        precision = P.mT @ self.precision @ P
        return TiedSites(linear, 0.5 * (precision + precision.mT))

    def loss(self, move: Projection) -> Tensor:
        """Return the nats that `project` loses, Δ = ½ tr(N (K_uu − P K_u'u)) ≥ 0, (*b,)."""
        return 0.5 * (self.precision * move.gap).sum((-2, -1))


@dataclass(frozen=True)
class GaussianStatistics:
    """What rows with Gaussian noise of one unknown variance σ² say of u: their sites are ``sums``/σ², whatever σ² is.

    Parameters
    ----------
    sums : TiedSites
        Σ wᵢ aᵢ yᵢ and Σ wᵢ aᵢ aᵢᵀ of centred targets.
    count : (*b,)
        Σ wᵢ.
    squares : (*b,)
        Σ wᵢ yᵢ², in units of y².
    residual : (*b,)
        Σ wᵢ (kᵢᵢ − qᵢᵢ), prior variance that the inducing points did not explain when rows came in, or when they moved.
    """

    sums: TiedSites
    count: Tensor
    squares: Tensor
    residual: Tensor

    @classmethod
    def none(cls, Z: Tensor, batch: tuple[int, ...] = ()) -> GaussianStatistics:
        """Return the statistics of no rows at Z (m, d)."""
        zero = Z.new_zeros(batch)
        return cls(TiedSites.none(Z, batch), zero, zero, zero)

    def __add__(self, other: GaussianStatistics) -> GaussianStatistics:
        return self._map(other, torch.add, self.sums + other.sums)

    def __sub__(self, other: GaussianStatistics) -> GaussianStatistics:
        return self._map(other, torch.sub, self.sums - other.sums)

    def _map(self, other: GaussianStatistics, operation: Any, sums: TiedSites) -> GaussianStatistics:
        mine, its = (self.count, self.squares, self.residual), (other.count, other.squares, other.residual)
        return GaussianStatistics(sums, *map(operation, mine, its))

    def scale(self, factor: float | Tensor) -> GaussianStatistics:
        """Return the statistics with all weights times ``factor``, a number or one per batch element, (*b,)."""
        rest = (factor * self.count, factor * self.squares, factor * self.residual)
        return GaussianStatistics(self.sums.scale(factor), *rest)

    def project(self, move: Projection) -> GaussianStatistics:
        """Return the statistics at other inducing points; what they do not explain goes to the residual."""
        residual = self.residual + 2.0 * self.sums.loss(move)
        return GaussianStatistics(self.sums.project(move), self.count, self.squares, residual)

    def tied(self, noise_variance: Tensor) -> TiedSites:
        """Return the sites at noise variance σ² (*b,); differentiable in it."""
        return self.sums.scale(noise_variance.reciprocal())


class Projection:
    """From inducing values u at Z to others u' at Z': E[u | u'] = P u' under the prior.

    Parameters
    ----------
    prior : Prior
    Z, Z_new : (m, d), (m', d)
    policy : NumericalPolicy

    Attributes
    ----------
    matrix : (m, m')
        P = K_uu' K_u'u'⁻¹; no gradients flow.
    gap : (m, m)
        Cov(u | u') = K_uu − P K_u'u, zero where Z is among Z'.
    """

    @torch.no_grad()
    def __init__(self, prior: Prior, Z: Tensor, Z_new: Tensor, policy: NumericalPolicy):
        crossed = gram(prior.kernel, Z, Z_new, policy=policy)
        L, _ = inducing_factor(prior, Z_new, policy)
        W = torch.linalg.solve_triangular(L, crossed.mT, upper=False)
        self.matrix = torch.linalg.solve_triangular(L.mT, W, upper=True).mT
        gap = inducing_covariance(prior, Z, policy) - W.mT @ W
        # an inducing value is f(z) and a rounding of its own, which it keeps where z stays
        same = (Z.unsqueeze(-2) == Z_new.unsqueeze(-3)).all(-1)
        kept = same.any(-1)
        self.matrix[..., kept, :] = same[kept].to(crossed)
        gap.masked_fill_(kept.unsqueeze(-1) | kept, 0.0)
        self.gap = gap


def own_variance(prior: Prior, Z: Tensor) -> Tensor:
    """Return the variance that inducing values at Z have beside the prior's, (m,)."""
    return _JITTER[Z.dtype] * diag(prior.kernel, Z)


def inducing_covariance(prior: Prior, Z: Tensor, policy: NumericalPolicy) -> Tensor:
    """Return K_uu, (m, m), the same wherever inducing values are spoken of; differentiable."""
    return gram(prior.kernel, Z, policy=policy) + torch.diag_embed(own_variance(prior, Z))


def inducing_factor(prior: Prior, Z: Tensor, policy: NumericalPolicy) -> tuple[Tensor, float]:
    """Return L with L Lᵀ = K_uu, differentiable, and the relative jitter that it needed beyond `own_variance`."""
    K = inducing_covariance(prior, Z, policy)
    found, info = torch.linalg.cholesky_ex(K)
    if not bool(info.any()):
        return found, 0.0
    name = "covariance matrix of the inducing points"
    jitter = cholesky(K, policy, name).stats["jitter"]
    # of the mean, as the ladder has it: a place may have no variance at all
    size = K.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    found, info = torch.linalg.cholesky_ex(K + jitter * torch.diag_embed(size.expand(K.shape[:-1])))
    if bool(info.any()):
        raise NotPositiveDefiniteError(f"The {name} is singular to rounding at relative jitter {jitter:g}.")
    return found, jitter
