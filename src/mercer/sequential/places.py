"""Where inducing points are on a stream: old ones stay, new ones are added where rows are not explained."""

from __future__ import annotations

import torch
from torch import Tensor

from mercer.families.base import Prior
from mercer.families.tied import Projection, TiedSites, inducing_factor
from mercer.geometry.greedy import greedy_variance
from mercer.kernels.evaluate import diag, gram
from mercer.policy import NumericalPolicy

_AT_ONCE = 2000  # rows of a batch among which new points are looked for


@torch.no_grad()
def next_inducing(
    prior: Prior,
    Z: Tensor,
    X: Tensor,
    sites: TiedSites,
    *,
    most: int,
    enough: float,
    loss_tol: float,
    policy: NumericalPolicy,
) -> Tensor:
    """Return the inducing points for a stream that brings the rows X.

    Rows whose conditional variance given Z is more than ``enough`` are added greedily. Where there is no room, points
    that cost least make some, as long as no more than ``loss_tol`` nats are lost by it.

    Parameters
    ----------
    prior : Prior
    Z : (m, d)
        Present points; there may be none.
    X : (b, d)
    sites : TiedSites
        What is known at Z.
    most : int
        Never more points than these.
    enough : float
        Variance that may stay unexplained, in units of f²; no less than 1e-8 and no more than half of the prior's.
    loss_tol : float
        Nats, summed over latents.
    policy : NumericalPolicy

    Returns
    -------
    (m', d)
        Kept points first, in their order.

    Notes
    -----
    O((m + b) m²) operations. A superset loses nothing, so that growth is free of error (Chang et al., 2023).
    """
    found = _unexplained(prior, Z, X[:_AT_ONCE], most, enough, policy)
    excess = len(Z) + len(found) - most
    if excess <= 0:
        return torch.cat([Z, found])
    cost = _cost_of_leaving(prior, Z, sites, policy)
    order = cost.argsort()
    # dropping one costs what it says, several cost more than the sum
    n_dropped = min(excess, int((cost[order].cumsum(0) <= loss_tol).sum()))
    while True:
        kept = torch.ones(len(Z), dtype=torch.bool, device=Z.device)
        kept[order[:n_dropped]] = False
        proposed = torch.cat([Z[kept], found[: most - len(Z) + n_dropped]])
        if n_dropped == 0 or float(sites.loss(Projection(prior, Z, proposed, policy)).sum()) <= loss_tol:
            return proposed
        n_dropped //= 2


def _unexplained(prior: Prior, Z: Tensor, X: Tensor, most: int, enough: float, policy: NumericalPolicy) -> Tensor:
    """Return the rows of X that are least explained by Z and by each other, the worst first."""
    variance = diag(prior.kernel, X)
    if len(Z):
        L, _ = inducing_factor(prior, Z, policy)
        W = torch.linalg.solve_triangular(L, gram(prior.kernel, Z, X, policy=policy), upper=False)
    else:
        W = X.new_zeros(1, len(X))
    residual = (variance - W.square().sum(-2)).clamp_min(0.0)
    limit = torch.full_like(variance, enough).clamp(1e-8 * variance, 0.5 * variance)
    wanted = (residual > limit).reshape(-1, len(X)).any(0)
    if not bool(wanted.any()):
        return X[:0]
    X, W, residual, limit = X[wanted], W[..., wanted], residual[..., wanted], limit[..., wanted]

    def row(j: Tensor) -> Tensor:
        return gram(prior.kernel, X[j], X, policy=policy) - W[..., j].mT @ W

    order = greedy_variance(row, residual, min(most, len(X))).index
    conditional = gram(prior.kernel, X[order], policy=policy) - W[..., order].mT @ W[..., order]
    own = torch.diag_embed(1e-2 * limit[..., order])
    pivots = torch.linalg.cholesky_ex(conditional + own)[0].diagonal(dim1=-2, dim2=-1).square()
    explained = (pivots > limit[..., order]).reshape(-1, len(order)).any(0)
    return X[order[: int(explained.long().cumprod(0).sum())]]


def _cost_of_leaving(prior: Prior, Z: Tensor, sites: TiedSites, policy: NumericalPolicy) -> Tensor:
    """Return the nats lost without each of the points alone, ½ N_jj / [K_uu⁻¹]_jj summed over latents, (m,)."""
    L, _ = inducing_factor(prior, Z, policy)
    eye = torch.eye(len(Z), dtype=Z.dtype, device=Z.device)
    inverse = torch.linalg.solve_triangular(L, eye, upper=False).square().sum(-2)
    cost = 0.5 * sites.precision.diagonal(dim1=-2, dim2=-1).clamp_min(0.0) / inverse
    return cost.reshape(-1, len(Z)).sum(0)
