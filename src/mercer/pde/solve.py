"""From an equation to a posterior: how many nodes, which solver, which prior, and what there is to confess."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mercer.kernels import Kernel
from mercer.pde.conditions import Condition
from mercer.pde.equation import PDE
from mercer.pde.gauss_newton import STALLED, STOPPED
from mercer.pde.grid_posterior import grid_posterior, is_separable
from mercer.pde.inverse import invert
from mercer.pde.judge import judge
from mercer.pde.priors import MOST_FEATURES, MOST_ROWS, Solver, Trial
from mercer.pde.problem import Problem, Sensors
from mercer.pde.report import Report
from mercer.pde.rows import Posterior, derivative
from mercer.pde.spectrum import Lines, forcing_lines, homogeneous_lines, solution_lines
from mercer.pde.unknowns import Coefficient

METHODS = ("auto", "features", "dense", "grid", "sylvester")
KERNELS = {"gm": "gaussian", "stm": "student"}
_FIRST_NODES, _MOST_NODES = {1: 256, 2: 64, 3: 16}, {1: 8192, 2: 1024, 3: 96}
_FINER, _COARSE = 4, {1: 2048}  # where the data's nodes do not resolve a solution: factor, and below how many
_FEWEST_NODES = 4  # in which frequencies can be found
_FEWEST_POINTS, _FEW_POINTS = 2.1, 4.0  # per wavelength
_FAINT = 1e-3  # of the strongest line: fainter ones do not count as the shortest wavelength
_RESOLVED = 1e-6  # check that leaves nothing to be asked of boundary data
_DOUBTFUL = 1e-3  # check from which a non-linear solution's spectrum is taken for another than its data's


class UnderresolvedError(ValueError):
    """Too few nodes for the shortest wavelength: what they show is another wave."""


@dataclass
class Solved:
    """A posterior with what was learned on the way."""

    posterior: Posterior
    kernels: list[Kernel]
    coefficients: dict[str, Coefficient]
    lines: Lines
    report: Report
    problem: Problem


def solve(
    pde: PDE,
    conditions: Sequence[Condition],
    sensors: Sequence[Sensors] = (),
    *,
    kernel: str | Kernel = "gm",
    method: str = "auto",
    n_collocation: int | Sequence[int] | None = None,
    nugget: float | None = None,
    optimizer: str | None = "lbfgs",
    max_steps: int = 20,
    device: torch.device | None = None,
    compat: bool | Mapping[str, Any] = False,
    tell: Callable[[str], None] = lambda text: None,
) -> Solved:
    """Solve an equation.

    Parameters
    ----------
    pde : PDE
    conditions : sequence of Condition
    sensors : sequence of Sensors
    kernel : {"gm", "stm"} or gpytorch Kernel
        Mixture of Gaussian or Student-t lines at frequencies from the data, or any kernel that is smooth enough.
    method : {"auto", "features", "dense", "grid", "sylvester"}
    n_collocation : int or one per axis, optional
        Nodes along each axis; None takes enough for the frequencies that are found.
    nugget : float, optional
        Relative nugget η; see `Solver`.
    optimizer : {"lbfgs", None}
        Whether hyperparameters are learned where frequencies and the ladder of lengthscales do not suffice.
    max_steps : int
        Of Gauss–Newton.
    device : torch.device, optional
    compat : bool or mapping
        With ``method="grid"``, the published training, with its options; see `solve_grid`.
    tell : callable
        Called after each conditioning, with what there is to say of the best solution so far.

    Returns
    -------
    Solved

    Raises
    ------
    UnderresolvedError
        Fewer than 2.1 nodes per wavelength.
    ValueError
        A method that the problem, the kernel or its size does not allow.
    """
    began = time.perf_counter()
    report = Report()
    spectrum = KERNELS.get(kernel, "gaussian") if isinstance(kernel, str) else ""
    counts, forced, lines = resolve_nodes(pde, conditions, n_collocation, report)
    problem = Problem(pde, conditions, counts, sensors, device)
    report.n_nodes = problem.counts
    solver = Solver(problem, "features" if spectrum == "gaussian" else "dense", nugget, max_steps, tell)
    if compat and (method != "grid" or not isinstance(kernel, str)):
        raise ValueError("compat needs method='grid' and kernel='gm' or 'stm': it is the published training.")
    report.method, report.reason = choose(method, kernel, solver, forced if len(forced) else lines)
    coefficients: dict[str, Coefficient] = {}
    given = None if isinstance(kernel, str) else [deepcopy(kernel) for _ in pde.fields]
    if report.method in ("grid", "sylvester"):
        lined = spectrum or "student"
        posterior, status, steps = grid_posterior(report.method, problem, lined, given, compat, tell)
        trial = Trial(given or [], posterior, problem.check(posterior), steps, status)
        report.notes += posterior.notes
    else:
        solver.method = report.method
        if sensors or pde.unknowns:

            def make_lines(c: Mapping[str, Tensor] | None) -> Lines:
                return choose_lines(pde, conditions, counts, c)[1]

            trial, coefficients = invert(solver, make_lines, given, spectrum or "gaussian")
        else:
            trial = _forward(solver, forced, lines, spectrum, given, optimizer)
            if n_collocation is None and given is None and report.method == "features":
                again = partial(_forward, solver, forced, lines, spectrum, None, optimizer)
                trial, problem = _refined(trial, solver, report, again)
            trial.posterior.surprise = max(1.0, problem.surprise(trial.posterior))
    judge(report, trial, problem)
    for name, found in coefficients.items():
        if not found.identified:
            report.warn(f"{name} is {found}{'' if found.note else ': observe more, or elsewhere'}.")
    report.seconds = time.perf_counter() - began
    return Solved(trial.posterior, trial.kernels, coefficients, lines, report, problem)


def choose(method: str, kernel: str | Kernel, solver: Solver, lines: Lines) -> tuple[str, str]:
    """Return the solver that runs, and why; ValueError for one that cannot."""
    pde, problem = solver.problem.pde, solver.problem
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    mixture_of_lines = kernel == "gm"
    inverse = bool(problem.sensors or pde.unknowns)
    if method != "auto":
        if method == "features" and not mixture_of_lines:
            raise ValueError("method='features' needs kernel='gm'; use method='dense' for other kernels.")
        if method in ("grid", "sylvester") and inverse:
            raise ValueError(f"method={method!r} has no posterior to condition on observations; use 'features'.")
        if method == "sylvester" and not is_separable(problem):
            raise ValueError(
                "method='sylvester' needs a linear equation that is a sum of operators of one axis each; "
                "use 'features'."
            )
        return method, "asked for"
    loud = lines.strongest(int((lines.amplitude >= _FAINT * lines.amplitude.max()).sum())) if len(lines) else lines
    size = solver.smallest(loud) if mixture_of_lines else 0
    kind = "linear" if pde.linear else "not linear, by Gauss–Newton"
    if mixture_of_lines and size <= MOST_FEATURES:
        return "features", f"{kind}, and its lines fit into {MOST_FEATURES} features"
    if problem.n_nodes <= MOST_ROWS:
        return "dense", f"{kind}, and at most {MOST_ROWS} nodes"
    why = f"the lines need {size} features and there are {problem.n_nodes} nodes" if size else "too many nodes"
    if inverse:
        raise ValueError(f"{why}, more than {MOST_FEATURES}: take fewer nodes, or kernel='gm'.")
    if is_separable(problem):
        return "sylvester", f"{why}, and the operator is a sum over axes: the mean only"
    return "grid", f"{why}: the mean only"


def resolve_nodes(
    pde: PDE, conditions: Sequence[Condition], n_collocation: int | Sequence[int] | None, report: Report
) -> tuple[tuple[int, ...], Lines, Lines]:
    """Return the nodes along each axis and the lines found on them; nodes double where waves are near Nyquist's."""
    d = min(pde.domain.d, 3)
    counts = pde.domain.counts(_FIRST_NODES[d] if n_collocation is None else n_collocation)
    if min(counts) < _FEWEST_NODES:
        raise ValueError(f"n_collocation must be at least {_FEWEST_NODES} along each axis, got {counts}.")
    while True:
        forced, lines = choose_lines(pde, conditions, counts, None)
        per_axis = _per_axis(lines, pde.domain.lengths, counts)
        points = min(per_axis)
        if n_collocation is not None or points >= _FEW_POINTS or max(counts) >= _MOST_NODES[d]:
            break
        near = [p < _FEW_POINTS for p in per_axis]
        counts = tuple(min(2 * n, _MOST_NODES[d]) if more else n for n, more in zip(counts, near, strict=True))
    report.points_per_wavelength, report.n_lines = points, len(lines)
    if points < _FEWEST_POINTS:
        raise UnderresolvedError(
            f"{points:.2g} nodes per shortest wavelength are fewer than {_FEWEST_POINTS}: the equation's data have "
            f"{', '.join(f'{mu:.3g}' for mu in _highest(lines))} cycles per unit of "
            f"{', '.join(pde.domain.names)}, and so few nodes show another wave. Raise n_collocation."
        )
    if points < _FEW_POINTS * (1 - 1e-9):
        report.warn(f"only {points:.3g} nodes per shortest wavelength; at least {_FEW_POINTS:g} are safe.")
    return counts, forced, lines


