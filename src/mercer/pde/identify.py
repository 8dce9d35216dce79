"""What the evidence says of unknown coefficients: where to start, how sure they are, and whether they are known at all.

The evidence is maximised over all else at both ends of a coefficient's range. Where it does not fall, the coefficient
is not identified; where it rises, the search had missed a better place.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from mercer.pde.evidence import FAILURES, Evidence, Maximum
from mercer.pde.rows import Posterior
from mercer.pde.unknowns import Coefficient, Unknown

_IDENTIFIED = 1.0  # nats by which the profile must fall to both ends of the range
_MISSED = 0.5  # nats by which an end is better than the maximum before the search starts from there
_AGAIN = 2  # times
_WORSE, _MET = 10.0, 1e-5  # by how much the equation may be met worse there, and how well is well enough
_AT_END = 1e-3  # of the range
_SCAN = 13
_PROFILE = 8  # iterations over all else at the ends of a range
_STEP = 1e-3  # of a coordinate, for the curvature


def scan(evidence: Evidence, theta: np.ndarray) -> np.ndarray:
    """Move each unknown coefficient to the best of a few places over its range, one after the other."""
    theta, search = theta.copy(), evidence.search
    for i in range(len(search.unknowns)):
        at = search.first_unknown + i
        places = [theta[at], *np.linspace(*search.bounds[at], _SCAN)]
        values = []
        for place in places:
            trial = theta.copy()
            trial[at] = place
            values.append(evidence.value(trial))
        theta[at] = places[int(np.argmax(values))]
    return theta


def describe(
    evidence: Evidence, maximum: Maximum, met: Callable[[Maximum], float]
) -> tuple[Maximum, dict[str, Coefficient], np.ndarray]:
    """Return the best maximum that the ends of the ranges lead to, what is known of each coefficient, and Cov θ.

    ``met`` says how well the equation is met at a maximum: an evidence that is larger because nodes no longer resolve
    the equation is not followed.
    """
    search = evidence.search
    for _ in range(_AGAIN):
        ends = _ends(evidence, maximum)
        best = max((end for pair in ends for end in pair if end), key=lambda end: end.value, default=maximum)
        if best.value <= maximum.value + _MISSED:
            break
        other = evidence.maximise(best.theta)
        now, then = (_at(evidence, place, met) for place in (other, maximum))
        if not now <= max(_WORSE * then, _MET):
            break
        maximum = other
    else:
        ends = _ends(evidence, maximum)
    covariance, found = _covariance(evidence, maximum.theta), {}
    for i, ((name, unknown), pair) in enumerate(zip(search.unknowns.items(), ends, strict=True)):
        at = search.first_unknown + i
        lower, upper = (np.inf if end is None else _fall(maximum.value - end.value) for end in pair)
        line = torch.tensor(maximum.theta[at], dtype=torch.float64, requires_grad=True)
        value = unknown.from_line(line)
        slope = float(torch.autograd.grad(value, line)[0])
        std = abs(slope) * float(np.sqrt(covariance[at, at]))
        drop = (float(lower), float(upper))
        note = _note(unknown, maximum.theta[at], search.bounds[at], drop)
        found[name] = Coefficient(float(value.detach()), std, min(drop) >= _IDENTIFIED, drop, note)
    evidence.posterior(maximum.theta)  # leaves the kernels where the maximum is
    return maximum, found, covariance


def _at(evidence: Evidence, maximum: Maximum, met: Callable[[Maximum], float]) -> float:
    """Return what ``met`` says of a maximum, with the kernels set to it: its posterior looks at them."""
    evidence.search.place(maximum.theta)
    return met(maximum)


def sigma_points(evidence: Evidence, maximum: Maximum, covariance: np.ndarray) -> list[tuple[Posterior, Posterior]]:
    """Return the posteriors a standard deviation to either side, along axes of the coefficients' covariance."""
    first, k = evidence.search.first_unknown, len(evidence.search.unknowns)
    low, high = np.array(evidence.search.bounds[first : first + k]).T
    values, vectors = np.linalg.eigh(covariance[first : first + k, first : first + k])
    pairs = []
    for value, vector in zip(values, vectors.T, strict=True):
        both = []
        for sign in (1.0, -1.0):
            theta = maximum.theta.copy()
            step = sign * np.sqrt(max(value, 0.0)) * vector
            theta[first : first + k] = np.clip(theta[first : first + k] + step, low, high)
            both.append(evidence.posterior(theta)[0])
        pairs.append((both[0], both[1]))
    evidence.posterior(maximum.theta)
    return pairs


def _ends(evidence: Evidence, maximum: Maximum) -> list[list[Maximum | None]]:
    """Return the maxima over all else at both ends of each coefficient's range, None where there is no posterior."""
    search, found = evidence.search, []
    for at in range(search.first_unknown, search.first_unknown + len(search.unknowns)):
        pair: list[Maximum | None] = []
        for end in search.bounds[at]:
            trial = maximum.theta.copy()
            trial[at] = end
            try:
                pair.append(evidence.maximise(trial, max_iter=_PROFILE, fixed=[at]))
            except FAILURES:
                pair.append(None)
        found.append(pair)
    return found


def _fall(drop: float) -> float:
    """Return a fall of the evidence; one that is hardly negative is the few steps of the profile."""
    return 0.0 if -_MISSED <= drop < 0 else drop


def _note(unknown: Unknown, place: float, bounds: tuple[float, float], drop: tuple[float, float]) -> str:
    """Say why a coefficient is not identified, where it is for its range and not for the data."""
    for i, name in enumerate(("lower", "upper")):
        end = unknown.bounds[i]
        if drop[i] < -_MISSED:
            return (
                f"not identified: the evidence rises by {-drop[i]:.2g} nats to the {name} end of its range, {end:g}, "
                "where it has another maximum or nodes resolve the equation worse: narrow the range, or take more nodes"
            )
        near = abs(place - bounds[i]) <= _AT_END * (bounds[1] - bounds[0])
        if near and drop[i] < _IDENTIFIED <= drop[1 - i]:
            return f"at the {name} end of its range, {end:g}: widen {name}"
    return ""


def _covariance(evidence: Evidence, theta: np.ndarray) -> np.ndarray:
    """Return the inverse of minus the Hessian of the evidence, from differences of the gradient."""
    k = len(theta)
    hessian = np.zeros((k, k))
    for i in range(k):
        sides = []
        for sign in (1.0, -1.0):
            moved = theta.copy()
            moved[i] += sign * _STEP
            sides.append(evidence(moved)[1])
        hessian[:, i] = (sides[1] - sides[0]) / (2 * _STEP)
    values, vectors = np.linalg.eigh(0.5 * (hessian + hessian.T))
    # directions that the data do not bend count as known to within a range of a few logarithms
    return (vectors / np.maximum(values, 0.1)) @ vectors.T
