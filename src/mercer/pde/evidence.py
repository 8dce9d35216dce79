"""Hyperparameters and unknown coefficients by maximal evidence, with what the evidence's curvature says of them.

θ is one vector: logarithms of amplitudes and lengthscales, coordinates of the coefficients, the logarithm of the noise.
The gradient is the posterior's adjoint, carried to θ by autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from mercer.kernels import Kernel, hyperparameters
from mercer.linalg.cholesky import NotPositiveDefiniteError
from mercer.pde.rows import Posterior, Rows
from mercer.pde.unknowns import Unknown

_FAR = 1e3  # nats by which a point that cannot be evaluated is worse than the first
_STEP = 1e-3  # of a coordinate, for the curvature
_IDENTIFIED = 1.0  # nats by which the profile must fall to both ends of the range
_SCAN = 13
_PROFILE = 8  # iterations over all else at the ends of a range

Condition = Callable[[Sequence[Rows]], Posterior]
MakeRows = Callable[[Mapping[str, Tensor], Tensor | None], list[Rows]]


@dataclass(frozen=True)
class Coefficient:
    """What was learned of an unknown coefficient.

    ``value`` and ``std`` are in its own units; ``drop`` is by how many nats the evidence, maximised over all else,
    falls towards the lower and the upper end of the range; ``identified`` says that both fall by at least one.
    """

    value: float
    std: float
    identified: bool
    drop: tuple[float, float]

    def __str__(self) -> str:
        if self.identified:
            return f"{self.value:.6g} ± {self.std:.2g}"
        return f"not identified (evidence falls by {self.drop[0]:.2g} and {self.drop[1]:.2g} nats over the range)"


class Search:
    """The coordinates in which the evidence is maximised.

    Parameters
    ----------
    kernels : sequence of gpytorch Kernel
        One per field; their parameters are set as the search moves.
    unknowns : mapping of str to Unknown
    noise : float, optional
        Standard deviation from which that of the sensors is learned; None where it is known.
    every : bool
        Move each parameter of the kernels by itself; else one amplitude per field, and one factor for its lengthscales.
    """

    def __init__(
        self,
        kernels: Sequence[Kernel],
        unknowns: Mapping[str, Unknown],
        noise: float | None = None,
        every: bool = False,
    ):
        self.unknowns = dict(unknowns)
        self.learn_noise = noise is not None
        self.held: list[tuple[torch.nn.Parameter, Tensor, Callable[[Tensor], Tensor], list[int]]] = []
        start: list[float] = []
        bounds: list[tuple[float, float]] = []
        for kernel in kernels:
            places: dict[str, int] = {}
            for h in hyperparameters(kernel):
                base = h.to_theta(h.parameter.detach()).detach()
                kind = h.name.rpartition(".")[2]
                if every:
                    index = list(range(len(start), len(start) + base.numel()))
                    # a weight may vanish, and its component is pruned then
                    reach = {"frequency": (-0.5, 0.5), "weight": (-25.0, 5.0), "outputscale": (-5.0, 5.0)}
                    start += [0.0] * base.numel()
                    bounds += [reach.get(kind, (-1.0, 1.0))] * base.numel()
                elif kind in ("weight", "outputscale", "lengthscale"):
                    group = "lengthscale" if kind == "lengthscale" else "amplitude"
                    if group not in places:
                        places[group] = len(start)
                        start.append(0.0)
                        bounds.append((-1.5, 0.2) if group == "lengthscale" else (-20.0, 20.0))
                    index = [places[group]] * base.numel()
                else:
                    continue
                self.held.append((h.parameter, base, h.to_storage, index))
        self.first_unknown = len(start)
        for unknown in self.unknowns.values():
            start.append(unknown.to_line(unknown.init))
            bounds.append((unknown.to_line(unknown.bounds[0]), unknown.to_line(unknown.bounds[1])))
        if noise is not None:
            start.append(float(np.log(noise)))
            bounds.append((start[-1] - 12.0, start[-1] + 6.0))
        self.start, self.bounds = np.array(start), bounds

    def place(self, theta: np.ndarray) -> tuple[Tensor, dict[str, Tensor], Tensor | None, list[Tensor]]:
        """Set the kernels' parameters; return θ as a leaf, the coefficients, log noise, and the storages made of θ."""
        leaf = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
        storages = []
        for parameter, base, to_storage, index in self.held:
            storage = to_storage(base + leaf[index].reshape(base.shape).to(base.device))
            parameter.data = storage.detach().clone()
            parameter.grad = None
            storages.append(storage)
        at = self.first_unknown
        coefficients = {name: u.from_line(leaf[at + i]) for i, (name, u) in enumerate(self.unknowns.items())}
        return leaf, coefficients, leaf[-1] if self.learn_noise else None, storages

    def pull(self, leaf: Tensor, storages: Sequence[Tensor]) -> np.ndarray:
        """Return the gradient in θ from those that arrived at the kernels' parameters and at θ itself."""
        moved = [(s, p.grad) for s, (p, *_) in zip(storages, self.held, strict=True) if p.grad is not None]
        if moved:
            torch.autograd.backward([s for s, _ in moved], [g for _, g in moved])
        return np.zeros(len(leaf)) if leaf.grad is None else leaf.grad.numpy().copy()


