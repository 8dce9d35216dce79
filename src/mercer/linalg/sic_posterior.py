"""The posterior precision Λ = U Uᵀ + diag(λ) of a sparse inverse Cholesky prior under Gaussian sites.

Λ is never factored exactly: an incomplete factor V on the pattern of U preconditions conjugate gradients, which
makes means and draws exact to their tolerance, and its determinant is corrected by quadrature.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from mercer.linalg.cholesky import Solution
from mercer.linalg.krylov import conjugate_gradients, quadratic_forms
from mercer.linalg.sic import Pattern, incomplete_posterior, logdet, precision_diagonal, solve, times

_MAX_ITER = 100


class PosteriorPrecision:
    """Λ = U Uᵀ + diag(λ), with its incomplete factor.

    Parameters
    ----------
    pattern : Pattern
    val : (*b, n, w)
        U; no gradients flow.
    precision : (*b, n)
        λ.
    tol : float
        Relative residual of every solve.

    Attributes
    ----------
    factor : (*b, n, w)
        V.
    shift : float
        See `mercer.linalg.sic.incomplete_posterior`; 0 as a rule.
    """

    def __init__(self, pattern: Pattern, val: Tensor, precision: Tensor, tol: float = 1e-8):
        self.pattern, self.val, self.precision, self.tol = pattern, val.detach(), precision.detach(), tol
        self.factor, self.shift = incomplete_posterior(pattern, self.val, self.precision)

    @cached_property
    def diagonal(self) -> Tensor:
        """(*b, n), the diagonal of Λ."""
        return precision_diagonal(self.pattern, self.val) + self.precision

    def product(self, x: Tensor) -> Tensor:
        """Return Λ x for x (*c, *b, n)."""
        return times(self.pattern, self.val, times(self.pattern, self.val, x, True)) + self.precision * x

    def solve(self, rhs: Tensor, start: Tensor | None = None) -> Solution:
        """Return Λ⁻¹ rhs for rhs (*c, *b, n), which confesses its residual and iterations."""
        return conjugate_gradients(self.product, rhs, self._near_inverse, tol=self.tol, max_iter=_MAX_ITER, start=start)

    def _near_inverse(self, x: Tensor) -> Tensor:
        return solve(self.pattern, self.factor, solve(self.pattern, self.factor, x), True)

    def draws(self, prior_noise: Tensor, site_noise: Tensor) -> Solution:
        """Return draws of covariance Λ⁻¹ and mean zero, (k, *b, n), from two sets of standard normal draws.

        Λ⁻¹ (U ε₁ + √λ ε₂), by perturbing and solving; needs λ ≥ 0.

        References
        ----------
        Papandreou and Yuille (2010), "Gaussian sampling by local perturbations".
        """
        pushed = times(self.pattern, self.val, prior_noise) + self.precision.clamp_min(0.0).sqrt() * site_noise
        return self.solve(pushed)

    def variances(self, draws: Tensor) -> Tensor:
        """Return the diagonal of Λ⁻¹, (*b, n), estimated from draws (k, *b, n) without bias.

        Given all other entries, entry i has variance 1/Λᵢᵢ; what the draws estimate is only the spread of its
        conditional mean xᵢ − (Λ x)ᵢ/Λᵢᵢ.
        """
        conditional = draws - self.product(draws) / self.diagonal
        return self.diagonal.reciprocal() + conditional.square().mean(0)

    def logdet(self, probes: Tensor, n_steps: int = 6) -> Tensor:
        """Return log |Λ|, (*b,): that of V exactly, and what V misses by Lanczos' quadrature.

        Parameters
        ----------
        probes : (k, *b, n)
            Entries ±1 at random. The better V, the nearer V⁻¹ Λ V⁻ᵀ to the identity, and the less they matter.
        n_steps : int
        """

        def whitened(x: Tensor) -> Tensor:
            return solve(self.pattern, self.factor, self.product(solve(self.pattern, self.factor, x, True)))

        return logdet(self.factor) + quadratic_forms(whitened, probes, torch.log, n_steps).mean(0)
