"""Noisy sensors and unknown coefficients: amplitudes, lengthscales, noise and coefficients by maximal evidence.

The equation holds to a relative tolerance, the same for all priors that are compared, so that the evidence weighs what
sensors say and not how well features can write the equation down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy

import torch
from torch import Tensor

from mercer.kernels import Kernel, MixtureKernel, functional_diag
from mercer.linalg.cholesky import NotPositiveDefiniteError
from mercer.pde.evidence import Coefficient, Evidence, Maximum, Search
from mercer.pde.gauss_newton import equation_rows, gauss_newton
from mercer.pde.marginalised import Marginalised
from mercer.pde.priors import Solver, Trial
from mercer.pde.problem import Problem
from mercer.pde.rows import Posterior, Rows
from mercer.pde.spectrum import Lines, mixture

TOLERANCE = 1e-10  # relative variance of the equation's residual
_RATIOS = (1.0, 2.0, 4.0, 8.0, 16.0)
_MOST_NODES, _PER_FACE = 600, 80
_RESOLVED = 1e-5  # check at which equation and conditions are met as well as the tolerance asks
_LOOKS = 4  # at the spectrum, which depends on the coefficients, and at the quadrature of its lines
_SHORTER = 0.8
_MOVED = 0.1  # relative change of a coefficient after which the spectrum is looked at again
_MOST_AT_ONCE = 800  # features of a prior whose evidence is climbed

MakeLines = Callable[[Mapping[str, Tensor] | None], Lines]


def invert(
    solver: Solver, make_lines: MakeLines, kernels: list[Kernel] | None = None
) -> tuple[Trial, dict[str, Coefficient]]:
    """Return the posterior at the largest evidence, and what was learned of the coefficients.

    Parameters
    ----------
    solver : Solver
    make_lines : callable
        Returns the lines of the spectrum for given coefficients.
    kernels : list of gpytorch Kernel, optional
        One per field, in the place of mixtures with these lines.
    """
    pde = solver.problem.pde
    coefficients = pde.initial_coefficients()
    best: _Fit | None = None
    chosen = kernels
    for _ in range(_LOOKS):
        if chosen is None:
            chosen = _resolved(solver, make_lines(coefficients), coefficients)
        fit = _Fit(solver, chosen)
        fit.search_from(best)
        best = fit
        learned = fit.maximum.coefficients
        near = all(abs(float(learned[name] - c)) <= _MOVED * abs(float(c)) for name, c in coefficients.items())
        if near and not fit.shortened():
            break
        # lengthscales that have shrunk need more quadrature nodes, other coefficients another spectrum
        chosen = fit.kernels if near or kernels is not None else None
        coefficients = learned
    assert best is not None
    posterior: Posterior = best.maximum.posterior
    found: dict[str, Coefficient] = {}
    if pde.unknowns:
        found, covariance = best.evidence.describe(best.maximum)
        posterior = Marginalised(posterior, best.evidence.sigma_points(best.maximum, covariance))
    solver.coefficients = best.maximum.coefficients or None
    check = solver.problem.check(posterior, solver.coefficients)
    trial = Trial(best.kernels, posterior, check, best.n_steps, best.maximum.status, best.evidence.n_evaluations)
    return trial, found


def _resolved(solver: Solver, lines: Lines, coefficients: Mapping[str, Tensor]) -> list[Kernel]:
    """Return the longest lengthscales with which equation and conditions alone can be met, or the best there are."""
    problem, best, smallest = solver.problem, None, math.inf
    exact = Problem(problem.pde, problem.conditions, problem.counts, (), problem.device)
    trial_solver = Solver(exact, solver.method, TOLERANCE if solver.nugget is None else solver.nugget, solver.max_steps)
    trial_solver.tell = solver.tell
    trial_solver.coefficients = coefficients
    for ratio in _RATIOS[1:] if problem.pde.domain.d == 1 else _RATIOS:
        kernels = _mixtures(solver, lines, ratio)
        features = solver.features(kernels)
        if best is not None and features is not None and features.size > _MOST_AT_ONCE:
            break
        try:
            found = trial_solver.solve(kernels).check.worst
        except NotPositiveDefiniteError:
            continue
        if best is None or found < smallest:
            best, smallest = kernels, found
        if found <= _RESOLVED:
            break
    if best is None:
        raise ValueError("no prior was found that the equation's rows can be conditioned on; take fewer nodes.")
    return best


class _Fit:
    """The evidence of one prior, with rows that follow the coefficients."""

    def __init__(self, solver: Solver, kernels: list[Kernel]):
        self.solver, self.kernels = solver, kernels
        self.features = solver.features(kernels)
        self.size = 0 if self.features is None else self.features.size
        self.held: Tensor | None = None
        self.n_steps = 1
        self._reference = [deepcopy(kernel) for kernel in kernels]
        self._begun = [kernel.lengthscale.detach().clone() for kernel in kernels if isinstance(kernel, MixtureKernel)]
        self._values: tuple[Tensor, ...] | None = None

    def search_from(self, other: _Fit | None) -> None:
        """Climb, from the coefficients and the noise of another fit if there is one."""
        pde, sensors = self.solver.problem.pde, self.solver.problem.sensors
        learn = [sensor for sensor in sensors if sensor.noise is None]
        noise = float(sum(s.y.std() for s in learn) / len(learn)) * math.exp(-2) if learn else None
        search = Search(self.kernels, pde.unknowns, noise)
        self.X = self.solver.problem.points(_MOST_NODES)
        # the tolerance is that of the first prior, whatever amplitudes are learned
        self.held = held = self._nuggets() if other is None or other.held is None else other.held

        def condition(rows: Sequence[Rows]) -> Posterior:
            # exact rows come first, and may come alone
            return self.solver.conditioner(self.kernels, self.features, held[: sum(map(len, rows))])(rows)

        self.evidence = Evidence(search, self._rows, condition)
        self._condition = condition
        start = search.start.copy()
        if other is not None:
            start[search.first_unknown :] = other.maximum.theta[search.first_unknown :]
        elif pde.unknowns:
            start = self.evidence.scan(start)
        self.maximum: Maximum = self.evidence.maximise(start)

    def shortened(self) -> bool:
        """Say whether lengthscales have shrunk so far that their quadrature is not to be trusted."""
        now = [kernel.lengthscale.detach() for kernel in self.kernels if isinstance(kernel, MixtureKernel)]
        return any(float((new / old).min()) < _SHORTER for new, old in zip(now, self._begun, strict=True))

    def _nuggets(self) -> Tensor:
        """Return nugget variances relative to the prior's at the start, (n,)."""
        rows = self._rows(self.solver.problem.pde.initial_coefficients(), None)
        tolerance = TOLERANCE if self.solver.nugget is None else self.solver.nugget
        if self.features is not None:
            sizes = [self.features.evaluate(part.functional).detach().square().sum(1) for part in rows]
        else:
            sizes = [functional_diag(self.kernels, part.functional).detach() for part in rows]
        return tolerance * torch.cat(sizes)

    def _rows(self, coefficients: Mapping[str, Tensor], log_noise: Tensor | None) -> list[Rows]:
        pde = self.solver.problem.pde
        known = self.solver.problem.known(_PER_FACE, log_noise)
        values = tuple(torch.zeros_like(self.X[:, 0]) for _ in pde.requests)
        if not pde.linear and self.held is not None:
            fixed = {name: value.detach() for name, value in coefficients.items()}
            quiet = [Rows(part.functional, part.target, part.kind, _detached(part.noise_variance)) for part in known]
            found = gauss_newton(
                pde, self.X, quiet, self._condition, self._values, fixed, self.solver.max_steps, tol=1e-7
            )
            values = self._values = found.values
            self.n_steps = found.n_steps
        return [*(self._scaled(part) for part in equation_rows(pde, self.X, values, coefficients)), *known]

    def _scaled(self, part: Rows) -> Rows:
        """Return rows in units of their prior's standard deviation, so that all coefficients have one tolerance."""
        fixed = tuple(term._replace(coefficient=term.coefficient.detach()) for term in part.functional)
        with torch.no_grad():
            size = functional_diag(self._reference, fixed).clamp_min(1e-300).sqrt()
        scaled = tuple(term._replace(coefficient=term.coefficient / size) for term in part.functional)
        return Rows(scaled, part.target / size, part.kind)


def _mixtures(solver: Solver, lines: Lines, ratio: float) -> list[Kernel]:
    """Return one mixture per field, with the amplitude of what its sensors read."""
    pde = solver.problem.pde
    kernels: list[Kernel] = []
    for field in pde.fields:
        read = [sensor.y.square().mean() for sensor in solver.problem.sensors if sensor.field == field]
        kernel: MixtureKernel = mixture(lines, pde.domain, ratio)
        if read:
            kernel.weight = kernel.weight.detach() / kernel.weight.detach().sum() * float(torch.stack(read).mean())
        kernels.append(kernel)
    return kernels


def _detached(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach()
