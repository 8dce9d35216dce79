"""Frequencies of the waves in data: peaks of a periodogram, refined together by variable projection.

A kernel's evidence has one optimum per period that fits into the data, so frequencies are found before they are
learned. Peaks of a Hann periodogram are added one at a time; after each, all frequencies move by Gauss–Newton steps on
the residual of the best amplitudes. Waves of less than a period come out to as many digits as the data have.

References
----------
Golub and Pereyra (1973), The differentiation of pseudo-inverses and nonlinear least squares problems whose variables
separate; Kaufman (1975) for the Jacobian. Fisher (1929), Tests of significance in harmonic analysis.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mercer.kernels.periodogram import Samples, peak, sampled

_LOWEST = 1 / 40  # cycles over the length of the data: below, a wave is a parabola to four digits
_APART = 0.75  # cycles over the length of the data by which two lines must differ
_MOST_POWERS = 4
_CHANCE = 1e-3  # of finding a line in noise
_FIRST_STEPS, _STEPS = 8, 40


def find_frequencies(x: Tensor, values: Tensor, most: int = 6, tol: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Find the frequencies of the waves that add up to the values, beside a constant.

    Parameters
    ----------
    x : (n,)
        Places, in any order and with any spacing.
    values : (n,) or (n, m)
        In columns: m functions that share their frequencies.
    most : int, default=6
        Largest number of waves.
    tol : float, default=1e-6
        Stop where the residual is this small beside the values about their mean, or looks like noise.

    Returns
    -------
    frequency : (k,)
        In cycles per unit of x, > 0 and up to Nyquist's for the mean spacing of different places, or for the step of a
        uniform grid where all places are among its nodes; the strongest first. k may be 0.
    amplitude : (k,)
        √2 times the root mean square of what each wave contributes; of a wave whose amplitude varies along x too.

    Raises
    ------
    ValueError
        Shapes that do not agree, numbers that are not finite, or fewer than four different places.

    Notes
    -----
    O(n log n) for nodes of a uniform grid, O(n²) otherwise, to look for a peak, O(n k²) for each step of refinement.
    Two lines closer than 0.75 cycles over the data are one wave of varying amplitude: x cos and x sin are added to it
    instead of a frequency, and x, x² and x³ to the constant where a wave would be too slow to be told from them.
    """
    if x.dim() != 1 or values.shape[:1] != x.shape or values.dim() > 2:
        raise ValueError(f"x must be (n,) and values (n,) or (n, m), got {tuple(x.shape)} and {tuple(values.shape)}.")
    _check_finite(x=x, values=values)
    if len(x.unique()) < 4:
        raise ValueError("frequencies cannot be found at fewer than four different places.")
    x, order = x.detach().double().sort()
    data = values.detach().double().reshape(len(x), -1)[order]
    data = data - data.mean(0)  # before sums of squares round it
    length = float(x[-1] - x[0])
    # in cycles over the data, about their centre
    t = (x - (x[0] + x[-1]) / 2) / length
    fit = _search(sampled(t), data, most, tol, _rounding(values))
    amplitude = fit.amplitudes()
    rank = amplitude.argsort(descending=True)
    return fit.frequency[rank] / length, amplitude[rank]


