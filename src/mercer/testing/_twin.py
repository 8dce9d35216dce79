"""The dense twin of a posterior, the sites on which families are compared with it, and finite differences.

The twin inverts the prior covariance of training and test rows, adds the site precisions and inverts again: the
definition of conditioning, and no route that a family would take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mercer._typing import Sites
from mercer.families.base import Prior
from mercer.kernels import gram


class Twin(NamedTuple):
    """The dense posterior of the centred latents (*b): moments at [X, X_new], and scalars (*b,) in nats."""

    mean: Tensor
    covariance: Tensor
    log_z: Tensor
    log_evidence: Tensor
    kl: Tensor


@torch.no_grad()
def dense_twin(prior: Prior, X: Tensor, X_new: Tensor, sites: Sites) -> Twin:
    """Condition N(0, K) on sites at X, one batch element at a time."""
    linear, precision = torch.broadcast_tensors(sites.linear, sites.precision)
    pairs = zip(linear.reshape(-1, len(X)), precision.reshape(-1, len(X)), strict=True)
    parts = [_one_latent(gram(prior.kernel, torch.cat([X, X_new])), *pair) for pair in pairs]
    batch = linear.shape[:-1]
    return Twin(*(torch.stack(items).reshape(batch + items[0].shape) for items in zip(*parts, strict=True)))


def _one_latent(K: Tensor, linear: Tensor, precision: Tensor) -> Twin:
    n = len(linear)
    pad = linear.new_zeros(len(K) - n)
    S = torch.linalg.inv(torch.linalg.inv(K) + torch.cat([precision, pad]).diag())
    m = S @ torch.cat([linear, pad])
    Kff, Sff, mf = K[:n, :n], S[:n, :n], m[:n]
    ratio = torch.linalg.slogdet(Sff)[1] - torch.linalg.slogdet(Kff)[1]
    log_z = 0.5 * linear @ mf + 0.5 * ratio
    kl = 0.5 * (torch.linalg.solve(Kff, Sff + mf.outer(mf)).trace() - n - ratio)
    log_evidence = log_z - 0.5 * (linear.square() / precision)[precision != 0].sum()
    return Twin(m, S, log_z, log_evidence, kl)


def draw(*shape: int, seed: int) -> Tensor:
    """Return standard normal numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch_of_sites(n: int) -> Sites:
    """Return proper sites of three latents."""
    return Sites(draw(3, n, seed=1), 0.1 + draw(3, n, seed=2).square())


def kinds_of_sites(n: int, negative: float) -> Iterator[tuple[str, Sites]]:
    """Yield the kinds of sites that engines produce, with a name each; ``negative`` is a precision ≤ 0."""
    batch = batch_of_sites(n)
    linear, precision = batch.linear[0], batch.precision[0]
    seen = torch.arange(n) % 3 > 0
    yield "one latent", Sites(linear, precision)
    yield "a batch of latents", batch
    yield "a shared precision", Sites(batch.linear, precision)
    yield "missing targets", Sites(linear * seen, precision * seen)
    yield "a site without curvature", Sites(linear, precision * seen)
    if negative < 0:
        yield "negative sites", Sites(batch.linear, torch.where(seen, batch.precision, negative))


@torch.no_grad()
def difference(function: Callable[[], Tensor], parameter: Tensor, direction: Tensor, step: float = 1e-3) -> Tensor:
    """Return the derivative of ``function()`` along ``direction`` of a parameter, by the five-point rule."""
    start = parameter.detach().clone()

    def at(k: int) -> Tensor:
        parameter.copy_(start + k * step * direction)
        return function().detach()

    slope = (8.0 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12.0 * step)
    parameter.copy_(start)
    return slope
