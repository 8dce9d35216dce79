"""Draws from posteriors that are functions: evaluate one at any X, again and again, with gradients in X."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mercer.families.base import Prior
from mercer.kernels.evaluate import gram
from mercer.kernels.paths import PriorPaths
from mercer.policy import NumericalPolicy


class Paths(Protocol):
    """Functions drawn once, deterministic thereafter."""

    def __call__(self, X: Tensor) -> Tensor:
        """Return all functions at X (*t, q, d): (n_samples, *b, *t, q), in units of f, prior mean included."""


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
