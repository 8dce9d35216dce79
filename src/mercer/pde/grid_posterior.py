"""Solvers on grids behind the questions that posteriors answer: the mean, and a clear refusal for the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from mercer.kernels import Kernel
from mercer.kernels.functionals import Functional
from mercer.pde.axes import Axis
from mercer.pde.equation import PDE
from mercer.pde.grid import any_kernel, solve_grid
from mercer.pde.grid_equation import GridEquation
from mercer.pde.grid_kernels import kernels_of_data
from mercer.pde.problem import Problem
from mercer.pde.rows import Rows
from mercer.pde.sides import condition_sides
from mercer.pde.sylvester import separate, solve_sylvester

SINGULAR = "nearly singular"
COMPAT_OPTIONS = ("max_iter", "seconds", "frequency_scale", "n_components", "change_point", "boundary_weight")


class GridPosterior:
    """The mean of a solution on a grid; it has no variance, and says so."""

    log_evidence = scale = nugget = surprise = math.nan

    def __init__(self, method: str, interpolant: Any, n_nodes: int, notes: Sequence[str] = ()):
        self.method, self.interpolant = method, interpolant
        self.notes = ["a point, and no posterior.", *notes]
        self.noise_variance = torch.zeros(n_nodes, dtype=torch.float64)

    def mean(self, L: Functional) -> Tensor:
        """Return the functional of the interpolant, (k,)."""
        return sum(term.coefficient * self.interpolant.at(term.X, term.index) for term in L)  # type: ignore[return-value]

    def marginals(self, L: Functional) -> NoReturn:
        """Raise: there is no posterior."""
        self._refuse()

    def joint(self, L: Functional) -> NoReturn:
        """Raise: there is no posterior."""
        self._refuse()

    def sample(self, L: Functional, n_samples: int, generator: torch.Generator) -> NoReturn:
        """Raise: there is no posterior."""
        self._refuse()

    def backward(self, rows: Sequence[Rows]) -> NoReturn:
        """Raise: there is no evidence."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise NotImplementedError(
            f"method {self.method!r} returns a point, and no standard deviation or samples; use method='features' or "
            "'dense', whose posterior is that of the equation (of its last linearisation where it is not linear)."
        )


def is_separable(problem: Problem) -> bool:
    """Say whether the equation is linear and a sum of operators of one axis each, without sensors or unknowns."""
    pde = problem.pde
    if not pde.linear or pde.n_equations > 1 or len(pde.fields) > 1 or pde.unknowns or problem.sensors:
        return False
    coarse = pde.domain.counts(5)
    X = pde.domain.nodes(coarse)
    J, _ = pde.jacobian(X, [torch.zeros_like(X[:, 0]) for _ in pde.requests])
    coefficients = {index: j[0].reshape(coarse) for (_, index), j in zip(pde.requests, J, strict=True)}
    return separate(coefficients) is not None


def grid_posterior(
    method: str,
    problem: Problem,
    spectrum: str,
    kernels: Sequence[Kernel] | None,
    compat: bool | Mapping[str, Any] = False,
    tell: Callable[[str], None] = lambda text: None,
) -> tuple[GridPosterior, str, int]:
    """Return the solution on the problem's nodes, how it ended, and the number of steps.

    ``compat`` runs the published training, a mapping with its options; ``tell`` is called after each of its steps.
    """
    pde, conditions = problem.pde, problem.conditions
    if kernels is not None:
        kernels = list(kernels) * pde.domain.d if len(kernels) == 1 else list(kernels)
    if compat:
        options = dict(compat) if isinstance(compat, Mapping) else {}
        if strange := sorted(set(options) - set(COMPAT_OPTIONS)):
            raise ValueError(f"compat takes {', '.join(COMPAT_OPTIONS)}, not {', '.join(strange)}.")
        trained = solve_grid(
            pde,
            conditions,
            None,
            problem.counts,
            compat=True,
            spectrum=spectrum,
            device=problem.device,
            on_iteration=lambda step, solution: tell(""),
            **options,
        )
        notes = ["trained as published: steps are those of Adam."]
        posterior = GridPosterior("grid", trained.interpolant, trained.values.numel(), notes)
        steps, status = trained.report["n_iter"], trained.status
        ended = {"steps": f"stopped after {steps} steps", "seconds": f"stopped after {options.get('seconds')} seconds"}
        return posterior, ended.get(status, status), steps
    if method == "grid":
        found = solve_grid(pde, conditions, kernels, problem.counts, spectrum=spectrum, device=problem.device)
        notes = [f"solved by {found.report['method']}."]
        if found.report.get("capped"):
            notes.append("the precision of the equation is at its cap: without one it would grow without limit.")
        posterior = GridPosterior(method, found.interpolant, found.values.numel(), notes)
        return posterior, _ended(pde, found.status), len(found.trace)
    equation = GridEquation(pde, pde.domain.axes(problem.counts, problem.device))
    if kernels is None:
        rough = [Axis(x, any_kernel(x)) for x in equation.nodes]
        sides = [side for condition in conditions for side in condition_sides(condition, pde.domain, rough)]
        kernels = kernels_of_data(equation, sides, spectrum)
    axes = [Axis(x, kernel, number=j) for j, (x, kernel) in enumerate(zip(equation.nodes, kernels, strict=True))]
    sides = [side for condition in conditions for side in condition_sides(condition, pde.domain, axes)]
    X = pde.domain.nodes(problem.counts, problem.device)
    J, base = pde.jacobian(X, [torch.zeros_like(X[:, 0]) for _ in pde.requests])
    coefficients = {index: j[0].reshape(problem.counts) for (_, index), j in zip(pde.requests, J, strict=True)}
    done = solve_sylvester(axes, coefficients, (pde.target(X) - base)[0].reshape(problem.counts), sides)
    return GridPosterior(method, done.stats["interpolant"], len(X)), _ended(pde, done.status), 1


def _ended(pde: PDE, status: str) -> str:
    """Return how a solution ended in the words of the other methods."""
    return ("linear" if pde.linear else "converged") if status == "ok" else status
