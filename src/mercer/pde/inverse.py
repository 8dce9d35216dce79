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
from mercer.pde.amplitudes import PER_FACE, data_size, data_sizes, with_amplitudes
from mercer.pde.equation import LinearisationError
from mercer.pde.evidence import Evidence, Maximum, Search
from mercer.pde.gauss_newton import equation_rows, gauss_newton, node_values
from mercer.pde.identify import describe, scan, sigma_points
from mercer.pde.marginalised import Marginalised
from mercer.pde.priors import Solver, Trial
from mercer.pde.problem import Problem
from mercer.pde.rows import Posterior, Rows
from mercer.pde.spectrum import Lines, mixture
from mercer.pde.unknowns import Coefficient, first_noise

TOLERANCE = 1e-10  # least relative variance of the equation's residual
_RATIOS = (1.0, 2.0, 4.0, 8.0, 16.0)
_MOST_NODES = 600
_RESOLVED = 1e-5  # check at which equation and conditions are met as well as the tolerance asks
_LOOKS = 4  # at the spectrum, which depends on the coefficients, and at the quadrature of its lines
_SHORTER = 0.8
_MOVED = 0.1  # relative change of a coefficient after which the spectrum is looked at again
_MOST_AT_ONCE = 800  # features of a prior whose evidence is climbed

_UNMET, _WORTH = 10.0, 5.0  # tolerances that an equation may be missed by, and nats for which it may

MakeLines = Callable[[Mapping[str, Tensor] | None], Lines]


def invert(
    solver: Solver, make_lines: MakeLines, kernels: list[Kernel] | None = None, spectrum: str = "gaussian"
) -> tuple[Trial, dict[str, Coefficient]]:
    """Return the posterior at the largest evidence under the last prior, and what was learned of the coefficients.

    The equation's tolerance is no constant: features that cannot meet it to 1e-10 would take what they miss for
    knowledge.

    Parameters
    ----------
    solver : Solver
    make_lines : callable
        Returns the lines of the spectrum for given coefficients.
    kernels : list of gpytorch Kernel, optional
        One per field, in the place of mixtures with these lines; one without an amplitude gets one.
    spectrum : {"gaussian", "student"}
        Shape of the lines.
    """
    pde = solver.problem.pde
    coefficients = pde.initial_coefficients()
    chosen = None if kernels is None else with_amplitudes(solver.problem, kernels)
    overdetermined = _overdetermined(solver.problem)
    if pde.unknowns and not solver.problem.sensors and not overdetermined:
        return _unobserved(solver, make_lines, chosen, spectrum)
    best: _Fit | None = None
    tolerance = TOLERANCE if solver.nugget is None else solver.nugget
    for look in range(_LOOKS):
        if chosen is None:
            chosen, left = _resolved(solver, make_lines(coefficients), coefficients, spectrum)
            # what features cannot meet is no knowledge; rougher priors meet it at nodes, and know of the rest.
            # All looks have one tolerance, so that their evidences are of the same equation
            if look == 0 and solver.nugget is None and solver.method == "features" and not overdetermined:
                tolerance = max(TOLERANCE, min(left, 1.0) ** 2)
        fit = _Fit(solver, chosen, tolerance)
        fit.search_from(best)
        best = fit
        learned = fit.maximum.coefficients
        near = all(abs(float(learned[name] - c)) <= _MOVED * abs(float(c)) for name, c in coefficients.items())
        if near and not fit.shortened():
            break
        # lengthscales that have shrunk need more quadrature nodes, other coefficients another spectrum
        chosen = fit.kernels if near or kernels is not None else None
        coefficients = learned
        if chosen is not None and fit.features is not None and _size(solver, chosen) > max(fit.size, _MOST_AT_ONCE):
            break
    assert best is not None
    posterior: Posterior = best.maximum.posterior
    found: dict[str, Coefficient] = {}
    if pde.unknowns:
        best.maximum, found, covariance = describe(best.evidence, best.maximum, best.met)
        posterior = Marginalised(best.maximum.posterior, sigma_points(best.evidence, best.maximum, covariance))
    solver.coefficients = best.maximum.coefficients or None
    check = solver.problem.check(posterior, solver.coefficients)
    trial = Trial(best.kernels, posterior, check, best.n_steps, best.maximum.status, best.evidence.n_evaluations)
    return trial, found


