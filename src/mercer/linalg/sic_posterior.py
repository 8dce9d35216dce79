"""The posterior precision Λ = U Uᵀ + diag(λ) of a sparse inverse Cholesky prior under Gaussian sites.

Λ is never factored exactly. An incomplete factor V on the pattern of U preconditions conjugate gradients, which make
means exact to their tolerance, and stands for Λ in determinants and covariances.
"""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mercer import _loops
from mercer.linalg.cholesky import NotPositiveDefiniteError, Solution
from mercer.linalg.incomplete import incomplete_factor, incomplete_logdet, precision_entries
from mercer.linalg.krylov import conjugate_gradients, quadratic_forms
from mercer.linalg.sic import Pattern, precision_diagonal, solve, times

_MAX_ITER = 200
_WORST_RESIDUAL = 1e-2  # of a solve that is still worth something
_FEW_ROWS = 2000  # quadratic forms of fewer rows visit all that they reach
_SMALLEST = 1e-8  # relative square of an entry that is followed further in quadratic forms of more


class PosteriorPrecision:
    """Λ = U Uᵀ + diag(λ), with its incomplete factor.

    Parameters
    ----------
    pattern : Pattern
    val : (*b, n, w)
        U; gradients flow through `logdet_and_variance` and `mean` only.
    precision : (*b, n)
        λ.
    tol : float
        Relative residual of every solve.
    shifting : bool
        Whether a factor that breaks down may be one of a shifted Λ, and so a preconditioner only.
    prior_entries : (*b, n, w), optional
        `mercer.linalg.incomplete.precision_entries` of U, where the caller has them already.

    Attributes
    ----------
    factor : (*b, n, w)
        V.
    shift : float
        See `mercer.linalg.incomplete.incomplete_factor`; 0 as a rule.
    residual : float
        Largest relative residual that a solve was left with.
    """

    def __init__(
        self,
        pattern: Pattern,
        val: Tensor,
        precision: Tensor,
        tol: float = 1e-10,
        shifting: bool = True,
        prior_entries: Tensor | None = None,
    ):
        self.pattern, self.tol, self.residual = pattern, tol, 0.0
        self._leaves = val, precision
        batch = torch.broadcast_shapes(val.shape[:-2], precision.shape[:-1])
        prior = precision_entries(pattern, val) if prior_entries is None else prior_entries
        entries = prior.expand(*batch, *val.shape[-2:])
        self._entries = torch.cat([entries[..., :-1], entries[..., -1:] + precision.unsqueeze(-1)], -1)
        self.val, self.precision = val.detach(), precision.detach()
        self.factor, self.shift = incomplete_factor(pattern, self._entries, shifting)

    def released(self) -> PosteriorPrecision:
        """Return the same without what only gradients need."""
        other = copy.copy(self)
        other._leaves, other._entries = (self.val, self.precision), self._entries.detach()
        return other

    @cached_property
    def diagonal(self) -> Tensor:
        """(*b, n), the diagonal of Λ."""
        return precision_diagonal(self.pattern, self.val) + self.precision

    def product(self, x: Tensor) -> Tensor:
        """Return Λ x for x (*c, *b, n)."""
        return times(self.pattern, self.val, times(self.pattern, self.val, x, True)) + self.precision * x

    def solve(self, rhs: Tensor, start: Tensor | None = None) -> Solution:
        """Return Λ⁻¹ rhs for rhs (*c, *b, n), which confesses its residual and iterations."""
        found = conjugate_gradients(
            self.product, rhs, self._near_inverse, tol=self.tol, max_iter=_MAX_ITER, start=start
        )
        self.residual = max(self.residual, found.stats["residual"])
        if not found.stats["residual"] < _WORST_RESIDUAL:
            raise NotPositiveDefiniteError("Conjugate gradients failed on the posterior precision.")
        return found

    def _near_inverse(self, x: Tensor) -> Tensor:
        return solve(self.pattern, self.factor, solve(self.pattern, self.factor, x), True)

    def mean(self, linear: Tensor, start: Tensor | None = None) -> Tensor:
        """Return Λ⁻¹ λ1 for λ1 (*b, n), differentiable in U, λ and λ1."""
        return _Mean.apply(*self._leaves, linear, self, start)

    @property
    def logdet(self) -> Tensor:
        """Return log |V Vᵀ|, (*b,); `missing_logdet` says what is missing to log |Λ|."""
        return 2.0 * self.factor[..., -1].log().sum(-1)

    def logdet_and_variance(self) -> tuple[Tensor, Tensor]:
        """Return log |V Vᵀ| (*b,) and its derivative in λ (*b, n), which approximates the diagonal of Λ⁻¹.

        Both are differentiable in U and λ.
        """
        return incomplete_logdet(self.pattern, self._entries, self.factor, self.shift)

    def missing_logdet(self, probes: Tensor, n_steps: int = 6) -> Tensor:
        """Return estimates of log |Λ| − log |V Vᵀ|, (k, *b), one of each probe, by Lanczos' quadrature.

        Parameters
        ----------
        probes : (k, *b, n)
            Entries ±1 at random. The better V, the nearer V⁻¹ Λ V⁻ᵀ to the identity, and the less they matter.
        n_steps : int
        """

        def whitened(x: Tensor) -> Tensor:
            return solve(self.pattern, self.factor, self.product(solve(self.pattern, self.factor, x, True)))

        return quadratic_forms(whitened, probes, torch.log, n_steps)

    def quadratic_forms(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Return bᵀ (V Vᵀ)⁻¹ b, (*b, q), of sparse vectors b with ``weights`` (q, m) at ``rows`` (q, m).

        Differentiable in the weights. For n > 2000 the sweep stops where what it would add is below 1e-8 of the sum.
        """
        return _QuadraticForms.apply(weights, rows, self)

    def whiten(self, x: Tensor) -> Tensor:
        """Return V⁻¹ x for x (*c, *b, n), so that x₁ᵀ (V Vᵀ)⁻¹ x₂ is a dot product; differentiable in x."""
        return solve(self.pattern, self.factor, x)

    def draws(self, noise: Tensor) -> Tensor:
        """Return draws V⁻ᵀ ε of covariance (V Vᵀ)⁻¹ from standard normal ε (k, *b, n)."""
        return solve(self.pattern, self.factor, noise, True)

    def exact_draws(self, prior_noise: Tensor, site_noise: Tensor) -> Solution:
        """Return draws of covariance Λ⁻¹ and mean zero, (k, *b, n), from two sets of standard normal draws.

        Λ⁻¹ (U ε₁ + √λ ε₂), by perturbing and solving; needs λ ≥ 0.

        References
        ----------
        Papandreou and Yuille (2010), "Gaussian sampling by local perturbations".
        """
        pushed = times(self.pattern, self.val, prior_noise) + self.precision.clamp_min(0.0).sqrt() * site_noise
        return self.solve(pushed)

    def sampled_variance(self, draws: Tensor) -> Tensor:
        """Return the diagonal of Λ⁻¹, (*b, n), estimated from exact draws (k, *b, n) without bias.

        Given all other entries, entry i has variance 1/Λᵢᵢ; what the draws estimate is only the spread of its
        conditional mean xᵢ − (Λ x)ᵢ/Λᵢᵢ (Rao and Blackwell).
        """
        conditional = draws - self.product(draws) / self.diagonal
        return self.diagonal.reciprocal() + conditional.square().mean(0)


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, val: Tensor, precision: Tensor, linear: Tensor, system: PosteriorPrecision, start: Tensor | None
    ) -> Tensor:
        mean = system.solve(linear.expand(torch.broadcast_shapes(linear.shape, system.factor.shape[:-1])), start).value
        ctx.save_for_backward(val, precision, linear, mean)
        ctx.system = system
        return mean

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        val, precision, linear, mean = ctx.saved_tensors
        system, pattern = ctx.system, ctx.system.pattern
        pulled = system.solve(grad).value
        by_val = None
        if ctx.needs_input_grad[0]:
            # −pulledᵀ d(U Uᵀ) mean
            index = pattern.columns.clamp_min(0)
            of_mean, of_pulled = (times(pattern, val, x, True).unsqueeze(-1) for x in (mean, pulled))
            by_val = -(pulled[..., index] * of_mean + mean[..., index] * of_pulled)
            by_val = by_val.masked_fill(pattern.padding, 0.0).sum_to_size(val.shape)
        return by_val, (-pulled * mean).sum_to_size(precision.shape), pulled.sum_to_size(linear.shape), None, None


class _QuadraticForms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, rows: Tensor, system: PosteriorPrecision) -> Tensor:
        ctx.save_for_backward(weights, rows)
        ctx.system = system
        factor, pattern = system.factor, system.pattern
        smallest = 0.0 if pattern.n <= _FEW_ROWS else _SMALLEST
        columns, picked = pattern.columns.cpu().numpy(), rows.cpu().numpy()
        values = weights.detach().double().cpu().contiguous().numpy()
        found = [
            torch.as_tensor(
                _loops.sic_quadratic_forms(
                    columns, each.double().cpu().numpy(), picked, values, smallest, torch.get_num_threads()
                )
            )
            for each in factor.reshape(-1, *factor.shape[-2:])
        ]
        return torch.stack(found).to(weights).reshape(*factor.shape[:-2], len(rows))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weights, rows = ctx.saved_tensors
        system = ctx.system
        index, unused = rows.clamp_min(0), rows < 0
        kept = weights.masked_fill(unused, 0.0)
        b = kept.new_zeros(len(rows), system.pattern.n).scatter_add(-1, index, kept)
        # one vector per batch element of the factor
        b = b.reshape(len(rows), *[1] * (system.factor.dim() - 2), -1)
        solved = system._near_inverse(b.expand(len(rows), *system.factor.shape[:-1]))
        places = index.reshape(len(rows), *[1] * (system.factor.dim() - 2), -1)
        slopes = 2.0 * solved.gather(-1, places.expand(*solved.shape[:-1], -1))
        slopes = (grad.movedim(-1, 0).unsqueeze(-1) * slopes).reshape(len(rows), -1, index.shape[-1]).sum(1)
        return slopes.masked_fill(unused, 0.0), None, None
