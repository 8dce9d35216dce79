"""The fused stationary covariance: one autograd function, one table of radial profiles.

A stationary kernel here is K = s·k(d²), d² the squared distance between scaled inputs. The function writes K
block by block, saves only the small inputs, and recomputes d² in its hand-written adjoint, so that neither
direction holds an n × n buffer beside the result (and never n × n × d). A new stationary kernel is one row of
``PROFILES``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Blocks of this size stay in the last-level cache of a CPU between elementwise passes; a GPU wants large
# blocks.
_CACHE_ELEMENTS = 1 << 19


@dataclass(frozen=True)
class Profile:
    """A radial profile k(d²) with k(0) = 1.

    Parameters
    ----------
    value : callable
        (d², shape) → k; may overwrite d².
    adjoint : callable
        (d², shape) → (k, ∂k/∂d², ∂k/∂shape or None); may overwrite d².
    has_shape : bool
        Whether there is a shape parameter beside the lengthscale (α of the rational quadratic).
    exact_distance : bool
        Whether d² must be accurate near zero. The expansion |x|² + |y|² − 2xy errs by eps·|x|², which a
        profile with a kink at 0 turns into sqrt(eps). Others take it while the error is below √eps.
    """

    value: Callable[[Tensor, Tensor | None], Tensor]
    adjoint: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor | None]]
    has_shape: bool = False
    exact_distance: bool = False


def _rbf(d2: Tensor, shape: Tensor | None) -> Tensor:
    return d2.mul_(-0.5).exp_()


def _rbf_adjoint(d2: Tensor, shape: Tensor | None) -> tuple[Tensor, Tensor, None]:
    k = d2.mul_(-0.5).exp_()
    return k, k * -0.5, None


def _matern12(d2: Tensor, shape: Tensor | None) -> Tensor:
    return d2.sqrt_().neg_().exp_()


def _matern12_adjoint(d2: Tensor, shape: Tensor | None) -> tuple[Tensor, Tensor, None]:
    distance = d2.sqrt_()
    k = distance.neg().exp_()
    # The kink at zero has no derivative; zero is the subgradient that autograd of a norm would give.
    slope = torch.where(distance > 0, k / distance, 0.0).mul_(-0.5)
    return k, slope, None


def _matern32(d2: Tensor, shape: Tensor | None) -> Tensor:
    a = d2.mul_(3.0).sqrt_()
    return torch.neg(a).exp_().mul_(a.add_(1.0))


def _matern32_adjoint(d2: Tensor, shape: Tensor | None) -> tuple[Tensor, Tensor, None]:
    a = d2.mul_(3.0).sqrt_()
    decay = torch.neg(a).exp_()
    return a.add_(1.0).mul_(decay), decay.mul_(-1.5), None


def _matern52(d2: Tensor, shape: Tensor | None) -> Tensor:
    a = torch.mul(d2, 5.0).sqrt_()
    polynomial = d2.mul_(5.0 / 3.0).add_(a).add_(1.0)
    return a.neg_().exp_().mul_(polynomial)


def _matern52_adjoint(d2: Tensor, shape: Tensor | None) -> tuple[Tensor, Tensor, None]:
    a = torch.mul(d2, 5.0).sqrt_()
    decay = torch.neg(a).exp_()
    a.add_(1.0)
    k = d2.mul_(5.0 / 3.0).add_(a).mul_(decay)
    return k, a.mul_(decay).mul_(-5.0 / 6.0), None


def _rational_quadratic(d2: Tensor, alpha: Tensor | None) -> Tensor:
    # (1 + d²/2α)^−α through log1p: accurate for the large α that make it an RBF.
    assert alpha is not None
    return d2.div_(2.0 * alpha).log1p_().mul_(-alpha).exp_()


def _rational_quadratic_adjoint(d2: Tensor, alpha: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    assert alpha is not None
    u = d2.div_(2.0 * alpha)
    log_base = torch.log1p(u)
    k = torch.mul(log_base, -alpha).exp_()
    base = torch.add(u, 1.0)
    # ∂k/∂α = k (u / (1 + u) − log(1 + u)) with u = d²/2α.
    by_alpha = u.div_(base).sub_(log_base).mul_(k)
    return k, base.reciprocal_().mul_(k).mul_(-0.5), by_alpha


PROFILES: dict[str, Profile] = {
    "rbf": Profile(_rbf, _rbf_adjoint),
    "matern12": Profile(_matern12, _matern12_adjoint, exact_distance=True),
    "matern32": Profile(_matern32, _matern32_adjoint),
    "matern52": Profile(_matern52, _matern52_adjoint),
    "rq": Profile(_rational_quadratic, _rational_quadratic_adjoint, has_shape=True),
}


def stationary_gram(
    profile: str, x1: Tensor, x2: Tensor | None, scale: Tensor, shape: Tensor | None, limit: int
) -> Tensor:
    """Return K = scale·k(|x1ᵢ − x2ⱼ|²), differentiable once in every tensor.

    Parameters
    ----------
    profile : str
        A key of ``PROFILES``.
    x1 : (*b, n1, d), dimensionless
        Inputs over lengthscales, with an origin near their middle.
    x2 : (*b, n2, d) or None
        Second inputs with the same origin; None means x1: exact symmetry, diagonal exactly ``scale``.
    scale : (*b, 1, 1), units of f²
    shape : (*b, 1, 1) or None, dimensionless
        Shape parameter where the profile has one.
    limit : int
        Largest temporary in elements.

    Returns
    -------
    Tensor
        (*b, n1, n2), units of f².
    """
    batches = [t.shape[:-2] for t in (x1, x2, scale, shape) if t is not None]
    # broadcasting shapes takes as long as a small matrix
    batch = torch.broadcast_shapes(*batches) if any(batches) else torch.Size()
    flat_size = math.prod(batch)

    def flat(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.expand(*batch, *value.shape[-2:]).reshape(flat_size, *value.shape[-2:])

    if x1.device.type == "cpu":
        limit = min(limit, _CACHE_ELEMENTS)
    out = _Stationary.apply(flat(x1), flat(x2), flat(scale), flat(shape), PROFILES[profile], limit)
    return out.reshape(*batch, *out.shape[-2:])


class _Stationary(torch.autograd.Function):
    """K = s·k(d²) on (B, n, d) inputs; see :func:`stationary_gram`."""

    @staticmethod
    def forward(
        ctx: Any, x1: Tensor, x2: Tensor | None, s: Tensor, shape: Tensor | None, profile: Profile, limit: int
    ) -> Tensor:
        ctx.save_for_backward(x1, x2, s, shape)
        ctx.profile, ctx.limit = profile, limit
        symmetric = x2 is None
        y = x1 if x2 is None else x2
        out = x1.new_empty(x1.shape[0], x1.shape[1], y.shape[1])
        left, right = _augmented(x1, y)
        ctx.exact = profile.exact_distance or _loses_digits(left, right)
        for b, rows, columns in _blocks(out.shape, symmetric, limit):
            d2 = _squared_distances(x1, y, left, right, b, rows, columns, ctx.exact)
            block = out[b, rows, columns]
            torch.mul(profile.value(d2, None if shape is None else shape[b]), s[b], out=block)
            if symmetric:
                _mirror(out, block, s[b], b, rows)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        x1, x2, s, shape = ctx.saved_tensors
        need_x1, need_x2, need_s, need_shape = ctx.needs_input_grad[:4]
        symmetric = x2 is None
        y = x1 if symmetric else x2
        left, right = _augmented(x1, y)
        ones1, ones2 = _with_ones(x1), _with_ones(y)
        # Σⱼ H and Σⱼ H y together, from one product with [y, 1].
        pull1, pull2 = torch.zeros_like(ones1), torch.zeros_like(ones2)
        by_s, by_shape = torch.zeros_like(s), torch.zeros_like(s)
        for b, rows, columns in _blocks(G.shape, symmetric, ctx.limit):
            d2 = _squared_distances(x1, y, left, right, b, rows, columns, ctx.exact)
            k, slope, shape_slope = ctx.profile.adjoint(d2, None if shape is None else shape[b])
            weight = _folded(G, b, rows, columns) if symmetric else G[b, rows, columns]
            if need_s:
                by_s[b] += k.mul_(weight).sum((-2, -1), keepdim=True)
            if need_shape:
                by_shape[b] += shape_slope.mul_(weight).sum((-2, -1), keepdim=True)
            if need_x1 or need_x2:
                H = slope.mul_(weight)
                if need_x1:
                    pull1[b, rows] += H @ ones2[b, columns]
                if need_x2 or symmetric:
                    pull2[b, columns] += H.mT @ ones1[b, rows]
        # ∂d²ᵢⱼ/∂xᵢ = 2 (xᵢ − yⱼ).
        by_x1 = 2.0 * s * (pull1[..., -1:] * x1 - pull1[..., :-1])
        by_x2 = 2.0 * s * (pull2[..., -1:] * y - pull2[..., :-1])
        if symmetric:
            by_x1 += by_x2
        return (
            by_x1 if need_x1 else None,
            by_x2 if need_x2 else None,
            by_s if need_s else None,
            s * by_shape if need_shape else None,
            None,
            None,
        )


def _blocks(size: torch.Size, symmetric: bool, limit: int) -> Iterator[tuple[slice, slice, slice]]:
    """Cut (B, n, m) into blocks of about ``limit`` elements: several whole matrices, or rows of one.

    In the symmetric case a block of rows starts at its own diagonal; the rest follows by symmetry.
    """
    count, n, m = size
    whole = slice(0, n)
    if n * m <= limit:
        step = max(1, limit // max(1, n * m))
        for start in range(0, count, step):
            yield slice(start, min(start + step, count)), whole, slice(0, m)
        return
    step = max(1, limit // m)
    for batch in range(count):
        for start in range(0, n, step):
            columns = slice(start if symmetric else 0, m)
            yield slice(batch, batch + 1), slice(start, min(start + step, n)), columns


def _augmented(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of d² = [−2x, |x|², 1] · [y, 1, |y|²]: one matrix product, no broadcasting pass."""
    x_norm, y_norm = x.square().sum(-1, keepdim=True), y.square().sum(-1, keepdim=True)
    left = torch.cat([-2.0 * x, x_norm, torch.ones_like(x_norm)], -1)
    right = torch.cat([y, torch.ones_like(y_norm), y_norm], -1)
    return left, right


