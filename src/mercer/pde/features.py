"""Conditioning on functionals by features and QR: solver F, for mixtures of Gaussian lines.

The prior is a linear model of trigonometric features. Their weights follow from one least-squares problem by QR, which
never squares the condition number: nuggets may be 1e-24 where Cholesky needs 1e-10. Rows pass through in blocks, so
that memory does not grow with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from mercer.kernels.functionals import Functional
from mercer.linalg.threads import torch_again
from mercer.pde.basis import Features
from mercer.pde.rows import Rows, amplitude, calibrates, cut, gaussian_constant

NUGGET = 1e-20
_PREDICTED = 4_000_000  # elements of one block of features where posteriors are evaluated


class FeaturePosterior:
    """u | rows, from the triangular factor of the weights' least-squares problem.

    Parameters
    ----------
    features : Features
    rows : sequence of Rows
    nugget : float
        η: each row gets the noise variance η times its prior variance, beside its own.
    nugget_variance : (n,), optional
        Use this instead, so that the noise stays the same while hyperparameters move.
    start : FeaturePosterior, optional
        Condition this one on further rows.

    Attributes
    ----------
    log_evidence : float
        In nats.
    scale : float
        ŝ² = yᵀ(G + R)⁻¹y / tr G(G + R)⁻¹, dimensionless. Multiplies variances if no row has noise of its own; far above
        1 the prior does not fit.
    nugget : float

    Notes
    -----
    O(n m²) time and O(m²) memory. Rows [Φ/√R, y/√R] and [I, 0] are reduced to [R̃, z; 0, ρ]: the weights' mean is R̃⁻¹z,
    their covariance (R̃ᵀR̃)⁻¹, yᵀ(G + R)⁻¹y = ρ², and |G + R| = |R| |R̃|². Exact rows have no share of the nugget's
    noise, so that ρ² is shared out among the m − tr (R̃ᵀR̃)⁻¹ weights that they determine. Dividing by the number of
    rows, as is common, makes variances smaller with every row that says nothing new.
    """

    @torch.no_grad()
    def __init__(
        self,
        features: Features,
        rows: Sequence[Rows],
        nugget: float = NUGGET,
        nugget_variance: Tensor | None = None,
        start: FeaturePosterior | None = None,
    ):
        self.features, self.nugget = features, nugget
        self.rows = list(rows)
        m = features.size
        device = self.rows[0].target.device
        self._fixed = nugget_variance
        held = torch.zeros(0, m + 1, dtype=torch.float64, device=device) if start is None else start.held
        log_noise, n = (0.0, 0) if start is None else (start.log_noise, start.n)
        most = max(2 * m, 256)
        noise, waiting = [], [held]
        for phi, part, extra in self._blocks(self.rows):
            R = part.noise() + (nugget * phi.square().sum(1) if extra is None else extra)
            R = R.clamp_min(torch.finfo(R.dtype).tiny)
            noise.append(R)
            log_noise += float(R.log().sum())
            waiting.append(torch.cat([phi, part.target[:, None]], 1).div_(R.sqrt()[:, None]))
            if sum(map(len, waiting[1:])) >= most:
                waiting = [_triangle(torch.cat(waiting))]
        if start is None:
            waiting.append(torch.eye(m, m + 1, dtype=torch.float64, device=device))
        held = _triangle(torch.cat(waiting))
        self.noise_variance = torch.cat(noise)
        self.held: Tensor = held
        self.log_noise: float = log_noise
        self.n: int = n + len(self.noise_variance)
        self.factor = held[:m, :m]
        self.weights = torch.linalg.solve_triangular(self.factor, held[:m, m:], upper=True)[:, 0]
        quadratic = float(held[m, m].square())
        self.surprise = 1.0  # what residuals elsewhere say of the variance, at least 1; see `Problem.surprise`
        self.quadratic: float = quadratic
        self.calibrated: bool = calibrates(self.rows) and (start is None or start.calibrated)
        half_det = float(self.factor.diagonal().abs().log().sum())
        self.log_evidence = -0.5 * quadratic - half_det - 0.5 * log_noise + gaussian_constant(self.n)

    @cached_property
    def scale(self) -> float:
        """ŝ², see above."""
        m = self.features.size
        eye = torch.eye(m, dtype=torch.float64, device=self.factor.device)
        left = torch.linalg.solve_triangular(self.factor, eye, upper=True).square().sum()
        return self.quadratic / max(1.0, m - float(left))

    @property
    def amplitude(self) -> float:
        """What prior variances are multiplied with: ŝ² and ``surprise``, or 1 where noise has units of its own."""
        return amplitude(self)

    def condition(self, rows: Sequence[Rows]) -> FeaturePosterior:
        """Return the posterior given further rows, O(n m²) for those alone."""
        return FeaturePosterior(self.features, rows, self.nugget, start=self)

    @torch.no_grad()
    def mean(self, L: Functional) -> Tensor:
        """Return the posterior mean of a functional of k rows, (k,)."""
        return torch.cat([phi @ self.weights for phi in self._evaluated(L)])

    @torch.no_grad()
    def marginals(self, L: Functional) -> tuple[Tensor, Tensor]:
        """Return mean and variance, (k,) each."""
        mean, variance = [], []
        for phi in self._evaluated(L):
            mean.append(phi @ self.weights)
            variance.append(self._whiten(phi).square().sum(0))
        return torch.cat(mean), self.amplitude * torch.cat(variance)

    @torch.no_grad()
    def joint(self, L: Functional) -> tuple[Tensor, Tensor]:
        """Return mean (k,) and covariance (k, k)."""
        phi = self.features.evaluate(L)
        white = self._whiten(phi)
        return phi @ self.weights, self.amplitude * (white.mT @ white)

    @torch.no_grad()
    def sample(self, L: Functional, n_samples: int, generator: torch.Generator) -> Tensor:
        """Return draws of the functional, (k, n_samples); equal generators give the same functions wherever asked."""
        m = self.features.size
        white = torch.randn(m, n_samples, generator=generator, dtype=torch.float64).to(self.factor.device)
        spread = torch.linalg.solve_triangular(self.factor, white, upper=True)
        draws = self.weights[:, None] + math.sqrt(self.amplitude) * spread
        return torch.cat([phi @ draws for phi in self._evaluated(L)])

    def backward(self, rows: Sequence[Rows]) -> Tensor:
        """Add the gradient of the log evidence to the leaves that kernels, and coefficients of ``rows``, came from.

        Returns
        -------
        (n,)
            The derivative in the noise variance of each row.

        Notes
        -----
        With B = R^-½Φ and r = R^-½y − Bθ: ∂/∂B = r θᵀ − B (R̃ᵀR̃)⁻¹ and ∂/∂(R^-½y) = −r.
        """
        by_noise, first = [], 0
        for phi, part, _ in self._blocks(rows):
            R = self.noise_variance[first : first + len(part)]
            first += len(part)
            with torch.no_grad():
                root = R.sqrt()
                B, target = phi / root[:, None], part.target / root
                residual = target - B @ self.weights
                whitened = torch.linalg.solve_triangular(self.factor, B, upper=True, left=False)
                solved = torch.linalg.solve_triangular(self.factor.mT, whitened, upper=False, left=False)
                by_B = torch.outer(residual, self.weights) - solved
                by_noise.append(-0.5 * ((by_B * B).sum(1) - residual * target + 1) / R)
            value = ((by_B / root[:, None]) * phi).sum() - (residual / root) @ part.target
            if value.requires_grad:
                value.backward(retain_graph=True)
        return torch.cat(by_noise)

    def _blocks(self, rows: Sequence[Rows]) -> Iterator[tuple[Tensor, Rows, Tensor | None]]:
        """Yield features, rows and the given nugget variances of blocks of rows."""
        most, first = max(2 * self.features.size, 256), 0
        for part in rows:
            for start in range(0, len(part), most):
                span = slice(start, min(start + most, len(part)))
                block = part.part(span)
                given = None if self._fixed is None else self._fixed[first + span.start : first + span.stop]
                yield self.features.evaluate(block.functional), block, given
            first += len(part)

    def _evaluated(self, L: Functional) -> Iterator[Tensor]:
        n = len(L[0].coefficient)
        step = max(1, _PREDICTED // max(1, self.features.size))
        for start in range(0, max(n, 1), step):
            yield self.features.evaluate(cut(L, slice(start, start + step)))

    def _whiten(self, phi: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.factor.mT, phi.mT, upper=False)


def _triangle(A: Tensor) -> Tensor:
    """Return R of A = Q R."""
    with torch_again(A.shape[0] * A.shape[1] ** 2):
        return torch.linalg.qr(A, mode="r")[1]
