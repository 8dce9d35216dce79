"""A differential equation as a plain torch function of points, unknown functions, derivatives and coefficients.

What the function asks for is recorded in one dry run, whether it is linear is probed and not declared, and its
linearisation is a Functional with coefficients by forward-mode differentiation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mercer.kernels.functionals import Functional, Term
from mercer.pde.conditions import field_number
from mercer.pde.domain import Box
from mercer.pde.linearity import is_linear
from mercer.pde.named import Fields, Named
from mercer.pde.unknowns import Unknown
from mercer.pde.values import Value, check_takes, evaluate

Request = tuple[int, tuple[int, ...]]  # field, order of the derivative in each column
_PROBES = 8
_SHIFT = "Write it for w with u = u₀ + w and a u₀ at which it has a slope."


class LinearisationError(ValueError):
    """There is no linearisation at some values: a slope or the equation is not finite, or there is no slope."""


class PDE:
    """N[u](x) = f(x) in a box.

    Parameters
    ----------
    residual : callable
        ``residual(p, u, d, c)`` returns N[u] at n points, (n,), or a tuple of such for a system. ``p.x`` are the
        coordinates (n,); ``u`` is the unknown function (n,), or with several fields their values by name (``u.v``);
        ``d("xx")`` is a derivative, ``d("xt", "v")`` one of another field; ``c.name`` is an unknown coefficient. A
        value at one point must not depend on another point.
    domain : Box
    rhs : float, callable, or a tuple of such for a system
        f; a callable takes the coordinates (n,) in the order of the axes.
    unknowns : mapping of str to Positive or Real
        Coefficients that are learned from observations.
    fields : sequence of str
        Names of the unknown functions. A forcing that is not known is a field of its own, without derivatives.

    Attributes
    ----------
    requests : tuple of (field, order per column)
        The derivatives that the residual asks for.
    n_equations : int
    linear : bool
        Whether superposition holds, for coefficients held fixed.

    Raises
    ------
    TypeError, ValueError
        The residual fails on tensors, does not return one number per point, asks for axes that are not there, is not
        finite at some point whatever u is there, or does not use one of the ``unknowns``.

    Examples
    --------
    >>> pde = PDE(lambda p, u, d, c: d("xx") + u**3 - u, Box(x=(0, 1)), rhs=lambda x: torch.sin(x))
    >>> pde.linear, pde.requests
    (False, ((0, (0,)), (0, (2,))))
    """

    def __init__(
        self,
        residual: Callable[..., Any],
        domain: Box,
        rhs: Value | tuple[Value, ...] = 0.0,
        unknowns: Mapping[str, Unknown] | None = None,
        fields: Sequence[str] = ("u",),
    ):
        check_takes(residual, 4, "the residual", "points, functions, derivatives and coefficients, (p, u, d, c)")
        self.residual = residual
        self.domain = domain
        self.rhs = rhs
        self.unknowns = dict(unknowns or {})
        self.fields = tuple(fields)
        if len(set(self.fields)) != len(self.fields) or not self.fields:
            raise ValueError(f"fields must be different names, got {self.fields}.")
        self.requests, self.n_equations = self._dry_run()
        if isinstance(rhs, tuple) and len(rhs) != self.n_equations:
            raise ValueError(f"the residual has {self.n_equations} equation(s) and rhs {len(rhs)}.")
        if not isinstance(rhs, tuple) and self.n_equations > 1 and callable(rhs):
            raise ValueError(f"rhs must be a tuple of {self.n_equations}, one for each equation.")
        self.linear = is_linear(self)

    def __repr__(self) -> str:
        orders = ", ".join(f"{n} in {name}" for name, n in zip(self.domain.names, self.order, strict=True))
        unknowns = f", unknown {', '.join(self.unknowns)}" if self.unknowns else ""
        kind = "linear" if self.linear else "not linear"
        return f"PDE({', '.join(self.fields)} on {self.domain}: order {orders}, {kind}{unknowns})"

    @property
    def order(self) -> tuple[int, ...]:
        """Highest derivative along each axis."""
        return tuple(max(index[j] for _, index in self.requests) for j in range(self.domain.d))

    def initial_coefficients(self) -> dict[str, Tensor]:
        """Return the unknown coefficients where a search starts."""
        return {name: torch.tensor(float(unknown.init), dtype=torch.float64) for name, unknown in self.unknowns.items()}

    def evaluate(self, X: Tensor, values: Sequence[Tensor], coefficients: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return N[u] at X (n, d), (E, n), from the values (n,) of each request."""
        given = dict(zip(self.requests, values, strict=True))
        # u is handed over whether or not the residual looks at it; what it does not look at may be anything
        unused = X.new_zeros(len(X))
        return self._call(X, lambda field, index: given.get((field, index), unused), coefficients)

    def target(self, X: Tensor) -> Tensor:
        """Return f at X (n, d), (E, n)."""
        sides = self.rhs if isinstance(self.rhs, tuple) else (self.rhs,) * self.n_equations
        names = self.domain.names
        return torch.stack([evaluate(side, X.unbind(-1), len(X), X, "rhs", names) for side in sides])

    def linearise(
        self, X: Tensor, values: Sequence[Tensor], coefficients: Mapping[str, Tensor] | None = None
    ) -> list[tuple[Functional, Tensor]]:
        """Return J u = f − N[u₀] + J u₀ at points X, one functional with its target for each equation.

        Parameters
        ----------
        X : (n, d)
        values : one (n,) per request
            Derivatives of u₀; zeros do for a linear equation.
        coefficients : mapping of str to scalar tensors, optional
            Gradients flow to them.

        Returns
        -------
        list of (Functional of n rows, (n,))

        Raises
        ------
        LinearisationError
            The equation or one of its slopes is not finite at a point, or it has no slope at all.
        """
        J, base = self.jacobian(X, values, coefficients)
        self.check_finite(X, J, base)
        right = self.target(X) - base + sum(j * value for j, value in zip(J, values, strict=True))
        rows = []
        for e in range(self.n_equations):
            terms = [
                Term(j[e], X, index, field)
                for j, (field, index) in zip(J, self.requests, strict=True)
                if j.requires_grad or bool(j[e].any())
            ]
            if not terms:
                at = "u = 0" if not any(bool(value.any()) for value in values) else "these values"
                raise LinearisationError(
                    f"{self.called(e)} has no linearisation at {at}: it has no slope there in any unknown function or "
                    f"derivative. {_SHIFT}"
                )
            rows.append((tuple(terms), right[e]))
        return rows

    def jacobian(
        self, X: Tensor, values: Sequence[Tensor], coefficients: Mapping[str, Tensor] | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Return ∂N/∂(request) at each point, one (E, n) per request, and N itself, (E, n)."""
        point = tuple(value.detach() for value in values)
        J = []
        base = self.evaluate(X, point, coefficients)
        for k in range(len(point)):
            tangents = tuple(torch.full_like(value, float(i == k)) for i, value in enumerate(point))
            J.append(torch.func.jvp(lambda *v: self.evaluate(X, v, coefficients), point, tangents)[1])
        return J, base

    def check_finite(self, X: Tensor, J: Sequence[Tensor], base: Tensor) -> None:
        """Raise a LinearisationError that names a point where a linearisation from `jacobian` is not finite."""
        finite = torch.stack([base.detach(), *(j.detach() for j in J)]).isfinite().all(0)
        if bool(finite.all()):
            return
        e, i = (~finite).nonzero()[0].tolist()
        raise LinearisationError(
            f"{self.called(e)} or one of its slopes is not finite at {self.domain.place(X[i])}. If it is so whatever u "
            f"is, multiply it by what vanishes there or keep the domain away. If it is so for this u alone: {_SHIFT}"
        )

    def symbol(self, frequency: Tensor, J: Sequence[Tensor], equation: int = 0, field: int = 0) -> Tensor:
        """Return P(iω) of a linearisation with coefficients averaged over its points, complex, (k,).

        Parameters
        ----------
        frequency : (k, d)
            Cycles per unit of X, with signs.
        J : one (E, n) per request
            As from `jacobian`.
        """
        omega = 2j * math.pi * frequency
        total = torch.zeros(len(frequency), dtype=omega.dtype, device=frequency.device)
        for (where, index), slope in zip(self.requests, J, strict=True):
            if where == field:
                power = torch.stack([omega[:, j] ** n for j, n in enumerate(index)]).prod(0)
                total = total + slope[equation].detach().mean() * power
        return total

    def _call(
        self, X: Tensor, value: Callable[[int, tuple[int, ...]], Tensor], coefficients: Mapping[str, Tensor] | None
    ) -> Tensor:
        if X.dtype != torch.float64:
            raise TypeError(f"equations are solved in float64 only, got points in {X.dtype}; use X.double().")
        d = self.domain.d

        def derivative(letters: str, field: str | None = None) -> Tensor:
            if field is None and len(self.fields) > 1:
                raise ValueError(f"d({letters!r}) must say of which field: {', '.join(self.fields)}.")
            number = 0 if field is None else field_number(field, self.fields)
            return value(number, self.domain.order(letters))

        points = Named(dict(zip(self.domain.names, X.unbind(-1), strict=True)))
        unknown = Fields(self.fields, lambda number: value(number, (0,) * d))
        given = self.initial_coefficients() if coefficients is None else coefficients
        c = Named({name: torch.as_tensor(v).to(X.device) for name, v in given.items()})
        found = self.residual(points, unknown.only() if len(self.fields) == 1 else unknown, derivative, c)
        equations = found if isinstance(found, (tuple, list)) else (found,)
        return torch.stack([self._checked(equation, len(X)) for equation in equations])

    @staticmethod
    def _checked(value: Any, n: int) -> Tensor:
        if not isinstance(value, Tensor) or value.dim() > 1 or (value.dim() == 1 and len(value) not in (1, n)):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the residual must return a tensor of one number per point, ({n},), got {shape}.")
        if value.dtype != torch.float64:
            raise TypeError(f"the residual is in {value.dtype}; equations are solved in float64 only.")
        return value.expand(n)

    def _dry_run(self) -> tuple[tuple[Request, ...], int]:
        """Call the residual once on numbers that mean nothing, and note what it asks for."""
        X = self.domain.scattered(_PROBES)
        generator = torch.Generator().manual_seed(0)
        seen: dict[Request, Tensor] = {}

        def value(field: int, index: tuple[int, ...]) -> Tensor:
            if (field, index) not in seen:
                drawn = torch.randn(_PROBES, generator=generator, dtype=torch.float64)
                seen[(field, index)] = drawn.requires_grad_()
            return seen[(field, index)]

        coefficients = {name: value.requires_grad_() for name, value in self.initial_coefficients().items()}
        found = self._call(X, value, coefficients)
        leaves = [*seen.values(), *coefficients.values()]
        slopes: Sequence[Tensor | None] = [None] * len(leaves)
        if found.requires_grad:
            slopes = torch.autograd.grad(found.sum(), leaves, allow_unused=True)
        used = tuple(request for request, slope in zip(seen, slopes[: len(seen)], strict=True) if slope is not None)
        if not used:
            raise ValueError("the residual does not use the unknown function or any of its derivatives.")
        for name, slope in zip(coefficients, slopes[len(seen) :], strict=True):
            if slope is None:
                raise ValueError(
                    f"the residual does not use the unknown {name!r}: write c.{name} in it, or leave it out."
                )
        return used, len(found)

    def called(self, e: int) -> str:
        """Return what messages call equation e."""
        return "the equation" if self.n_equations == 1 else f"equation {e}"
