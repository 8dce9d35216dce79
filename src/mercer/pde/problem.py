"""An equation with its conditions and sensors: where rows are asked for, and how far a solution is from obeying them.

A solution is judged where it was not made: by the residual at shifted nodes and on shifted points of the faces. Neither
evidence nor ŝ² sees aliasing; this does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mercer.kernels import Kernel
from mercer.kernels.functionals import Term, functional_diag
from mercer.pde.conditions import Condition, NormalDerivative, Periodic, Robin, field_number
from mercer.pde.equation import PDE, LinearisationError
from mercer.pde.rows import Posterior, Rows, amplitude, derivative
from mercer.pde.unknowns import first_noise

_CHECKED = 2000  # shifted nodes at most
_CHECKED_ON_FACE = 200
_SURPRISED = 300
_LOOKED_AT = 33  # nodes along each axis, the middle and both ends among them
_TAIL = 1e-3  # of the size of u: what smaller targets are judged by
_OFFSET = 0.123  # of shifted points that are scattered


@dataclass(frozen=True)
class Sensors:
    """Noisy observations y = ∂^derivative u(X) + ε.

    Parameters
    ----------
    X : (n, d)
    y : (n,)
    noise : float, (n,) or None
        Standard deviation of ε in units of y; None learns one for all.
    field : str
    derivative : str
        Such as "x"; the function itself by default.
    """

    X: Tensor
    y: Tensor
    noise: Tensor | float | None = None
    field: str = "u"
    derivative: str = ""

    def rows(self, pde: PDE, log_noise: Tensor | None = None) -> Rows:
        """Return the observations as rows; ``log_noise`` is that of a standard deviation which is learned."""
        index = pde.domain.order(self.derivative)
        L = derivative(self.X, index, field_number(self.field, pde.fields))
        if self.noise is None:
            start = self.y.new_tensor(first_noise(self.y)).log() if log_noise is None else log_noise.to(self.y.device)
            return Rows(L, self.y, "sensor", (2 * start).exp().expand(len(self.y)))
        noise = torch.as_tensor(self.noise, dtype=torch.float64, device=self.y.device)
        return Rows(L, self.y, "sensor", noise.square().expand(len(self.y)))


@dataclass(frozen=True)
class Check:
    """How far a solution is from the equation and its conditions, relative to the size of their terms."""

    residual: float
    boundary: float
    condition: str = ""  # the one that is met worst

    @property
    def worst(self) -> float:
        """The larger of the two, infinite where one is not a number."""
        found = max(self.residual, self.boundary)
        return found if math.isfinite(self.residual + self.boundary) else math.inf


class Problem:
    """A PDE with its conditions and sensors on given numbers of nodes.

    Parameters
    ----------
    pde : PDE
    conditions : sequence of Condition
    counts : sequence of int
        Nodes along each axis.
    sensors : sequence of Sensors
    device : torch.device, optional
    """

    def __init__(
        self,
        pde: PDE,
        conditions: Sequence[Condition],
        counts: Sequence[int],
        sensors: Sequence[Sensors] = (),
        device: torch.device | None = None,
    ):
        self.pde, self.conditions, self.sensors, self.device = pde, list(conditions), list(sensors), device
        self.counts = pde.domain.counts(counts)
        self.shifted = self._shifted()
        self._checks = [self._condition(c, [max(2, int(0.73 * n)) for n in self.counts], 200) for c in self.conditions]

    @property
    def n_nodes(self) -> int:
        """Number of nodes of the full grid."""
        return math.prod(self.counts)

    def points(self, most: int, *, grid: bool = False) -> Tensor:
        """Return where the equation is asked for, (n, d): as many points as the grid has, ``most`` at the most.

        Scattered points by default: on a grid, a wave that is faster than the nodes looks like one that is slower.
        """
        if grid and self.n_nodes <= most:
            return self.pde.domain.nodes(self.counts, self.device)
        return self.pde.domain.scattered(min(most, self.n_nodes), device=self.device)

    def known(self, most: int, log_noise: Tensor | None = None) -> list[Rows]:
        """Return the rows of conditions, ``most`` per face, and of sensors."""
        rows = [self._condition(condition, self.counts, most) for condition in self.conditions]
        return [*rows, *(sensor.rows(self.pde, log_noise) for sensor in self.sensors)]

    def left_open(self, posterior: Posterior, kernels: Sequence[Kernel]) -> float:
        """Return the largest share of the prior variance of u that is left at shifted nodes, in any field.

        Exact rows that determine the solution leave a share of the order of their nugget.
        """
        X, shares = self.shifted[:: max(1, len(self.shifted) // _SURPRISED)], []
        for field in range(len(self.pde.fields)):
            L = derivative(X, (0,) * self.pde.domain.d, field)
            prior = functional_diag(kernels, L).detach()
            shares.append(float((posterior.marginals(L)[1] / prior).max()))
        return max(shares) / amplitude(posterior)

    def counts_of_conditions(self) -> list[tuple[int, int]]:
        """Return, for each axis, how many conditions there are and how many derivatives, all fields together."""
        pde, found = self.pde, []
        for j in range(pde.domain.d):
            orders = [max((i[j] for f, i in pde.requests if f == field), default=0) for field in range(len(pde.fields))]
            given = 0
            for condition in self.conditions:
                n = condition.per_axis(pde.domain)[j]
                # a period says no more than that there are no ends
                given += min(n, sum(orders)) if isinstance(condition, Periodic) else n
            found.append((given, sum(orders)))
        return found

    def lacking(self) -> list[str]:
        """Return the axes that have fewer conditions than the equation has derivatives.

        Those along which the leading coefficient vanishes are left out: to be smooth there is a condition too.
        """
        pairs = zip(self.pde.domain.names, self.counts_of_conditions(), strict=True)
        found = [(j, axis, given, order) for j, (axis, (given, order)) in enumerate(pairs) if given < order]
        return [f"{axis} ({given} of {order})" for j, axis, given, order in found if not self._degenerate(j)]

    def _degenerate(self, j: int) -> bool:
        """Say whether the highest derivative along axis j of a linear equation has a zero weight beside the others'."""
        if not self.pde.linear:
            return False
        X, order = self.pde.domain.nodes(_LOOKED_AT, self.device), self.pde.order[j]
        J, _ = self.pde.jacobian(X, [torch.zeros_like(X[:, 0]) for _ in self.pde.requests])
        size = torch.stack(J).detach().abs().sum(0)
        if not bool(torch.isfinite(size).all()):  # 1/r at the centre of a disc
            return True
        leading = [slope.detach() / size for slope, (_, i) in zip(J, self.pde.requests, strict=True) if i[j] == order]
        return any(bool((c.amin(1) * c.amax(1) <= 0).logical_and(c.any(1)).any()) for c in leading)

    def check(self, posterior: Posterior, coefficients: Mapping[str, Tensor] | None = None) -> Check:
        """Return the residual at shifted nodes and the error of conditions on shifted points of the faces."""
        X, pde = self.shifted, self.pde
        values = [posterior.mean(derivative(X, index, field)) for field, index in pde.requests]
        J, base = pde.jacobian(X, values, coefficients)
        target = pde.target(X)
        terms = sum((j.detach() * value).square() for j, value in zip(J, values, strict=True))
        residual = _rms(base.detach() - target) / max(
            _rms(terms**0.5), _rms(target), self._natural(posterior, J), 1e-300
        )
        boundary, name = 0.0, ""
        for condition, part in zip(self.conditions, self._checks, strict=True):
            natural = max(self._size(posterior, term) for term in part.functional)
            # the tail of a pulse is small, and need not be right to three digits
            size = max(_rms(part.target), _TAIL * natural, 1e-300) if bool(part.target.any()) else max(natural, 1e-300)
            error = _rms(posterior.mean(part.functional) - part.target) / size
            if not error <= boundary:
                boundary, name = error, _name(condition)
        return Check(residual, boundary, name)

    def misfits(self, posterior: Posterior) -> list[float]:
        """Return the mean square of what each of the sensors reads beside the solution, in units of its noise."""
        found = []
        for sensor, noise in zip(self.sensors, self.sensor_variance(posterior), strict=True):
            part = sensor.rows(self.pde)
            found.append(float(((posterior.mean(part.functional) - part.target).square() / noise).mean()))
        return found

    def sensor_variance(self, posterior: Posterior) -> list[Tensor]:
        """Return the variances of the noise of each sensor's readings; they are the last rows."""
        sizes, every = [len(sensor.y) for sensor in self.sensors], posterior.noise_variance
        return list(every[len(every) - sum(sizes) :].split(sizes)) if sizes else []

    def surprise(self, posterior: Posterior, coefficients: Mapping[str, Tensor] | None = None) -> float:
        """Return the mean square of residuals at shifted places, in units of the posterior's variance of them.

        ŝ² is calibrated where the equation was asked for; this is, where it was not.
        """
        X, pde = self.shifted[:: max(1, len(self.shifted) // _SURPRISED)], self.pde
        values = [posterior.mean(derivative(X, index, field)) for field, index in pde.requests]
        try:
            found = [Rows(L, target) for L, target in pde.linearise(X, values, coefficients)]
        except LinearisationError:
            return 1.0
        worst = 0.0
        for part in [*found, *self._checks]:
            mean, variance = posterior.marginals(part.functional)
            floor = torch.finfo(mean.dtype).tiny
            worst = max(worst, float(((mean - part.target).square() / variance.clamp_min(floor)).mean()))
        return worst if math.isfinite(worst) else 1.0

    def _natural(self, posterior: Posterior, J: Sequence[Tensor]) -> float:
        """Return the size that terms have for functions that change once over the domain, where they may all vanish."""
        domain, total = self.pde.domain, 0.0
        for (field, index), j in zip(self.pde.requests, J, strict=True):
            u = _rms(posterior.mean(derivative(self.shifted, (0,) * domain.d, field)))
            total += (_rms(j.detach()) * u / math.prod(b**n for b, n in zip(domain.lengths, index, strict=True))) ** 2
        return math.sqrt(total)

    def _size(self, posterior: Posterior, term: Term) -> float:
        """Return the size of a term of a condition over the whole domain, where it may not vanish."""
        X = self.shifted[:: max(1, len(self.shifted) // _CHECKED_ON_FACE)]
        return float(term.coefficient.abs().max()) * _rms(posterior.mean(derivative(X, term.index, term.field)))

    def _condition(self, condition: Condition, counts: Sequence[int], most: int) -> Rows:
        L, target = condition.rows(self.pde.domain, counts, self.pde.fields, most, self.device)
        return Rows(L, target, "condition")

    def _shifted(self) -> Tensor:
        domain = self.pde.domain
        if self.n_nodes <= _CHECKED:
            return domain.midpoints(self.counts, self.device)
        return domain.scattered(_CHECKED, _OFFSET, self.device)


def _name(condition: Condition) -> str:
    """Return what a condition is called in a message."""
    if isinstance(condition, (Robin, NormalDerivative)):
        return f"{type(condition).__name__}({condition.where!r})"
    return f"Periodic({condition.axis!r})" if isinstance(condition, Periodic) else f"Initial(order={condition.order})"


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
