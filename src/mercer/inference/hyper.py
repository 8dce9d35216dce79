"""Learn hyperparameters θ: L-BFGS-B in stages, of which the earlier ones look at less.

For larger n a subset is fitted first, and restarts happen there. It is one of rows, or, where the evidence is a sum
over columns, one of columns, which estimates the evidence of all rows without bias.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mercer._typing import Data, Sites
from mercer.inference.evidence import Evidence, Learned
from mercer.inference.fisher import fisher_information
from mercer.inference.freeform import Freeform
from mercer.inference.theta import ThetaVector
from mercer.linalg.cholesky import NotPositiveDefiniteError

if TYPE_CHECKING:
    from mercer.model import Model

_SUBSET_COLUMNS = 1000  # no stage has fewer
_INFORMATION_COLUMNS = 1000  # so many say what curvature to expect
_MOST_PLANS = 6  # orders and neighbours of one stage
# an iteration that gains less (nats) ends the search; a subset says only where to start the next stage
_SETTLED, _SETTLED_COLUMNS, _SETTLED_PER_ROW = 1e-2, 1e-1, 1e-5
_SETTLED_SUBSET = 1e-1
_SETTLED_PLACES, _SETTLED_PLACES_SUBSET = 1e-4, 4e-3  # per row, where places are learned: all rows are soon worth more
_FEW = 20  # so many hyperparameters are worth differences of the gradient for their curvature


@dataclass(frozen=True)
class Stage:
    """What one stage looks at: data, and of these the columns of ``rows`` alone if given.

    ``least`` are the nats that the last stage may leave open: more where neighbours are an approximation already.
    """

    data: Data
    rows: Tensor | None = None
    least: float = _SETTLED

    @property
    def size(self) -> int:
        """How many rows or columns."""
        return self.data.n_rows if self.rows is None else len(self.rows)

    def plan(self, model: Model, before: Any = None) -> Any:
        """Return the family's plan at the model's present hyperparameters, or what was learned of the one before."""
        if hasattr(before, "learnable") and before.learnable():
            return before.over(self.data.X, model.policy)
        if self.rows is None:
            return model.family.plan(model.prior, self.data.X, model.policy)
        return model.family.plan_some(model.prior, self.data.X, model.policy, self.rows)

    def settled(self, final: bool, plan: Any = None) -> float:
        """Return the nats that the search may leave open; those of columns stand for more."""
        if hasattr(plan, "learnable") and plan.learnable():
            return (_SETTLED_PLACES if final else _SETTLED_PLACES_SUBSET) * self.data.n_rows
        return self.least if final else _SETTLED_SUBSET * self.data.n_rows / self.size


def learn(
    model: Model,
    data: Data,
    *,
    max_iter: int = 100,
    n_restarts: int = 0,
    generator: torch.Generator,
    start: np.ndarray | None = None,
    on_iteration: Callable[[int, float], None] | None = None,
) -> Learned:
    """Maximise the engine's log evidence (plus log priors) over θ; leaves the model at the best θ.

    Parameters
    ----------
    model : Model
        Its modules are changed in place.
    data : Data
    max_iter : int
        Most L-BFGS-B iterations on all rows.
    n_restarts : int
        Extra random starts, drawn log-uniformly around the first within the bounds.
    generator : torch.Generator
        Draws the subset and the restarts.
    start : (k,) ndarray, optional
        First θ; the model's own by default. Given (warm start), no subset is fitted.
    on_iteration : callable, optional
        Called with (iteration, objective) on all rows.

    Returns
    -------
    Learned
    """
    vector = ThetaVector(model)
    first = vector.read() if start is None else np.asarray(start, dtype=np.float64)
    if isinstance(model.engine, Freeform):  # moves hyperparameters along with the posterior
        vector.write(first)
        return model.engine.learn(model, data, generator, on_iteration)
    stages = _stages(model, data, generator) if start is None or n_restarts else [Stage(data)]
    starts = [first, *_restarts(first, vector.bounds, n_restarts, generator)]
    notes: list[str] = []
    optima: list[float] = []
    best, sites, plan = Learned(first, -np.inf), None, None
    steps: np.ndarray | None = None
    for stage, following in zip(stages, [*stages[1:], None], strict=True):
        final = following is None
        climb = _Climb(model, stage, final, max_iter, on_iteration if final else None, plan)
        best, reached = climb(starts, sites, steps, every_start=stage is stages[0])
        plan = climb.plan
        notes += climb.notes
        optima = climb.optima or optima
        if not reached:
            if final:
                raise climb.reason
            continue
        if best.interrupted:
            break
        if following is not None:
            what = "rows" if stage.rows is None else "columns"
            notes.append(f"warm start: hyperparameters fitted first on {stage.size} of {data.n_rows} {what}")
            # the first start is there in case the optimum of the subset cannot be factored on more rows
            starts = [best.theta, first]
            sites = best.sites if stage.rows is not None else _carried_sites(climb.evidence, best, following.data)
            steps = _next_steps(climb, best, steps, 4 * stage.size <= data.n_rows)
            if steps is not None and len(steps) == len(best.theta):  # curvature grows with the number of rows
                steps = steps * (stage.data.n_rows / following.data.n_rows) ** 0.5
    vector.write(best.theta)
    best.optima, best.notes = optima, notes
    return best


class _Climb:
    """The search of one stage, with new plans as lengthscales move.

    Attributes
    ----------
    plan, evidence : Plan, Evidence
        The last plan, which starts as that of the stage before, and its evidence.
    notes, optima, reason
        What is to be reported, how far below the best each start ended, and why the last start was given up.
    """

    evidence: Evidence

    def __init__(
        self,
        model: Model,
        stage: Stage,
        final: bool,
        max_iter: int,
        on_iteration: Callable[[int, float], None] | None,
        plan: Any = None,
    ):
        self.model, self.stage, self.final, self.plan = model, stage, final, plan
        self.max_iter, self.on_iteration = max_iter, on_iteration
        self.notes: list[str] = []
        self.optima: list[float] = []
        self.reason: Exception = FloatingPointError("no start was tried")

    def __call__(
        self, starts: list[np.ndarray], sites: Sites | None, steps: np.ndarray | None, every_start: bool
    ) -> tuple[Learned, bool]:
        """Return the best point that the starts lead to, and whether there is one."""
        trace: list[float] = []
        best = Learned(starts[0], -np.inf)
        for n_plans in range(1, _MOST_PLANS + 1):
            ThetaVector(self.model).write(starts[0])
            self.plan = plan = self.stage.plan(self.model, self.plan)
            settled = self.stage.settled(self.final, plan)
            self.evidence = Evidence(self.model, plan, self.stage.data, settled=settled)
            # several starts have lengthscales of their own; the last plan is kept whatever happens
            keep_on = (every_start and len(starts) > 1) or n_plans == _MOST_PLANS
            outcomes = self._outcomes(starts, sites, steps, every_start, None if keep_on else plan, len(trace))
            self.notes += _failure_notes(self.evidence)
            if not outcomes:
                return best, n_plans > 1
            best = max(outcomes, key=lambda outcome: outcome.value)
            if len(outcomes) > 1:
                self.optima = [outcome.value - best.value for outcome in outcomes]
            trace += best.trace
            self.evidence.vector.write(best.theta)
            best.theta = best.theta[: len(starts[0])]  # the plan keeps its own coordinates
            stale = self.model.family.stale(self.model.prior, plan)
            if best.interrupted or not stale or len(trace) >= self.max_iter:
                break
            starts, sites, every_start = [best.theta], best.sites, False
        best.trace, best.n_iter = trace, len(trace)
        best.plan = None if stale or self.stage.rows is not None else plan
        return best, True

    def _outcomes(
        self,
        starts: list[np.ndarray],
        sites: Sites | None,
        steps: np.ndarray | None,
        every_start: bool,
        plan: Any,
        n_iter: int,
    ) -> list[Learned]:
        """Climb from the first start that can be factored, or from all; stop when ``plan``, if given, gets stale."""
        model, outcomes = self.model, []
        report = None if self.on_iteration is None else _counting_from(n_iter, self.on_iteration)
        moved = None if plan is None else lambda: model.family.stale(model.prior, plan)
        own = self.evidence.vector.read()[len(starts[0]) :]  # coordinates of the plan
        for theta in starts:
            self.evidence.sites = sites
            point = np.concatenate([theta, own])
            try:
                outcomes.append(self.evidence.maximise(point, self.max_iter - n_iter, report, steps, moved))
            except (NotPositiveDefiniteError, FloatingPointError) as failure:
                self.notes.append(f"a start was given up: {failure}")
                self.reason = failure
                continue
            if outcomes[-1].interrupted or not every_start:
                break
        if not outcomes:  # the next stage takes the places over
            self.evidence.vector.write(np.concatenate([starts[0], own]))
        return outcomes


def _counting_from(n_iter: int, report: Callable[[int, float], None]) -> Callable[[int, float], None]:
    return lambda iteration, value: report(n_iter + iteration, value)


def _next_steps(climb: _Climb, best: Learned, before: np.ndarray | None, cheap: bool) -> np.ndarray | None:
    """Return the likely steps around the optimum of a stage: measured while that is cheap, then the same ones."""
    model, stage = climb.model, climb.stage
    if climb.evidence.places_learned:
        return best.steps
    if stage.rows is not None:
        some = replace(climb.evidence.plan, rows=climb.evidence.plan.rows[:_INFORMATION_COLUMNS])
        return climb.evidence.inverse_root(fisher_information(model, some, stage.data), best.theta)
    if len(best.theta) > _FEW:
        return best.steps
    if before is not None and not cheap:
        return before
    evidence = Evidence(model, climb.evidence.plan, stage.data)  # small differences need sites that have converged
    evidence.sites = best.sites
    try:
        return evidence.curvature_steps(best.theta)
    except (NotPositiveDefiniteError, FloatingPointError):
        return best.steps


@torch.no_grad()
def _carried_sites(evidence: Evidence, best: Learned, following: Data) -> Sites | None:
    """Return the sites that the likelihood asks for at the rows of the next stage, under the posterior of this one."""
    model = evidence.model
    if best.sites is None or model.likelihood.conjugate:
        return None
    ThetaVector(model).write(best.theta)
    m, v = model.family.condition(model.prior, evidence.plan, best.sites).marginals(following.X)
    expected = model.likelihood.expected_log_prob(following.y, m, v, **following.side)
    centred = m - model.prior.mean_at(following.X)
    return Sites(following.weight * (expected.alpha + expected.beta * centred), following.weight * expected.beta)


def _stages(model: Model, data: Data, generator: torch.Generator) -> list[Stage]:
    """Return nested random subsets, each a share of the next, and last the data themselves."""
    order = torch.randperm(data.n_rows, generator=generator)
    columns = model.likelihood.conjugate and model.family.sums_over_columns
    growth = model.family.stage_growth
    # what columns say does not change with the number of rows, so that fewer stages do
    share, fewest = (2 * growth, _SUBSET_COLUMNS) if columns else (growth, model.family.stage_rows)
    least = max(_SETTLED_COLUMNS, _SETTLED_PER_ROW * data.n_rows) if columns else _SETTLED
    stages, size = [Stage(data, least=least)], data.n_rows // share
    while size >= fewest:
        some = order[:size].to(data.X.device)
        stages.insert(0, Stage(data, some) if columns else Stage(data.rows(some.sort().values)))
        size //= share
    return stages


def _restarts(first: np.ndarray, bounds: np.ndarray, n: int, generator: torch.Generator) -> list[np.ndarray]:
    """Draw n starts uniformly within ±2.5 of the first (a factor of 12 either way), inside the bounds."""
    draws = torch.rand(n, len(first), generator=generator, dtype=torch.float64).numpy()
    return [np.clip(first + 5.0 * (u - 0.5), bounds[:, 0], bounds[:, 1]) for u in draws]


def _failure_notes(evidence: Evidence) -> list[str]:
    """Say once how many evaluations failed and why."""
    if not evidence.failures:
        return []
    count = len(evidence.failures)
    return [f"{count} evaluation(s) of the objective failed and were stepped back from: {evidence.failures[0]}"]
