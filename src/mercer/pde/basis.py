"""Trigonometric features of mixtures of Gaussian lines: priors as linear models with exact derivatives.

Each line of the spectrum is a quadrature rule; products over columns take only the combinations of frequencies that the
mixture has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from mercer.kernels import MixtureKernel
from mercer.kernels.functionals import Functional, Term

_LONG = 4.5  # windows in the domain up to which Gauss–Hermite needs fewer nodes
_OVERLAP = 6.0  # lengthscales by which the period of the trapezoidal rule exceeds the domain
_TAIL = 6.0  # exp(−t²) there is 2e-16

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
