"""Kernels for the axes of a grid: their frequencies are those of the forcing and of the conditions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mercer.kernels import MixtureKernel
from mercer.kernels.frequencies import find_frequencies, find_frequencies_grid
from mercer.pde.grid_equation import GridEquation
from mercer.pde.sides import Side

_WEAKEST = 1e-7  # amplitude of a wave of u beside the strongest
_ROUGH = 1e-3
_ACCURATE = 1e-5  # how far a first solution is trusted
_APART = 0.3  # cycles over an axis: nearer frequencies are one line
_SAME = 0.01
_COLUMNS = 16  # of data on a side that are looked at
_FEWEST = 4  # nodes along an axis that can show a wave
_MOST = 12  # waves along an axis


def kernels_of_data(equation: GridEquation, sides: Sequence[Side], spectrum: str) -> list[MixtureKernel]:
    """Return one kernel per axis from what is known before anything is solved.

    The forcing shows a wave of u times |P(iω)|, P the symbol of the equation; what would be too weak in u is left out.
    Data at a side show the waves along it. Equations without forcing (waves, advection, heat) have only the latter.

    Raises
    ------
    ValueError
        Fewer than four nodes along an axis show no waves.
    """
    n_axes = len(equation.shape)
    if min(equation.shape) < _FEWEST:
        raise ValueError(
            f"n_collocation (the shape of the grid) is {' × '.join(map(str, equation.shape))}: waves are not found on "
            f"fewer than {_FEWEST} nodes along an axis. Take more, or give kernels."
        )
    found: list[list[Tensor]] = [[] for _ in range(n_axes)]
    zeros = [torch.zeros_like(equation.rhs) for _ in equation.indices]
    _, forcing = equation.linearise(zeros)
    if bool(forcing.any()):
        # the forcing of a non-linear equation has faint waves that are its own, and the solution is looked at later
        frequencies, amplitude = _waves(equation.nodes, forcing, _WEAKEST if equation.pde.linear else _ROUGH)
        slopes, _ = equation.pde.jacobian(equation.X, [zero.reshape(-1) for zero in zeros])
        response = equation.pde.symbol(frequencies, slopes).abs()
        size = amplitude / response.clamp_min(1e-300)
        kept = frequencies[size >= _WEAKEST * size.max()] if len(size) else frequencies
        for j in range(n_axes):
            found[j].append(kept[:, j])
    for k in range(n_axes):
        across = [side.target.movedim(k, 0).reshape(equation.shape[k], -1) for side in sides if side.axis != k]
        if across:
            columns = torch.cat([columns[:, :: max(1, columns.shape[1] // _COLUMNS)] for columns in across], 1)
            found[k].append(find_frequencies(equation.nodes[k], columns, _MOST)[0])
    return [
        _kernel(x, torch.cat([x.new_zeros(1), *lines]), spectrum)
        for x, lines in zip(equation.nodes, found, strict=True)
    ]


def kernels_of_solution(nodes: Sequence[Tensor], U: Tensor, spectrum: str) -> list[MixtureKernel]:
    """Return one kernel per axis with the frequencies of grid values."""
    frequencies, _ = _waves(nodes, U, _ACCURATE)
    return [_kernel(x, torch.cat([x.new_zeros(1), frequencies[:, j]]), spectrum) for j, x in enumerate(nodes)]


def alike(first: Sequence[MixtureKernel], second: Sequence[MixtureKernel], nodes: Sequence[Tensor]) -> bool:
    """Say whether two sets of mixtures have the same lines, to a small part of a cycle over each axis."""
    for one, other, x in zip(first, second, nodes, strict=True):
        here, there = one.frequency.detach(), other.frequency.detach()
        if here.shape != there.shape or bool((here - there).abs().max() * (x[-1] - x[0]) > _SAME):
            return False
    return True


def _waves(nodes: Sequence[Tensor], values: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """Return frequencies (k, D) and amplitudes (k,) of values on a grid."""
    if len(nodes) > 1:
        return find_frequencies_grid(nodes, values, tol=tol, most_per_axis=_MOST)
    frequency, amplitude = find_frequencies(nodes[0], values, tol=tol)
    return frequency[:, None], amplitude


def _kernel(nodes: Tensor, frequency: Tensor, spectrum: str) -> MixtureKernel:
    """Return a mixture with a line at each frequency and at 0, long beside the domain (§2.3 of the specification)."""
    length = float(nodes[-1] - nodes[0])
    lines: list[float] = []
    for value in frequency.sort().values.tolist():
        if not lines or value - lines[-1] > _APART / length:
            lines.append(value)
    ell = length / 2 if spectrum == "student" else length / math.sqrt(8)
    weight = [math.exp(-1)] * len(lines)
    return MixtureKernel(weight=weight, lengthscale=[ell] * len(lines), frequency=lines, spectrum=spectrum)
