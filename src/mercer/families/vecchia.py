"""Vecchia's approximation: each row given some of the rows before it, as columns of a sparse inverse Cholesky factor.

Of the latent process, the factor U of K is the prior p̂(f) = ∏ᵢ p(fᵢ | f_sᵢ); of noisy data, that of K + diag(noise)
makes log p̂(y) a plain sum over rows, which any subset of rows estimates without bias. New rows are more columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mercer.families.base import Prior
from mercer.families.nearness import Nearness
from mercer.families.sic_plan import SicPlan
from mercer.kernels.evaluate import gram
from mercer.linalg.cholesky import NotPositiveDefiniteError
from mercer.linalg.sic import Pattern, column_factors, solve

_ROUNDING = 1e-3  # share of a conditional variance that rounding may make up
_APART = 1e-2  # nugget of new rows, in units of prior variance and of the square root of a rounding error


def prior_factor(prior: Prior, plan: SicPlan) -> tuple[Tensor, float]:
    """Return U of the latent prior, (n, w), differentiable in the hyperparameters, and the nugget that it has.

    Raises
    ------
    NotPositiveDefiniteError
        Some row is known to rounding from its neighbours, at the largest nugget too.
    """

    def of_chunk(chunk: Tensor, nugget: float) -> Tensor:
        return columns_of(prior, plan, None, plan.pattern.columns[chunk], nugget)[0]

    while True:
        nugget = plan.nugget.value
        try:
            chunks = [_checkpointed(of_chunk, chunk, nugget) for chunk in plan.chunks(None)]
            U = torch.cat(chunks, -2)
            known = U.detach()[..., -1].square().amax() * plan.prior_variance(prior).detach()
            if bool(known * torch.finfo(U.dtype).eps > _ROUNDING):
                raise NotPositiveDefiniteError(
                    "Some rows are known from their neighbours to rounding: look for near-duplicates."
                )
            return U, nugget
        except NotPositiveDefiniteError as failure:
            plan.nugget.raise_after(failure)


def columns_of(
    prior: Prior, plan: SicPlan, noise: Tensor | None, columns: Tensor, nugget: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return factors (*b, B, w) of rows given others, ``columns`` (B, w), and their tiles (*b, B, w, w).

    ``noise`` is (*b, n) in the plan's order, and the factor that of K + diag(noise); None is the latent prior with
    its relative ``nugget``.
    """
    index = columns.clamp_min(0)
    if noise is None:
        tiles = _prior_tiles(prior, plan, plan.X[index], nugget)
    else:
        tiles = gram(prior.kernel, plan.X[index], policy=plan.policy) + torch.diag_embed(noise[..., index])
    return column_factors(tiles, columns < 0), tiles


def response_log_likelihood(prior: Prior, plan: SicPlan, y: Tensor, noise: Tensor) -> Tensor:
    """Return log p̂(y) of noisy data, in nats, with its gradient in the hyperparameters.

    Parameters
    ----------
    prior : Prior
    plan : SicPlan
        Where it has ``rows``, n/r times the sum over those r columns stands for the whole: over random rows that is
        log p̂(y) in expectation.
    y : (*b, n)
        Targets minus the prior mean, in the order of the data.
    noise : (*b, n), or fewer dimensions
        Noise variance of each row, > 0, in units of y²; batch members with one noise share the factor.

    Returns
    -------
    (*b,)

    Notes
    -----
    O(n m³) operations. Chunks of columns are recomputed for the gradient, so that memory is O(n m) for the pattern
    and O(chunk · m²) for the rest.

    References
    ----------
    Vecchia (1988); Guinness (2021), "Gaussian process learning via Fisher scoring of Vecchia's approximation".
    """
    noise = noise.expand(*noise.shape[:-1], len(plan.X))[..., plan.order]
    y = y[..., plan.order]
    total = y.new_zeros(y.shape[:-1])

    def of_chunk(y: Tensor, noise: Tensor, columns: Tensor) -> Tensor:
        """Return the sum over columns (B, w), given targets and noise there."""
        tiles = gram(prior.kernel, plan.X[columns.clamp_min(0)], policy=plan.policy) + torch.diag_embed(noise)
        u = column_factors(tiles, columns < 0)
        white = (u * y).sum(-1)
        return (u[..., -1].log() - 0.5 * white.square()).sum(-1) - 0.5 * math.log(2 * math.pi) * len(columns)

    order = plan.walk if plan.rows is None else plan.rows
    chunks = [plan.pattern.columns[rows] for rows in plan.chunks(order, max(1, noise.shape[:-1].numel()))]
    if total.numel() == 1:
        total = total + _sum_with_slopes(of_chunk, prior.kernel, y, noise, chunks)
    else:
        for columns in chunks:
            index = columns.clamp_min(0)
            total = total + _checkpointed(of_chunk, y[..., index], noise[..., index], columns)
    return total if plan.rows is None else total * (len(plan.X) / len(plan.rows))