def choose_lines(
    pde: PDE, conditions: Sequence[Condition], counts: Sequence[int], c: Mapping[str, Tensor] | None
) -> tuple[Lines, Lines]:
    """Return the lines of the forcing, and those with the ones of boundary and initial data joined to them."""
    X = pde.domain.scattered(64)
    with torch.no_grad():
        J, _ = pde.jacobian(X, [torch.zeros(len(X), dtype=torch.float64) for _ in pde.requests], c)
        if not all(bool(torch.isfinite(slope).all()) for slope in J):  # as √u has none at zero
            J, _ = pde.jacobian(X, _typical(pde, conditions, len(X)), c)
    forced = forcing_lines(pde, counts, J)
    return forced, forced.join(homogeneous_lines(pde, conditions, counts, J), pde.domain)


def _typical(pde: PDE, conditions: Sequence[Condition], n: int) -> list[Tensor]:
    """Return values around which an equation may have slopes before anything is solved, n for each request.

    u is what conditions on values have on average, its derivatives are zero.
    """
    given: list[list[float]] = [[] for _ in pde.fields]
    for condition in conditions:
        terms, target = condition.rows(pde.domain, 16, pde.fields, 64)
        if len(terms) == 1 and not any(terms[0].index):
            given[terms[0].field].append(float((target / terms[0].coefficient).mean()))
    mean = [sum(values) / len(values) if values else 0.0 for values in given]
    size = [0.0 if any(index) else mean[field] for field, index in pde.requests]
    return [torch.full((n,), value, dtype=torch.float64) for value in size]


