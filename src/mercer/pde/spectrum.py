"""Where in the spectrum a solution lives, read off the equation's data: forcing, boundary and initial values.

The solution of a linear equation has the frequencies of its forcing, and those of the data on its faces; along the axis
that a face does not show, the equation itself says what goes with them: P(iω) = 0. A known solution is never looked at.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mercer.kernels import MixtureKernel
from mercer.kernels.frequencies import find_frequencies_grid
from mercer.pde.conditions import Condition, Periodic
from mercer.pde.domain import Box
from mercer.pde.equation import PDE

_MOST_NODES = {1: 16_384, 2: 1_200_000}  # of the grid on which a forcing is looked at, by dimension; 600 000 beyond
_SAME = 0.02  # cycles over an axis by which two lines differ at least
_WAVE = 0.02  # cycles over an axis below which there is no wave
_FAINTEST = 1e-3  # of the largest weight: quadrature at small nuggets resolves fainter parts anyway
_SILENT = 1e-9  # size of data, beside those of all faces, that are rounding
_REAL = 1e-6
_DECAYS = 4.0  # along an axis from which a decay needs a lengthscale of its own


@dataclass(frozen=True)
class Lines:
    """Lines of a spectrum.

    Parameters
    ----------
    frequency : (k, d)
        Cycles per unit of each axis, ≥ 0.
    decay : (k, d)
        Rate at which the wave's envelope changes along each axis, per unit of X, ≥ 0; 0 where nothing is known of it.
    amplitude : (k,)
        In units of u, up to a common factor.
    """

    frequency: Tensor
    decay: Tensor
    amplitude: Tensor

    @classmethod
    def none(cls, d: int) -> Lines:
        """Return no lines."""
        zero = torch.zeros(0, d, dtype=torch.float64)
        return cls(zero, zero, zero[:, 0])

    def __len__(self) -> int:
        return len(self.amplitude)

    def join(self, other: Lines, domain: Box) -> Lines:
        """Return these lines and those of the others that are not among them."""
        lengths = self.frequency.new_tensor(domain.lengths)
        new = []
        for i in range(len(other)):
            gap = ((self.frequency - other.frequency[i]).abs() * lengths).amax(1)
            slower = (self.decay - other.decay[i]).abs() * lengths <= 0.5 * _DECAYS
            if not bool(((gap < _SAME) & slower.all(1)).any()):
                new.append(i)
        parts = zip(
            (self.frequency, self.decay, self.amplitude), (other.frequency, other.decay, other.amplitude), strict=True
        )
        return Lines(*(torch.cat([mine, its[new]]) for mine, its in parts))

    def strongest(self, n: int) -> Lines:
        """Return the n lines of largest amplitude."""
        kept = self.amplitude.argsort(descending=True)[:n]
        return Lines(self.frequency[kept], self.decay[kept], self.amplitude[kept])

    def highest(self) -> tuple[float, ...]:
        """Return the highest frequency along each axis, zeros without lines."""
        return tuple(self.frequency.amax(0).tolist()) if len(self) else (0.0,) * self.frequency.shape[1]


def forcing_lines(pde: PDE, counts: Sequence[int], J: Sequence[Tensor]) -> Lines:
    """Find the lines of the forcing and weight them with the equation's symbol, û = f̂/P(iω).

    Parameters
    ----------
    pde : PDE
    counts : sequence of int
        Nodes along each axis; the forcing is looked at there and between them.
    J : one (E, n) per request
        Linearisation of the equation, from `PDE.jacobian`.
    """
    domain, found = pde.domain, Lines.none(pde.domain.d)
    most = _MOST_NODES.get(domain.d, 600_000)
    fine = [2 * n - 1 for n in counts]
    if math.prod(fine) > most:
        shrink = (most / math.prod(fine)) ** (1 / domain.d)
        fine = [max(8, min(n, int(shrink * k))) for n, k in zip(counts, fine, strict=True)]
    axes = domain.axes(fine)
    X = torch.cartesian_prod(*axes).reshape(-1, domain.d)
    for equation, values in enumerate(pde.target(X)):
        if not bool((values != 0).any()):
            continue
        frequency, amplitude = find_frequencies_grid(axes, values.reshape(fine))
        for field in range(len(pde.fields)):
            size = _size_of_symbol(pde, frequency, J, equation, field)
            # what is slower than the domain counts as filling it, and resonance is bounded
            slow = torch.tensor([[0.16 / length for length in domain.lengths]], dtype=torch.float64)
            size = size.clamp_min(float(_size_of_symbol(pde, slow, J, equation, field)))
            weighted = amplitude / size.clamp_min(1e-300)
            if bool((size > 0).any()):
                found = found.join(Lines(frequency, torch.zeros_like(frequency), weighted), domain)
    return found


def homogeneous_lines(pde: PDE, conditions: Sequence[Condition], counts: Sequence[int], J: Sequence[Tensor]) -> Lines:
    """Find the lines of boundary and initial data, with what the equation makes of them along the axis across.

    Parameters
    ----------
    pde, counts, J
        As in `forcing_lines`.
    conditions : sequence of Condition
    """
    domain, found = pde.domain, Lines.none(pde.domain.d)
    if domain.d == 1:
        empty = torch.zeros(1, 0, dtype=torch.float64)
        return _across(pde, J, 0, empty, torch.ones(1, dtype=torch.float64))
    samples = list(_face_values(domain, conditions, counts))
    size = max((float(values.abs().max()) for _, _, values in samples), default=0.0)
    for column, axes, values in samples:
        if float(values.abs().max()) > _SILENT * size:
            frequency, amplitude = find_frequencies_grid(axes, values)
            found = found.join(_across(pde, J, column, frequency, amplitude), domain)
    return found


def solution_lines(domain: Box, counts: Sequence[int], values: Tensor, most: int = 64) -> Lines:
    """Find the lines of an approximate solution on the grid of ``counts`` nodes, Π counts values."""
    frequency, amplitude = find_frequencies_grid(domain.axes(counts), values.reshape(tuple(counts)), most)
    return Lines(frequency, torch.zeros_like(frequency), amplitude)


def mixture(lines: Lines, domain: Box, ratio: float, spectrum: str = "gaussian") -> MixtureKernel:
    """Return the prior whose lines are these, and one at frequency zero.

    Parameters
    ----------
    lines : Lines
    domain : Box
    ratio : float
        How often a lengthscale fits into the domain, along every axis; envelopes with a decay get shorter ones.
    spectrum : {"gaussian", "student"}
    """
    zero = torch.zeros(1, domain.d, dtype=torch.float64)
    top = lines.amplitude.max().reshape(1) if len(lines) else torch.ones(1, dtype=torch.float64)
    # what is smooth may be hidden under the forcing of a fast wave, so that it counts like the strongest line
    lines = lines.join(Lines(zero, zero, top), domain)
    lengths = zero.new_tensor(domain.lengths)
    frequency = torch.where(lines.frequency * lengths < _WAVE, 0.0, lines.frequency)
    lengthscale = torch.minimum(lengths / ratio, 2.0 / lines.decay.clamp_min(1e-300))
    weight = lines.amplitude.square()
    weight = (weight / weight.max().clamp_min(1e-300)).clamp_min(_FAINTEST)
    return MixtureKernel(weight=weight, lengthscale=lengthscale, frequency=frequency, spectrum=spectrum)


def _size_of_symbol(pde: PDE, frequency: Tensor, J: Sequence[Tensor], equation: int, field: int) -> Tensor:
    """Return |P(iω)|, averaged over the directions in which the waves can travel, (k,)."""
    directions = [pde.symbol(frequency * sign, J, equation, field).abs() for sign in _signs(pde.domain.d)]
    return torch.stack(directions).mean(0)


def _face_values(
    domain: Box, conditions: Sequence[Condition], counts: Sequence[int]
) -> Iterator[tuple[int, list[Tensor], Tensor]]:
    """Yield the column across, the axes along and the values on a grid for each face with data."""
    fine = [2 * n - 1 for n in domain.counts(counts)]
    for condition in conditions:
        if isinstance(condition, Periodic):
            continue
        for column, upper in condition.faces(domain):
            others = [j for j in range(domain.d) if j != column]
            points = domain.on_face(column, upper, fine, math.prod(fine))
            values = condition.given(domain, column, points)
            axes = domain.axes(fine)
            yield column, [axes[j] for j in others], values.reshape([fine[j] for j in others])


def _across(pde: PDE, J: Sequence[Tensor], column: int, frequency: Tensor, amplitude: Tensor) -> Lines:
    """Complete frequencies (k, d − 1) on a face by the roots of the symbol along the axis across it."""
    domain = pde.domain
    others = [j for j in range(domain.d) if j != column]
    rows: list[tuple[list[float], list[float], float]] = []
    for mu, size in zip(frequency.tolist(), amplitude.tolist(), strict=True):
        for field in range(len(pde.fields)):
            for equation in range(pde.n_equations):
                for sign in _signs(len(others)):
                    omega = [2 * math.pi * m * float(s) for m, s in zip(mu, sign, strict=True)]
                    for root in _roots(pde, J, equation, field, column, others, omega):
                        full, decay = [0.0] * domain.d, [0.0] * domain.d
                        for j, m in zip(others, mu, strict=True):
                            full[j] = m
                        turns = abs(root.imag) / (2 * math.pi)
                        full[column] = turns if turns * domain.lengths[column] > _WAVE else 0.0
                        rate = abs(root.real)
                        slow = rate * domain.lengths[column] < _DECAYS or rate < _REAL * abs(root)
                        decay[column] = 0.0 if slow else rate
                        rows.append((full, decay, size))
    found = Lines.none(domain.d)
    for full, decay, size in rows:
        waves, envelope, amplitudes = (torch.tensor([v], dtype=torch.float64) for v in (full, decay, size))
        found = found.join(Lines(waves, envelope, amplitudes), domain)
    return found


def _roots(
    pde: PDE, J: Sequence[Tensor], equation: int, field: int, column: int, others: list[int], omega: list[float]
) -> list[complex]:
    """Return the s with P(…, s, …) = 0 in the place of iω of one axis; none where the equation is free of it."""
    coefficients = np.zeros(pde.order[column] + 1, dtype=complex)
    for (where, index), slope in zip(pde.requests, J, strict=True):
        if where == field:
            factor = np.prod([(1j * w) ** index[j] for j, w in zip(others, omega, strict=True)]) if others else 1.0
            coefficients[index[column]] += complex(slope[equation].detach().mean()) * factor
    size = np.abs(coefficients).max()
    if size == 0:
        return []
    coefficients[np.abs(coefficients) < 1e-14 * size] = 0
    return [complex(root) for root in np.roots(coefficients[::-1])]


def _signs(d: int) -> list[Tensor]:
    """Return the directions that a product of waves can travel, up to the common sign."""
    if d == 0:
        return [torch.ones(0, dtype=torch.float64)]
    return [torch.tensor([1.0, *rest], dtype=torch.float64) for rest in itertools.product((1.0, -1.0), repeat=d - 1)]