@dataclass(frozen=True)
class Appended:
    """New rows given data and, if among themselves, given new rows before them: f* = U_**⁻ᵀ (pull + white noise).

    The q rows are those of all sets, one set after the other; between sets U_** is zero.

    Attributes
    ----------
    near : (q, m) int tensor
        Data that each is given, positions in the plan's order, −1 for padding.
    weights : (*b, q, m)
        −U_o*: what each takes of those data.
    factor : (*b, q, w)
        U_**, on ``pattern``.
    """

    near: Tensor
    weights: Tensor
    factor: Tensor
    pattern: Pattern

    def pull(self, values: Tensor) -> Tensor:
        """Return Σ weights · values of the data (*c, n): (*c, q), with the batch of the weights."""
        return (self.weights * values[..., self.near.clamp_min(0)]).sum(-1)

    def spread(self, x: Tensor) -> Tensor:
        """Return U_**⁻ᵀ x for x (*c, q)."""
        return solve(self.pattern, self.factor, x, True)

    def white_noise(self, sets: torch.Size) -> Tensor:
        """Return U_**⁻ᵀ of each set, (*b, *t, q, q) for ``sets`` (*t, q): the rows' shares in white noise."""
        q, batch = sets[-1], self.factor.dim() - 2
        eye = torch.eye(q, dtype=self.factor.dtype, device=self.factor.device)
        # each column, in all sets at once, is one right-hand side
        sides = eye.repeat(1, sets[:-1].numel()).reshape(q, *[1] * batch, sets.numel())
        return self.spread(sides).movedim(0, -1).unflatten(-2, sets)


def append(
    prior: Prior,
    plan: SicPlan,
    X_new: Tensor,
    noise: Tensor | None,
    n_neighbors: int,
    joint: bool,
    nugget: float = 0.0,
    nearness: Nearness | None = None,
) -> Appended:
    """Return the columns of new rows.

    Parameters
    ----------
    prior, plan
    X_new : (*t, q, d)
        Sets of rows, which know nothing of one another.
    noise : (*b, n) or None
        Noise variance of the data in the plan's order; None if it is the latent values that are given.
    n_neighbors : int
        How many each new row is given: the nearest data and, if ``joint``, new rows of its set before it.
    joint : bool
    nugget : float
        Of `prior_factor`, where latent values are given.
    nearness : Nearness, optional
        For the prior and the plan's rows, where it can be kept from one call to the next.

    Returns
    -------
    Appended
    """
    n, q = len(plan.X), X_new.shape[:-1].numel()
    nearness = nearness or Nearness(prior.kernel, plan.X, plan.policy)
    columns = _neighbours_of_new(nearness, plan, X_new, n_neighbors, joint)
    index = columns.clamp_min(0)
    X = torch.cat([plan.X, X_new.reshape(q, -1)])
    # a new row may be one of the data
    apart = _APART * torch.finfo(X.dtype).eps ** 0.5 * plan.prior_variance(prior)
    if noise is None:
        noise, tiles = X.new_zeros(n), _prior_tiles(prior, plan, X[index], nugget)
    else:
        tiles = gram(prior.kernel, X[index], policy=plan.policy)
    own = torch.cat([noise, apart.expand(*noise.shape[:-1], q)], -1)
    tiles = tiles + torch.diag_embed(own[..., index])
    u = column_factors(tiles, columns < 0)
    of_new = columns >= n
    pattern = Pattern(torch.where(of_new, columns - n, -1)[:, :-1])
    # the pattern sorts its columns, and those of new rows are last already
    return Appended(columns.masked_fill(of_new, -1), -u.masked_fill(of_new, 0.0), u.masked_fill(~of_new, 0.0), pattern)


