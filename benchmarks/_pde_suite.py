"""The problems of pde.py: equations with known solutions, and coefficients to be found from sensors.

Exact solutions are here to make data (forcings by automatic differentiation, values at the sides) and to be compared
with; no solver sees one. Solvers see the equation, its domain, its conditions and how many nodes it may use.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mercer.pde import PDE, Box, Dirichlet, Initial, Positive

TWO_PI = 2 * math.pi


@dataclass(frozen=True)
class Case:
    """One equation with the solution that it has.

    Attributes
    ----------
    name : str
    bounds : mapping of axis to (lower, upper)
    nodes : tuple of int
        Along each axis, as in the reference.
    exact : callable
        u of the coordinates.
    terms : mapping of derivative to coefficient
        The linear part of the equation, such as {"xx": 1.0}; the peers need it as data.
    cubic : bool
        Whether u(u² − 1) is added.
    forced : bool
        Whether there is a forcing.
    frequency_scale, boundary_weight : float
        What the reference tuned by hand for its own solver; no other solver sees them.
    n_test : int
        Test points along each axis.
    """

    name: str
    bounds: dict[str, tuple[float, float]]
    nodes: tuple[int, ...]
    exact: Callable[..., Tensor]
    terms: dict[str, float]
    cubic: bool = False
    forced: bool = True
    frequency_scale: float = 20.0
    boundary_weight: float = 200.0
    n_test: int = 300

    def residual(self, p: Any, u: Any, d: Callable[[str], Any], c: Any) -> Any:
        """Return N[u], the residual that solvers are given."""
        total = sum(coefficient * d(letters) for letters, coefficient in self.terms.items())
        return total + u * (u**2 - 1) if self.cubic else total

    def forcing(self, *coordinates: Tensor) -> Tensor:
        """Return f = N[exact u] by automatic differentiation."""
        at = {name: x.detach().clone().requires_grad_() for name, x in zip(self.bounds, coordinates, strict=True)}
        u = self.exact(*at.values())

        def derivative(letters: str) -> Tensor:
            value = u
            for letter in letters:
                (value,) = torch.autograd.grad(value.sum(), at[letter], create_graph=True)
            return value

        return self.residual(SimpleNamespace(**at), u, derivative, None).detach()

    @property
    def domain(self) -> Box:
        """The box."""
        return Box(**self.bounds)

    @property
    def pde(self) -> PDE:
        """The equation, made anew at each call."""
        return PDE(self.residual, self.domain, rhs=self.forcing if self.forced else 0.0)

    @property
    def conditions(self) -> list[Any]:
        """Values at all sides; with a time axis, at the start and at the inflow x = 0."""
        if "t" not in self.bounds:
            return [Dirichlet("boundary", self.exact)]
        return [Initial(lambda x: self.exact(x, 0 * x)), Dirichlet("x=0", lambda t: self.exact(0 * t, t))]

    @property
    def published_conditions(self) -> list[Any]:
        """What the published solver is given: values at all sides, those at the end of time included."""
        if "t" not in self.bounds:
            return self.conditions
        end = self.bounds["t"][1]
        return [
            Dirichlet("boundary", self.exact),
            Dirichlet("t=0", lambda x: self.exact(x, 0 * x)),
            Dirichlet(f"t={end}", lambda x: self.exact(x, 0 * x + end)),
        ]

    def reduced(self, nodes: int, part: float) -> Case:
        """Return the case on so many nodes per axis and a part of the domain, to try out whatever runs it."""
        bounds = {name: (low, low + part * (high - low)) for name, (low, high) in self.bounds.items()}
        return replace(self, bounds=bounds, nodes=(nodes,) * len(self.nodes), n_test=40)

    def test_axes(self) -> list[Tensor]:
        """Return the uniform test points along each axis."""
        return [torch.linspace(*ends, self.n_test, dtype=torch.float64) for ends in self.bounds.values()]

    def test_points(self) -> Tensor:
        """Return all of them, (n^d, d), the last axis running fastest."""
        return torch.cartesian_prod(*self.test_axes()).reshape(-1, len(self.nodes))

    def truth(self) -> Tensor:
        """Return u at the test points, (n^d,)."""
        return self.exact(*self.test_points().unbind(1))


def relative_error(found: Tensor, case: Case) -> float:
    """Return |found − u| / |u| over the test points, both roots of sums of squares."""
    exact = case.truth()
    return float(torch.linalg.vector_norm(found.reshape(-1) - exact) / torch.linalg.vector_norm(exact))


def _one(name: str, end: float, nodes: int, exact: Callable[[Tensor], Tensor], scale: float, **more: Any) -> Case:
    return Case(name, {"x": (0.0, end)}, (nodes,), exact, {"xx": 1.0}, frequency_scale=scale, **more)


def _two(name: str, end: float, nodes: int, exact: Callable[..., Tensor], scale: float, **more: Any) -> Case:
    bounds = {"x": (0.0, end), "y": (0.0, end)}
    return Case(name, bounds, (nodes, nodes), exact, {"xx": 1.0, "yy": 1.0}, frequency_scale=scale, **more)


def _waves(z: Tensor) -> Tensor:
    return torch.sin(z) + 0.1 * torch.sin(20 * z) + torch.cos(100 * z)


def _beat(z: Tensor) -> Tensor:
    return torch.sin(6 * z) * torch.cos(20 * z)


def _fast(x: Tensor) -> Tensor:
    return torch.sin(100 * x)


def _product(x: Tensor) -> Tensor:
    return torch.sin(6 * x) * torch.cos(100 * x)


CASES = (
    _one("poisson_1d_single_sin", TWO_PI, 400, _fast, 20.0),
    _one("poisson_1d_sin_cos", TWO_PI, 400, _product, 20.0),
    _one("poisson_1d_x_time_sinx", TWO_PI, 900, lambda x: x * torch.sin(200 * x), 50.0),
    _one(
        "poisson_1d_mix_sin",
        1.0,
        900,
        lambda x: torch.sin(x) + 0.1 * torch.sin(20 * x) + 0.05 * torch.sin(100 * x),
        30.0,
    ),
    _one("poisson_1d_x2_add_sinx", 1.0, 400, lambda x: torch.sin(500 * x) - 2 * (x - 0.5) ** 2, 100.0),
    _one("allencahn_1d_single_sin", TWO_PI, 400, _fast, 20.0, cubic=True),
    _one("allencahn_1d_sin_cos", TWO_PI, 400, _product, 20.0, cubic=True),
    _two("poisson_2d_sin_sin", TWO_PI, 400, lambda x, y: torch.sin(100 * x) * torch.sin(100 * y), 20.0),
    _two("poisson_2d_sin_add_cos", TWO_PI, 200, lambda x, y: _beat(x) + _beat(y), 20.0),
    _two("allencahn_2d_mix_sincos", 1.0, 400, lambda x, y: _waves(x) * _waves(y), 30.0, cubic=True),
    Case(
        "advection_sin",
        {"x": (0.0, 1.0), "t": (0.0, 1.0)},
        (200, 200),
        lambda x, t: torch.sin(x - 200.0 * t),
        {"x": 200.0, "t": 1.0},
        forced=False,
        frequency_scale=40.0,
        boundary_weight=500.0,
    ),
)


@dataclass(frozen=True)
class Inverse:
    """An equation with a coefficient to be found from sensors.

    Attributes
    ----------
    name : str
    pde : PDE
    conditions : list
    X : (n, d)
        Where the sensors are.
    y : (n,)
        What they read.
    noise : float
        Standard deviation of their noise.
    truth : mapping of str to float
    identified : bool
        Whether the data say anything about the coefficient.
    nodes : tuple of int
        Of the equation, along each axis.
    """

    name: str
    pde: PDE
    conditions: list[Any]
    X: Tensor
    y: Tensor
    noise: float
    truth: dict[str, float]
    identified: bool = True
    nodes: tuple[int, ...] = (120,)


def inverse_problems(seed: int = 0) -> list[Inverse]:
    """Return the inverse problems, with noise drawn from ``seed``."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(n: int, domain: Box) -> Tensor:
        unit = torch.rand(n, domain.d, generator=generator, dtype=torch.float64)
        return torch.tensor(domain.lower, dtype=torch.float64) + unit * torch.tensor(
            domain.lengths, dtype=torch.float64
        )

    def read(u: Tensor, noise: float) -> Tensor:
        return u + noise * torch.randn(u.shape, generator=generator, dtype=torch.float64)

    return [_helmholtz(drawn, read), _heat(drawn, read), _steady(drawn, read)]


