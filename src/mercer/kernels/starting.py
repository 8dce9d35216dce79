"""Where mixtures start: the waves that are in the data.

The default of every other parameter is a number, because standardised data look alike; frequencies do not. This file
gives mixtures without frequencies those that the targets show, before anything is learned.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Sequence

import torch
from gpytorch.kernels import AdditiveKernel, Kernel, ProductKernel, ScaleKernel
from scipy.stats import beta
from torch import Tensor

from mercer.kernels.frequencies import find_frequencies
from mercer.kernels.mixture import MixtureKernel
from mercer.kernels.params import is_unset
from mercer.kernels.units import variance_carrier

_MOST_ROWS = 2000
_MOST_CYCLES = 24.0  # over the spread of a column, for pairs of columns
_LEAST_CYCLES = 0.75
_PREFERENCE = 0.8  # of a wave along one column to a pair that explains a little more
_PER_CYCLE = 4
_MOST_PAIRED = 6  # columns of which all pairs are looked at
_CHANCE = 1e-3  # of taking noise for a wave
_SAME_CYCLES = 0.5  # over the spread of a column, by which frequencies of two outputs may differ
_LEAST_SHARE = 0.05  # of the variance of the targets, for a component that nothing was found for


def start_from_data(kernel: Kernel, X: Tensor, y: Tensor, *, amplitudes: bool = True) -> list[str]:
    """Give the mixtures of a kernel whose frequencies were never set those of the waves in the data, in place.

    Parameters
    ----------
    kernel : gpytorch Kernel
        From :func:`mercer.kernels.adapt.prepare`; parameters are in the units of X and y.
    X : (n, d)
    y : (n,) or (n, p)
        NaN is missing. Several outputs share their frequencies, and variances are then those of standardised outputs.
    amplitudes : bool, default=True
        Whether weights are known from those of the waves; not where y is not in the units of the latent function.
        Inside of a scale, or of a product whose variance another factor carries, they are shares of one.

    Returns
    -------
    list of str
        One sentence per mixture.

    Notes
    -----
    The first component has no wave. Each other one has the next strongest wave, along one column or a pair of them, for
    as many as are beyond what noise would give, and a lengthscale of half the spread of a column. What is left over
    starts at one cycle, two, … over the data. Of more rows than 2000 as many are drawn, because every k-th would make
    fast waves look like slow ones. Outputs that are missing at different rows are looked at one by one.
    """
    X, y = X.detach().double(), y.detach().double().reshape(len(y), -1)
    sets = _complete(X, y)
    found = list(_mixtures(kernel, list(range(X.shape[1]))))
    # where two factors could carry the variance it is the one whose amplitude is set, and these weights are about to be
    unset = {id(p) for p in kernel.parameters() if is_unset(p)}
    unset -= {id(leaf.raw_weight) for leaf, *_ in found} if amplitudes else set()
    carried = {id(leaf) for leaf in _carriers(kernel, unset)}
    notes = []
    for leaf, columns in found:
        seen = [(rows[:, columns], values) for rows, values in sets]
        notes.append(_start(leaf, X[:, columns], seen, y.shape[1], amplitudes, id(leaf) in carried))
    return notes


def _complete(X: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return rows and targets without gaps, centred and of several outputs in standard deviations.

    All outputs together where they are mostly seen together, else one by one; outputs without a value are left out.
    """
    present = ~y.isnan()
    together = present.all(1)
    if 2 * int(together.sum()) >= int(present.sum(0).max()):
        groups = [(together, list(range(y.shape[1])))] if bool(together.any()) else []
    else:
        groups = [(present[:, j], [j]) for j in range(y.shape[1]) if bool(present[:, j].any())]
    sets = []
    for rows, outputs in groups:
        index = rows.nonzero().squeeze(1)
        if len(index) > _MOST_ROWS:
            drawn = torch.randperm(len(index), generator=torch.Generator().manual_seed(0))[:_MOST_ROWS]
            index = index[drawn.sort().values.to(index.device)]
        values = y[index][:, outputs]
        values = values - values.mean(0)
        if y.shape[1] > 1:
            values = values / values.std(0, correction=0).clamp_min(1e-300)
        sets.append((X[index], values))
    return sets