def _unobserved(
    solver: Solver, make_lines: MakeLines, kernels: list[Kernel] | None, spectrum: str
) -> tuple[Trial, dict[str, Coefficient]]:
    """Solve with the coefficients that a search would start from: there is nothing to tell others from them."""
    pde, coefficients = solver.problem.pde, solver.problem.pde.initial_coefficients()
    solver.coefficients = coefficients
    trial = solver.climb(make_lines(coefficients), None, spectrum) if kernels is None else solver.solve(kernels)
    if trial is None:
        raise ValueError("no prior was found that the rows can be conditioned on; take other nodes.")
    trial.posterior.surprise = max(1.0, solver.problem.surprise(trial.posterior, coefficients))
    note = "not identified: nothing was observed, so that the solution is for its init, {:g}"
    found = {
        name: Coefficient(unknown.init, math.inf, False, (0.0, 0.0), note.format(unknown.init))
        for name, unknown in pde.unknowns.items()
    }
    return trial, found


def _overdetermined(problem: Problem) -> bool:
    """Say whether some axis has more conditions than the equations have derivatives."""
    return any(given > order for given, order in problem.counts_of_conditions())


def _size(solver: Solver, kernels: list[Kernel]) -> int:
    features = solver.features(kernels)
    return 0 if features is None else features.size


def _resolved(
    solver: Solver, lines: Lines, coefficients: Mapping[str, Tensor], spectrum: str
) -> tuple[list[Kernel], float]:
    """Return the longest lengthscales that meet equation and conditions alone, or the best there are; and how well."""
    problem, best, smallest, spare = solver.problem, None, math.inf, None
    exact = Problem(problem.pde, problem.conditions, problem.counts, (), problem.device)
    nugget = TOLERANCE if solver.nugget is None else solver.nugget
    trial_solver = Solver(exact, solver.method, nugget, solver.max_steps, solver.tell)
    trial_solver.coefficients = coefficients
    for ratio in _RATIOS[1:] if problem.pde.domain.d == 1 else _RATIOS:
        kernels = _mixtures(solver, lines, ratio, spectrum)
        if best is not None and _size(solver, kernels) > _MOST_AT_ONCE:
            break
        try:
            found = trial_solver.solve(kernels).check.worst
        except NotPositiveDefiniteError:
            continue
        except LinearisationError:  # without sensors steps may lead where there is none
            spare = spare or kernels
            continue
        if best is None or found < smallest:
            best, smallest = kernels, found
        if found <= _RESOLVED:
            break
    chosen = best or spare
    if chosen is None:
        raise ValueError("no prior was found that the equation's rows can be conditioned on; take fewer nodes.")
    return chosen, smallest if best is not None else 0.0


