"""A posterior that also counts what is not known of the equation's coefficients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mercer.kernels.functionals import Functional
from mercer.pde.rows import Posterior, Rows


class Marginalised:
    """u with coefficients integrated out to first order: the mean moves along their standard deviations.

    Parameters
    ----------
    posterior : Posterior
        At the best coefficients.
    pairs : sequence of (Posterior, Posterior)
        At a standard deviation to either side, along uncorrelated directions of the coefficients. Half of the
        difference of their means is a standard deviation of u that the posterior at fixed coefficients leaves out.
    """

    def __init__(self, posterior: Posterior, pairs: Sequence[tuple[Posterior, Posterior]]):
        self.posterior, self.pairs = posterior, list(pairs)
        self.log_evidence, self.scale, self.nugget = posterior.log_evidence, posterior.scale, posterior.nugget
        self.surprise, self.noise_variance = posterior.surprise, posterior.noise_variance
        self.calibrated: bool = getattr(posterior, "calibrated", False)
        self.quadratic: float = getattr(posterior, "quadratic", 0.0)
        self.features = getattr(posterior, "features", None)

    def mean(self, L: Functional) -> Tensor:
        """Return the posterior mean of a functional of k rows, (k,)."""
        return self.posterior.mean(L)

    def marginals(self, L: Functional) -> tuple[Tensor, Tensor]:
        """Return mean and variance, (k,) each."""
        mean, variance = self.posterior.marginals(L)
        return mean, variance + self._shifts(L).square().sum(1)

    def joint(self, L: Functional) -> tuple[Tensor, Tensor]:
        """Return mean (k,) and covariance (k, k)."""
        mean, covariance = self.posterior.joint(L)
        shifts = self._shifts(L)
        return mean, covariance + shifts @ shifts.mT

    def sample(self, L: Functional, n_samples: int, generator: torch.Generator) -> Tensor:
        """Return draws of the functional, (k, n_samples)."""
        draws = self.posterior.sample(L, n_samples, generator)
        white = torch.randn(len(self.pairs), n_samples, generator=generator, dtype=torch.float64).to(draws.device)
        return draws + self._shifts(L) @ white

    def backward(self, rows: Sequence[Rows]) -> Tensor:
        """Add the gradient of the log evidence at the best coefficients; see `FeaturePosterior.backward`."""
        return self.posterior.backward(rows)

    def _shifts(self, L: Functional) -> Tensor:
        """Return half the differences of means along each direction, (k, number of directions)."""
        return torch.stack([0.5 * (above.mean(L) - below.mean(L)) for above, below in self.pairs], 1)