def _mixtures(kernel: Kernel, visible: list[int], selected: bool = False) -> Iterator[tuple[MixtureKernel, list[int]]]:
    """Yield the mixtures without frequencies, each with the columns that it sees."""
    if kernel.active_dims is not None and not selected:
        visible = [visible[j] for j in kernel.active_dims.tolist()]
    if isinstance(kernel, ScaleKernel):
        yield from _mixtures(kernel.base_kernel, visible, selected=True)
    elif isinstance(kernel, MixtureKernel):
        if is_unset(kernel.raw_frequency) and kernel.raw_frequency.numel():
            yield kernel, visible
    else:
        for part in getattr(kernel, "kernels", []):
            yield from _mixtures(part, visible)


def _carriers(kernel: Kernel, unset: Collection[int]) -> Iterator[Kernel]:
    """Yield the leaves whose variances are in units of y²."""
    if isinstance(kernel, ProductKernel):
        yield from _carriers(variance_carrier(kernel, unset), unset)
    elif isinstance(kernel, AdditiveKernel):
        for part in kernel.kernels:
            yield from _carriers(part, unset)
    elif not isinstance(kernel, ScaleKernel):
        yield kernel


def _start(
    kernel: MixtureKernel,
    X: Tensor,
    sets: Sequence[tuple[Tensor, Tensor]],
    n_outputs: int,
    amplitudes: bool,
    carries: bool,
) -> str:
    q, d = kernel.n_components, X.shape[1]
    spread = X.amax(0) - X.amin(0)
    spread = spread.where(spread > 0, torch.ones_like(spread))
    variance = sum(float(y.square().mean(0).sum()) for _, y in sets) / n_outputs or 1.0
    frequency, amplitude = _joined([_waves_in(rows, y, q - 1, spread) for rows, y in sets], spread, q - 1)
    n_found = len(frequency)
    rest = torch.arange(1, q - n_found).to(X)[:, None] / spread
    kernel.frequency = torch.cat([X.new_zeros(1, d), frequency, rest])
    if is_unset(kernel.raw_lengthscale):
        smooth = X.std(0, correction=0).where(spread > 0, spread) * min(8.0, max(1.0, math.sqrt(d)))
        smooth = smooth.where(smooth > 0, spread)
        kernel.lengthscale = torch.cat(
            [smooth[None], (spread / 2).expand(n_found, d), (spread / 4).expand(len(rest), d)]
        )
    if amplitudes and is_unset(kernel.raw_weight):
        weight = X.new_full((q,), _LEAST_SHARE * variance)
        weight[1 : n_found + 1] = (amplitude.square() / (2 * n_outputs)).clamp_min(_LEAST_SHARE**2 * variance)
        weight[0] = max(variance - float(weight[1 : n_found + 1].sum()), 2 * _LEAST_SHARE * variance)
        kernel.weight = weight if carries else weight / weight.sum()
    return f"{kernel.short_name} starts from {n_found} wave(s) in the data"