def _helmholtz(drawn: Callable[..., Tensor], read: Callable[..., Tensor]) -> Inverse:
    """u″ + κu = f with κ = 50, 15 sensors and nothing known at the ends."""
    domain, kappa = Box(x=(0.0, 1.0)), 50.0

    def u(x: Tensor) -> Tensor:
        return torch.sin(2 * math.pi * x) + 0.3 * torch.sin(20 * x)

    def rhs(x: Tensor) -> Tensor:
        return (kappa - 4 * math.pi**2) * torch.sin(2 * math.pi * x) + 0.3 * (kappa - 400) * torch.sin(20 * x)

    pde = PDE(lambda p, u, d, c: d("xx") + c.kappa * u, domain, rhs=rhs, unknowns={"kappa": Positive(20.0)})
    X = drawn(15, domain)
    return Inverse("helmholtz", pde, [], X, read(u(X[:, 0]), 1e-3), 1e-3, {"kappa": kappa})


def _heat(drawn: Callable[..., Tensor], read: Callable[..., Tensor]) -> Inverse:
    """u_t = κ u_xx with κ = 0.05 from 30 sensors, the start and both ends."""
    domain, kappa = Box(x=(0.0, 1.0), t=(0.0, 1.0)), 0.05

    def u(x: Tensor, t: Tensor) -> Tensor:
        slow, fast = (torch.exp(-kappa * (n * math.pi) ** 2 * t) for n in (1, 3))
        return slow * torch.sin(math.pi * x) + 0.5 * fast * torch.sin(3 * math.pi * x)

    pde = PDE(lambda p, u, d, c: d("t") - c.kappa * d("xx"), domain, unknowns={"kappa": Positive(0.2)})
    conditions = [Initial(lambda x: u(x, 0 * x)), Dirichlet("x=0"), Dirichlet("x=1")]
    X = drawn(30, domain)
    return Inverse("heat", pde, conditions, X, read(u(*X.unbind(1)), 1e-3), 1e-3, {"kappa": kappa}, nodes=(24, 24))


def _steady(drawn: Callable[..., Tensor], read: Callable[..., Tensor]) -> Inverse:
    """The same equation where u = x is steady: any κ fits, and none is to be reported."""
    domain = Box(x=(0.0, 1.0), t=(0.0, 1.0))
    pde = PDE(lambda p, u, d, c: d("t") - c.kappa * d("xx"), domain, unknowns={"kappa": Positive(0.2)})
    conditions = [Initial(lambda x: x), Dirichlet("x=0"), Dirichlet("x=1", 1.0)]
    X = drawn(30, domain)
    return Inverse(
        "steady", pde, conditions, X, read(X[:, 0], 1e-3), 1e-3, {"kappa": 0.05}, identified=False, nodes=(16, 16)
    )
