"""Grid values by variable projection: for given kernels they are a least-squares problem, which is solved, not trained.

With U = (L_1 ⊗ … ⊗ L_D) e the prior is ½|e|², equation and conditions are rows on e, and Gauss–Newton steps are QR
factorisations. Only the kernels are left to be learned: tens of numbers, of which the profiled objective is a function.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from mercer.inference.theta import ThetaVector
from mercer.kernels import Kernel
from mercer.linalg.cholesky import NotPositiveDefiniteError, Solution
from mercer.linalg.kronecker import kron_logdet, kron_matvec
from mercer.pde.axes import NUGGET, factor, node_gram
from mercer.pde.equation import LinearisationError
from mercer.pde.grid_equation import GridEquation, Index
from mercer.pde.sides import Elimination

PRECISE = 1e-8  # residual that a precision tolerates, beside the rms of f
LEARN = (1e-6, 1e-2)  # the same while kernels are learned, at most and at least precise
_NOTHING = 1e-16  # of a mean square beside that of the prior
_SETTLED = 1e-9  # relative step of Gauss–Newton
_SLOWEST = 0.95  # part by which steps of precisions shrink that is extrapolated
_FLAT = 1e-4  # relative gain of J at which kernels are learned
_STEADY, _PROFILES = 1e-3, 20  # log precisions that no longer move, and times that they are set anew


class Projection:
    """The profiled objective of a grid equation in the hyperparameters of its kernels.

    Parameters
    ----------
    equation : GridEquation
    elimination : Elimination
        The conditions, and which nodes are left for the equation; corners count once.
    kernels : sequence of D gpytorch Kernel
        Changed in place by `learn`.
    boundary_weight : float
        λ_b, which multiplies the log density of the conditions.
    nuggets : sequence of D floats, optional
        Of each axis, as in `Axis`.

    Notes
    -----
    J = −½ log|C| − ½|e|² + λ_b (½ N_b log τ − ½ τ |gap|²) + ½ N_r log v − ½ v |r|² over (e, τ, v); O(N³) for N nodes in
    all. Precisions are those of the residuals, N/|r|², within bounds 1/(ε² mean f²). Without a cap J has no upper bound
    wherever the equation can be met; without a floor it is often largest where the equation counts for nothing and u is
    the prior's mean.
    """

    def __init__(
        self,
        equation: GridEquation,
        elimination: Elimination,
        kernels: Sequence[Kernel],
        boundary_weight: float = 1.0,
        nuggets: Sequence[float] | None = None,
    ):
        self.equation, self.elimination, self.kernels = equation, elimination, tuple(kernels)
        self.boundary_weight = boundary_weight
        self.nuggets = [NUGGET] * len(self.kernels) if nuggets is None else list(nuggets)
        self.inner = GridEquation(equation.pde, [x[i] for x, i in zip(equation.nodes, elimination.inner, strict=True)])
        self.rhs = self.inner.rhs.reshape(-1)
        self.target = torch.cat([part.reshape(-1) for part in self._targets()])
        self._scale = self._scales()
        model: Any = SimpleNamespace(
            prior=SimpleNamespace(mean=None, kernel=torch.nn.ModuleList(self.kernels)),
            likelihood=SimpleNamespace(hyperparameters=list),
        )
        self.theta = ThetaVector(model)

    def solve(
        self,
        tolerance: float = PRECISE,
        start: Tensor | None = None,
        *,
        loosest: float | None = None,
        precisions: Tensor | None = None,
        max_iter: int = 30,
        deadline: float | None = None,
    ) -> Solution:
        """Find the values for the present kernels.

        Parameters
        ----------
        tolerance : float
            ε of the caps.
        start : (N,), optional
            e of a solution nearby.
        loosest : float, optional
            ε of the floors; precisions are at their caps by default.
        precisions : (2,), optional
            Where to begin with τ and v; at their caps by default.
        max_iter : int
            Most Gauss–Newton steps; a linear equation takes one.
        deadline : float, optional
            ``time.perf_counter()`` after which no step is begun.

        Returns
        -------
        Solution
            ``value`` (N_1, …, N_D); ``status`` "ok", "not converged", "stalled" or "seconds"; ``stats``: ``white`` e
            (N,), ``precisions`` τ and v (2,), ``capped`` (whether the equation is met to ε, so that v would be higher),
            ``objective`` J in nats, and ``trace``, the rms residual after each step in units of f.
        """
        with torch.no_grad():
            factors, rows, sides = self._rows()
            white = self.target.new_zeros(self.equation.size) if start is None else start
            caps = torch.stack([1 / (tolerance**2 * scale) for scale in self._scale])
            floors = caps if loosest is None else caps * (tolerance / loosest) ** 2
            precisions = caps if precisions is None else torch.clamp(precisions, floors, caps)
            path = [precisions.log()]
            trace: list[float] = []
            for _ in range(_PROFILES):
                white, found, status = self._gauss_newton(rows, sides, white, precisions, max_iter, deadline)
                trace += found
                before = precisions
                wanted = torch.stack([_precision(sides @ white - self.target), _precision(self._residual(rows, white))])
                precisions = torch.clamp(wanted, floors, caps)
                if status == "seconds" or bool((precisions / before).log().abs().max() <= _STEADY):
                    break
                path.append(precisions.log())
                if len(path) == 3:
                    precisions = torch.clamp(_limit(*path).exp(), floors, caps)
                    path = [precisions.log()]
            else:
                status = "not converged"
            # e belongs to the precisions before
            stats: dict[str, Any] = {"white": white, "precisions": before, "capped": bool(wanted[1] >= caps[1])}
            J = self._objective(factors, rows, sides, white, before)
            U = kron_matvec(factors, white.reshape(self.equation.shape))
        return Solution(U, status, {**stats, "objective": float(J), "trace": trace})

    def objective(self, solution: Solution) -> tuple[float, np.ndarray]:
        """Return J and its gradient in θ; e, τ and v follow at no cost: J is stationary in them, or they at bounds."""
        stats = solution.stats
        self.theta.zero_grad()
        J = self._objective(*self._rows(), stats["white"], stats["precisions"])
        J.backward()
        gradient = self.theta.gradient()
        self.theta.zero_grad()
        return float(J.detach()), gradient

    def learn(self, max_iter: int, deadline: float | None = None) -> list[float]:
        """Maximise J over θ by L-BFGS-B, leave the kernels at the best θ, and return J after each evaluation."""
        first = self.theta.read()
        best: dict[str, Any] = {"theta": first, "white": None, "precisions": None}
        trace: list[float] = []

        def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
            if deadline is not None and time.perf_counter() > deadline:
                raise TimeoutError
            self.theta.write(theta)
            try:
                near = best["white"], best["precisions"]
                solution = self.solve(LEARN[0], near[0], loosest=LEARN[1], precisions=near[1], deadline=deadline)
                J, gradient = self.objective(solution)
            except (NotPositiveDefiniteError, LinearisationError):
                return np.inf, np.zeros_like(theta)
            if solution.status == "seconds":
                raise TimeoutError
            if not trace or max(trace) < J:
                best.update(theta=theta.copy(), white=solution.stats["white"], precisions=solution.stats["precisions"])
            trace.append(J)
            return -J, -gradient

        with suppress(TimeoutError):
            options = {"maxiter": max_iter, "ftol": _FLAT}
            minimize(loss, first, jac=True, method="L-BFGS-B", bounds=self.theta.bounds, options=options)
        self.theta.write(best["theta"])
        return trace

    def _targets(self) -> list[Tensor]:
        found = []
        for j, of_axis in enumerate(self.elimination.sides):
            for side in of_axis:
                target = side.target
                for k in range(j + 1, target.dim()):
                    target = target.index_select(k, self.elimination.inner[k])
                found.append(target)
        return found

    def _rows(self) -> tuple[list[Tensor], dict[Index, Tensor], Tensor]:
        """Return the factors L_j, the derivatives at inner nodes and the conditions as rows on e; differentiable."""
        nodes = self.equation.nodes
        grams = [node_gram(kernel, x, 0) for kernel, x in zip(self.kernels, nodes, strict=True)]
        factors = [factor(K, nugget, j) for j, (K, nugget) in enumerate(zip(grams, self.nuggets, strict=True))]
        inner = self.elimination.inner
        rows = {}
        for index in self.equation.indices:
            parts = []
            for j, order in enumerate(index):
                # ∂ⁿ K⁻¹ L = K⁽ⁿ⁾ L⁻ᵀ along axes that are differentiated, the values themselves along the others
                whole = factors[j]
                if order:
                    whole = torch.linalg.solve_triangular(
                        factors[j], node_gram(self.kernels[j], nodes[j], order).mT, upper=False
                    ).mT
                parts.append(whole[inner[j]])
            rows[index] = _kron(parts)
        sides = []
        for j, of_axis in enumerate(self.elimination.sides):
            for side in of_axis:
                # lines of corners belong to the last of their axes
                lines = [L if k <= j else L[inner[k]] for k, L in enumerate(factors)]
                lines[j] = (side.row @ factors[j])[None]
                sides.append(_kron(lines))
        return factors, rows, torch.cat(sides) if sides else self.rhs.new_zeros(0, self.equation.size)

    def _values(self, rows: dict[Index, Tensor], white: Tensor) -> list[Tensor]:
        return [(rows[index] @ white).reshape(self.inner.shape) for index in self.inner.indices]

    def _residual(self, rows: dict[Index, Tensor], white: Tensor) -> Tensor:
        return self.inner.evaluate(self._values(rows, white)).reshape(-1) - self.rhs

    def _linear(self, rows: dict[Index, Tensor], white: Tensor) -> tuple[Tensor, Tensor]:
        coefficients, target = self.inner.linearise(self._values(rows, white))
        terms = [coefficients[index].reshape(-1, 1) * rows[index] for index in self.inner.indices]
        return sum(terms[1:], terms[0]), target.reshape(-1)

    @torch.no_grad()
    def _scales(self) -> tuple[Tensor, Tensor]:
        """Return the mean squares of g and f; where those are nothing, what they can be under the first prior."""
        _, rows, sides = self._rows()
        A, _ = self._linear(rows, self.target.new_zeros(self.equation.size))
        found = []
        for target, matrix, least in ((self.target, sides, 1.0), (self.rhs, A, _NOTHING)):
            if len(target):
                found.append(torch.maximum(target.square().mean(), least * matrix.square().sum(1).mean()))
            else:
                found.append(target.new_ones(()))
        return found[0], found[1]

    def _gauss_newton(
        self,
        rows: dict[Index, Tensor],
        sides: Tensor,
        white: Tensor,
        precisions: Tensor,
        max_iter: int,
        deadline: float | None,
    ) -> tuple[Tensor, list[float], str]:
        n, (tau, v) = self.equation.size, precisions
        weight = self.boundary_weight * tau
        prior = torch.eye(n, n + 1, dtype=white.dtype, device=white.device)
        trace: list[float] = []

        def loss(e: Tensor) -> Tensor:
            gap = sides @ e - self.target
            return 0.5 * (e.square().sum() + weight * gap.square().sum() + v * self._residual(rows, e).square().sum())

        for step in range(max_iter):
            A, target = self._linear(rows, white)
            # the heavy rows first, as Householder's reflections like them
            equation = v.sqrt() * torch.cat([A, target[:, None]], 1)
            conditions = weight.sqrt() * torch.cat([sides, self.target[:, None]], 1)
            # Qᵀ of the right-hand side, the last column, without Q itself
            R = torch.linalg.qr(torch.cat([equation, conditions, prior]), mode="r")[1]
            new = torch.linalg.solve_triangular(R[:n, :n], R[:n, n:], upper=True)[:, 0]
            if not self.equation.pde.linear and step:
                new = _shortened(loss, white, new)
            moved = torch.linalg.vector_norm(new - white) / torch.linalg.vector_norm(new).clamp_min(1e-300)
            white = new
            trace.append(float(self._residual(rows, white).square().mean().sqrt()))
            if self.equation.pde.linear or bool(moved <= _SETTLED):
                return white, trace, "ok"
            if len(trace) > 3 and trace[-1] >= trace[-2] >= trace[-3]:
                return white, trace, "ok" if bool(moved <= 1e3 * _SETTLED) else "stalled"
            if deadline is not None and time.perf_counter() > deadline:
                return white, trace, "seconds"
        return white, trace, "not converged"

    def _objective(
        self,
        factors: Sequence[Tensor],
        rows: dict[Index, Tensor],
        sides: Tensor,
        white: Tensor,
        precisions: Tensor,
    ) -> Tensor:
        residual, gap = self._residual(rows, white), sides @ white - self.target
        tau, v = precisions
        boundary = 0.5 * len(gap) * tau.log() - 0.5 * tau * gap.square().sum()
        fit = 0.5 * len(residual) * v.log() - 0.5 * v * residual.square().sum()
        return -0.5 * kron_logdet(factors) - 0.5 * white.square().sum() + self.boundary_weight * boundary + fit


def _precision(residual: Tensor) -> Tensor:
    return len(residual) / residual.square().sum().clamp_min(1e-300)


def _limit(first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    """Return where steps lead that shrink by the same part each time (Aitken), or the third where they do not."""
    part = (third - second) / (second - first)
    return torch.where((part > 0) & (part < _SLOWEST), third + (third - second) * part / (1 - part), third)


def _shortened(loss: Any, old: Tensor, new: Tensor) -> Tensor:
    """Halve a step until the loss falls, at most six times."""
    before, step = loss(old), new - old
    for k in range(6):
        if bool(loss(old + 0.5**k * step) <= before):
            return old + 0.5**k * step
    return old + 0.5**6 * step


def _kron(parts: Sequence[Tensor]) -> Tensor:
    whole = parts[0]
    for part in parts[1:]:
        whole = torch.kron(whole.contiguous(), part.contiguous())
    return whole
