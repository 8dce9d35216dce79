"""Conditioning on functionals by Cholesky: solver L, any kernel that is smooth enough.

[ℓ(u), u(x)] is jointly Gaussian, so a linear equation is regression on functionals. Values of derivatives differ by
many orders of magnitude, and no one jitter is right for all rows: the covariance is scaled to a unit diagonal, and the
nugget is relative to the prior variance of each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from mercer.kernels import Kernel
from mercer.kernels.functionals import Functional, functional_diag, functional_gram
from mercer.linalg.cholesky import NotPositiveDefiniteError
from mercer.linalg.dense import factor_, inverse_, solve_factored
from mercer.pde.rows import Rows, amplitude, calibrates, draw, gaussian_constant

NUGGETS = (1e-10, 1e-9, 1e-8, 1e-7, 1e-6)


class DensePosterior:
    """u | rows, from the Cholesky factor of the covariance of all rows.

    Parameters
    ----------
    kernels : sequence of gpytorch Kernel
        One per field.
    rows : sequence of Rows
    nuggets : sequence of float
        Relative nuggets η tried in turn: each row gets the noise η G_ii beside its own.
    nugget_variance : (n,), optional
        Use this instead of η G_ii, so that the noise stays the same while hyperparameters move.

    Attributes
    ----------
    log_evidence : float
        In nats.
    scale : float
        ŝ² = yᵀ(G + R)⁻¹y / tr G(G + R)⁻¹, dimensionless. Multiplies variances if no row has noise of its own; far above
        1 the prior does not fit. See `FeaturePosterior`.
    nugget : float
        The η that was used.

    Raises
    ------
    NotPositiveDefiniteError
        Even the largest nugget does not make the covariance positive definite.

    Notes
    -----
    O(n³) time, O(n²) memory.
    """

    @torch.no_grad()
    def __init__(
        self,
        kernels: Sequence[Kernel],
        rows: Sequence[Rows],
        nuggets: Sequence[float] = NUGGETS,
        nugget_variance: Tensor | None = None,
    ):
        self.kernels = list(kernels)
        self.rows = list(rows)
        G = rows_gram(self.kernels, self.rows)
        y = torch.cat([part.target for part in self.rows])
        noise = torch.cat([part.noise() for part in self.rows])
        size = G.diagonal().clone()
        for nugget in nuggets:
            extra = nugget * size if nugget_variance is None else nugget_variance * (nugget / nuggets[0])
            self.noise_variance = noise + extra
            self.row_scale = (size + noise).clamp_min(torch.finfo(G.dtype).tiny).sqrt()
            scaled = G / self.row_scale[:, None] / self.row_scale
            scaled.diagonal().add_(self.noise_variance / self.row_scale.square())
            self.factor, ok = factor_(scaled)
            if ok:
                break
        else:
            raise NotPositiveDefiniteError(
                f"The covariance of {len(y)} rows is not positive definite even with a relative nugget of "
                f"{nuggets[-1]:g}. Take fewer nodes, a rougher kernel, or method='features'."
            )
        self.nugget = float(nugget)
        self.weights = solve_factored(self.factor, y / self.row_scale) / self.row_scale  # (G + R)⁻¹ y
        quadratic = float(y @ self.weights)
        self.surprise = 1.0  # what residuals elsewhere say of the variance, at least 1; see `Problem.surprise`
        self.quadratic = quadratic
        self.calibrated = calibrates(self.rows)
        log_det = 2 * float(self.factor.diagonal().log().sum() + self.row_scale.log().sum())
        self.log_evidence = -0.5 * quadratic - 0.5 * log_det + gaussian_constant(len(y))

    @cached_property
    def scale(self) -> float:
        """ŝ², see above."""
        inverse = inverse_(self.factor.clone()).diagonal() / self.row_scale.square()
        return self.quadratic / max(1.0, len(inverse) - float(self.noise_variance @ inverse))

    @property
    def amplitude(self) -> float:
        """What prior variances are multiplied with: ŝ² and ``surprise``, or 1 where noise has units of its own."""
        return amplitude(self)

    @torch.no_grad()
    def mean(self, L: Functional) -> Tensor:
        """Return the posterior mean of a functional of k rows, (k,)."""
        return self._cross(L).mT @ self.weights

    @torch.no_grad()
    def marginals(self, L: Functional) -> tuple[Tensor, Tensor]:
        """Return mean and variance, (k,) each."""
        cross = self._cross(L)
        white = self._whiten(cross)
        variance = functional_diag(self.kernels, L) - white.square().sum(0)
        return cross.mT @ self.weights, self.amplitude * variance.clamp_min(0.0)

    @torch.no_grad()
    def joint(self, L: Functional) -> tuple[Tensor, Tensor]:
        """Return mean (k,) and covariance (k, k)."""
        cross = self._cross(L)
        white = self._whiten(cross)
        return cross.mT @ self.weights, self.amplitude * (functional_gram(self.kernels, L) - white.mT @ white)

    def sample(self, L: Functional, n_samples: int, generator: torch.Generator) -> Tensor:
        """Return draws of the functional, (k, n_samples)."""
        return draw(*self.joint(L), n_samples, generator)

    def backward(self, rows: Sequence[Rows]) -> Tensor:
        """Add the gradient of the log evidence to the leaves that kernels, and coefficients of ``rows``, came from.

        Returns
        -------
        (n,)
            The derivative in the noise variance of each row.
        """
        inverse = inverse_(self.factor.clone()) / self.row_scale[:, None] / self.row_scale
        by_gram = 0.5 * (torch.outer(self.weights, self.weights) - inverse)
        value = (by_gram * rows_gram(self.kernels, rows)).sum()
        value = value - self.weights @ torch.cat([part.target for part in rows])
        if value.requires_grad:
            value.backward()
        return by_gram.diagonal()

    def _cross(self, L: Functional) -> Tensor:
        """Return Cov(rows, ℓ), (n, k)."""
        return torch.cat([functional_gram(self.kernels, part.functional, L) for part in self.rows])

    def _whiten(self, cross: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.factor, cross / self.row_scale[:, None], upper=False)


def rows_gram(kernels: Sequence[Kernel], rows: Sequence[Rows]) -> Tensor:
    """Return the prior covariance of all rows, (n, n); differentiable in hyperparameters and coefficients."""
    blocks: list[list[Tensor]] = [[] for _ in rows]
    for i, left in enumerate(rows):
        for j, right in enumerate(rows[:i]):
            blocks[i].append(functional_gram(kernels, left.functional, right.functional))
            blocks[j].append(blocks[i][j].mT)
        blocks[i].append(functional_gram(kernels, left.functional))
    return torch.cat([torch.cat(line, 1) for line in blocks])
