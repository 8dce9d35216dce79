"""Which prior: lines from the equation's data, lengthscales from a ladder, all else from the evidence.

Trials are judged by the residual at shifted nodes; the evidence alone may rise while the solution gets worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from mercer.kernels import Kernel, MixtureKernel, prune
from mercer.linalg.cholesky import NotPositiveDefiniteError
from mercer.pde.basis import Features
from mercer.pde.dense import DensePosterior
from mercer.pde.evidence import Evidence, Search
from mercer.pde.features import NUGGET, FeaturePosterior
from mercer.pde.gauss_newton import equation_rows, gauss_newton, node_values
from mercer.pde.problem import Check, Problem
from mercer.pde.rows import Posterior, Rows
from mercer.pde.spectrum import Lines, mixture

MOST_FEATURES, MOST_ROWS = 4000, 4000
_BUDGETS = (1000, 2000, MOST_FEATURES)  # features
_RATIOS = {1: (2.0, 4.0, 8.0, 16.0, 32.0), 2: (0.5, 1.0, 2.0, 4.0, 8.0, 11.0, 16.0), 3: (0.5, 1.0, 2.0, 4.0)}
_DENSE_RATIOS = (2.0, 4.0, 8.0)
_SPARE = {1: 8, 2: 3, 3: 3}
# features up to which a check this small is worth having; what is better is not worth more features
_WORTH = ((600, 1e-9), (2000, 1e-6), (MOST_FEATURES, 1e-3))
_POOR = 1e-6  # check above which the evidence is tried
_LEARNED_ROWS = 1500  # most rows with which an evaluation of the dense evidence is worth its n³
_LEARNED_WORK = 2e9  # n m² likewise
_ROWS_PER_FEATURE = 4


@dataclass
class Trial:
    """One prior with the posterior that it led to."""

    kernels: list[Kernel]
    posterior: Posterior
    check: Check
    n_steps: int
    status: str
    n_evaluations: int = 0
    n_pruned: int = 0


class Solver:
    """Conditions one problem under one prior after another.

    Parameters
    ----------
    problem : Problem
    method : {"features", "dense"}
    nugget : float, optional
        Relative nugget η; by default 1e-20 for features, and a ladder from 1e-10 for the dense solver.
    max_steps : int
        Of Gauss–Newton.
    tell : callable
        Called after each conditioning, with what there is to say of the last prior.
    """

    def __init__(
        self,
        problem: Problem,
        method: str,
        nugget: float | None = None,
        max_steps: int = 20,
        tell: Callable[[str], None] = lambda text: None,
    ):
        self.problem, self.method, self.max_steps, self.tell = problem, method, max_steps, tell
        self.nugget = nugget
        self.coefficients: Mapping[str, Tensor] | None = None
        self._last: Posterior | None = None

    def features(self, kernels: Sequence[Kernel]) -> Features | None:
        """Return the features of a prior over the problem's domain; None for the dense solver."""
        if self.method == "dense":
            return None
        domain = self.problem.pde.domain
        centre = [0.5 * (a + b) for a, b in zip(domain.lower, domain.upper, strict=True)]
        mixtures = [kernel for kernel in kernels if isinstance(kernel, MixtureKernel)]
        return Features(mixtures, centre, domain.lengths, _SPARE[min(domain.d, 3)])

    def points(self, features: Features | None) -> Tensor:
        """Return where the equation holds."""
        if features is None:
            return self.problem.points(MOST_ROWS, grid=True)
        return self.problem.points(max(_ROWS_PER_FEATURE * features.size, 500))

    def known(self, features: Features | None, log_noise: Tensor | None = None) -> list[Rows]:
        """Return the rows of conditions and sensors, as many per face as the functions on it need."""
        d = self.problem.pde.domain.d
        size = MOST_ROWS if features is None else features.size
        return self.problem.known(max(40, int((6 if d == 2 else 3) * size ** ((d - 1) / d))), log_noise)

    def conditioner(
        self, kernels: Sequence[Kernel], features: Features | None, held: Tensor | None = None
    ) -> Callable[[Sequence[Rows]], Posterior]:
        """Return the function that conditions a prior on rows; ``held`` are nugget variances that stay."""

        def condition(rows: Sequence[Rows]) -> Posterior:
            posterior: Posterior
            if features is not None:
                posterior = FeaturePosterior(features, rows, NUGGET if self.nugget is None else self.nugget, held)
            elif self.nugget is None:
                posterior = DensePosterior(kernels, rows, nugget_variance=held)
            else:
                ladder = tuple(self.nugget * factor for factor in (1.0, 10.0, 100.0, 1e3, 1e4))
                posterior = DensePosterior(kernels, rows, ladder, held)
            self.tell("")
            return posterior

        return condition

    def solve(self, kernels: list[Kernel]) -> Trial:
        """Condition under one prior, by Gauss–Newton where the equation is not linear."""
        features, pde = self.features(kernels), self.problem.pde
        X = self.points(features)
        start = None if self._last is None or pde.linear else node_values(pde, self._last, X)
        found = gauss_newton(
            pde,
            X,
            self.known(features),
            self.conditioner(kernels, features),
            start,
            self.coefficients,
            self.max_steps,
        )
        check = self.problem.check(found.posterior, self.coefficients)
        self.tell(f"{features.size if features else 'no'} features, equation met to {check.worst:.1e}")
        return Trial(kernels, found.posterior, check, found.n_steps, found.status)

    def climb(self, lines: Lines, best: Trial | None = None, spectrum: str = "gaussian") -> Trial | None:
        """Try shorter and shorter lengthscales around the same lines; return the best, or what was best before.

        Few features come first: with fewer lines where all of them would be too many.
        """
        dense = self.method == "dense"
        ratios = _DENSE_RATIOS if dense else _RATIOS[min(self.problem.pde.domain.d, 3)]
        tried = set()
        for most in (0,) if dense else _BUDGETS:
            previous = math.inf
            for ratio in ratios:
                found = self._within(lines, ratio, most, spectrum)
                if found is None:
                    break
                kernels, size, n_lines = found
                if size > self.problem.n_nodes and best is not None:
                    break  # nodes cannot tell so many features apart
                if best is not None and best.check.worst <= next(good for limit, good in _WORTH if size <= limit):
                    return best
                if (ratio, n_lines) in tried:
                    continue
                tried.add((ratio, n_lines))
                try:
                    trial = self.solve(kernels)
                except NotPositiveDefiniteError:
                    continue  # shorter lengthscales tell the rows apart
                if best is None or trial.check.worst < best.check.worst:
                    best, self._last = trial, trial.posterior
                elif trial.check.worst > 3 * previous:
                    break
                previous = trial.check.worst
                if n_lines < len(lines):
                    break  # shorter lengthscales would leave out even more lines
        return best

    def smallest(self, lines: Lines) -> int:
        """Return how many features the lines need at the least."""
        domain = self.problem.pde.domain
        kernels = [mixture(lines, domain, _RATIOS[min(domain.d, 3)][0]) for _ in self.problem.pde.fields]
        features = self.features(kernels)
        return 0 if features is None else features.size

    def improve(self, trial: Trial) -> Trial:
        """Learn every parameter of the kernels by maximal evidence; return the better of both by shifted residual."""
        features, pde = self.features(trial.kernels), self.problem.pde
        n = len(trial.posterior.noise_variance)
        small = n <= _LEARNED_ROWS if features is None else n * features.size**2 <= _LEARNED_WORK
        if not (small and pde.linear and trial.check.worst > _POOR):
            return trial
        kernels = [deepcopy(kernel) for kernel in trial.kernels]
        features = self.features(kernels)
        X, known = self.points(features), self.known(features)
        rows = [*equation_rows(pde, X, [torch.zeros_like(X[:, 0]) for _ in pde.requests], self.coefficients), *known]
        held = trial.posterior.noise_variance - torch.cat([part.noise() for part in rows])
        search, condition = Search(kernels, {}, every=True), self.conditioner(kernels, features, held)
        evidence = Evidence(search, lambda c, s: rows, condition)
        maximum = evidence.maximise()
        evidence.posterior(maximum.theta)
        pruned, dropped = zip(*(prune(kernel) for kernel in kernels), strict=True)
        learned = self.solve(list(pruned))
        learned.n_pruned = sum(dropped)
        learned.n_evaluations = trial.n_evaluations = maximum.n_evaluations
        return learned if learned.check.worst < trial.check.worst else trial

    def _within(self, lines: Lines, ratio: float, most: int, spectrum: str) -> tuple[list[Kernel], int, int] | None:
        """Return a prior of at most ``most`` features, its size, and how many of the strongest lines it has."""
        n_fields, domain = len(self.problem.pde.fields), self.problem.pde.domain
        n = len(lines)
        while True:
            kernels: list[Kernel] = [mixture(lines.strongest(n), domain, ratio, spectrum) for _ in range(n_fields)]
            features = self.features(kernels)
            if features is None:
                return kernels, 0, n
            if features.size <= most:
                return kernels, features.size, n
            if n == 0:
                return None
            n = min(n - 1, int(n * most / features.size) + 1)
