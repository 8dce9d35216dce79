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
from mercer.linalg.kronecker import kron_cholesky, kron_logdet, kron_matvec
from mercer.pde.axes import NUGGET, node_gram
from mercer.pde.grid_equation import GridEquation, Index
from mercer.pde.sides import Elimination

PRECISE, LEARN = 1e-8, 1e-6  # residual that a capped precision tolerates, beside the rms of f
_NOTHING = 1e-16  # of a mean square beside that of the prior
_SETTLED = 1e-9  # relative step of Gauss–Newton
_PROFILES = 3  # times that precisions are set anew


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

    Notes
    -----
    J = −½ log|C| − ½|e|² + λ_b (½ N_b log τ − ½ τ |gap|²) + ½ N_r log v − ½ v |r|² over (e, τ, v). Precisions are those
    of the residuals, N/|r|², up to a cap of 1/(ε² mean f²): without it J has no upper bound wherever the equation can
    be met. O(N³) for N nodes in all.
    """

    def __init__(
        self,
        equation: GridEquation,
        elimination: Elimination,
        kernels: Sequence[Kernel],
        boundary_weight: float = 1.0,
    ):
        self.equation, self.elimination, self.kernels = equation, elimination, tuple(kernels)
        self.boundary_weight = boundary_weight
        self.inner = GridEquation(equation.pde, [x[i] for x, i in zip(equation.nodes, elimination.inner, strict=True)])
        self.rhs = self.inner.rhs.reshape(-1)
        self.target = torch.cat([part.reshape(-1) for part in self._targets()])
        self._scale = self._scales()
        model: Any = SimpleNamespace(
            prior=SimpleNamespace(mean=None, kernel=torch.nn.ModuleList(self.kernels)),
            likelihood=SimpleNamespace(hyperparameters=list),
        )
        self.theta = ThetaVector(model)

    def solve(self, tolerance: float = PRECISE, start: Tensor | None = None, max_iter: int = 30) -> Solution:
        """Find the values for the present kernels.

        Parameters
        ----------
        tolerance : float
            ε of the caps.
        start : (N,), optional
            e of a solution nearby.
        max_iter : int
            Most Gauss–Newton steps; a linear equation takes one.

        Returns
        -------
        Solution
            ``value`` (N_1, …, N_D); ``stats``: ``white`` e (N,), ``log_tau``, ``log_v``, ``capped`` (whether v is at
            its cap), ``objective`` J in nats, and ``trace``, the rms residual after each step in units of f.
        """
        with torch.no_grad():
            factors, rows, sides = self._rows()
            white = self.target.new_zeros(self.equation.size) if start is None else start
            caps = [1 / (tolerance**2 * scale) for scale in self._scale]
            tau, v = caps
            trace: list[float] = []
            status = "ok"
            for _ in range(_PROFILES):
                white, found, status = self._gauss_newton(rows, sides, white, tau, v, max_iter)
                trace += found
                residual, gap = self._residual(rows, white), sides @ white - self.target
                before = v
                tau = torch.minimum(caps[0], len(gap) / gap.square().sum().clamp_min(1e-300))
                v = torch.minimum(caps[1], len(residual) / residual.square().sum().clamp_min(1e-300))
                if bool((v / before).log().abs() < 0.1):
                    break
            stats: dict[str, Any] = {
                "white": white,
                "log_tau": tau.log(),
                "log_v": v.log(),
                "capped": bool(v == caps[1]),
            }
            J = self._objective(factors, rows, sides, white, stats["log_tau"], stats["log_v"])
            U = kron_matvec(factors, white.reshape(self.equation.shape))
        return Solution(U, status, {**stats, "objective": float(J), "trace": trace})

    def objective(self, solution: Solution) -> tuple[float, np.ndarray]:
        """Return J and its gradient in θ; e, τ and v follow θ at no cost, J being stationary in them or they capped."""
        stats = solution.stats
        self.theta.zero_grad()
        J = self._objective(*self._rows(), stats["white"], stats["log_tau"], stats["log_v"])
        J.backward()
        gradient = self.theta.gradient()
        self.theta.zero_grad()
        return float(J.detach()), gradient

    def learn(self, max_iter: int, deadline: float | None = None) -> list[float]:
        """Maximise J over θ by L-BFGS-B, leave the kernels at the best θ, and return J after each evaluation."""
        first = self.theta.read()
        state: dict[str, Any] = {"white": None, "best": first}
        trace: list[float] = []

        def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
            if deadline is not None and time.perf_counter() > deadline:
                raise TimeoutError
            self.theta.write(theta)
            try:
                solution = self.solve(LEARN, state["white"])
                J, gradient = self.objective(solution)
            except NotPositiveDefiniteError:
                return np.inf, np.zeros_like(theta)
            state["white"] = solution.stats["white"]
            if not trace or max(trace) < J:
                state["best"] = theta.copy()
            trace.append(J)
            return -J, -gradient

        with suppress(TimeoutError):
            minimize(loss, first, jac=True, method="L-BFGS-B", bounds=self.theta.bounds, options={"maxiter": max_iter})
        self.theta.write(state["best"])
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
        factors = [kron_cholesky([K], NUGGET * float(K.detach().diagonal().mean()))[0] for K in grams]
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
        self, rows: dict[Index, Tensor], sides: Tensor, white: Tensor, tau: Tensor, v: Tensor, max_iter: int
    ) -> tuple[Tensor, list[float], str]:
        n = self.equation.size
        weight = self.boundary_weight * tau
        eye = torch.eye(n, dtype=white.dtype, device=white.device)
        trace: list[float] = []

        def loss(e: Tensor) -> Tensor:
            gap = sides @ e - self.target
            return 0.5 * (e.square().sum() + weight * gap.square().sum() + v * self._residual(rows, e).square().sum())

        for step in range(max_iter):
            A, target = self._linear(rows, white)
            # the heavy rows first, as Householder's reflections like them
            Q, R = torch.linalg.qr(torch.cat([v.sqrt() * A, weight.sqrt() * sides, eye]))
            right = torch.cat([v.sqrt() * target, weight.sqrt() * self.target, torch.zeros_like(white)])
            new = torch.linalg.solve_triangular(R, (Q.mT @ right)[:, None], upper=True)[:, 0]
            if not self.equation.pde.linear and step:
                new = _shortened(loss, white, new)
            moved = torch.linalg.vector_norm(new - white) / torch.linalg.vector_norm(new).clamp_min(1e-300)
            white = new
            trace.append(float(self._residual(rows, white).square().mean().sqrt()))
            if self.equation.pde.linear or bool(moved <= _SETTLED):
                return white, trace, "ok"
            if len(trace) > 3 and trace[-1] >= trace[-2] >= trace[-3]:
                return white, trace, "ok" if bool(moved <= 1e3 * _SETTLED) else "stalled"
        return white, trace, "not converged"

    def _objective(
        self,
        factors: Sequence[Tensor],
        rows: dict[Index, Tensor],
        sides: Tensor,
        white: Tensor,
        log_tau: Tensor,
        log_v: Tensor,
    ) -> Tensor:
        residual, gap = self._residual(rows, white), sides @ white - self.target
        boundary = 0.5 * len(gap) * log_tau - 0.5 * log_tau.exp() * gap.square().sum()
        fit = 0.5 * len(residual) * log_v - 0.5 * log_v.exp() * residual.square().sum()
        return -0.5 * kron_logdet(factors) - 0.5 * white.square().sum() + self.boundary_weight * boundary + fit


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
