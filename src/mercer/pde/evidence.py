"""Hyperparameters and unknown coefficients by maximal evidence.

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
from mercer.pde.equation import LinearisationError
from mercer.pde.rows import Posterior, Rows
from mercer.pde.unknowns import Unknown

_FAR = 1e3  # nats by which a point that cannot be evaluated is worse than the first
_SMALLEST = -4.0  # logarithm of an amplitude, relative to what data say
# what happens at θ that cannot be evaluated
FAILURES = (NotPositiveDefiniteError, torch.linalg.LinAlgError, LinearisationError)

Conditioner = Callable[[Sequence[Rows]], Posterior]
MakeRows = Callable[[Mapping[str, Tensor], Tensor | None], list[Rows]]


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
    seen : sequence of bool, optional
        Which fields have data that say how large they are. Exact rows do not count as data, and where the prior's waves
        are rougher than the solution sensors would rather have an amplitude near zero, so that these stay near.
    """

    def __init__(
        self,
        kernels: Sequence[Kernel],
        unknowns: Mapping[str, Unknown],
        noise: float | None = None,
        every: bool = False,
        seen: Sequence[bool] = (),
    ):
        self.unknowns = dict(unknowns)
        self.learn_noise = noise is not None
        self.held: list[tuple[torch.nn.Parameter, Tensor, Callable[[Tensor], Tensor], list[int]]] = []
        start: list[float] = []
        bounds: list[tuple[float, float]] = []
        for number, kernel in enumerate(kernels):
            places: dict[str, int] = {}
            least = _SMALLEST if seen and seen[number] else -20.0
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
                        bounds.append((-1.5, 0.2) if group == "lengthscale" else (least, 20.0))
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

    def __init__(self, search: Search, rows: MakeRows, condition: Conditioner):
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
        ends: list[tuple[Tensor, Tensor]] = []
        rows = [_cut(part, ends) for part in self.rows(coefficients, log_noise)]
        exact, value = _exact(rows), 0.0
        if exact:
            given = self.condition([_detached(part) for part in exact])
            value -= given.log_evidence
            given.backward(exact)
            for tensor in (*(end for _, end in ends), *(parameter for parameter, *_ in self.search.held)):
                if tensor.grad is not None:
                    tensor.grad.neg_()
        posterior = self.condition([_detached(part) for part in rows])
        by_noise = posterior.backward(rows)
        variances = torch.cat([part.noise() for part in rows])
        if variances.requires_grad:
            variances.backward(by_noise, retain_graph=True)
        moved = [(tensor, end.grad) for tensor, end in ends if end.grad is not None]
        if moved:
            torch.autograd.backward([tensor for tensor, _ in moved], [gradient for _, gradient in moved])
        return posterior.log_evidence + value, self.search.pull(leaf, storages)

    def value(self, theta: np.ndarray) -> float:
        """Return the evidence alone, −∞ where it cannot be computed."""
        try:
            found = self.posterior(theta)[2]
        except FAILURES:
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
            except FAILURES:
                value, gradient = np.nan, np.zeros(len(theta))
            if not (np.isfinite(value) and np.isfinite(gradient).all()):
                return (_FAR - best_value if np.isfinite(best_value) else 1e10), np.zeros(len(free))
            if value > best_value:
                best_value, best_theta = value, theta.copy()
            return -value, -gradient[free]

        if not len(free):
            posterior, coefficients, value = self.posterior(start)
            return Maximum(start, value, posterior, coefficients, self.n_evaluations, "nothing to learn")
        bounds = [self.search.bounds[i] for i in free]
        clipped = np.clip(start[free], [b[0] for b in bounds], [b[1] for b in bounds])
        options = {"maxiter": max_iter, "maxfun": 3 * max_iter}
        found = minimize(objective, clipped, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        posterior, coefficients, value = self.posterior(best_theta)
        return Maximum(best_theta, value, posterior, coefficients, self.n_evaluations, str(found.message))


def _exact(rows: Sequence[Rows]) -> list[Rows]:
    """Return the rows without noise of their own, none if that is all of them."""
    exact = [part for part in rows if part.noise_variance is None]
    return exact if len(exact) < len(rows) else []


def _cut(part: Rows, ends: list[tuple[Tensor, Tensor]]) -> Rows:
    """Return rows whose coefficients and targets are leaves, noted in ``ends`` beside what they were copied from.

    Gradients arrive there twice, from all rows and from the exact ones, and a graph may be walked once.
    """

    def leaf(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        ends.append((tensor, tensor.detach().requires_grad_()))
        return ends[-1][1]

    functional = tuple(term._replace(coefficient=leaf(term.coefficient)) for term in part.functional)
    return Rows(functional, leaf(part.target), part.kind, part.noise_variance)


def _detached(part: Rows) -> Rows:
    functional = tuple(term._replace(coefficient=term.coefficient.detach()) for term in part.functional)
    noise = None if part.noise_variance is None else part.noise_variance.detach()
    return Rows(functional, part.target.detach(), part.kind, noise)
