"""How accurate are differential equations solved, in what time, and does the standard deviation cover the error?

The suite of the published grid solver: high frequencies, mixed scales, one and two dimensions, linear or not. `auto`
gets the equation, its conditions and the number of nodes, and finds frequencies from the forcing and the values at the
sides; the published solver (the same nodes, and the frequency scale and boundary weight that its authors tuned by hand
for each problem) trains for the same time, and then on to --grid-factor times as long. Its extra process, which the
reference begins after 5·10⁵ of 10⁶ steps (mix_sin) or after 10⁴ (x2_add_sinx), is left out: such short runs end before,
and begun at the same part of its time it makes the second one worse. Finite differences and Chebyshev collocation by
SciPy use as many nodes, and a physics-informed network trains as long as the published solver. Every method is scored
in its last state; the published one's best of twenty looks at the exact solution, which is how the reference scores
itself, stands in brackets. The error is |û − u| / |u| over 300 or 300 × 300 uniform points, seconds are those of the
fit and the mean at these points; those that train count the training alone, with its steps.

Run ``python benchmarks/pde.py [--only NAME …] [--grid-factor F] [--limit SECONDS] [--at-least SECONDS]``; the name
``inverse`` stands for the problems with unknown coefficients. Keys of the last line: ``error_<case>`` and
``seconds_<case>`` of `auto`, and ``worst_coverage``, the least share of test points at which the error is below two
standard deviations. ``--nodes`` and ``--part`` make small problems of the same kind, for trials.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from _harness import finish, parser, table, timed
from _pde_peers import chebyshev, finite_differences, network
from _pde_suite import CASES, Case, inverse_problems, relative_error

from mercer.estimators import GPPDESolver
from mercer.pde.grid import GridSolution, solve_grid

LOOKS = 20


def auto(case: Case) -> dict[str, float | str]:
    """Fit, predict, and compare the error with the standard deviation."""
    X = case.test_points().numpy()
    model = GPPDESolver(case.pde, case.conditions, n_collocation=case.nodes)
    seconds, mean = timed(lambda: model.fit().predict(X))
    _, sd = model.predict(X, return_std=True)
    error = (torch.as_tensor(mean) - case.truth()).abs()
    return {
        "error": relative_error(torch.as_tensor(mean), case),
        "seconds": seconds,
        "coverage": float((error < 2 * torch.as_tensor(sd)).double().mean()),
        "method": model.fit_report_.method,
        "residual": model.fit_report_.residual,
    }


def ours_on_grid(case: Case) -> tuple[float, float]:
    """Return seconds and error of the grid method without ``compat``."""

    def run() -> torch.Tensor:
        found = solve_grid(case.pde, case.conditions, None, case.nodes)
        return found.mean_on(case.test_axes())

    seconds, mean = timed(run)
    return seconds, relative_error(mean, case)


class Looks:
    """Look at the published solver's state at given times of its training, and at the exact solution."""

    def __init__(self, case: Case, short: float, long: float):
        self.case, self.short = case, short
        self.times = [long * (k + 1) / LOOKS for k in range(LOOKS)]
        self.began, self.looked = time.perf_counter(), 0.0
        self.at_short = math.nan
        self.best = math.inf
        self.steps_at_short = 0

    def __call__(self, step: int, make: Callable[[], GridSolution]) -> None:
        start = time.perf_counter()
        spent = start - self.began - self.looked
        due = [each for each in self.times if each <= spent]
        first = math.isnan(self.at_short) and spent >= self.short
        if due or first:
            error = relative_error(make().mean_on(self.case.test_axes()), self.case)
            self.best = min(self.best, error)
            self.times = self.times[len(due) :]
            if first:
                self.at_short, self.steps_at_short = error, step
        self.looked += time.perf_counter() - start


def published(case: Case, short: float, long: float) -> tuple[Looks, float, GridSolution]:
    """Train for ``long`` seconds; return what was seen on the way, the last error, and the last state."""
    looks = Looks(case, short, long)
    found = solve_grid(
        case.pde,
        case.published_conditions,
        None,
        case.nodes,
        compat=True,
        max_iter=10**7,
        seconds=long,
        frequency_scale=case.frequency_scale,
        boundary_weight=case.boundary_weight,
        on_iteration=looks,
    )
    return looks, relative_error(found.mean_on(case.test_axes()), case), found