def _forward(
    solver: Solver, forced: Lines, lines: Lines, spectrum: str, given: list[Kernel] | None, optimizer: str | None
) -> Trial:
    """Solve without sensors: more lines as long as they are needed, then the evidence."""
    problem, pde = solver.problem, solver.problem.pde
    if given is not None:
        best: Trial | None = solver.solve(given)
    elif pde.domain.d == 1 or not len(forced):
        best = solver.climb(lines, None, spectrum)
    else:
        # a forcing's own lines may be all: those of boundary data decay into the domain and need many features
        best = solver.climb(forced, None, spectrum)
        if (best is None or best.check.worst > _RESOLVED) and len(lines) > len(forced):
            best = solver.climb(lines, best, spectrum)
    if best is None:
        raise ValueError("no prior was found that the rows can be conditioned on; take other nodes or method='grid'.")
    if not pde.linear and best.check.worst > _DOUBTFUL and given is None and len(pde.fields) == 1:
        counts = tuple(min(n, {1: 4096, 2: 256, 3: 48}[min(pde.domain.d, 3)]) for n in problem.counts)
        values = best.posterior.mean(_values_at(pde, counts))
        best = solver.climb(solution_lines(pde.domain, counts, values, most=32), best, spectrum)
    assert best is not None
    return best if optimizer is None else solver.improve(best)


def _refined(trial: Trial, solver: Solver, report: Report, again: Callable[[], Trial]) -> tuple[Trial, Problem]:
    """Take more nodes of a line as long as a solution is not resolved; return the best solution, and its nodes.

    A front is no wave, and needs more than its data do. In a plane so many nodes would need more features than there
    can be.
    """
    problem = old = solver.problem
    most = 0 if trial.status in (STALLED, STOPPED) else _COARSE.get(old.pde.domain.d, 0)
    while trial.check.worst > _RESOLVED and solver.problem.n_nodes < most:
        counts = [_FINER * n for n in solver.problem.counts]
        solver.problem = Problem(old.pde, old.conditions, counts, old.sensors, old.device)
        trial.check = solver.problem.check(trial.posterior)
        finer = again()
        if finer.check.worst < trial.check.worst:
            trial, problem = finer, solver.problem
    report.points_per_wavelength *= problem.counts[0] / old.counts[0]
    report.n_nodes = problem.counts
    return trial, problem


def _values_at(pde: PDE, counts: Sequence[int]) -> Any:
    return derivative(pde.domain.nodes(counts), (0,) * pde.domain.d)


def _per_axis(lines: Lines, lengths: Sequence[float], counts: Sequence[int]) -> list[float]:
    """Return the nodes per shortest wavelength along each axis, infinite without waves."""
    top = _highest(lines)
    return [n / (mu * b) if mu * b > 0.5 else math.inf for n, mu, b in zip(counts, top, lengths, strict=True)]


def _highest(lines: Lines) -> list[float]:
    """Return the highest frequency along each axis among lines that are not faint."""
    if not len(lines):
        return [0.0] * lines.frequency.shape[1]
    loud = lines.amplitude >= _FAINT * lines.amplitude.max()
    return lines.frequency[loud].amax(0).tolist()
