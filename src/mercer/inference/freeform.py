"""The free-form engine: stochastic gradients on a sparse inverse Cholesky posterior, as Cao et al. (2023) train it.

Rows come in random batches; the evidence lower bound of a batch, times n over its size, estimates the whole. Mean,
factor and, if asked for, hyperparameters move together by Adam.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from mercer._typing import Data, Info, Sites
from mercer.families.dklgp import DoubleKL, FreeParameters, FreePlan, FreePosterior, divergence_terms
from mercer.inference.base import State, zero_sites
from mercer.inference.evidence import Learned
from mercer.inference.objective import expected_log_prob
from mercer.inference.theta import ThetaVector
from mercer.likelihoods.base import ExpectedLogProb
from mercer.linalg.sic import times
from mercer.linalg.threads import lapack_first

if TYPE_CHECKING:
    from mercer.model import Model

_START_STEPS = 20
_HALVINGS = 15
_DAMPING = 0.5
_SETTLED = 1e-8  # nats per row that a step of the start has to gain
_MILESTONE, _DECAY = 25, 0.1  # of the learning rate, in epochs


@dataclass(frozen=True)
class FreeFit:
    """Outcome of `train_free`: where q ended, under which plan.

    ``trace`` holds the mean over batches of the estimated evidence lower bound, one number per epoch, in nats, as it
    was on the way; numbers of different plans are of different priors. ``seconds`` is the time of all of it.
    """

    parameters: FreeParameters
    plan: FreePlan
    trace: list[float]
    seconds: float


def free_bound(
    model: Model,
    plan: FreePlan,
    parameters: FreeParameters,
    data: Data,
    rows: Tensor | None = None,
    exact: bool = False,
    prior_factor: Tensor | None = None,
) -> Tensor:
    """Return the evidence lower bound, or its estimate from some rows, in nats, with all gradients.

    n/r Σᵢ { wᵢ E_q[log p(yᵢ|fᵢ)] − KLᵢ }, see `mercer.families.dklgp.divergence_terms`.

    Parameters
    ----------
    model : Model
    plan : FreePlan
    parameters : FreeParameters
    data : Data
        In the order of the plan, ``data.rows(plan.order)``.
    rows : (r,) int tensor, optional
        All by default.
    exact : bool
        Solve with all of V; else with reduced ancestors.
    prior_factor : (n, w), optional
        U, which then has no gradients.
    """
    rows = torch.arange(data.n_rows, device=data.X.device) if rows is None else rows
    terms = divergence_terms(model.prior, plan, parameters, rows, exact, prior_factor)
    batch = data.rows(rows)
    expected = expected_log_prob(model, batch, terms.mean, terms.variance).value
    return data.n_rows / len(rows) * (batch.weight * expected - terms.kl).sum()


@torch.no_grad()
def site_start(
    model: Model, plan: FreePlan, data: Data, n_steps: int = _START_STEPS, laplace: bool = True
) -> FreePosterior:
    """Return q from Gaussian sites: a mean by Newton's method, and V by incomplete Cholesky of the precision there.

    Parameters
    ----------
    model, plan, data
        ``data`` in its own order.
    n_steps : int
        Most steps. A step is halved until Σ w E[log p(y|f)] − ½ ‖Uᵀ g‖² at the present variances does not fall.
    laplace : bool
        Expand at the mean, as if q had no variance. Otherwise variances follow V by reduced ancestors, and the fixed
        point is that of natural-gradient variational inference, as far as V allows.

    Notes
    -----
    Where a likelihood is not log-concave a step takes the absolute value of its curvature, which only shortens it, and
    V takes none where it is negative. V then moves halfway too, since variances and curvature may chase each other.
    """
    _check(model, data)
    ordered = data.rows(plan.order)
    weight, zeros = ordered.weight, torch.zeros_like(ordered.weight)
    start = FreePosterior(model.prior, plan, FreeParameters(zeros, zeros.unsqueeze(-1), zeros))
    U, g, v = start.prior_factor, zeros, zeros

    def objective(g: Tensor) -> Tensor:
        expected = expected_log_prob(model, ordered, g, v).value
        return (weight * expected).sum() - 0.5 * times(plan.columns.pattern, U, g, True).square().sum()

    def under_sites(expected: ExpectedLogProb, precision: Tensor) -> FreePosterior:
        linear, precision = weight * (expected.alpha + precision * g), weight * precision
        return start.with_sites(Sites(linear[plan.inverse], precision[plan.inverse]))

    kept: Tensor | None = None
    for _ in range(n_steps):
        expected = expected_log_prob(model, ordered, g, v)
        newton = under_sites(expected, expected.beta.abs())
        before, step = objective(g), newton.parameters.mean - g
        for _ in range(_HALVINGS):
            gain = objective(g + step) - before
            if gain >= 0:  # False for NaN
                break
            step = 0.5 * step
        if model.likelihood.log_concave:
            posterior = newton
        else:
            curvature = expected.beta.clamp_min(0.0)
            kept = curvature if kept is None else torch.lerp(kept, curvature, _DAMPING)
            posterior = under_sites(expected, kept)
        g = g + step
        spread = zeros if laplace else divergence_terms(model.prior, plan, posterior.parameters).variance
        moved, v = (spread - v).abs().max() / spread.max().clamp_min(1e-300), spread
        if float(gain) < _SETTLED * data.n_rows and float(moved) < 1e-4:
            break
    return FreePosterior(model.prior, plan, replace(posterior.parameters, mean=g), posterior.sites, U)


class _Training:
    """Adam on parameters and hyperparameters under one plan."""

    def __init__(
        self,
        model: Model,
        plan: FreePlan,
        data: Data,
        start: FreePosterior,
        *,
        batch_size: int,
        learning_rate: float,
        learn_hyperparameters: bool,
        generator: torch.Generator,
    ):
        self.model, self.plan, self.data = model, plan, data.rows(plan.order)
        self.batch_size, self.generator = batch_size, generator
        self.parameters = start.parameters.leaves()
        self.prior_factor = None if learn_hyperparameters else start.prior_factor
        self.vector = ThetaVector(model) if learn_hyperparameters else None
        learned = [] if self.vector is None else [item for _, item in self.vector.parts]
        self.hyperparameters = [item.parameter for item in learned]
        with torch.no_grad():
            self.bounds = [
                tuple(
                    item.to_storage(torch.as_tensor(bound, dtype=torch.float64).expand_as(item.parameter)).to(
                        item.parameter
                    )
                    for bound in (item.lower, item.upper)
                )
                for item in learned
            ]
        self.free = [*self.parameters.tensors(), *self.hyperparameters]
        self.adam = torch.optim.Adam(self.free, lr=learning_rate)
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(self.adam, [_MILESTONE], _DECAY)

    def epoch(self) -> float:
        """Take every row once, in random batches; return the mean of the estimates that were climbed, in nats."""
        with lapack_first(self.plan.sets.shape[-1], self.data.X.device):
            return self._epoch()

    def _epoch(self) -> float:
        n = self.data.n_rows
        shuffled = torch.randperm(n, generator=self.generator, device=self.generator.device).to(self.data.X.device)
        seen = []
        for rows in shuffled.split(self.batch_size):
            estimate = free_bound(
                self.model, self.plan, self.parameters, self.data, rows, prior_factor=self.prior_factor
            )
            log_prior = 0.0 if self.vector is None else self.vector.log_prior()
            # gradients of parameters that nobody asked for are not left behind
            grads = torch.autograd.grad(-(estimate + log_prior), self.free, materialize_grads=True)
            for leaf, grad in zip(self.free, grads, strict=True):
                leaf.grad = grad
            self.adam.step()
            with torch.no_grad():
                for leaf, (low, high) in zip(self.hyperparameters, self.bounds, strict=True):
                    leaf.clamp_(low, high)
            seen.append(estimate.detach() * len(rows) / n)
        for leaf in self.free:
            leaf.grad = None
        self.schedule.step()
        return float(torch.stack(seen).sum())


def train_free(
    model: Model,
    options: DoubleKL,
    data: Data,
    *,
    epochs: Sequence[int] = (5, 30),
    batch_size: int = 128,
    learning_rate: float = 0.01,
    learn_hyperparameters: bool = True,
    generator: torch.Generator,
    on_epoch: Callable[[int, float], None] | None = None,
) -> FreeFit:
    """Fit q, and the hyperparameters in place, by stochastic gradients.

    Parameters
    ----------
    model : Model
        Its family and engine are not asked.
    options : DoubleKL
        How to plan.
    data : Data
        One target per row, of a likelihood with one latent.
    epochs : sequence of int
        Passes over the data. Before each entry order, neighbours and q are made anew for the hyperparameters reached,
        and Adam starts afresh; where hyperparameters stay as they are nothing would change, and all are one.
    batch_size : int
        Rows per step.
    learning_rate : float
        Of Adam, a tenth of it after 25 epochs.
    learn_hyperparameters : bool
    generator : torch.Generator
        Draws the batches.
    on_epoch : callable, optional
        Called with the number of epochs so far and the latest entry of the trace.

    Returns
    -------
    FreeFit

    References
    ----------
    Cao et al. (2023), section 5 and their code for the numbers of epochs, the rates and the batch size.
    """
    began = time.perf_counter()
    trace: list[float] = []
    for count in epochs if learn_hyperparameters else [sum(epochs)]:
        plan = options.plan(model.prior, data.X, model.policy)
        training = _Training(
            model,
            plan,
            data,
            site_start(model, plan, data),
            batch_size=batch_size,
            learning_rate=learning_rate,
            learn_hyperparameters=learn_hyperparameters,
            generator=generator,
        )
        for _ in range(count):
            trace.append(training.epoch())
            if on_epoch is not None:
                on_epoch(len(trace), trace[-1])
    return FreeFit(training.parameters.detached(), plan, trace, time.perf_counter() - began)


@dataclass(frozen=True)
class Freeform:
    """Variational inference over the mean and a sparse factor, at fixed hyperparameters; one step is one epoch.

    Its family is `mercer.families.dklgp.DoubleKL`. The objective is exact for the q that was reached and bounds the
    evidence of the Vecchia prior; training estimates it from reduced ancestors.

    Parameters
    ----------
    n_epochs : int
    batch_size : int
    learning_rate : float
    seed : int
        Of the batches.
    """

    n_epochs: int = 35
    batch_size: int = 128
    learning_rate: float = 0.01
    seed: int = 0
    name: ClassVar[str] = "freeform"
    evidence: ClassVar[str] = "lower bound"
    requires: ClassVar[tuple[str, ...]] = ("single_latent",)

    def learn(
        self,
        model: Model,
        data: Data,
        generator: torch.Generator,
        on_iteration: Callable[[int, float], None] | None = None,
    ) -> Learned:
        """Train hyperparameters with the posterior, see `train_free`; leaves the model at the last of them."""
        first = max(1, self.n_epochs // 7)  # then order and neighbours are found again
        fit = train_free(
            model,
            model.family,
            data,
            epochs=(first, self.n_epochs - first),
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            generator=generator,
            on_epoch=on_iteration,
        )
        # there is no rule that ends the training early
        return Learned(
            ThetaVector(model).read(),
            fit.trace[-1],
            fit.parameters,
            n_iter=len(fit.trace),
            n_evaluations=len(fit.trace),
            message=f"trained for {len(fit.trace)} epochs",
            trace=fit.trace,
            plan=fit.plan,
        )

    def init(self, model: Model, plan: Any, data: Data, sites: Sites | FreeParameters | None = None) -> State:
        """Start from given sites, or from those of Laplace's method; parameters are taken as trained."""
        _check(model, data)
        if isinstance(sites, FreeParameters):
            posterior = model.family.variational(model.prior, plan, sites)
            asked = expected_log_prob(model, data, posterior.mean_at_data, posterior.variance_at_data)
            precision = data.weight * asked.beta
            posterior.sites = Sites(data.weight * asked.alpha + precision * posterior.mean_at_data, precision)
            return State(posterior.sites, posterior, float("-inf"))
        posterior = site_start(model, plan, data) if sites is None else model.family.condition(model.prior, plan, sites)
        training = _Training(
            model,
            plan,
            data,
            posterior,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            learn_hyperparameters=False,
            generator=torch.Generator().manual_seed(self.seed),
        )
        return State(posterior.sites or zero_sites(model, data), posterior, float("-inf"), history=(training,))

    def step(self, model: Model, plan: Any, state: State, data: Data) -> tuple[State, Info]:
        """Go through the data once; ``Info`` reports the change of the estimated bound.

        The state carries Adam's memory, which moves on: a state that was stepped from cannot be stepped from again.
        """
        if not state.history:  # trained before
            return state, {"converged": True, "change": 0.0}
        (training,) = state.history
        with torch.enable_grad():
            value = training.epoch()
        posterior = FreePosterior(model.prior, plan, training.parameters.detached(), state.sites)
        converged = training.schedule.last_epoch >= self.n_epochs
        info = {"converged": converged, "change": abs(value - state.value)}
        return State(state.sites, posterior, value, history=state.history), info

    def objective(self, model: Model, plan: Any, state: State, data: Data) -> Tensor:
        """Return the evidence lower bound of the q reached, with its gradient in the hyperparameters at that q."""
        return free_bound(model, plan, state.posterior.parameters, data.rows(plan.order), exact=True)


def _check(model: Model, data: Data) -> None:
    if data.X.dtype != torch.float64:
        raise ValueError("free-form posteriors are trained in float64: leave dtype at its default.")
    if model.likelihood.n_latents > 1 or data.y.dim() > 1:
        raise ValueError("free-form posteriors have one latent function: give one target per row.")