def find_frequencies_grid(
    axes: Sequence[Tensor], values: Tensor, most: int = 64, tol: float = 1e-6, most_per_axis: int = 12
) -> tuple[Tensor, Tensor]:
    """Find the waves in values on a grid: which frequencies of the axes go together.

    Parameters
    ----------
    axes : sequence of d tensors (N_j,)
    values : (N_1, …, N_d)
        All finite.
    most : int, default=64
        Largest number of combinations, the strongest.
    tol : float, default=1e-6
        Combinations weaker than this beside the strongest, the constant left aside, are not there; also as in
        `find_frequencies`.
    most_per_axis : int, default=12

    Returns
    -------
    frequencies : (k, d)
        In cycles per unit of each axis, ≥ 0; 0 is a factor that is constant along an axis. A combination stands for
        all products of a cosine or sine per axis, waves that travel either way included.
    amplitudes : (k,)
        Root of the sum of squares of those products' coefficients; the strongest first.

    Raises
    ------
    ValueError
        Values that do not fit the axes or are not finite, or an axis of fewer than four places.

    Notes
    -----
    Along each axis the singular vectors of the unfolded values share their frequencies, which is a problem in one
    dimension. Coefficients of all combinations are then linear least squares, axis by axis.
    """
    if values.shape != tuple(len(axis) for axis in axes):
        raise ValueError(f"values {tuple(values.shape)} do not fit axes of {tuple(len(axis) for axis in axes)} places.")
    _check_finite(values=values)
    mean, rounding = values.detach().double().mean(), _rounding(values)
    centred = values.detach().double() - mean
    coefficients = centred
    found: list[Tensor] = []
    for j, axis in enumerate(axes):
        left, size, _ = torch.linalg.svd(centred.movedim(j, 0).reshape(len(axis), -1), full_matrices=False)
        kept = size > max(tol * float(size[0]), rounding * math.sqrt(centred.numel()))
        channels = (left * size)[:, kept][:, : 2 * most_per_axis + 1]
        frequency = channels.new_zeros(0)
        if channels.shape[1]:
            frequency, _ = find_frequencies(axis, channels, most_per_axis, tol)
        frequency = torch.cat([frequency.new_zeros(1), frequency])
        basis = _waves(axis.double() - axis.double().mean(), frequency[1:], [1] * len(frequency))
        q, r = torch.linalg.qr(basis)
        projected = torch.tensordot(q.mT, coefficients, dims=([1], [j]))
        solved = torch.linalg.solve_triangular(r, projected.reshape(len(r), -1), upper=True).reshape(projected.shape)
        coefficients = solved.movedim(0, j)
        found.append(frequency)
    constant = (0,) * len(axes)
    power = coefficients.square()
    power[constant] = (coefficients[constant] + mean).square()
    for j, frequency in enumerate(found):  # a constant, then cosine and sine of each wave
        pairs = power.narrow(j, 1, 2 * (len(frequency) - 1)).unflatten(j, (len(frequency) - 1, 2)).sum(j + 1)
        power = torch.cat([power.narrow(j, 0, 1), pairs], j)
    amplitude = power.sqrt()
    waves = amplitude.clone()
    waves[constant] = 0
    least = max(tol * float(waves.max()), rounding)
    strongest = amplitude.reshape(-1).argsort(descending=True)[:most]
    strongest = strongest[amplitude.reshape(-1)[strongest] > least]
    index = torch.unravel_index(strongest, amplitude.shape)
    return torch.stack([f[i] for f, i in zip(found, index, strict=True)], 1), amplitude.reshape(-1)[strongest]


@dataclass
class _Fit:
    """Waves with the amplitudes that fit best: frequencies (k,), the residual, and how many powers of t each carries.

    ``powers`` has one entry more than there are frequencies: the first is that of the constant.
    """

    samples: Samples
    data: Tensor
    frequency: Tensor
    powers: list[int]
    coefficients: Tensor = field(init=False)
    residual: Tensor = field(init=False)
    basis: Tensor = field(init=False)
    q: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.basis = _waves(self.samples.t, self.frequency, self.powers)
        # a column scaled to one, and what others explain to the last digits left out
        scale = self.basis.norm(dim=0).clamp_min(1e-300)
        u, s, vt = torch.linalg.svd(self.basis / scale, full_matrices=False)
        kept = s > 1e-13 * s[0]
        self.q = u[:, kept]
        projected = self.q.mT @ self.data
        self.coefficients = (vt[kept].mT / s[kept]) @ projected / scale[:, None]
        self.residual = self.data - self.q @ projected

    @property
    def loss(self) -> float:
        return float(self.residual.square().sum())

    def _spans(self) -> list[slice]:
        starts = [self.powers[0]]
        for powers in self.powers[1:]:
            starts.append(starts[-1] + 2 * powers)
        return [slice(first, last) for first, last in itertools.pairwise(starts)]

    def amplitudes(self) -> Tensor:
        parts = [self.basis[:, span] @ self.coefficients[span] for span in self._spans()]
        rms = [(2 * part.square().sum(1).mean()).sqrt() for part in parts]
        return torch.stack(rms) if rms else self.frequency.new_zeros(0)

    def moved(self, step: Tensor) -> _Fit:
        """Return the fit after a step, inside of the range in which waves can be told."""
        frequency = (self.frequency + step).clamp(_LOWEST, self.samples.highest)
        return _Fit(self.samples, self.data, frequency, self.powers)

    def jacobian(self) -> Tensor:
        """Return −∂residual/∂frequency with the best amplitudes following, (n m, k) (Kaufman's approximation)."""
        columns = []
        for span, powers in zip(self._spans(), self.powers[1:], strict=True):
            cosine, sine = self.basis[:, span].unflatten(1, (powers, 2)).unbind(2)
            by = torch.stack([-sine, cosine], 2).flatten(1) * (2 * math.pi * self.samples.t[:, None])
            change = by @ self.coefficients[span]
            columns.append((change - self.q @ (self.q.mT @ change)).reshape(-1))
        return torch.stack(columns, 1)


