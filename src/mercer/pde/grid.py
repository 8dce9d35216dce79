"""Differential equations on a grid of nodes: a point, not a posterior.

``solve_grid`` looks for grid values whose interpolant fulfils the equation at the nodes. Small grids are least squares
with kernels that can be learned (`projection`), large ones are Newton's method in the limit of exact equations
(`grid_newton`), and ``compat=True`` is the published training on a penalty (`published`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from mercer.kernels import Kernel, StudentMixture
from mercer.linalg.cholesky import NotPositiveDefiniteError, Solution
from mercer.linalg.kronecker import kron_whiten
from mercer.pde.axes import Axis, Interpolant, InterpolantSum
from mercer.pde.equation import PDE, LinearisationError
from mercer.pde.grid_equation import GridEquation
from mercer.pde.grid_kernels import alike, kernels_of_data, kernels_of_solution
from mercer.pde.grid_newton import newton
from mercer.pde.projection import LEARN, PRECISE, Projection
from mercer.pde.published import COMPONENTS, JITTER, Parameters, Published, train
from mercer.pde.sides import Elimination, Side, condition_sides

SMALL = 1000  # nodes in all up to which kernels are learned; each evaluation costs N³
_ENOUGH = 1e-5  # shifted residual below which nothing is learned


@dataclass(frozen=True)
class GridSolution:
    """Grid values and their interpolant: a point estimate.

    Attributes
    ----------
    axes : tuple of D Axis
        Nodes and kernels.
    values : (N_1, …, N_D)
        u at the nodes.
    status : str
        "ok", or why the search ended before it had converged.
    trace : list of float
        Rms residual at the nodes after each step, in units of f; with ``compat=True`` the objective in nats.
    report : dict
        ``method``, ``shifted_residual`` (rms at cell centres beside the largest term), ``nuggets`` of predictions, and
        what the solver that ran has to say.
    """

    axes: tuple[Axis, ...]
    values: Tensor
    interpolant: Interpolant | InterpolantSum
    status: str
    trace: list[float]
    report: dict[str, Any] = field(default_factory=dict)

    def mean(self, X: Tensor, index: Sequence[int] | None = None) -> Tensor:
        """Return u, or ∂^index u, at points X (n, D), (n,)."""
        if X.dim() != 2 or X.shape[1] != len(self.axes):
            raise ValueError(f"X needs one column per axis, (n, {len(self.axes)}), got {tuple(X.shape)}.")
        return self.interpolant.at(X, (0,) * len(self.axes) if index is None else index)

    def mean_on(self, points: Sequence[Tensor], index: Sequence[int] | None = None) -> Tensor:
        """Return the same on the product of points along each axis, (M_1, …, M_D)."""
        return self.interpolant.on(points, (0,) * len(self.axes) if index is None else index)

    def std(self, X: Tensor) -> NoReturn:
        """Raise: a grid solution has no posterior."""
        raise NotImplementedError(
            "method 'grid' returns a point, and no standard deviation; use method='features' or 'dense', whose "
            "posterior is that of the equation (of its last linearisation, Laplace's, where it is not linear)."
        )


def solve_grid(
    pde: PDE,
    conditions: Sequence[Any],
    kernels: Sequence[Kernel] | None,
    shape: int | Sequence[int],
    *,
    compat: bool = False,
    spectrum: str = "student",
    max_iter: int | None = None,
    seconds: float | None = None,
    frequency_scale: float | None = None,
    n_components: int | None = None,
    change_point: float | None = None,
    boundary_weight: float | None = None,
    device: torch.device | None = None,
    on_iteration: Callable[[int, Callable[[], GridSolution]], None] | None = None,
) -> GridSolution:
    """Solve an equation on a grid.

    Parameters
    ----------
    pde : PDE
        Of one field and one equation, linear or not, without unknown coefficients.
    conditions : sequence of Dirichlet, Neumann, Robin, Initial, Periodic
    kernels : sequence of D gpytorch Kernel of one column, or None
        One per axis, copied; None takes mixtures with the frequencies of the forcing and of the conditions.
        ``compat=True`` has its own, and takes none.
    shape : int or D integers
        Nodes along each axis, ends included.
    compat : bool
        The published solver: everything trained together by Adam at 0.01.
    spectrum : {"student", "gaussian"}
        Lines of the mixtures, where no kernels are given.
    max_iter : int, optional
        Iterations of L-BFGS on the kernels of a small grid (default 20; 0 learns nothing), or steps of Adam (10⁵).
    seconds : float, optional
        Wall time after which no iteration is begun.
    frequency_scale : float, optional
        Largest frequency at the start of ``compat=True``, in cycles per unit of X; 20 by default.
    n_components : int, optional
        Lines per axis of ``compat=True``; 30 by default.
    change_point : float, optional
        With ``compat=True``: part of the training after which one smooth process is trained to correct the solution.
    boundary_weight : float, optional
        λ_b of the conditions; 1, or 200 for ``compat=True``. Large grids meet conditions exactly, whatever it is.
    device : torch.device, optional
    on_iteration : callable, optional
        With ``compat=True``: called with the number of steps and a function that makes the present solution; its time
        does not count.

    Returns
    -------
    GridSolution

    Raises
    ------
    ValueError
        A system, unknown coefficients, no conditions or some that a grid cannot use, other than one kernel per axis, or
        arguments that are not for this value of ``compat``.
    NotPositiveDefiniteError
        A kernel is too smooth for so many nodes.

    Notes
    -----
    Student-t lines are the safer ones: many nodes under a smooth kernel make covariances of low rank, and
    differentiation matrices that know nothing of the rest. Small grids cost O(N³) per evaluation, large ones O(Σ
    N_j³ + N Σ N_j) per product. Of the kernels before and after learning those are kept whose residual at cell
    centres, where the equation was not asked for, is smaller.
    """
    of_compat = {
        "frequency_scale": frequency_scale,
        "n_components": n_components,
        "change_point": change_point,
        "on_iteration": on_iteration,
    }
    unused = [] if compat else [name for name, value in of_compat.items() if value is not None]
    if unused:
        raise ValueError(f"{', '.join(unused)}: for compat=True only, the published training; drop it or set compat.")
    if compat and kernels is not None:
        raise ValueError("kernels cannot be given with compat=True: the published training learns its own; drop them.")
    equation = GridEquation(pde, pde.domain.axes(shape, device))
    if compat:
        return _published(
            equation,
            Published(equation, conditions, spectrum, 200.0 if boundary_weight is None else boundary_weight),
            max_iter=100_000 if max_iter is None else max_iter,
            seconds=seconds,
            frequency_scale=20.0 if frequency_scale is None else frequency_scale,
            n_components=COMPONENTS if n_components is None else n_components,
            change_point=change_point,
            on_iteration=on_iteration,
        )
    deadline = None if seconds is None else time.perf_counter() + seconds
    small = equation.size <= SMALL
    weight = 1.0 if boundary_weight is None else boundary_weight
    if kernels is None:
        rough = _sides(pde, conditions, [Axis(x, any_kernel(x)) for x in equation.nodes])
        forced = kernels_of_data(equation, rough, spectrum)
        best = _solved(equation, conditions, forced, None, small, weight, deadline)
        # waves of a non-linear equation's solution need not be those of its forcing
        look = best.status == "ok" and not pde.linear
        seen = kernels_of_solution(equation.nodes, best.values, spectrum) if look else forced
        if not _late(deadline) and not alike(seen, forced, equation.nodes):
            best = _improved(best, equation, conditions, seen, small, weight, deadline)
    elif len(kernels) == len(equation.shape):
        copies = [deepcopy(kernel) for kernel in kernels]
        best = _solved(equation, conditions, copies, None, small, weight, deadline)
    else:
        raise ValueError(f"a grid needs one kernel per axis, {len(equation.shape)}, got {len(kernels)}.")
    iterations = 20 if max_iter is None else max_iter
    if small and iterations and best.report["shifted_residual"] > _ENOUGH and not _late(deadline):
        learned = [deepcopy(axis.kernel) for axis in best.axes]
        elimination = Elimination(equation.shape, _sides(pde, conditions, best.axes))
        projection = Projection(equation, elimination, learned, weight, [axis.nugget for axis in best.axes])
        search = projection.learn(iterations, deadline)
        first, best = best, _improved(best, equation, conditions, learned, small, weight, deadline)
        best.report.update(search=search, learned=best is not first)
    return best


def _improved(
    best: GridSolution, equation: GridEquation, conditions: Sequence[Any], kernels: Sequence[Kernel], *how: Any
) -> GridSolution:
    """Solve again with other kernels, and return the better solution; the first where they lead to none."""
    try:
        return _better(best, _solved(equation, conditions, kernels, best.values, *how))
    except (NotPositiveDefiniteError, LinearisationError):
        return best


def _solved(
    equation: GridEquation,
    conditions: Sequence[Any],
    kernels: Sequence[Kernel],
    start: Tensor | None,
    small: bool,
    weight: float,
    deadline: float | None,
) -> GridSolution:
    """Solve for given kernels: least squares, or Newton's method where there are too many nodes for it."""
    axes = tuple(Axis(x, kernel, number=j) for j, (x, kernel) in enumerate(zip(equation.nodes, kernels, strict=True)))
    elimination = Elimination(equation.shape, _sides(equation.pde, conditions, axes))
    if not small:
        done: Solution = newton(equation, axes, elimination, start=start, deadline=deadline)
        facts = {"method": "Newton", "linear_iterations": done.stats["linear_iterations"]}
        return _solution(equation, axes, done.value, done.status, done.stats["trace"], facts)
    projection = Projection(equation, elimination, kernels, weight, [axis.nugget for axis in axes])
    white = None if start is None else kron_whiten([axis.factor for axis in axes], start).reshape(-1)
    best: GridSolution | None = None
    for tolerance in (PRECISE, LEARN[0]):
        done = projection.solve(tolerance, white, deadline=deadline)
        facts = dict(zip(("log_tau", "log_v"), done.stats["precisions"].log().tolist(), strict=True))
        facts |= {name: done.stats[name] for name in ("objective", "capped")}
        facts |= {"method": "variable projection", "tolerance": tolerance}
        found = _solution(equation, axes, done.value, done.status, done.stats["trace"], facts)
        best = found if best is None else _better(best, found)
        # where a kernel cannot meet the equation, to insist on it magnifies rounding
        if done.stats["capped"] or _late(deadline):
            break
    assert best is not None
    if elimination.free and (0,) * len(axes) not in equation.indices and best.status == "ok":
        best = replace(best, status="nearly singular")  # the prior has chosen the constant
    return best