class _Fit:
    """The evidence of one prior, with rows that follow the coefficients."""

    def __init__(self, solver: Solver, kernels: list[Kernel], tolerance: float):
        self.solver, self.kernels = solver, kernels
        self.features = solver.features(kernels)
        self.size = 0 if self.features is None else self.features.size
        self.held: Tensor | None = None
        self.n_steps = 1
        self._tolerance = tolerance
        self._reference = [deepcopy(kernel) for kernel in kernels]
        self._begun = [kernel.lengthscale.detach().clone() for kernel in kernels if isinstance(kernel, MixtureKernel)]
        self._values: tuple[Tensor, ...] | None = None
        self._solved_for: Mapping[str, Tensor] = {}

    def search_from(self, other: _Fit | None) -> None:
        """Climb, from the coefficients and the noise of another fit if there is one."""
        pde, sensors = self.solver.problem.pde, self.solver.problem.sensors
        learn = [sensor for sensor in sensors if sensor.noise is None]
        noise = sum(first_noise(sensor.y) for sensor in learn) / len(learn) if learn else None
        seen = [data_size(self.solver.problem, field) is not None for field in range(len(pde.fields))]
        search = Search(self.kernels, pde.unknowns, noise, seen=seen)
        self.X = self.solver.problem.points(_MOST_NODES)
        # the tolerance is that of the first prior, whatever amplitudes are learned
        self.held = held = self._nuggets() if other is None or other.held is None else other.held

        def condition(rows: Sequence[Rows]) -> Posterior:
            # exact rows come first, and may come alone
            return self._conditioned(rows, held[: sum(map(len, rows))])

        self.evidence = Evidence(search, self._rows, condition)
        start = search.start.copy()
        if other is not None:
            start[search.first_unknown :] = other.maximum.theta[search.first_unknown :]
        elif pde.unknowns:
            start = scan(self.evidence, start)
        self.maximum: Maximum = self.evidence.maximise(start)
        if self.met() > _UNMET * math.sqrt(self._tolerance):
            # readings that a prior explains a little better are not worth an equation that it can no longer meet
            kept = self.evidence.maximise(start, fixed=range(search.first_unknown))
            if self.maximum.value - kept.value < _WORTH:
                self.maximum = kept
            self.evidence.posterior(self.maximum.theta)  # leaves the kernels there

    def met(self, maximum: Maximum | None = None) -> float:
        """Return how well equation and conditions are met, by the maximum of this fit by default."""
        at = self.maximum if maximum is None else maximum
        return self.solver.problem.check(at.posterior, at.coefficients).worst

    def shortened(self) -> bool:
        """Say whether lengthscales have shrunk so far that their quadrature is not to be trusted."""
        now = [kernel.lengthscale.detach() for kernel in self.kernels if isinstance(kernel, MixtureKernel)]
        return any(float((new / old).min()) < _SHORTER for new, old in zip(now, self._begun, strict=True))

    def _conditioned(self, rows: Sequence[Rows], nuggets: Tensor | None) -> Posterior:
        posterior = self.solver.conditioner(self.kernels, self.features, nuggets)(rows)
        if nuggets is not None and self.features is not None:
            posterior.nugget = self._tolerance
        return posterior

    def _nuggets(self) -> Tensor:
        """Return nugget variances relative to the prior's at the start, (n,)."""
        pde, known = self.solver.problem.pde, self.solver.problem.known(PER_FACE)
        values = tuple(torch.zeros_like(self.X[:, 0]) for _ in pde.requests)
        if not pde.linear and known:
            values = node_values(pde, self._conditioned(known, None), self.X)
        rows = [*map(self._scaled, equation_rows(pde, self.X, values, pde.initial_coefficients())), *known]
        if self.features is not None:
            sizes = [self.features.evaluate(part.functional).detach().square().sum(1) for part in rows]
        else:
            sizes = [functional_diag(self.kernels, part.functional).detach() for part in rows]
        return self._tolerance * torch.cat(sizes)

    def _rows(self, coefficients: Mapping[str, Tensor], log_noise: Tensor | None) -> list[Rows]:
        """Return all rows, the equation linearised around its solution for these coefficients."""
        pde, known = self.solver.problem.pde, self.solver.problem.known(PER_FACE, log_noise)
        values = tuple(torch.zeros_like(self.X[:, 0]) for _ in pde.requests)
        if not pde.linear:
            values = self._solved({name: value.detach() for name, value in coefficients.items()}, known)
        return [*map(self._scaled, equation_rows(pde, self.X, values, coefficients)), *known]

    def _solved(self, coefficients: Mapping[str, Tensor], known: Sequence[Rows]) -> tuple[Tensor, ...]:
        """Return the derivatives of the solution for these coefficients at the nodes, by Gauss–Newton."""
        pde, held = self.solver.problem.pde, self.held
        assert held is not None
        quiet = [Rows(part.functional, part.target, part.kind, _detached(part.noise_variance)) for part in known]

        def condition(rows: Sequence[Rows]) -> Posterior:
            equations = [self._tolerance * self._variance(part) for part in rows if part.kind == "equation"]
            return self._conditioned(rows, torch.cat([*equations, held[len(self.X) * pde.n_equations :]]))

        # the last solution is a start for one nearby; that of other coefficients may lead to another solution
        near = all(
            abs(float(self._solved_for.get(name, math.inf) - c)) <= _MOVED * abs(float(c))
            for name, c in coefficients.items()
        )
        start = self._values if near else None
        found = gauss_newton(pde, self.X, quiet, condition, start, coefficients, self.solver.max_steps, tol=1e-7)
        self._values, self._solved_for, self.n_steps = found.values, coefficients, found.n_steps
        return found.values

    def _variance(self, part: Rows) -> Tensor:
        """Return the prior variances of rows at the start, (n,)."""
        fixed = tuple(term._replace(coefficient=term.coefficient.detach()) for term in part.functional)
        with torch.no_grad():
            return functional_diag(self._reference, fixed).clamp_min(1e-300)

    def _scaled(self, part: Rows) -> Rows:
        """Return rows in units of their prior's standard deviation, so that all coefficients have one tolerance."""
        size = self._variance(part).sqrt()
        scaled = tuple(term._replace(coefficient=term.coefficient / size) for term in part.functional)
        return Rows(scaled, part.target / size, part.kind)


def _mixtures(solver: Solver, lines: Lines, ratio: float, spectrum: str) -> list[Kernel]:
    """Return one mixture per field, with the amplitudes of what sensors or conditions say."""
    domain = solver.problem.pde.domain
    kernels: list[Kernel] = [mixture(lines, domain, ratio, spectrum) for _ in solver.problem.pde.fields]
    for kernel, size in zip(kernels, data_sizes(solver.problem, kernels), strict=True):
        kernel.weight = kernel.weight.detach() * size
    return kernels


def _detached(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach()