@dataclass
class Maximum:
    """Where the evidence is largest: θ, its value in nats, the posterior there, and how the search ended."""

    theta: np.ndarray
    value: float
    posterior: Posterior
    coefficients: dict[str, Tensor]
    n_evaluations: int
    status: str


class Evidence:
    """log p(noisy rows | exact rows, θ) and its gradient.

    Equations and conditions are not data: what sensors say is weighed given them, so that an equation may be
    multiplied by anything, and a coefficient that no sensor can see leaves the evidence flat. Without noisy rows it is
    log p(rows).

    Parameters
    ----------
    search : Search
    rows : callable
        Returns the rows for given coefficients and log noise, so that gradients flow to both.
    condition : callable
        Returns the posterior given rows.
    """

    def __init__(self, search: Search, rows: MakeRows, condition: Condition):
        self.search, self.rows, self.condition = search, rows, condition
        self.n_evaluations = 0

    def posterior(self, theta: np.ndarray) -> tuple[Posterior, dict[str, Tensor], float]:
        """Return the posterior at θ, with the kernels set to it, the coefficients, and the evidence in nats."""
        _, coefficients, log_noise, _ = self.search.place(theta)
        fixed = {name: value.detach() for name, value in coefficients.items()}
        rows = self.rows(fixed, None if log_noise is None else log_noise.detach())
        posterior = self.condition(rows)
        exact = _exact(rows)
        return posterior, fixed, posterior.log_evidence - (self.condition(exact).log_evidence if exact else 0.0)

    def __call__(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the evidence in nats and its gradient, (k,)."""
        self.n_evaluations += 1
        leaf, coefficients, log_noise, storages = self.search.place(theta)
        rows = self.rows(coefficients, log_noise)
        exact, value = _exact(rows), 0.0
        if exact:
            given = self.condition([_detached(part) for part in exact])
            value -= given.log_evidence
            given.backward(exact)
            for tensor in (leaf, *(parameter for parameter, *_ in self.search.held)):
                if tensor.grad is not None:
                    tensor.grad.neg_()
        posterior = self.condition([_detached(part) for part in rows])
        by_noise = posterior.backward(rows)
        variances = torch.cat([part.noise() for part in rows])
        if variances.requires_grad:
            variances.backward(by_noise, retain_graph=True)
        return posterior.log_evidence + value, self.search.pull(leaf, storages)

    def value(self, theta: np.ndarray) -> float:
        """Return the evidence alone, −∞ where it cannot be computed."""
        try:
            found = self.posterior(theta)[2]
        except (NotPositiveDefiniteError, torch.linalg.LinAlgError):
            return -np.inf
        return found if np.isfinite(found) else -np.inf

    def maximise(self, start: np.ndarray | None = None, max_iter: int = 60, fixed: Sequence[int] = ()) -> Maximum:
        """Climb by L-BFGS from ``start``, entries ``fixed`` held; what cannot be evaluated counts as far below."""
        start = self.search.start if start is None else np.asarray(start, dtype=float)
        free = np.array([i for i in range(len(start)) if i not in set(fixed)], dtype=int)
        best_value, best_theta = -np.inf, start.copy()

        def objective(part: np.ndarray) -> tuple[float, np.ndarray]:
            nonlocal best_value, best_theta
            theta = start.copy()
            theta[free] = part
            try:
                value, gradient = self(theta)
            except (NotPositiveDefiniteError, torch.linalg.LinAlgError):
                value, gradient = np.nan, np.zeros(len(theta))
            if not (np.isfinite(value) and np.isfinite(gradient).all()):
                return (_FAR - best_value if np.isfinite(best_value) else 1e10), np.zeros(len(free))
            if value > best_value:
                best_value, best_theta = value, theta.copy()
            return -value, -gradient[free]

        bounds = [self.search.bounds[i] for i in free]
        clipped = np.clip(start[free], [b[0] for b in bounds], [b[1] for b in bounds])
        options = {"maxiter": max_iter, "maxfun": 3 * max_iter}
        found = minimize(objective, clipped, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        posterior, coefficients, value = self.posterior(best_theta)
        return Maximum(best_theta, value, posterior, coefficients, self.n_evaluations, str(found.message))

    def scan(self, theta: np.ndarray) -> np.ndarray:
        """Move each unknown coefficient to the best of a few places over its range, one after the other."""
        theta = theta.copy()
        for i in range(len(self.search.unknowns)):
            at = self.search.first_unknown + i
            places = [theta[at], *np.linspace(*self.search.bounds[at], _SCAN)]
            values = []
            for place in places:
                trial = theta.copy()
                trial[at] = place
                values.append(self.value(trial))
            theta[at] = places[int(np.argmax(values))]
        return theta

    def describe(self, maximum: Maximum) -> tuple[dict[str, Coefficient], np.ndarray]:
        """Return value, sd and identifiability of each unknown coefficient at a maximum, and the covariance of θ."""
        search, theta = self.search, maximum.theta
        covariance = self._covariance(theta)
        found = {}
        for i, (name, unknown) in enumerate(search.unknowns.items()):
            at = search.first_unknown + i
            drops = []
            for end in search.bounds[at]:
                trial = theta.copy()
                trial[at] = end
                drops.append(maximum.value - self.maximise(trial, max_iter=_PROFILE, fixed=[at]).value)
            line = torch.tensor(theta[at], dtype=torch.float64, requires_grad=True)
            value = unknown.from_line(line)
            slope = float(torch.autograd.grad(value, line)[0])
            value = value.detach()
            std = abs(slope) * float(np.sqrt(covariance[at, at]))
            drop = (float(drops[0]), float(drops[1]))
            found[name] = Coefficient(float(value), std, min(drop) >= _IDENTIFIED, drop)
        self.posterior(theta)  # leaves the kernels where the maximum is
        return found, covariance

    def sigma_points(self, maximum: Maximum, covariance: np.ndarray) -> list[tuple[Posterior, Posterior]]:
        """Return the posteriors a standard deviation to either side, along axes of the coefficients' covariance."""
        first, k = self.search.first_unknown, len(self.search.unknowns)
        low, high = np.array(self.search.bounds[first : first + k]).T
        values, vectors = np.linalg.eigh(covariance[first : first + k, first : first + k])
        pairs = []
        for value, vector in zip(values, vectors.T, strict=True):
            both = []
            for sign in (1.0, -1.0):
                theta = maximum.theta.copy()
                step = sign * np.sqrt(max(value, 0.0)) * vector
                theta[first : first + k] = np.clip(theta[first : first + k] + step, low, high)
                both.append(self.posterior(theta)[0])
            pairs.append((both[0], both[1]))
        self.posterior(maximum.theta)
        return pairs

    def _covariance(self, theta: np.ndarray) -> np.ndarray:
        """Return the inverse of minus the Hessian of the evidence, from differences of the gradient."""
        k = len(theta)
        hessian = np.zeros((k, k))
        for i in range(k):
            sides = []
            for sign in (1.0, -1.0):
                moved = theta.copy()
                moved[i] += sign * _STEP
                sides.append(self(moved)[1])
            hessian[:, i] = (sides[1] - sides[0]) / (2 * _STEP)
        values, vectors = np.linalg.eigh(0.5 * (hessian + hessian.T))
        # directions that the data do not bend count as known to within a range of a few logarithms
        return (vectors / np.maximum(values, 0.1)) @ vectors.T


def _exact(rows: Sequence[Rows]) -> list[Rows]:
    """Return the rows without noise of their own, none if that is all of them."""
    exact = [part for part in rows if part.noise_variance is None]
    return exact if len(exact) < len(rows) else []


def _detached(part: Rows) -> Rows:
    functional = tuple(term._replace(coefficient=term.coefficient.detach()) for term in part.functional)
    noise = None if part.noise_variance is None else part.noise_variance.detach()
    return Rows(functional, part.target.detach(), part.kind, noise)