def _search(samples: Samples, data: Tensor, most: int, tol: float, rounding: float) -> _Fit:
    """Add one wave after the other until nothing is left, or nothing but noise."""
    fit = _Fit(samples, data, data.new_zeros(0), [1])
    enough = max(tol**2 * fit.loss, rounding**2 * data.numel())
    while fit.loss > enough:
        trials = list(_grown(fit, peak(samples, fit.residual), most))
        trial = _refined(min(trials, key=lambda one: one.loss, default=fit), _STEPS)
        if not _beyond_chance(fit, trial):
            break
        fit = trial
    return fit


def _grown(fit: _Fit, at: float, most: int) -> Iterator[_Fit]:
    """Yield fits with one wave more, near the one given, or with more powers of the wave that is there."""
    nearest = int((torch.cat([fit.frequency.new_zeros(1), fit.frequency]) - at).abs().argmin())
    if len(fit.frequency) < most:
        added = torch.cat([fit.frequency, fit.frequency.new_tensor([at])])
        trial = _refined(_Fit(fit.samples, fit.data, added, [*fit.powers, 1]), _FIRST_STEPS)
        ranked = trial.frequency.sort().values
        if float(ranked[0]) > 1.01 * _LOWEST and bool((ranked.diff() > _APART).all()):
            yield trial
    for more in (1, 2):  # an even function is not seen by an odd one
        powers = [min(n + more * (i == nearest), _MOST_POWERS) for i, n in enumerate(fit.powers)]
        if powers != fit.powers:
            yield _refined(_Fit(fit.samples, fit.data, fit.frequency, powers), _FIRST_STEPS)


def _refined(fit: _Fit, steps: int) -> _Fit:
    """Move all frequencies together to the least residual, by Levenberg's damped Gauss–Newton steps."""
    damping = 1e-3
    for _ in range(steps if len(fit.frequency) else 0):
        J = fit.jacobian()
        scale = J.norm(dim=0).clamp_min(1e-300)
        u, s, vt = torch.linalg.svd(J / scale, full_matrices=False)
        gradient = u.mT @ fit.residual.reshape(-1)
        for _ in range(8):
            step = vt.mT @ (s / (s.square() + damping) * gradient) / scale
            trial = fit.moved(step.clamp(-0.5, 0.5))
            if trial.loss < fit.loss:
                break
            damping = max(10 * damping, 1e-12)
        else:
            break
        gain, fit, damping = fit.loss - trial.loss, trial, damping / 10
        if gain <= 1e-6 * fit.loss:
            break
    return fit


def _beyond_chance(before: _Fit, after: _Fit) -> bool:
    """Say whether noise would hardly give a line as strong: Fisher's g, the share of one line of m = n/2."""
    if before.loss <= 0:
        return False
    m = len(before.data) // 2 - len(before.frequency)
    share = 1 - after.loss / before.loss
    lines = max(m, before.samples.highest)
    return m > 1 and lines * (1 - min(share, 1.0)) ** (m - 1) < _CHANCE


def _check_finite(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} must be finite and has NaN or infinite entries; leave those rows out.")


def _rounding(values: Tensor) -> float:
    """Return the root mean square below which a wave is the rounding of the values."""
    dtype = values.dtype if values.dtype.is_floating_point else torch.float64
    return torch.finfo(dtype).eps * float(values.abs().max())


def _waves(t: Tensor, frequency: Tensor, powers: Sequence[int]) -> Tensor:
    """Return the powers of t for the constant, then tᵖ cos(2πμt) and tᵖ sin(2πμt) for each p and each frequency μ."""
    columns = [t**p for p in range(powers[0])]
    for mu, count in zip(frequency, powers[1:], strict=True):
        angle = 2 * math.pi * mu * t
        cosine, sine = angle.cos(), angle.sin()
        for p in range(count):
            columns += [t**p * cosine, t**p * sine]
    return torch.stack(columns, 1)