def measure(
    case: Case, factor: float, limit: float, at_least: float = 0.0
) -> tuple[dict[str, Any], list[list[object]]]:
    """Run everything on one case; return the scores of `auto` and the rows of a table."""
    mine = auto(case)
    short = float(mine["seconds"])
    long = max(short, min(factor * short, limit), at_least)
    rows: list[list[object]] = [[f"mercer, auto ({mine['method']})", short, mine["error"], mine["coverage"]]]
    rows.append(["mercer, grid", *ours_on_grid(case), ""])
    looks, error, found = published(case, short, long)
    rows.append([f"published grid, equal time, {looks.steps_at_short} steps", short, looks.at_short, ""])
    name = f"published grid, {long / short:.3g} times, {found.report['n_iter']} steps"
    rows.append([name, long, f"{error:.4g} [{min(looks.best, error):.4g}]", ""])
    for label, solve in (("finite differences", finite_differences), ("Chebyshev", chebyshev)):
        seconds, values = timed(lambda solve=solve: solve(case))
        rows.append([f"SciPy, {label}", seconds, relative_error(torch.as_tensor(values), case), ""])
    for mark, (steps, values) in zip((short, long), network(case, [short, long]), strict=True):
        rows.append([f"network (PINN), {steps} steps", mark, relative_error(torch.as_tensor(values), case), ""])
    return mine, rows


def inverse() -> None:
    """Print what is found of unknown coefficients."""
    rows: list[list[object]] = []
    for problem in inverse_problems():
        model = GPPDESolver(problem.pde, problem.conditions, n_collocation=problem.nodes)
        data = (problem.X.numpy(), problem.y.numpy(), problem.noise)
        seconds, _ = timed(lambda model=model, data=data: model.fit(observations=data))
        for name, truth in problem.truth.items():
            found = model.coefficients_[name]
            verdict = "identified" if found.identified else "not identified"
            rows.append([problem.name, truth, found.value, found.std, verdict, seconds])
    table("unknown coefficients", ["", "truth", "found", "sd", "", "seconds"], rows)


def main() -> None:
    """Answer for all cases and print the keys."""
    arguments = parser(__doc__)
    names = [*(case.name for case in CASES), "inverse"]
    arguments.add_argument("--only", nargs="+", choices=names, default=names, help="by default all", metavar="NAME")
    arguments.add_argument("--grid-factor", type=float, default=20.0, help="how many times as long others may train")
    arguments.add_argument("--limit", type=float, default=600.0, help="most seconds of such a training")
    arguments.add_argument("--at-least", type=float, default=0.0, help="fewest seconds of it, whatever the limit")
    arguments.add_argument("--nodes", type=int, help="nodes along each axis in the place of the reference's")
    arguments.add_argument("--part", type=float, default=1.0, help="part of each axis that is left with --nodes")
    given = arguments.parse_args()
    warnings.simplefilter("ignore")
    auto(CASES[0].reduced(24, 0.02))  # what a first call costs is not the problem's
    keys: dict[str, float] = {}
    coverage: list[float] = []
    for case in CASES:
        if case.name not in given.only:
            continue
        small = case if given.nodes is None else case.reduced(given.nodes, given.part)
        mine, rows = measure(small, given.grid_factor, given.limit, given.at_least)
        keys |= {f"error_{case.name}": mine["error"], f"seconds_{case.name}": mine["seconds"]}
        coverage.append(mine["coverage"])
        nodes = " × ".join(map(str, small.nodes))
        title = f"{case.name}, {nodes} nodes, residual at shifted nodes {mine['residual']:.2g}"
        table(title, ["", "seconds", "relative error", "within 2 sd"], rows)
    if "inverse" in given.only:
        inverse()
    finish(keys | ({"worst_coverage": min(coverage)} if coverage else {}))


if __name__ == "__main__":
    main()