def _neighbours_of_new(nearness: Nearness, plan: SicPlan, X_new: Tensor, m: int, joint: bool) -> Tensor:
    """Return the nearest data and new rows before each new row, then itself, (q, w), ascending with −1 first."""
    n, q, rows = len(plan.X), X_new.shape[-2], X_new.reshape(-1, X_new.shape[-1])
    near, squared = (torch.as_tensor(each, device=X_new.device) for each in nearness.nearest(plan.X, rows, m))
    own = torch.arange(len(rows), device=X_new.device).unsqueeze(-1)
    if joint and q > 1:
        if len(rows) == q:
            earlier = torch.as_tensor(nearness.nearest_earlier(rows, min(m, q - 1)), device=X_new.device)
        else:
            earlier = rows_before(own, q)
        away = nearness.squared_of(rows, earlier).to(squared)
        squared = torch.cat([squared, away.masked_fill(earlier < 0, torch.inf)], -1)
        near = torch.cat([near, torch.where(earlier < 0, -1, earlier + n)], -1)
        near = near.gather(-1, squared.sort(dim=-1, stable=True).indices[:, :m])
    return torch.cat([near.sort(-1).values, own + n], -1)


def rows_before(rows: Tensor, q: int) -> Tensor:
    """Return for each of ``rows`` (R, 1) those before it in its set of q: (R, q), −1 for none."""
    of_set = rows - rows % q + torch.arange(q, device=rows.device)
    return torch.where(of_set < rows, of_set, -1)


def _prior_tiles(prior: Prior, plan: SicPlan, X: Tensor, nugget: float) -> Tensor:
    """Return tiles of the latent prior at rows X (B, w, d), nugget included: (B, w, w)."""
    tiles = gram(prior.kernel, X, policy=plan.policy)
    if nugget == 0.0:
        return tiles
    eye = torch.eye(tiles.shape[-1], dtype=tiles.dtype, device=tiles.device)
    return tiles + nugget * plan.prior_variance(prior) * eye


def _checkpointed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Call it, and again for the gradient, so that nothing in between is kept."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def _sum_with_slopes(
    function: Callable[..., Tensor], kernel: Any, y: Tensor, noise: Tensor, chunks: list[Tensor]
) -> Tensor:
    """Sum a number over chunks and take each gradient at once, so that nothing has to be kept or computed twice.

    A chunk sees its own entries of y and noise, since gradients of n entries for each would take O(n²) time.
    """
    parameters = [each for each in kernel.parameters() if each.requires_grad]
    leaves = [*parameters, *(each for each in (y, noise) if each.requires_grad)]
    recording = torch.is_grad_enabled() and bool(leaves)
    slopes, total = [torch.zeros_like(each) for each in leaves], y.new_zeros(())
    for columns in chunks:
        index = columns.clamp_min(0)
        own = [each.detach()[..., index].requires_grad_(recording and each.requires_grad) for each in (y, noise)]
        value = function(*own, columns)
        total = total + value.detach()
        if recording:
            inner = [*parameters, *(each for each in own if each.requires_grad)]
            found = torch.autograd.grad(value.sum(), inner, materialize_grads=True)
            for k, (slope, more) in enumerate(zip(slopes, found, strict=True)):
                if k < len(parameters):
                    slope += more
                else:
                    slope.index_add_(-1, index.flatten(), more.flatten(-2))
    # equal to the total, with these slopes
    return total + sum(((leaf - leaf.detach()) * slope).sum() for leaf, slope in zip(leaves, slopes, strict=True))