def _solution(
    equation: GridEquation,
    axes: Sequence[Axis],
    U: Tensor,
    status: str,
    trace: list[float],
    facts: dict[str, Any],
    interpolant: Interpolant | InterpolantSum | None = None,
) -> GridSolution:
    interpolant = Interpolant(axes, U) if interpolant is None else interpolant
    facts["shifted_residual"] = equation.shifted_residual(interpolant)
    facts["nuggets"] = interpolant.nuggets
    return GridSolution(tuple(axes), U, interpolant, status, trace, facts)


def _better(first: GridSolution, second: GridSolution) -> GridSolution:
    return second if second.report["shifted_residual"] < first.report["shifted_residual"] else first


def _late(deadline: float | None) -> bool:
    return deadline is not None and time.perf_counter() > deadline


def _sides(pde: PDE, conditions: Sequence[Any], axes: Sequence[Axis]) -> list[Side]:
    return [side for condition in conditions for side in condition_sides(condition, pde.domain, axes)]


def any_kernel(nodes: Tensor) -> Kernel:
    """Return some kernel: targets of sides do not depend on it."""
    length = float(nodes[-1] - nodes[0])
    return StudentMixture(weight=[1.0], lengthscale=[length / 2], frequency=[0.0])


def _published(
    equation: GridEquation,
    objective: Published,
    *,
    on_iteration: Callable[[int, Callable[[], GridSolution]], None] | None,
    **options: Any,
) -> GridSolution:
    def solution(parameters: list[Parameters], trace: list[tuple[int, float]], status: str, step: int) -> GridSolution:
        parts = []
        for each, spectrum in zip(parameters, (objective.spectrum, "student"), strict=False):
            kernels = [each.kernel(j, spectrum) for j in range(len(equation.shape))]
            axes = [Axis(x, k, JITTER, j) for j, (x, k) in enumerate(zip(equation.nodes, kernels, strict=True))]
            parts.append(Interpolant(axes, each.U.detach().clone(), [JITTER / axis.scale for axis in axes]))
        last = parameters[-1]
        facts = {
            "method": "published",
            "n_iter": step,
            "log_tau": float(last.log_tau.detach()),
            "log_v": float(last.log_v.detach()),
        }
        U = torch.stack([part.values for part in parts]).sum(0)
        values = [value for _, value in trace]
        return _solution(equation, parts[0].axes, U, status, values, facts, InterpolantSum(parts))

    def report(step: int, parameters: list[Parameters]) -> None:
        if on_iteration is not None:
            on_iteration(step, lambda: solution(parameters, [], "running", step))

    done = train(objective, on_iteration=report, **options)
    return solution(done.parameters, done.trace, done.status, done.n_iter)
