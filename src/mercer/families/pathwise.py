"""Draws from posteriors that are functions: evaluate one at any X, again and again, with gradients in X."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mercer.families.base import Prior
from mercer.families.sets import lined_up
from mercer.kernels.evaluate import gram
from mercer.kernels.paths import PriorPaths
from mercer.policy import NumericalPolicy


class Paths(Protocol):
    """Functions drawn once, deterministic thereafter."""

    def __call__(self, X: Tensor) -> Tensor:
        """Return all functions at X (*t, q, d): (n_samples, *b, *t, q), in units of f, prior mean included."""


class Anchor(Protocol):
    """Covariances with f at some rows X (*t, Q, d)."""

    def covariance(self, X_new: Tensor) -> Tensor:
        """Return Cov(f(X), f(X_new)) set by set: (*b, *t, Q, q), latents that share it of size one."""


@dataclass(frozen=True)
class KernelPaths:
    """f(x) = μ(x) + g(x) + Σᵢ wᵢ k(x, Rᵢ): functions of the prior, corrected by what the rows R say.

    Parameters
    ----------
    prior : Prior
    functions : PriorPaths
        As many as there are draws and latents together.
    rows : (r, d)
        R.
    weights : (n_samples, *b, r)
        w, in units of 1/f.
    policy : NumericalPolicy
    """

    prior: Prior
    functions: PriorPaths
    rows: Tensor
    weights: Tensor
    policy: NumericalPolicy

    def __call__(self, X: Tensor) -> Tensor:
        """Return all functions at X (*t, q, d): (n_samples, *b, *t, q)."""
        flat = X.reshape(-1, X.shape[-1])
        size = self.policy.chunk_rows(self.weights.shape[:-1].numel() * self.weights.shape[-1])
        return torch.cat([self._at(chunk) for chunk in flat.split(size)], -1).unflatten(-1, X.shape[:-1])

    def _at(self, X: Tensor) -> Tensor:
        Ksf = gram(self.prior.kernel, X, self.rows, policy=self.policy)
        update = self.weights @ Ksf.mT if Ksf.dim() == 2 else (Ksf @ self.weights.unsqueeze(-1)).squeeze(-1)
        return self.functions(X).reshape(update.shape) + update + self.prior.mean_at(X)


@dataclass(frozen=True)
class CorrectedPaths:
    """Functions f(x) + Cov(f(x), f(X)) w: those of a posterior, corrected by what observations at X say.

    Parameters
    ----------
    functions : Paths
    anchor : Anchor
        Covariances of the posterior with f(X), of one set of rows.
    weights : (n_samples, *b, Q)
        w, in units of 1/f.
    """

    functions: Paths
    anchor: Anchor
    weights: Tensor

    def __call__(self, X: Tensor) -> Tensor:
        """Return all functions at X (*t, q, d): (n_samples, *b, *t, q)."""
        cross = self.anchor.covariance(X)
        weights = lined_up(self.weights.unsqueeze(-2), self.weights.dim() - 1, X.dim() - 2, 2)
        return self.functions(X) + (weights @ cross).squeeze(-2)


def standard_normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw on the generator's device in float64, so that seeds mean the same everywhere; returned as ``like``."""
    draw = torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)
    return draw.to(like)
