"""Greedy choice of points: each next one is the candidate that the chosen ones explain least.

This is a Cholesky factorisation with pivots whose rows are computed on demand. It knows covariances alone, which
arrive through a callable, so it works for every kernel and every input that a kernel takes, and for posterior
covariances as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_LOOK_EVERY = 16  # steps between two questions to the device whether all is explained


@dataclass(frozen=True)
class Greedy:
    """The candidates that were chosen, and what they leave unexplained.

    Parameters
    ----------
    index : (m,) int tensor
        Positions of the chosen candidates, in the order in which they were taken; each occurs once.
    residual : (*b, N) tensor
        Variance of every candidate given the chosen ones, in units of f².
    """

    index: Tensor
    residual: Tensor


@torch.no_grad()
def greedy_variance(
    row: Callable[[Tensor], Tensor],
    diagonal: Tensor,
    n_points: int,
    *,
    tol: float = 0.0,
    start: Tensor | None = None,
    weight: Tensor | None = None,
    noise: Tensor | None = None,
) -> Greedy:
    """Choose candidates one by one, each time the one of largest variance given those already chosen.

    Parameters
    ----------
    row : callable
        ``row(j)`` with j an int tensor of shape (1,) gives the covariances of candidate j with all candidates,
        (*b, 1, N) or (*b, N), such as ``lambda j: gram(kernel, X[j], X)``. Called once per point.
    diagonal : (*b, N) tensor
        Variances of the candidates, ≥ 0, in units of f². Where there are batch dimensions (latents or outputs
        that share their points) variances are summed over them.
    n_points : int ≥ 0
        Most candidates to choose, ``start`` among them.
    tol : float ≥ 0
        The choice ends early when no candidate has more than ``tol`` times its ``diagonal`` left, and in any case when
        only rounding is left. It changes how many points are chosen, not which come first.
    start : (s,) int tensor, optional
        Candidates that are chosen in any case, first and in this order.
    weight : (N,) or (*b, N) tensor, optional
        ≥ 0; multiplies the variances that are compared, as if the kernel were √w k √w. Weight 0 is never chosen.
    noise : (N,) or (*b, N) tensor, optional
        ≥ 0, in units of f²: what is known of a chosen candidate is its value with this noise variance, by default
        the value itself.

    Returns
    -------
    Greedy
        Ties go to the lowest index. What is chosen for a smaller ``n_points`` is a beginning of what is chosen for
        a larger one.

    Raises
    ------
    ValueError
        An argument out of its range or of another shape, named.

    Notes
    -----
    O(N m²) operations beside m rows of covariances, O(N m) memory, for each batch. Variances are right to a few
    roundings of ``diagonal`` where pivots are the largest ones; points that nearly depend on one another and are
    taken all the same, for ``start`` or ``weight``, cost up to half of the digits.

    References
    ----------
    Harbrecht, Peters and Schneider (2012), "On the low-rank approximation by the pivoted Cholesky decomposition";
    Burt, Rasmussen and van der Wilk (2020), "Convergence of sparse variational inference in Gaussian processes
    regression", for what it means as a choice of inducing points.
    """
    *batch, N = diagonal.shape
    start = _start(start, n_points, N, diagonal.device)
    _check_positive("diagonal", diagonal)
    if not tol >= 0:
        raise ValueError(f"tol must not be negative, got {tol}.")
    prior = diagonal.detach().reshape(math.prod(batch), N)
    scale = _per_candidate("weight", weight, diagonal, prior)
    spread = _per_candidate("noise", noise, diagonal, prior)
    size = min(n_points, N)
    factor = prior.new_empty(len(prior), size, N)
    residual = prior.clone()
    index = torch.zeros(size, dtype=torch.long, device=prior.device)
    kept = torch.zeros(size, dtype=torch.bool, device=prior.device)
    taken = torch.zeros(N, dtype=torch.bool, device=prior.device)
    rounding = torch.finfo(prior.dtype).eps
    for t in range(size):
        # Rounding in a difference of t squares grows with t; below it a pivot is noise.
        floor = (t + 8) * rounding * prior
        if t < len(start):
            j = start[t : t + 1]
            kept[t] = True
        else:
            if t % _LOOK_EVERY == 0 and t > len(start) and not bool(kept[t - 1]):
                break
            compared = (residual if scale is None else residual * scale).sum(0)
            compared = compared.masked_fill(taken | (residual <= floor).all(0), 0.0)
            j = compared.argmax(0, keepdim=True)
            kept[t] = ((residual > tol * prior).any(0) & (compared > 0)).any()
        pivot = residual[:, j] if spread is None else residual[:, j] + spread[:, j]
        # An infinite pivot makes the step do nothing, without a question to the device.
        pivot = pivot.masked_fill(~kept[t] | (pivot <= floor[:, j]), torch.inf)
        explained = factor[:, :t, j].mT @ factor[:, :t]
        line = (_row(row, j, prior) - explained.squeeze(1)) * pivot.rsqrt()
        residual = (residual - line.square()).clamp_min_(0.0)
        factor[:, t] = line
        index[t : t + 1] = j
        taken.index_fill_(0, j, True)
    if not bool(residual.isfinite().all()):
        raise ValueError("row gave NaN or infinite covariances: an input or a hyperparameter is out of range.")
    return Greedy(index[kept], residual.reshape(diagonal.shape))


def _start(start: Tensor | None, n_points: int, N: int, device: torch.device) -> Tensor:
    if n_points < 0:
        raise ValueError(f"n_points must not be negative, got {n_points}.")
    if start is None:
        return torch.zeros(0, dtype=torch.long, device=device)
    if start.ndim != 1 or start.dtype.is_floating_point or start.dtype == torch.bool:
        kind = f"{start.dtype} of shape {tuple(start.shape)}"
        raise ValueError(f"start must hold positions of candidates, (s,) integers, got {kind}.")
    if len(start) > n_points:
        raise ValueError(f"start holds {len(start)} points but n_points is {n_points}; raise n_points.")
    if len(start) and (int(start.min()) < 0 or int(start.max()) >= N or len(start.unique()) < len(start)):
        raise ValueError(f"start must hold different positions between 0 and {N - 1}.")
    return start.to(device, torch.long)


def _per_candidate(name: str, value: Tensor | None, diagonal: Tensor, prior: Tensor) -> Tensor | None:
    """Return ``value`` in the shape of ``prior``, where batch dimensions are one."""
    if value is None:
        return None
    if value.shape not in (diagonal.shape, diagonal.shape[-1:]):
        raise ValueError(
            f"{name} must have one entry per candidate, shape {tuple(diagonal.shape[-1:])} or "
            f"{tuple(diagonal.shape)}, got {tuple(value.shape)}."
        )
    _check_positive(name, value, infinite=name == "noise")
    return value.detach().to(prior).expand(diagonal.shape).reshape(prior.shape)


def _check_positive(name: str, value: Tensor, infinite: bool = False) -> None:
    if not bool(((value >= 0) & (infinite | value.isfinite())).all()):
        raise ValueError(f"{name} must be ≥ 0{'' if infinite else ' and finite'} for every candidate.")


def _row(row: Callable[[Tensor], Tensor], j: Tensor, prior: Tensor) -> Tensor:
    values = row(j)
    if values.numel() != prior.numel():
        raise ValueError(
            f"row must give the covariances of one candidate with all {prior.shape[-1]}, (*b, 1, N) or (*b, N) with "
            f"the batch dimensions of diagonal, got {tuple(values.shape)}."
        )
    return values.reshape(prior.shape)
