"""A differential equation as a plain torch function of points, unknown functions, derivatives and coefficients.

What the function asks for is recorded in one dry run, whether it is linear is probed and not declared, and its
linearisation is a Functional with coefficients by forward-mode differentiation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mercer.kernels.functionals import Functional, Term
from mercer.pde.conditions import Value, evaluate, field_number
from mercer.pde.domain import Box
from mercer.pde.unknowns import Unknown

Request = tuple[int, tuple[int, ...]]  # field, order of the derivative in each column
_PROBES = 8
_LINEAR = 1e-10  # deviation from superposition, relative


class Named:
    """Tensors by name, as attributes, items, or in their order."""

    def __init__(self, values: Mapping[str, Any]):
        self._values = dict(values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._values:
            known = ", ".join(self.__dict__.get("_values", {})) or "none"
            raise AttributeError(f"there is no {name!r} here; known: {known}.")
        return self._values[name]

    def __getitem__(self, key: str | int) -> Any:
        return self._values[key] if isinstance(key, str) else list(self._values.values())[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values.values())


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
        The residual fails on tensors, does not return one number per point, or asks for axes that are not there.

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
        self.linear = self._probe()

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
        return torch.stack([evaluate(side, X.unbind(-1), len(X), X, "rhs") for side in sides])

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
        """
        J, base = self.jacobian(X, values, coefficients)
        right = self.target(X) - base + sum(j * value for j, value in zip(J, values, strict=True))
        rows = []
        for e in range(self.n_equations):
            terms = [
                Term(j[e], X, index, field)
                for j, (field, index) in zip(J, self.requests, strict=True)
                if j.requires_grad or bool(j[e].any())
            ]
            if not terms:
                raise ValueError(f"equation {e} does not depend on any unknown function at these values.")
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
        unknown = _Values(self.fields, lambda number: value(number, (0,) * d))
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

        found = self._call(X, value, None)
        slopes: Sequence[Tensor | None] = [None] * len(seen)
        if found.requires_grad:
            slopes = torch.autograd.grad(found.sum(), list(seen.values()), allow_unused=True)
        used = tuple(request for request, slope in zip(seen, slopes, strict=True) if slope is not None)
        if not used:
            raise ValueError("the residual does not use the unknown function or any of its derivatives.")
        return used, len(found)

    def _probe(self) -> bool:
        """Test superposition at random values: r(αu + βw) − r(0) = α (r(u) − r(0)) + β (r(w) − r(0))."""
        X = self.domain.scattered(_PROBES)
        generator = torch.Generator().manual_seed(1)
        k = len(self.requests)
        u, w = (torch.randn(k, _PROBES, generator=generator, dtype=torch.float64) for _ in range(2))
        alpha, beta = 0.7, -1.3

        def r(values: Tensor) -> Tensor:
            return self.evaluate(X, values.unbind(0))

        zero = r(torch.zeros_like(u))
        parts = (r(alpha * u + beta * w) - zero, alpha * (r(u) - zero), beta * (r(w) - zero))
        scale = max(float(part.abs().max()) for part in parts)
        deviation = float((parts[0] - parts[1] - parts[2]).abs().max())
        return math.isfinite(deviation) and deviation <= _LINEAR * scale


class _Values(Named):
    """Unknown functions by name, evaluated only when they are asked for."""

    def __init__(self, fields: Sequence[str], value: Callable[[int], Tensor]):
        super().__init__({name: None for name in fields})
        self._value = value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._values:
            raise AttributeError(f"there is no field {name!r}; the equation has {', '.join(self._values)}.")
        return self._value(list(self._values).index(name))

    def __getitem__(self, key: str | int) -> Any:
        return getattr(self, key) if isinstance(key, str) else self._value(range(len(self._values))[key])

    def __iter__(self) -> Iterator[Any]:
        return (self._value(number) for number in range(len(self._values)))

    def only(self) -> Any:
        return self._value(0)
