"""Learn hyperparameters θ by L-BFGS-B on one flat float64 vector.

θ holds the logarithm of positive quantities and the value of others, for kernel, mean and likelihood together.
At each θ the engine is run to convergence from the last sites, so that the objective is a function of θ alone
and its gradient is exact. For larger n a subset is fitted first, and restarts happen there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from mercer._typing import Data, Hyperparameter, Sites
from mercer.inference.base import run
from mercer.kernels.hyperparameters import hyperparameters
from mercer.linalg.cholesky import NotPositiveDefiniteError

if TYPE_CHECKING:
    from mercer.model import Model

_AT_BOUND = 1e-6
_SUBSET_FROM = 800  # rows from which a fit on a subset pays for itself
_SUBSET_ROWS = 400
_STEP_SCALES = (1e-2, 1.0)
_CAUTION = 0.5  # how much of the step that the subset's curvature suggests is taken first


class ThetaVector:
    """The learnable hyperparameters of a model as one flat vector.

    Parameters
    ----------
    model : Model

    Attributes
    ----------
    names : list of str
        One per entry, such as ``kernel.base_kernel.lengthscale[2]``.
    bounds : (k, 2) ndarray
    """

    def __init__(self, model: Model):
        mean = [] if model.prior.mean is None else hyperparameters(model.prior.mean)
        parts = [
            ("kernel", hyperparameters(model.prior.kernel)),
            ("mean", mean),
            ("likelihood", model.likelihood.hyperparameters()),
        ]
        self.parts: list[tuple[str, Hyperparameter]] = [
            (f"{owner}.{h.name}", h) for owner, found in parts for h in found
        ]
        self.names: list[str] = []
        lower: list[np.ndarray] = []
        upper: list[np.ndarray] = []
        for name, h in self.parts:
            size = h.parameter.numel()
            self.names += [name] if size == 1 else [f"{name}[{i}]" for i in range(size)]
            for bound, into in ((h.lower, lower), (h.upper, upper)):
                value = torch.as_tensor(bound, dtype=torch.float64)
                into.append(value.expand(h.parameter.shape).reshape(-1).numpy())
        empty = np.empty(0)
        self.bounds = np.stack([np.concatenate([empty, *lower]), np.concatenate([empty, *upper])], axis=1)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def log_scale(self) -> np.ndarray:
        """Boolean mask: which entries are logarithms."""
        flags = [np.full(h.parameter.numel(), h.log_scale) for _, h in self.parts]
        return np.concatenate([np.empty(0, bool), *flags])

    def read(self) -> np.ndarray:
        """Return θ."""
        with torch.no_grad():
            values = [h.to_theta(h.parameter).reshape(-1).double().cpu().numpy() for _, h in self.parts]
        return np.concatenate([np.empty(0), *values])

    def write(self, theta: np.ndarray) -> None:
        """Set the hyperparameters to θ, in place."""
        start = 0
        with torch.no_grad():
            for _, h in self.parts:
                stop = start + h.parameter.numel()
                block = torch.as_tensor(theta[start:stop], dtype=torch.float64).reshape(h.parameter.shape)
                h.parameter.copy_(h.to_storage(block))
                start = stop

    def gradient(self) -> np.ndarray:
        """Return d/dθ from the ``.grad`` that a backward pass left on the parameters."""
        grads = [np.empty(0)]
        for _, h in self.parts:
            if h.parameter.grad is None:
                grads.append(np.zeros(h.parameter.numel()))
                continue
            with torch.enable_grad():
                theta = h.to_theta(h.parameter.detach().double()).requires_grad_()
                storage = h.to_storage(theta)
            (chained,) = torch.autograd.grad(storage, theta, h.parameter.grad.to(storage))
            grads.append(chained.reshape(-1).cpu().numpy())
        return np.concatenate(grads)

    def zero_grad(self) -> None:
        """Forget gradients."""
        for _, h in self.parts:
            h.parameter.grad = None

    def log_prior(self) -> Tensor | float:
        """Return the log density of the registered hyperparameter priors, in nats."""
        return sum((h.log_prior() for _, h in self.parts if h.log_prior is not None), 0.0)


@dataclass
class Learned:
    """Outcome of hyperparameter learning.

    ``theta`` is the best point seen and ``value`` its objective (nats, priors included); ``trace`` holds the
    objective at each iteration on all rows; ``optima`` the objective reached from each start; ``step_scale`` the
    root of the diagonal of the inverse Hessian, as L-BFGS-B left it.
    """

    theta: np.ndarray
    value: float
    sites: Sites | None = None
    n_iter: int = 0
    n_evaluations: int = 0
    converged: bool = True
    message: str = ""
    trace: list[float] = field(default_factory=list)
    optima: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False
    step_scale: np.ndarray | None = None


class Evidence:
    """The engine's log evidence as a function of θ: ``(value, gradient)``, with warm-started sites."""

    def __init__(self, model: Model, plan: Any, data: Data, with_priors: bool = True):
        self.model, self.plan, self.data, self.with_priors = model, plan, data, with_priors
        self.vector = ThetaVector(model)
        self.sites: Sites | None = None
        self.failures: list[str] = []
        self.n_evaluations = 0
        self.inner_converged = True
        self.inner_notes: dict[str, None] = {}

    def __call__(self, theta: np.ndarray, gradient: bool = True) -> tuple[float, np.ndarray]:
        """Return the objective in nats and its gradient at θ.

        Raises
        ------
        NotPositiveDefiniteError
            A factorisation failed at this θ.
        """
        self.vector.write(theta)
        self.n_evaluations += 1
        inference = run(self.model, self.plan, self.data, self.sites)
        self.inner_converged = inference.converged
        self.inner_notes = dict.fromkeys(inference.notes)
        if not inference.converged and self.model.engine.evidence == "approximation":
            # a bound holds anywhere; an approximation means something at its fixed point only
            raise FloatingPointError("the sites did not converge")
        self.vector.zero_grad()
        with torch.set_grad_enabled(gradient):
            engine = self.model.engine
            value = engine.objective(self.model, self.plan, inference.state, self.data)
            if self.with_priors:
                value = value + self.vector.log_prior()
            if gradient and value.requires_grad:
                value.backward()
        self.sites = inference.state.sites
        grad = self.vector.gradient() if gradient else np.empty(0)
        self.vector.zero_grad()
        return float(value.detach()), grad

    def maximise(
        self,
        start: np.ndarray,
        max_iter: int,
        on_iteration: Callable[[int, float], None] | None = None,
        scale: np.ndarray | None = None,
    ) -> Learned:
        """Climb from ``start`` by L-BFGS-B, remembering the best point and why evaluations failed.

        ``scale`` (k,) is the expected size of a step in each entry of θ; the search runs in θ / scale.
        """
        best = Learned(np.array(start), -np.inf)
        if scale is None:  # the objective is a sum over rows, and so is its curvature
            scale = np.full(len(start), self.data.n_rows**-0.5)
        latest = {"value": -np.inf}

        def negative(scaled: np.ndarray) -> tuple[float, np.ndarray]:
            # rounding of the change of variables must not leave the bounds
            theta = np.clip(scaled * scale, self.vector.bounds[:, 0], self.vector.bounds[:, 1])
            try:
                value, grad = self(theta)
                if not (np.isfinite(value) and np.isfinite(grad).all()):
                    raise FloatingPointError("the objective is not finite")
            except (NotPositiveDefiniteError, FloatingPointError) as failure:
                self.failures.append(str(failure))
                self.sites = best.sites
                if not np.isfinite(best.value):
                    raise
                # a wall, so that the line search backs off
                return -best.value + 1e3 * (1.0 + abs(best.value)), np.zeros_like(theta)
            if value > best.value:
                best.theta, best.value, best.sites = theta.copy(), value, self.sites
            latest["value"] = value
            return -value, -grad * scale

        def iteration(_: np.ndarray) -> None:
            best.n_iter += 1
            best.trace.append(latest["value"])
            if on_iteration is not None:
                on_iteration(best.n_iter, latest["value"])

        try:
            result = scipy.optimize.minimize(
                negative,
                np.clip(start, self.vector.bounds[:, 0], self.vector.bounds[:, 1]) / scale,
                jac=True,
                method="L-BFGS-B",
                bounds=self.vector.bounds / scale[:, None],
                callback=iteration,
                options={"maxiter": max_iter, "ftol": 1e-6, "gtol": 1e-3, "maxls": 30, "maxcor": 20},
            )
            # an abnormal end in the line search at the resolution of the objective is convergence
            best.converged = bool(result.success) or result.status == 2
            best.message = str(result.message)
            best.step_scale = scale * np.sqrt(np.diag(result.hess_inv.todense()).clip(1e-12))
        except KeyboardInterrupt:
            if not np.isfinite(best.value):
                raise
            best.converged, best.interrupted, best.message = False, True, "interrupted by the user"
        best.n_evaluations = self.n_evaluations
        return best


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
    notes: list[str] = []
    stage = _subset(data, generator) if start is None or n_restarts else None
    staged = data if stage is None else stage
    evidence = Evidence(model, model.family.plan(model.prior, staged.X, model.policy), staged)
    outcomes: list[Learned] = []
    for theta in [first, *_restarts(first, vector.bounds, n_restarts, generator)]:
        evidence.sites = None
        on_full = on_iteration if stage is None else None
        try:
            outcomes.append(evidence.maximise(theta, max_iter, on_full))
        except (NotPositiveDefiniteError, FloatingPointError) as failure:
            notes.append(f"a start was given up: {failure}")
            if len(outcomes) == 0 and n_restarts == 0 and stage is None:
                raise
        if outcomes and outcomes[-1].interrupted:
            break
    if not outcomes and stage is None:
        raise NotPositiveDefiniteError(f"Every start failed. First reason: {evidence.failures[0]}")
    best = max(outcomes, key=lambda o: o.value) if outcomes else Learned(first, -np.inf)
    optima = [o.value for o in outcomes]
    notes += _failure_notes(evidence)
    if stage is not None and not best.interrupted:
        notes.append(f"warm start: hyperparameters fitted first on {staged.n_rows} of {data.n_rows} rows")
        evidence = Evidence(model, model.family.plan(model.prior, data.X, model.policy), data)
        # what the subset taught about curvature, which grows with the number of rows
        scale = best.step_scale
        if scale is not None:
            scale = (scale * 0.3 * (staged.n_rows / data.n_rows) ** 0.5).clip(*_STEP_SCALES)
        best = evidence.maximise(best.theta, max_iter, on_iteration, scale)
        notes += _failure_notes(evidence)
    vector.write(best.theta)
    best.optima, best.notes = optima, notes
    return best


def _subset(data: Data, generator: torch.Generator) -> Data | None:
    """Return a random subset for the warm start, or None when n is small."""
    if data.n_rows < _SUBSET_FROM:
        return None
    order = torch.randperm(data.n_rows, generator=generator)[:_SUBSET_ROWS]
    return data.rows(order.sort().values.to(data.X.device))


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


def at_bounds(theta: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Return −1, 0 or 1 per entry: at the lower bound, inside, at the upper bound."""
    low, high = theta <= bounds[:, 0] + _AT_BOUND, theta >= bounds[:, 1] - _AT_BOUND
    return high.astype(int) - low.astype(int)
