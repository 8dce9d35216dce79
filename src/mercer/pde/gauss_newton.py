"""Equations that are not linear: condition on their linearisation, and linearise again where that leads.

The posterior is that of the last linearisation, Laplace's approximation of the one that the equation has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mercer.pde.equation import PDE
from mercer.pde.rows import Posterior, Rows, derivative

STOPPED, STALLED = "reached max_steps", "no step lowers the residual"
_SHORTEST = 1 / 64  # part of a step
_NEAR = 1e-6  # relative change below which rounding, not the step, decides whether the residual falls


@dataclass(frozen=True)
class Linearised:
    """The posterior after the last step, how many there were, and how they ended."""

    posterior: Posterior
    n_steps: int
    status: str
    values: tuple[Tensor, ...]


def equation_rows(
    pde: PDE, X: Tensor, values: Sequence[Tensor], coefficients: Mapping[str, Tensor] | None = None
) -> list[Rows]:
    """Return the linearised equations at X (n, d) around derivatives ``values`` as rows."""
    return [Rows(L, target) for L, target in pde.linearise(X, values, coefficients)]


def node_values(pde: PDE, posterior: Posterior, X: Tensor) -> tuple[Tensor, ...]:
    """Return the posterior means at X of all derivatives that the equation asks for."""
    return tuple(posterior.mean(derivative(X, index, field)) for field, index in pde.requests)


def gauss_newton(
    pde: PDE,
    X: Tensor,
    others: Sequence[Rows],
    condition: Callable[[Sequence[Rows]], Posterior],
    start: Sequence[Tensor] | None = None,
    coefficients: Mapping[str, Tensor] | None = None,
    max_steps: int = 20,
    tol: float = 1e-9,
) -> Linearised:
    """Condition on the equation at X and on the other rows.

    Parameters
    ----------
    pde : PDE
    X : (n, d)
        Where the equation holds.
    others : sequence of Rows
        Conditions and sensors.
    condition : callable
        Returns the posterior given rows: solver L or F with its prior.
    start : one (n,) per request, optional
        Derivatives of u₀ at X; by default those of what the other rows say alone.
    coefficients : mapping of str to scalar tensors, optional
    max_steps : int
    tol : float
        Largest change of the derivatives, relative to their size, at which steps end.

    Returns
    -------
    Linearised
        A linear equation takes one step from anywhere.

    Notes
    -----
    Steps are halved until the residuals of equation, conditions and sensors, each in units of its noise and nugget,
    fall together.
    """
    target = pde.target(X)
    status, steps, misfit = STOPPED, 0, [part.target for part in others]
    if start is not None:
        values = tuple(start)
    elif pde.linear or not others:
        values = tuple(torch.zeros_like(X[:, 0]) for _ in pde.requests)
    else:  # what conditions and sensors say alone is nearer than zero, where an equation may not even have a slope
        posterior = condition(others)
        values = node_values(pde, posterior, X)
        misfit = [posterior.mean(part.functional) - part.target for part in others]
    while True:
        steps += 1
        posterior = condition([*equation_rows(pde, X, values, coefficients), *others])
        proposed = node_values(pde, posterior, X)
        if pde.linear:
            return Linearised(posterior, steps, "linear", proposed)
        reached = [posterior.mean(part.functional) - part.target for part in others]
        variance = posterior.noise_variance.split([*[len(X)] * pde.n_equations, *map(len, others)])
        weight = torch.stack(variance[: pde.n_equations])

        def merit(trial: Sequence[Tensor], gaps: Sequence[Tensor], weight=weight, variance=variance) -> float:
            residual = pde.evaluate(X, trial, coefficients).detach() - target
            squares = [gap.square() / v for gap, v in zip(gaps, variance[pde.n_equations :], strict=True)]
            total = float((residual.square() / weight).sum() + sum(square.sum() for square in squares))
            return total if math.isfinite(total) else math.inf

        change, length, before = _change(values, proposed), 1.0, merit(values, misfit)
        while True:
            trial = tuple(torch.lerp(old, new, length) for old, new in zip(values, proposed, strict=True))
            gaps = [torch.lerp(old, new, length) for old, new in zip(misfit, reached, strict=True)]
            found = merit(trial, gaps)
            # the first step goes to where conditions hold, whatever it does to the residual
            if steps == 1 or found < before or length <= _SHORTEST or change <= _NEAR:
                break
            length /= 2
        stalled = change <= _NEAR and found > 0.5 * before
        values, misfit = trial, gaps
        if change <= tol or stalled:
            status = "converged"
        elif length <= _SHORTEST:
            status = STALLED
        elif steps < max_steps:
            continue
        return Linearised(posterior, steps, status, values)


def _change(old: Sequence[Tensor], new: Sequence[Tensor]) -> float:
    """Return the largest relative change among the derivatives, as root mean squares."""
    return max(float((b - a).norm() / b.norm().clamp_min(1e-300)) for a, b in zip(old, new, strict=True))
