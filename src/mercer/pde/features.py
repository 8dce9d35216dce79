"""Conditioning on functionals by features and QR: solver F, for mixtures of Gaussian lines.

Quadrature of each line of the spectrum makes the prior a linear model of trigonometric features, whose derivatives are
exact. The weights follow from one least-squares problem by QR, which never squares the condition number: nuggets may be
1e-24 where Cholesky needs 1e-10. Rows pass through in blocks, so that memory does not grow with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from mercer.kernels import MixtureKernel
from mercer.kernels.functionals import Functional, Term
from mercer.pde.rows import Rows, calibrates, cut, gaussian_constant

NUGGET = 1e-20
_LONG = 4.5  # windows in the domain up to which Gauss–Hermite needs fewer nodes
_OVERLAP = 6.0  # lengthscales by which the period of the trapezoidal rule exceeds the domain
_TAIL = 6.0  # exp(−t²) there is 2e-16
_PREDICTED = 4_000_000  # elements of one block of features where posteriors are evaluated


Rule = tuple[np.ndarray, np.ndarray]


@cache
def quadrature(ratio: float, spare: int = 8) -> Rule:
    """Return nodes t and weights with Σ w cos(2tb) ≈ exp(−b²) for a line whose lengthscale fits ``ratio`` times.

    Parameters
    ----------
    ratio : float
        Length of the domain over the lengthscale.
    spare : int
        Nodes beyond what the ratio asks for.

    Returns
    -------
    nodes, weights : (J,)
        Symmetric and of odd length: the centre of the line is a node, so that a wave of known frequency is a feature.

    Notes
    -----
    Gauss–Hermite for long windows. Its nodes grow with the square of the ratio; short windows take the trapezoidal
    rule, whose error is the window one period away, and whose nodes grow in proportion.
    """
    if ratio <= _LONG:
        n = math.ceil(spare + 1.5 * ratio + 0.5 * ratio**2)
        nodes, weights = np.polynomial.hermite.hermgauss(n + 1 - n % 2)
        return nodes, weights / math.sqrt(math.pi)
    step = math.sqrt(2) * math.pi / (ratio + _OVERLAP)
    half = math.ceil(_TAIL / step)
    uniform = step * np.arange(-half, half + 1)
    gaussian = np.exp(-np.square(uniform))
    return uniform, gaussian / gaussian.sum()


class Features:
    """Trigonometric features with k(x, x′) ≈ φ(x)ᵀφ(x′) for one mixture per field.

    Parameters
    ----------
    kernels : sequence of MixtureKernel
        With Gaussian lines, and frequencies for all d columns.
    centre, lengths : (d,)
        Of the domain: phases are taken from its centre, and quadrature is accurate over its lengths.
    spare : int
        Quadrature nodes beyond what the lengthscale asks for; see `quadrature`.

    Attributes
    ----------
    size : int
        m, number of features.

    Notes
    -----
    Each component is a product over columns of cosines and sines at its nodes; nodes at −ξ repeat those at ξ where the
    frequency is 0, and are left out. The numbers of nodes are chosen once; values follow the kernels' parameters.
    """

    def __init__(
        self, kernels: Sequence[MixtureKernel], centre: Sequence[float], lengths: Sequence[float], spare: int = 8
    ):
        self.kernels = list(kernels)
        self.centre = tuple(centre)
        self.rules: list[list[list[Rule]]] = []
        for kernel in kernels:
            if not isinstance(kernel, MixtureKernel) or kernel.spectrum != "gaussian":
                raise TypeError(f"features need a GaussianMixture for each field, got {type(kernel).__name__}.")
            ell = kernel.lengthscale.detach().expand(-1, len(self.centre)).tolist()
            self.rules.append([[quadrature(b / e, spare) for e, b in zip(row, lengths, strict=True)] for row in ell])
        self.sizes = [
            sum(self._component_size(f, q) for q in range(kernel.n_components)) for f, kernel in enumerate(self.kernels)
        ]
        self.size = sum(self.sizes)

    def evaluate(self, L: Functional) -> Tensor:
        """Return ℓ_i(φ), (n, m); differentiable in the kernels' parameters and in the coefficients."""
        n = len(L[0].coefficient)
        columns = []
        for f, kernel in enumerate(self.kernels):
            terms = [term for term in L if term.field == f]
            if terms:
                columns += self._field(f, kernel, terms)
            else:
                columns.append(L[0].X.new_zeros(n, self.sizes[f]))
        return torch.cat(columns, 1)

    def _field(self, f: int, kernel: MixtureKernel, terms: Sequence[Term]) -> list[Tensor]:
        """Return one (n, m_q) block for each component of a field."""
        X = terms[0].X
        shape = (-1, X.shape[1])
        weight, ell = kernel.weight.to(X), kernel.lengthscale.to(X).expand(*shape)
        frequency = kernel.frequency.to(X).expand(*shape)
        blocks = []
        for q in range(kernel.n_components):
            known: dict[tuple, Tensor] = {}
            total: Tensor | None = None
            for term in terms:
                product = (weight[q].sqrt() * term.coefficient)[:, None]
                for j, order in enumerate(term.index):
                    key = (id(term.X), j, order)
                    if key not in known:
                        wave = bool(kernel.moving[q, min(j, kernel.moving.shape[1] - 1)])
                        mu = frequency[q, j] if wave else None
                        x = term.X[:, j] - self.centre[j]
                        known[key] = _column(x, mu, ell[q, j], self.rules[f][q][j], order)
                    factor = known[key]
                    product = (product.unsqueeze(2) * factor.unsqueeze(1)).flatten(1)
                total = product if total is None else total + product
            assert total is not None
            blocks.append(total)
        return blocks

    def _component_size(self, f: int, q: int) -> int:
        moving = self.kernels[f].moving[q].expand(len(self.centre)).tolist()
        return math.prod(_width(rule, wave) for rule, wave in zip(self.rules[f][q], moving, strict=True))


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
        ŝ² = yᵀ(G + R)⁻¹y/n, dimensionless. Multiplies variances if no row has noise of its own; far above 1 the prior
        does not fit.
    nugget : float

    Notes
    -----
    O(n m²) time and O(m²) memory. Rows [Φ/√R, y/√R] and [I, 0] are reduced to [R̃, z; 0, ρ]: the weights' mean is R̃⁻¹z,
    their covariance (R̃ᵀR̃)⁻¹, yᵀ(G + R)⁻¹y = ρ², and |G + R| = |R| |R̃|².
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
        self.scale = quadratic / self.n
        self.calibrated: bool = calibrates(self.rows) and (start is None or start.calibrated)
        half_det = float(self.factor.diagonal().abs().log().sum())
        self.log_evidence = -0.5 * quadratic - half_det - 0.5 * log_noise + gaussian_constant(self.n)

    @property
    def amplitude(self) -> float:
        """What prior variances are multiplied with: ŝ² and ``surprise``, or 1 where noise has units of its own."""
        return self.scale * self.surprise if self.calibrated else 1.0

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
    return torch.linalg.qr(A, mode="r")[1]


