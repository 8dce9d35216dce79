"""The published grid solver: values, precisions and kernels together, by Adam on a penalty.

Every term is that of the reference code (§4 of the specification), the corners that count twice and the equation at
boundary nodes included. It is here to be compared with; `grid` has what replaces it.

References
----------
Fang, Cooley, Long, Li, Kirby and Zhe (2024), Solving high frequency and multi-scale PDEs with Gaussian processes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mercer.kernels import MixtureKernel
from mercer.kernels.mixture_gram import mixture_gram
from mercer.linalg.kronecker import kron_cholesky, kron_logdet, kron_solve, mode_product
from mercer.pde.axes import toeplitz
from mercer.pde.conditions import Initial, Robin
from mercer.pde.grid_equation import GridEquation

JITTER = 1e-6  # of every factor, absolute
RATE = 0.01
COMPONENTS = 30


@dataclass
class Parameters:
    """What Adam moves.

    Parameters
    ----------
    U : (N_1, …, N_D)
    log_tau, log_v : ()
        Log precisions of boundary and equation.
    log_weight, log_scale, frequency : lists of D tensors (Q,)
        Of each axis. ``log_scale`` is the log of an inverse squared length (s in exp(−s d²)) for Gaussian lines, and of
        an inverse length (1/ℓ of a Matérn-5/2 window) for Student-t lines; frequencies in cycles, not in logs.
    """

    U: Tensor
    log_tau: Tensor
    log_v: Tensor
    log_weight: list[Tensor]
    log_scale: list[Tensor]
    frequency: list[Tensor]

    @classmethod
    def start(cls, shape: Sequence[int], frequency_scale: float, n_components: int, device: torch.device) -> Parameters:
        """Return the reference's start: zeros, unit lengths, frequencies evenly from 0 to ``frequency_scale``."""
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}

        def each(value: Tensor) -> list[Tensor]:
            return [value.clone().requires_grad_() for _ in shape]

        values, tau, v = (torch.zeros(size, **options).requires_grad_() for size in (tuple(shape), (), ()))
        return cls(
            values,
            tau,
            v,
            each(torch.full((n_components,), -math.log(n_components), **options)),
            each(torch.zeros(n_components, **options)),
            each(torch.linspace(0, 1, n_components, **options) * frequency_scale),
        )

    @classmethod
    def correction(cls, first: Parameters) -> Parameters:
        """Return where the reference's extra process starts: zeros, one window of unit length, the first's τ."""
        start = cls.start(first.U.shape, 0.0, 1, first.U.device)
        start.log_tau.data.copy_(first.log_tau.detach())
        for frequency in start.frequency:
            frequency.requires_grad_(False)
        return start

    def tensors(self) -> list[Tensor]:
        """Return what is learned: all of them, but for the frequencies of a correction."""
        every = [self.U, self.log_tau, self.log_v, *self.log_weight, *self.log_scale, *self.frequency]
        return [tensor for tensor in every if tensor.requires_grad]

    def lengthscale(self, j: int, spectrum: str) -> Tensor:
        """Return the lengths of one axis in the library's sense, (Q,)."""
        return torch.exp(-self.log_scale[j]) if spectrum == "student" else torch.exp(-0.5 * self.log_scale[j]) / 2**0.5

    def kernel(self, j: int, spectrum: str) -> MixtureKernel:
        """Return the kernel of one axis."""
        weight, ell = self.log_weight[j].detach().exp(), self.lengthscale(j, spectrum).detach()
        # the wave of −μ is that of μ
        frequency = self.frequency[j].detach().abs()
        return MixtureKernel(weight=weight, lengthscale=ell, frequency=frequency, spectrum=spectrum)