def _loses_digits(left: Tensor, right: Tensor) -> bool:
    """Whether the product of the augmented inputs errs by more than √eps, as it does 50 lengthscales out in float32."""
    if left.numel() == 0 or right.numel() == 0:
        return False
    largest = torch.maximum(left[..., -2].max(), right[..., -1].max())
    return bool(largest > torch.finfo(left.dtype).eps ** -0.5)


def _with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[..., :1])], -1)


def _squared_distances(
    x: Tensor, y: Tensor, left: Tensor, right: Tensor, b: slice, rows: slice, columns: slice, exact: bool
) -> Tensor:
    """Return one block of squared distances, (b, rows, columns), never negative."""
    if exact:
        distance = torch.cdist(x[b, rows], y[b, columns], compute_mode="donot_use_mm_for_euclid_dist")
        return distance.square_()
    return torch.matmul(left[b, rows], right[b, columns].mT).clamp_min_(0.0)


def _mirror(out: Tensor, block: Tensor, s: Tensor, b: slice, rows: slice) -> None:
    """Make a block on the diagonal exactly symmetric and copy the rest of its rows into their columns."""
    n = rows.stop - rows.start
    square = block[..., :n]
    lower = torch.ones(n, n, dtype=torch.bool, device=out.device).tril_()
    square.copy_(torch.where(lower, square.mT, square))
    square.diagonal(dim1=-2, dim2=-1).copy_(s.squeeze(-1))
    out[b, rows.stop :, rows] = block[..., n:].mT


def _folded(G: Tensor, b: slice, rows: slice, columns: slice) -> Tensor:
    """Add to the adjoint of each block that of its mirror image, which need not be equal."""
    n = rows.stop - rows.start
    weight = G[b, rows, columns] + G[b, columns, rows].mT
    weight[..., :n] *= 0.5  # The square on the diagonal holds both orders of each pair itself.
    return weight
