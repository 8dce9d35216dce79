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
    curvature: float,
    residual_tol: float,
    loss_tol: float,
    policy: NumericalPolicy,
    spare: int = 0,
    known: int | None = None,
) -> Tensor:
    """Return the inducing points for a stream that brings the rows X.

    Rows that Z leaves unexplained are added, the worst first. Where there is no room for all, old and new points are
    chosen anew, the least explained first, if that costs the objective less of what is known,
    ½ tr(N Cov(u | u')) nats, than it saves of the rows to come, ½ Σ β Var(f | u).

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
    curvature : float
        β, expected curvature of the log likelihood of a row, summed over latents, in 1/f².
    residual_tol : float
        β times the variance that a row may keep; less than 1e-8 of the prior's is never asked for, and more than half
        never left.
    loss_tol : float
        Nats, summed over latents, that may be lost even where less is saved by it.
    policy : NumericalPolicy
    spare : int
        So many points more are returned rather than lose more than ``loss_tol``.
    known : int, optional
        The first so many of Z, all by default, are known of and stay, or are given up as above; others may simply go.

    Returns
    -------
    (m', d)
        Kept points first where there is room; at most ``most``, or ``most`` + ``spare`` rather than lose more.

    Notes
    -----
    O((m + b) m²) operations. A superset loses nothing, so that growth is free of error (Chang et al., 2023).
    """
    looked_at = _spread(X, _AT_ONCE)
    enough = residual_tol / max(curvature, torch.finfo(X.dtype).tiny)
    found = _unexplained(prior, Z, looked_at, most, enough, policy)
    if len(Z) + len(found) <= most:
        return torch.cat([Z, found])
    candidates = torch.cat([Z, found])
    grown = candidates[: max(most, len(Z) if known is None else known)].clone()  # a view would keep all of them
    K = gram(prior.kernel, candidates, policy=policy)
    chosen = greedy_variance(lambda j: K[..., j, :], K.diagonal(dim1=-2, dim2=-1), most).index
    proposed = candidates[chosen.sort().values]
    loss = float(sites.loss(Projection(prior, Z, proposed, policy)).sum())
    if loss <= loss_tol:
        return proposed
    if spare:
        return candidates[: most + spare]
    left = [_residual(prior, each, looked_at, policy)[0].sum() for each in (grown, proposed)]
    saved = 0.5 * curvature * len(X) / len(looked_at) * float(left[0] - left[1])
    return grown if loss > saved else proposed


def _residual(prior: Prior, Z: Tensor, X: Tensor, policy: NumericalPolicy) -> tuple[Tensor, Tensor]:
    """Return the prior variance that Z leaves of the rows X, (b,), and W with Cov(f | u) = k − WᵀW, (m, b)."""
    if len(Z) == 0:
        return diag(prior.kernel, X), X.new_zeros(1, len(X))
    L, _ = inducing_factor(prior, Z, policy)
    W = torch.linalg.solve_triangular(L, gram(prior.kernel, Z, X, policy=policy), upper=False)
    return (diag(prior.kernel, X) - W.square().sum(-2)).clamp_min(0.0), W


def _unexplained(prior: Prior, Z: Tensor, X: Tensor, most: int, enough: float, policy: NumericalPolicy) -> Tensor:
    """Return the rows of X that are least explained by Z and by each other, the worst first."""
    residual, W = _residual(prior, Z, X, policy)
    variance = diag(prior.kernel, X)
    limit = torch.full_like(variance, enough).clamp(1e-8 * variance, 0.5 * variance)
    wanted = (residual > limit).reshape(-1, len(X)).any(0)
    if not bool(wanted.any()):
        return X[:0]
    X, W, residual, limit = X[wanted], W[..., wanted], residual[..., wanted], limit[..., wanted]

    def row(j: Tensor) -> Tensor:
        return gram(prior.kernel, X[j], X, policy=policy) - W[..., j].mT @ W

    order = greedy_variance(row, residual, min(most, len(X))).index
    conditional = gram(prior.kernel, X[order], policy=policy) - W[..., order].mT @ W[..., order]
    root, _ = torch.linalg.cholesky_ex(conditional + torch.diag_embed(1e-2 * limit[..., order]))
    useful = (root.diagonal(dim1=-2, dim2=-1).square() > limit[..., order]).reshape(-1, len(order)).any(0)
    return X[order[: int(useful.long().cumprod(0).sum())]]


def _spread(X: Tensor, most: int) -> Tensor:
    """Return at most so many rows, evenly spaced in their order, so that a long batch is seen to its end."""
    return X if len(X) <= most else X[torch.linspace(0, len(X) - 1, most, device=X.device).long()]