class Published:
    """The penalised log density J of grid values.

    Parameters
    ----------
    equation : GridEquation
    conditions : sequence of Dirichlet or Initial of order 0
    spectrum : {"student", "gaussian"}
    boundary_weight : float
        λ_b; the reference has 200, and 500 for advection.

    Raises
    ------
    ValueError
        No conditions, or one that is not on values alone.
    """

    def __init__(
        self, equation: GridEquation, conditions: Sequence[Any], spectrum: str, boundary_weight: float = 200.0
    ):
        self.equation, self.spectrum, self.boundary_weight = equation, spectrum, boundary_weight
        if not conditions:
            raise ValueError("a grid needs at least one condition; add Dirichlet(…), or use method='features'.")
        self.lags = [(x - x[0])[:, None] for x in equation.nodes]
        nodes, targets = [], []
        place = torch.arange(equation.size, device=equation.X.device).reshape(equation.shape)
        domain = equation.pde.domain
        for condition in conditions:
            on_values = isinstance(condition, Robin) and condition.b == 0
            if not on_values and not (isinstance(condition, Initial) and condition.order == 0):
                raise ValueError("the published solver knows conditions on values alone: Dirichlet, and Initial.")
            _, target = condition.rows(domain, equation.shape, most=equation.size, device=equation.X.device)
            if isinstance(condition, Robin):
                target = target / condition.a
            targets.append(target)
            nodes += [place.select(j, -1 if upper else 0).reshape(-1) for j, upper in condition.faces(domain)]
        # corners belong to two faces, and count twice
        self.boundary, self.target = torch.cat(nodes), torch.cat(targets)
        self.frozen = [torch.zeros_like(equation.rhs) for _ in equation.indices]

    def beyond(self, parameters: Parameters) -> Published:
        """Return the objective of a Matérn-5/2 correction to the solution at ``parameters``, which no longer moves."""
        other = copy(self)
        other.spectrum = "student"
        with torch.no_grad():
            other.target = self.target - parameters.U.reshape(-1)[self.boundary]
            other.frozen = [a + b for a, b in zip(self.frozen, self._derivatives(parameters)[1], strict=True)]
        return other

    def grams(self, parameters: Parameters, j: int, order: int) -> Tensor:
        """Return K_j⁽ⁿ⁾ of the uniform nodes of one axis, (N_j, N_j)."""
        lags, ell = self.lags[j], parameters.lengthscale(j, self.spectrum)
        shape = (parameters.log_weight[j].exp(), ell[:, None], parameters.frequency[j][:, None])
        values = mixture_gram(self.spectrum, lags, torch.zeros_like(lags[:1]), *shape, (order,))[:, 0]
        return toeplitz(values, order)

    def __call__(self, parameters: Parameters) -> Tensor:
        """Return J, constants left out; differentiable.

        Short forms: ∂ⁿ along one axis is K_j⁽ⁿ⁾ C_j⁻¹ there and nothing along the others.
        """
        U, equation = parameters.U, self.equation
        factors, moved = self._derivatives(parameters)
        prior = -0.5 * kron_logdet(factors) - 0.5 * (U * kron_solve(factors, U)).sum()
        gap = U.reshape(-1)[self.boundary] - self.target
        boundary = 0.5 * len(gap) * parameters.log_tau - 0.5 * parameters.log_tau.exp() * gap.square().sum()
        values = [frozen + value for frozen, value in zip(self.frozen, moved, strict=True)]
        residual = equation.evaluate(values) - equation.rhs
        fit = 0.5 * equation.size * parameters.log_v - 0.5 * parameters.log_v.exp() * residual.square().sum()
        return prior + self.boundary_weight * boundary + fit

    def _derivatives(self, parameters: Parameters) -> tuple[list[Tensor], list[Tensor]]:
        """Return the Cholesky factor of each axis, and the derivatives at the nodes that the equation asks for."""
        n_axes, values = len(self.equation.shape), []
        factors = kron_cholesky([self.grams(parameters, j, 0) for j in range(n_axes)], JITTER)
        for index in self.equation.indices:
            value = parameters.U
            for j, order in enumerate(index):
                if order:
                    moved = value.movedim(j, 0)
                    solved = torch.cholesky_solve(moved.reshape(len(moved), -1), factors[j]).reshape(moved.shape)
                    value = mode_product(self.grams(parameters, j, order), solved.movedim(0, j), j, n_axes)
            values.append(value)
        return factors, values


@dataclass
class Training:
    """Where Adam stopped: its last state, J every hundredth of the way, and why it stopped.

    ``parameters`` are those of one process, or of the mixture and of its correction.
    """

    parameters: list[Parameters]
    trace: list[tuple[int, float]]
    status: str
    n_iter: int


def train(
    objective: Published,
    *,
    max_iter: int,
    seconds: float | None = None,
    frequency_scale: float = 20.0,
    n_components: int = COMPONENTS,
    change_point: float | None = None,
    on_iteration: Callable[[int, list[Parameters]], None] | None = None,
) -> Training:
    """Maximise J by Adam at 0.01 from the reference's start.

    Parameters
    ----------
    objective : Published
    max_iter : int
        Steps; the reference takes 10⁵ to 3·10⁶.
    seconds : float, optional
        Stop after so much wall time, ``on_iteration`` not counted.
    frequency_scale : float
        Largest frequency at the start, in cycles per unit of X; tuned by hand for each problem in the reference.
    n_components : int
        Q of each axis.
    change_point : float, optional
        Part of the steps, or of the time, after which the solution is frozen and one Matérn-5/2 process is trained to
        correct it, the reference's answer to slow parts under a fast forcing. A frequency 0 in the mixture needs none.
    on_iteration : callable, optional
        Called with the number of steps done and the present parameters, as in `Training`.

    Returns
    -------
    Training
    """
    equation = objective.equation
    parameters = Parameters.start(equation.shape, frequency_scale, n_components, equation.X.device)
    every = [parameters]
    adam = torch.optim.Adam(parameters.tensors(), lr=RATE)
    trace: list[tuple[int, float]] = []
    spent, step, status = 0.0, 0, "steps"
    for step in range(1, max_iter + 1):
        began = time.perf_counter()
        gone = max((step - 1) / max_iter, 0.0 if seconds is None else spent / seconds)
        if change_point is not None and len(every) == 1 and gone >= change_point:
            objective, parameters = objective.beyond(parameters), Parameters.correction(parameters)
            every.append(parameters)
            adam = torch.optim.Adam(parameters.tensors(), lr=RATE)
        adam.zero_grad()
        try:
            value = objective(parameters)
        except ArithmeticError:
            step, status = step - 1, "covariance not positive definite"
            break
        (-value).backward()
        adam.step()
        spent += time.perf_counter() - began
        if step % max(1, max_iter // 100) == 0 or step == 1:
            trace.append((step, float(value.detach())))
        if on_iteration is not None:
            on_iteration(step, every)
        if seconds is not None and spent >= seconds:
            status = "seconds"
            break
    return Training(every, trace, status, step)
