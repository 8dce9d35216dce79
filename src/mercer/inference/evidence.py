"""The log evidence as a function of the hyperparameters θ, and its maximisation by L-BFGS-B.

θ holds the logarithm of positive quantities and the value of others, for kernel, mean and likelihood together.
At each θ the engine is run to convergence from the last sites, so that the objective is a function of θ alone
and its gradient is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.optimize
import torch

from mercer._typing import Data, Sites
from mercer.inference.base import run, threads_for
from mercer.inference.theta import ThetaVector, at_bounds
from mercer.linalg.cholesky import NotPositiveDefiniteError
from mercer.linalg.threads import torch_alone

if TYPE_CHECKING:
    from mercer.model import Model

# sites stop at this share of what ends the search; an approximation has its value at the fixed point only
_INNER_SHARE = 0.1
_INNER_TOL = 1e-7
_MAX_INNER = 25
_STEP_SCALES = (1e-2, 1.0)
_CAUTION = 0.3  # how much of the step that L-BFGS-B's idea of the curvature suggests is taken first
_DIFFERENCE = 1e-3


@dataclass
class Learned:
    """Outcome of hyperparameter learning.

    ``theta`` is the best point seen and ``value`` its objective (nats, priors included); ``trace`` holds the
    objective at each iteration on all rows; ``optima`` how far below the best each start of several ended (nats,
    ≤ 0, on the rows of the first stage); ``steps`` are sizes (k,) or directions and sizes (k, k)
    of likely steps in θ: a root of the inverse Hessian. ``moved`` says that the search stopped for a new
    plan, and ``plan`` is the last one, None where it is stale at ``theta``.
    """

    theta: np.ndarray
    value: float
    sites: Any = None
    n_iter: int = 0
    n_evaluations: int = 0
    converged: bool = True
    message: str = ""
    trace: list[float] = field(default_factory=list)
    optima: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False
    moved: bool = False
    plan: Any = None
    steps: np.ndarray | None = None


class Evidence:
    """The engine's log evidence as a function of θ: ``(value, gradient)``, with warm-started sites.

    ``settled`` are the nats that a search for θ leaves open, or those that a sampled objective is known to if they
    are more. Sites then converge no further than such a search can tell. By default they converge fully.
    """

    def __init__(self, model: Model, plan: Any, data: Data, with_priors: bool = True, settled: float = 0.0):
        policy = model.policy
        n_rows = float(data.weight.sum())
        self.settled = max(settled, model.likelihood.sampling_error * n_rows)
        if settled:
            share = _INNER_TOL
            if model.engine.evidence == "lower bound":  # which holds at any sites, so a bad θ is seen early
                share = _INNER_SHARE * self.settled / max(1.0, n_rows)
                policy = replace(policy, max_inner=min(policy.max_inner, _MAX_INNER))
            policy = replace(policy, tol=max(policy.tol, share))
        self.model = replace(model, policy=policy)
        self.plan, self.data, self.with_priors = plan, data, with_priors
        self.vector = ThetaVector(model, plan)
        self.places_learned = len(self.vector) > len(ThetaVector(model))
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
        with threads_for(self.model, self.data):
            return self._evaluate(theta, gradient)

    def _evaluate(self, theta: np.ndarray, gradient: bool) -> tuple[float, np.ndarray]:
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
        steps: np.ndarray | None = None,
        moved: Callable[[], bool] | None = None,
    ) -> Learned:
        """Climb from ``start`` by L-BFGS-B, remembering the best point and why evaluations failed.

        The search runs in z with θ = start + steps z, ``steps`` (k, k), or (k,) where directions are those of θ. It
        ends when an iteration gains less than ``settled`` nats and the slope promises no more, or when ``moved`` says
        that the plan is of no use any more.
        """
        best = Learned(np.array(start), -np.inf)
        if steps is None:  # the objective is a sum over replicates, and so is its curvature
            steps = self.vector.scale * max(1.0, float(self.data.weight.sum())) ** -0.5
        elif steps.ndim == 2 and np.array_equal(steps, np.diag(np.diag(steps))):
            steps = np.diag(steps)
        low, high = self.vector.bounds.T
        start = np.clip(start, low, high)
        # bounds of θ are bounds of z where each direction is one entry of θ; else θ is stopped at them
        aligned = steps.ndim == 1
        many = self.places_learned  # a slope that is small in all of so many directions is not to be waited for
        first: dict[bytes, tuple[float, np.ndarray]] = {}
        stretch = 1.0
        if not aligned:
            first[start.tobytes()] = _, slope = self(start)
            # no entry wants to move by more than one: curvature is no guide so far away, least where there is little
            steps = self.inverse_root(np.linalg.inv(steps @ steps.T) + np.diag(np.abs(slope)), start)
            stretch = max(1.0, float(np.linalg.norm(steps.T @ slope)))
            steps = steps * stretch  # the first step of L-BFGS-B has length one in z, and should be Newton's
        bounds = np.stack([low - start, high - start], axis=1) / steps[:, None] if aligned else None
        latest: dict[str, Any] = {"value": -np.inf, "slope": np.inf, "z": np.zeros(len(start))}

        def negative(z: np.ndarray) -> tuple[float, np.ndarray]:
            theta = np.clip(start + (steps * z if aligned else steps @ z), low, high)
            try:
                value, grad = first.pop(theta.tobytes()) if theta.tobytes() in first else self(theta)
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
            inside = np.where(at_bounds(theta, self.vector.bounds) * grad > 0, 0.0, grad)
            slope = steps * inside if aligned else steps.T @ inside
            latest["value"], latest["slope"] = value, float(slope @ slope) / stretch**2
            return -value, -(grad * steps if aligned else slope)

        def iteration(z: np.ndarray) -> None:
            best.n_iter += 1
            if many:  # so far it moves in one iteration, wherever that leads
                best.steps = steps * float(np.linalg.norm(z - latest["z"]))
                latest["z"] = z.copy()
            gain = latest["value"] - (best.trace[-1] if best.trace else -np.inf)
            best.trace.append(latest["value"])
            if on_iteration is not None:
                on_iteration(best.n_iter, latest["value"])
            # a Newton step would gain half the slope where the curvature was measured; where it was not, the last
            # gain has to agree, and the first steps are too cautious to say
            flat = 0.5 * latest["slope"] < self.settled or many
            if many and best.n_iter > 2:  # one short iteration says little
                gain = (best.trace[-1] - best.trace[-3]) / 2
            if flat and (not aligned or (gain < self.settled and best.n_iter > 2)):
                best.message = f"the evidence settled: the last iteration gained {gain:.1g} nats"
                raise StopIteration
            if moved is not None and moved():
                best.moved = True
                raise StopIteration

        try:
            with torch_alone() if many else nullcontext():  # L-BFGS-B itself would wake all threads
                result = scipy.optimize.minimize(
                    negative,
                    np.zeros(len(start)),
                    jac=True,
                    method="L-BFGS-B",
                    bounds=bounds,
                    callback=iteration,
                    options={"maxiter": max_iter, "ftol": 0.0, "gtol": 1e-3, "maxls": 30, "maxcor": 20},
                )
            # an abnormal end in the line search at the resolution of the objective is convergence
            best.converged = bool(best.message) or bool(result.success) or result.status == 2
            best.message = best.message or str(result.message)
            if not many:
                roots = np.diag(steps) if aligned else steps
                sizes = np.sqrt(np.diag(roots @ result.hess_inv.todense() @ roots.T).clip(1e-12))
                best.steps = (_CAUTION * sizes).clip(*_STEP_SCALES)
        except KeyboardInterrupt:
            if not np.isfinite(best.value):
                raise
            best.converged, best.interrupted, best.message = False, True, "interrupted by the user"
        best.n_evaluations = self.n_evaluations
        return best

    def curvature_steps(self, theta: np.ndarray) -> np.ndarray:
        """Return a root of the inverse of minus the Hessian at θ, (k, k), by differences of the gradient."""
        high = self.vector.bounds[:, 1]
        inward = np.where(theta + _DIFFERENCE > high, -_DIFFERENCE, _DIFFERENCE)
        _, here = self(theta)
        there = [self(theta + step)[1] for step in np.diag(inward)]
        return self.inverse_root(-(np.stack(there) - here) / inward[:, None], theta)

    def inverse_root(self, curvature: np.ndarray, theta: np.ndarray) -> np.ndarray:
        """Return R with R Rᵀ the inverse of a curvature (k, k) at θ.

        Entries of θ at a bound keep to themselves, and curvature counts as at least one nat per unit of θ squared.
        """
        low, high = self.vector.bounds.T
        free = (theta > low + _DIFFERENCE) & (theta < high - _DIFFERENCE)
        kept = np.where(free[:, None] & free, 0.5 * (curvature + curvature.T), np.diag(np.diag(curvature)))
        values, vectors = np.linalg.eigh(kept)
        return vectors / np.sqrt(np.maximum(np.abs(values), 1.0))