def _joined(found: Sequence[tuple[Tensor, Tensor]], spread: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the strongest waves of all sets, each once; what sets share adds up in its square."""
    if len(found) == 1:
        return found[0]
    frequency, power = spread.new_zeros(0, len(spread)), spread.new_zeros(0)
    for other, amplitude in found:
        for mu, size in zip(other, amplitude, strict=True):
            near = ((frequency - mu).abs() * spread).amax(1) < _SAME_CYCLES
            power = torch.where(near, power + size.square(), power)
            if not bool(near.any()):
                frequency, power = torch.cat([frequency, mu[None]]), torch.cat([power, size.square()[None]])
    strongest = power.argsort(descending=True)[:most]
    return frequency[strongest], power[strongest].sqrt()


def _waves_in(X: Tensor, y: Tensor, most: int, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Return frequencies (k, d), k ≤ most, and amplitudes of the waves in y, in the root of the sum over outputs."""
    if most < 1 or len(X) < 8 or not bool(y.any()):
        return X.new_zeros(0, X.shape[1]), X.new_zeros(0)
    if X.shape[1] == 1:
        if len(X.unique()) < 4:
            return X.new_zeros(0, 1), X.new_zeros(0)
        frequency, amplitude = find_frequencies(X[:, 0], y, most)
        return frequency[:, None], amplitude
    return _waves_in_columns((X - X.amin(0)) / spread, y, most, spread)


def _waves_in_columns(t: Tensor, y: Tensor, most: int, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Add the best wave along one column or a pair of them, one after the other; ``t`` is between 0 and 1."""
    n, d = t.shape
    found: list[Tensor] = []
    basis = [torch.ones_like(t[:, :1])]
    residual, coefficients = y, y.new_zeros(0, y.shape[1])
    while len(found) < most:
        frequency, lines = _best(t, residual)
        basis.append(_products(t, frequency))
        whole = torch.cat(basis, 1)
        u, s, vt = torch.linalg.svd(whole, full_matrices=False)
        kept = s > 1e-10 * s[0]
        projected = u[:, kept].mT @ y
        left = y - u[:, kept] @ projected
        share = 1 - float(left.square().sum()) / max(float(residual.square().sum()), 1e-300)
        # what functions of noise explain has a beta distribution; as many lines were looked at
        size = basis[-1].shape[1]
        if lines * beta.sf(share, size / 2, (n - 1 - size) / 2) > _CHANCE:
            break
        found.append(frequency)
        residual, coefficients = left, (vt[kept].mT / s[kept]) @ projected
    if not found:
        return t.new_zeros(0, d), t.new_zeros(0)
    parts = coefficients[1:].split([part.shape[1] for part in basis[1 : len(found) + 1]])
    waves = [part @ c for part, c in zip(basis[1:], parts, strict=False)]
    amplitude = torch.stack([(2 * wave.square().mean(0).sum()).sqrt() for wave in waves])
    rank = amplitude.argsort(descending=True)
    return (torch.stack(found) / spread)[rank], amplitude[rank]


def _best(t: Tensor, residual: Tensor) -> tuple[Tensor, float]:
    """Return the frequencies (d,) with the highest power, in cycles over the data, and how many lines there are."""
    n, d = t.shape
    cycle = torch.arange(1, int(_PER_CYCLE * min(_MOST_CYCLES, n / 2)) + 1).to(t) / _PER_CYCLE
    angles = 2 * math.pi * t.unsqueeze(-1) * cycle
    waves = torch.cat([angles.cos(), angles.sin()], -1).unbind(1)
    best, frequency, lines = -1.0, t.new_zeros(d), 0.0
    single = [(j,) for j in range(d)]
    for columns in [*single, *(itertools.combinations(range(d), 2) if d <= _MOST_PAIRED else ())]:
        power = t.new_zeros([len(cycle)] * len(columns))
        for values in residual.mT:
            if len(columns) == 1:
                power += (values @ waves[columns[0]]).square().reshape(2, -1).sum(0)
            else:
                product = (waves[columns[0]] * values[:, None]).mT @ waves[columns[1]]
                # four products of a cosine or sine, each with half the norm of one wave
                power += 2 * _PREFERENCE * product.square().reshape(2, len(cycle), 2, len(cycle)).sum((0, 2))
        if len(columns) == 2:  # products of less than a cycle are nearly the same functions, and count double
            power[cycle < _LEAST_CYCLES] = 0.0
            power[:, cycle < _LEAST_CYCLES] = 0.0
        lines += (len(cycle) / _PER_CYCLE) ** len(columns)
        if float(power.max()) > best:
            best, frequency = float(power.max()), t.new_zeros(d)
            frequency[list(columns)] = cycle[torch.stack(torch.unravel_index(power.argmax(), power.shape))]
    return frequency, lines


def _products(t: Tensor, frequency: Tensor) -> Tensor:
    """Return all products of a cosine or sine per column that has a frequency, (n, 2) or (n, 4)."""
    product = torch.ones_like(t[:, :1])
    for j in frequency.nonzero().flatten().tolist():
        angle = 2 * math.pi * frequency[j] * t[:, j, None]
        product = torch.cat([product * angle.cos(), product * angle.sin()], 1)
    return product