def _width(rule: Rule, wave: bool) -> int:
    """Return how many features one column of a component has: cosine and sine at each node, without repetitions."""
    return 2 * len(rule[0]) if wave else len(rule[0])


def _column(x: Tensor, mu: Tensor | None, ell: Tensor, rule: Rule, order: int) -> Tensor:
    """Return the order-th derivatives of the cosines and sines of one column, (n, width).

    Nodes ξ = μ + t √2/(2πℓ): the line of the window exp(−d²/2ℓ²) is N(μ, 1/(2πℓ)²).
    """
    nodes, weights = rule
    if mu is None:  # those at −t are those at t
        centre = len(nodes) // 2
        nodes, weights = np.abs(nodes[centre:]), weights[centre:] * np.where(np.arange(centre + 1) > 0, 2.0, 1.0)
    t, root = (torch.as_tensor(value).to(x) for value in (nodes, np.sqrt(weights)))
    omega = t * math.sqrt(2) / ell
    if mu is not None:
        omega = omega + 2 * math.pi * mu
    phase = x[:, None] * omega
    scale = root if order == 0 else root * omega**order
    cosine, sine = phase.cos(), phase.sin()
    of_cosine, of_sine = ((cosine, sine), (-sine, cosine), (-cosine, -sine), (sine, -cosine))[order % 4]
    first = 1 if mu is None else 0  # the sine of frequency zero
    return torch.cat([of_cosine * scale, of_sine[:, first:] * scale[first:]], 1)
