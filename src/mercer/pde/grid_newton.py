"""Newton's method for grid values in the limit of exact equations: one equation per node, conditions built in.

The Jacobian of a residual on a grid is a Kronecker sum plus what does not separate. Minimal residuals solve it with the
Kronecker sum as preconditioner, so that a step costs a few products along axes whatever the size.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from mercer.linalg.cholesky import Solution
from mercer.linalg.gmres import gmres
from mercer.pde.axes import Axis
from mercer.pde.grid_equation import GridEquation
from mercer.pde.sides import Elimination
from mercer.pde.sylvester import apply, averaged, is_singular, kronecker_sum

_SETTLED = 1e-9  # relative step
_FORCING = 1e-9  # of the linear solves
_SHORT = 1e-4
_HOPELESS = 0.5  # relative residual of a linear solve
_SHORTEST = 2**-6  # step of the line search


def newton(
    equation: GridEquation,
    axes: Sequence[Axis],
    elimination: Elimination,
    *,
    start: Tensor | None = None,
    max_iter: int = 20,
    deadline: float | None = None,
) -> Solution:
    """Solve N[u] = f at all nodes that no condition gives.

    Parameters
    ----------
    equation : GridEquation
    axes : sequence of D Axis
    elimination : Elimination
    start : (N_1, …, N_D), optional
        Where to linearise first; zero by default.
    max_iter : int
        Most steps; a linear equation takes one.
    deadline : float, optional
        ``time.perf_counter()`` after which no step is begun.

    Returns
    -------
    Solution
        ``value`` (N_1, …, N_D); ``status`` "ok", "not converged", "stalled", "nearly singular" or "seconds"; ``stats``
        with ``trace``, the rms residual at inner nodes after each step in units of f, and ``linear_iterations``.
    """
    U = torch.zeros_like(equation.rhs) if start is None else start
    # the first step goes to values that fulfil the conditions, those after it keep them
    base = elimination.extend(torch.zeros_like(elimination.restrict(U)) if start is None else elimination.restrict(U))
    trace: list[float] = []
    products, size = 0, 1.0
    status, singular = "not converged", False
    for _ in range(max_iter):
        coefficients, target = equation.linearise(equation.derivatives(axes, U))
        system = kronecker_sum(axes, averaged(coefficients), elimination)

        def product(inside: Tensor, coefficients: dict = coefficients) -> Tensor:
            return elimination.restrict(apply(axes, coefficients, elimination.extend(inside, homogeneous=True)))

        def inverse(inside: Tensor, system=system) -> Tensor:
            return system.solve(inside, refine=0).value

        rhs = elimination.restrict(target - apply(axes, coefficients, base))
        singular = is_singular(axes, coefficients, elimination, system.solve(rhs, refine=0))
        done = gmres(product, rhs, inverse, tol=_FORCING)
        products += done.stats["iterations"]
        if done.stats["residual"] > _HOPELESS and trace:
            # what is left after a short step is its square, and may be rounding
            status = "ok" if size <= _SHORT else "stalled"
            break
        step = elimination.extend(done.value, homogeneous=True)
        if equation.pde.linear:
            U, status = base + step, "ok" if done.status == "ok" else "not converged"
            trace.append(_rms(equation, axes, elimination, U))
            break
        U, residual = _search(equation, axes, elimination, base, step, trace)
        trace.append(residual)
        size = float(torch.linalg.vector_norm(U - base) / torch.linalg.vector_norm(U).clamp_min(1e-300))
        base = U
        if size <= _SETTLED:
            status = "ok"
            break
        if len(trace) > 3 and residual >= trace[-2] >= trace[-3]:
            status = "ok" if size <= 1e3 * _SETTLED else "stalled"
            break
        if deadline is not None and time.perf_counter() > deadline:
            status = "seconds"
            break
    if singular and status == "ok":
        status = "nearly singular"
    return Solution(U, status, {"trace": trace, "linear_iterations": products})


def _search(
    equation: GridEquation,
    axes: Sequence[Axis],
    elimination: Elimination,
    base: Tensor,
    step: Tensor,
    trace: list[float],
) -> tuple[Tensor, float]:
    """Halve the step until the residual falls; the first step, from values that mean nothing, is taken whole."""
    length = 1.0
    while True:
        U = base + length * step
        residual = _rms(equation, axes, elimination, U)
        if not trace or residual < trace[-1] or length <= _SHORTEST:
            return U, residual
        length *= 0.5


def _rms(equation: GridEquation, axes: Sequence[Axis], elimination: Elimination, U: Tensor) -> float:
    residual = equation.evaluate(equation.derivatives(axes, U)) - equation.rhs
    return float(elimination.restrict(residual).square().mean().sqrt())
