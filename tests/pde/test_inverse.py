"""Sensors and unknown coefficients: amplitudes, noise, spectra, and what is said where data say too little."""

import math

import numpy as np
import pytest
import torch

from mercer.kernels import RBF, ScaleKernel
from mercer.pde import PDE, Box, Dirichlet, Initial, Neumann, Periodic, Positive, Real, Sensors
from mercer.pde.evidence import Evidence, Search
from mercer.pde.identify import describe, scan
from mercer.pde.inverse import TOLERANCE, invert
from mercer.pde.priors import Solver
from mercer.pde.problem import Problem
from mercer.pde.rows import derivative
from mercer.pde.solve import choose_lines, solve
from mercer.pde.unknowns import Coefficient

D = torch.float64
LINE = Box(x=(0, 1))


def u(x):
    return torch.exp(x) * torch.sin(3 * x)


def second(x):
    return torch.exp(x) * (6 * torch.cos(3 * x) - 8 * torch.sin(3 * x))


def poisson(size=1.0):
    return PDE(lambda p, v, d, c: d("xx"), LINE, rhs=lambda x: size * second(x))


def helmholtz(k, unknown):
    """u″ + k u = f."""
    unknowns = {"k": unknown}
    return PDE(lambda p, v, d, c: d("xx") + c.k * v, LINE, rhs=lambda x: second(x) + k * u(x), unknowns=unknowns)


def read(n, noise, size=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.rand(n, 1, generator=generator, dtype=D)
    return Sensors(X, size * u(X[:, 0]) + noise * torch.randn(n, generator=generator, dtype=D), noise)


def inverted(pde, conditions=(), sensors=(), n=40, kernel=None, spectrum="gaussian", nugget=None):
    problem = Problem(pde, conditions, (n,), sensors)
    method = "features" if kernel is None and spectrum == "gaussian" else "dense"
    kernels = None if kernel is None else [kernel for _ in pde.fields]
    lines = lambda c: choose_lines(pde, conditions, (n,), c)[1]  # noqa: E731
    return invert(Solver(problem, method, nugget), lines, kernels, spectrum)


def at(posterior, X):
    mean, variance = posterior.marginals(derivative(X, (0,)))
    return mean, variance.sqrt()


# ---------------------------------------------------------------------------------------------------------- spectra


def test_student_lines_stay_student():
    conditions = [Dirichlet("boundary", u)]
    trial, _ = inverted(poisson(), conditions, [read(10, 1e-2)], spectrum="student")
    assert trial.kernels[0].spectrum == "student"
    X = LINE.nodes(50)
    mean, std = at(trial.posterior, X)
    error = (mean - u(X[:, 0])).abs()
    assert error.max() < 1e-2 and (error <= 2.5 * std).double().mean() > 0.9


def test_student_lines_find_a_coefficient():
    _, found = inverted(helmholtz(5.0, Positive(2.0)), [], [read(20, 1e-3)], spectrum="student")
    assert found["k"].identified and abs(found["k"].value - 5) < 3 * found["k"].std < 1


# ----------------------------------------------------------------------------------------------- amplitudes and noise


@pytest.mark.parametrize("make", [lambda: RBF(0.3), lambda: RBF(0.3, outputscale=1.0)])
@pytest.mark.parametrize("size", [1e4, 1e-6])
def test_kernels_of_users_get_the_amplitude_of_the_data(make, size):
    trial, _ = inverted(poisson(size), [], [read(10, 1e-3 * size, size)], kernel=make())
    assert isinstance(trial.kernels[0], ScaleKernel)
    X = LINE.nodes(50)
    mean, std = at(trial.posterior, X)
    error = (mean - size * u(X[:, 0])).abs()
    assert error.max() < 5e-3 * size and (error < 2.5 * std).double().mean() > 0.9


def test_an_amplitude_may_come_from_a_derivative_or_from_conditions():
    size = 1e4
    X = torch.full((1, 1), 0.5, dtype=D)
    slope = torch.exp(X[:, 0]) * (torch.sin(3 * X[:, 0]) + 3 * torch.cos(3 * X[:, 0]))
    sensor = Sensors(X, size * slope, 1.0, derivative="x")
    trial, _ = inverted(poisson(size), [Dirichlet("x=1", size * float(u(torch.ones(1, dtype=D))))], [sensor])
    mean, std = at(trial.posterior, LINE.nodes(20))
    assert ((mean - size * u(LINE.nodes(20)[:, 0])).abs() < 3 * std).all() and std.max() < 1e-3 * size


def test_kernels_without_anything_to_learn():
    kernel = RBF(0.3, outputscale=4.0)
    for parameter in kernel.parameters():
        parameter.requires_grad_(False)
    trial, found = inverted(helmholtz(5.0, Positive(2.0)), [], [read(20, 1e-3)], kernel=kernel)
    assert found["k"].identified and abs(found["k"].value - 5) < 3 * found["k"].std
    trial, _ = inverted(poisson(), [], [read(20, 1e-3)], kernel=kernel)
    assert trial.status == "nothing to learn" and float(trial.kernels[0].outputscale) == 4.0


def test_readings_that_are_zero():
    pde = PDE(lambda p, v, d, c: d("xx"), LINE)
    X = torch.tensor([[0.2], [0.7]], dtype=D)
    trial, _ = inverted(pde, [], [Sensors(X, torch.zeros(2, dtype=D), 0.1)])
    mean, std = at(trial.posterior, X)
    assert not mean.any() and (std > 0).all() and (std < 0.1).all()


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_an_unknown_forcing_has_the_size_of_what_is_seen(size):
    pde = PDE(lambda p, w, d, c: d("xx", "u") - w.g, LINE, fields=("u", "g"))
    trial, _ = inverted(pde, [], [read(30, 1e-4 * size, size)])
    X = LINE.nodes(9)[1:-1]
    g, variance = trial.posterior.marginals(derivative(X, (0,), 1))
    error = (g - size * second(X[:, 0])).abs()
    assert (error < 3 * variance.sqrt()).all() and error.max() < 2 * size


@pytest.mark.parametrize("y", [[1.0], [2.0, 2.0], [0.0, 0.0]])
def test_noise_starts_somewhere_whatever_the_readings(y):
    X = torch.linspace(0.2, 0.7, len(y), dtype=D)[:, None]
    sensor = Sensors(X, torch.tensor(y, dtype=D))
    assert (sensor.rows(poisson()).noise_variance > 0).all()
    trial, _ = inverted(PDE(lambda p, v, d, c: d("xx"), LINE), [], [sensor])
    assert at(trial.posterior, X)[0].isfinite().all()


def test_learned_noise_is_where_the_readings_are():
    sensor = Sensors(torch.zeros(2, 1, dtype=D, device="meta"), torch.zeros(2, dtype=D, device="meta"))
    assert sensor.rows(poisson(), torch.tensor(0.0, dtype=D)).noise_variance.device.type == "meta"


def test_the_nugget_is_the_tolerance_of_the_equation():
    for nugget, expected in ((None, TOLERANCE), (1e-12, 1e-12)):
        trial, _ = inverted(poisson(), [], [read(5, 1e-2)], nugget=nugget)
        assert trial.posterior.nugget == expected
    trial, _ = inverted(helmholtz(5.0, Positive(2.0)), [], [read(20, 1e-3)])
    assert trial.posterior.nugget == TOLERANCE


# -------------------------------------------------------------------------------------------------- not linear


def test_a_solution_for_other_coefficients_is_no_start():
    """u″ + k u³ = f has several solutions, and for large k another one is near."""
    pde = PDE(
        lambda p, v, d, c: d("xx") + c.k * v**3,
        LINE,
        rhs=lambda x: second(x) + 3 * u(x) ** 3,
        unknowns={"k": Positive(1.0)},
    )
    trial, found = inverted(pde, [Dirichlet("boundary", u)], [read(12, 1e-2)])
    assert found["k"].identified and abs(found["k"].value - 3) < 3 * found["k"].std < 0.1
    X = LINE.nodes(50)
    mean, std = at(trial.posterior, X)
    assert ((mean - u(X[:, 0])).abs() < 3 * std).all()


def test_an_equation_without_a_slope_at_zero():
    """u′ = −k √u, whose solution without sensors runs into zero for the k that the search starts from."""
    exact = lambda t: (1 - t / 2) ** 2  # noqa: E731
    pde = PDE(lambda p, v, d, c: d("x") + c.k * torch.sqrt(v), LINE, unknowns={"k": Positive(2.0)})
    X = torch.linspace(0.05, 0.95, 12, dtype=D)[:, None]
    y = exact(X[:, 0]) + 1e-2 * torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=D)
    _, found = inverted(pde, [Dirichlet("x=0", 1.0)], [Sensors(X, y, 1e-2)])
    assert found["k"].identified and abs(found["k"].value - 1) < 3 * found["k"].std < 0.1


# ---------------------------------------------------------------------------------------------------- identifiability


def test_a_range_that_is_too_narrow_is_said_to_be():
    _, found = inverted(helmholtz(5.0, Positive(1.0, lower=0.5, upper=2.0)), [], [read(25, 1e-3)])
    assert not found["k"].identified
    assert str(found["k"]) == "at the upper end of its range, 2: widen upper"
    _, found = inverted(helmholtz(5.0, Real(10.0, lower=7.0, upper=30.0)), [], [read(25, 1e-3)])
    assert str(found["k"]) == "at the lower end of its range, 7: widen lower"


@pytest.mark.parametrize("kernel", [None, RBF(0.3)])
def test_without_observations_nothing_is_identified(kernel):
    pde = PDE(lambda p, v, d, c: d("xx") + c.k * v, LINE, unknowns={"k": Positive(2.0)})
    trial, found = inverted(pde, [Dirichlet("boundary", 1.0)], kernel=kernel)
    assert not found["k"].identified and "not identified: nothing was observed" in str(found["k"])
    assert found["k"].value == 2.0 and trial.n_evaluations == 0
    x = LINE.nodes(20)
    root = math.sqrt(2.0)
    exact = torch.cos(root * (x[:, 0] - 0.5)) / math.cos(root / 2)
    assert (at(trial.posterior, x)[0] - exact).abs().max() < 1e-5


def test_more_conditions_than_derivatives_are_observations():
    """u = sin πx has k = π² and the slope π at both ends."""
    pde = PDE(lambda p, v, d, c: d("xx") + c.k * v, LINE, unknowns={"k": Positive(5.0, lower=2.0, upper=20.0)})
    _, found = inverted(pde, [Dirichlet("boundary"), Neumann("boundary", -math.pi)])
    assert found["k"].identified and abs(found["k"].value - math.pi**2) < 0.01


def test_periods_are_no_observations():
    pde = PDE(lambda p, v, d, c: d("x") + c.k * v, LINE, rhs=1.0, unknowns={"k": Positive(5.0)})
    _, found = inverted(pde, [Periodic("x")])
    assert "nothing was observed" in str(found["k"])


def test_places_without_a_linearisation_count_as_far_below():
    """a u′ = 1 has no slope at a = 0, where the scan of the range looks."""
    unknowns = {"a": Real(1.0, lower=-3.0, upper=3.0)}
    pde = PDE(lambda p, v, d, c: c.a * d("x"), LINE, rhs=1.0, unknowns=unknowns)
    X = torch.linspace(0, 1, 8, dtype=D)[:, None]
    _, found = inverted(pde, [], [Sensors(X, X[:, 0] / 2 + 1e-3 * torch.cos(40 * X[:, 0]), 1e-3)])
    assert found["a"].identified and abs(found["a"].value - 2) < 0.02


class Hills(Evidence):
    """An evidence with hills of given heights, one of which the search starts on."""

    def __init__(self, heights, reachable=True):
        super().__init__(Search([], {"k": Real(0.0, lower=-1.0, upper=1.0)}), lambda c, n: [], lambda rows: None)
        self.heights, self.reachable = heights, reachable

    def _value(self, theta):
        x = theta[0]
        hills = [h * np.exp(-((x - c) ** 2) / 0.02) for c, h in zip((-0.8, 0.3), self.heights, strict=True)]
        slopes = [-(x - c) / 0.01 * hill for c, hill in zip((-0.8, 0.3), hills, strict=True)]
        return sum(hills), np.array([sum(slopes)])

    def __call__(self, theta):
        self.n_evaluations += 1
        value, slope = self._value(theta)
        return value, slope

    def posterior(self, theta):
        return None, {"k": torch.tensor(theta[0], dtype=D)}, self._value(theta)[0]


def test_a_better_end_is_climbed_from():
    """The end of the range is on the slope of the higher hill, so that the evidence rises towards it."""
    evidence = Hills((60.0, 5.0))
    first = evidence.maximise(np.array([0.3]))
    assert abs(first.theta[0] - 0.3) < 1e-3
    assert evidence.value(np.array([-1.0])) > first.value
    maximum, found, _ = describe(evidence, first, lambda maximum: 1e-6)
    assert abs(maximum.theta[0] + 0.8) < 1e-3 and abs(found["k"].value + 0.8) < 1e-3
    assert found["k"].identified and min(found["k"].drop) > 1
    # the scan finds it at once
    assert abs(scan(evidence, np.array([0.3]))[0] + 0.8) < 0.1


def test_a_better_end_where_the_equation_is_not_met_is_only_spoken_of():
    evidence = Hills((60.0, 5.0))
    first = evidence.maximise(np.array([0.3]))
    met = lambda maximum: 1e-6 if maximum.theta[0] > 0 else 1e-2  # noqa: E731
    maximum, found, _ = describe(evidence, first, met)
    assert maximum is first and not found["k"].identified and found["k"].drop[0] < -1
    assert "rises by" in str(found["k"]) and "lower end of its range, -1" in str(found["k"])


def test_what_is_not_identified_does_not_spoil_the_solution():
    """u = x is steady whatever κ is, and large κ leave the equation unresolved by so few nodes."""
    box = Box(x=(0, 1), t=(0, 1))
    pde = PDE(lambda p, v, d, c: d("t") - c.kappa * d("xx"), box, unknowns={"kappa": Positive(0.2)})
    conditions = [Initial(lambda x: x), Dirichlet("x=0"), Dirichlet("x=1", 1.0)]
    generator = torch.Generator().manual_seed(0)
    X = torch.rand(20, 2, generator=generator, dtype=D)
    sensor = Sensors(X, X[:, 0] + 1e-3 * torch.randn(20, generator=generator, dtype=D), 1e-3)
    problem = Problem(pde, conditions, (12, 12), [sensor])
    trial, found = invert(Solver(problem, "features"), lambda c: choose_lines(pde, conditions, (12, 12), c)[1])
    assert not found["kappa"].identified and "not identified" in str(found["kappa"])
    mean, variance = trial.posterior.marginals(derivative(box.nodes(20), (0, 0)))
    error = (mean - box.nodes(20)[:, 0]).abs()
    # no worse than one reading
    assert error.max() < 1e-3 and (error <= 2 * variance.sqrt() + 1e-12).double().mean() > 0.9


def test_coefficients_say_why_they_are_not_identified():
    assert str(Coefficient(2.0, 0.5, True, (3.0, 4.0))) == "2 ± 0.5"
    assert "falls by 0.5 and 4 nats" in str(Coefficient(2.0, 0.5, False, (0.5, 4.0)))
    assert str(Coefficient(2.0, 0.5, False, (0.5, 4.0), "because")) == "because"


def test_readings_with_much_noise_do_not_bend_a_prior_that_meets_the_equation():
    def heat(x, t):
        return torch.exp(-0.05 * math.pi**2 * t) * torch.sin(math.pi * x)

    plane = Box(x=(0, 1), t=(0, 1))
    generator = torch.Generator().manual_seed(0)
    X = torch.rand(30, 2, generator=generator, dtype=D)
    y = heat(*X.unbind(1)) + 0.05 * torch.randn(30, generator=generator, dtype=D)
    pde = PDE(lambda p, v, d, c: d("t") - 0.05 * d("xx"), plane)
    conditions = [Initial(lambda x: torch.sin(math.pi * x)), Dirichlet("x=0"), Dirichlet("x=1")]
    solved = solve(pde, conditions, [Sensors(X, y, 0.05)], n_collocation=16)
    at = plane.scattered(500, 0.3)
    mean, variance = solved.posterior.marginals(derivative(at, (0, 0)))
    error = (mean - heat(*at.unbind(1))).abs()
    assert solved.report.residual < 1e-3 and not solved.report.warnings
    assert error.max() < 1e-3 and (error < 2 * variance.sqrt()).double().mean() >= 0.95


def test_what_a_prior_cannot_meet_is_no_knowledge():
    """A kink of f between two lengthscales: the equation's tolerance is what the best prior leaves of it."""

    def truth(x):
        return (x - 0.5).clamp_min(0.0).square() / 2 - x / 8

    generator = torch.Generator().manual_seed(0)
    X = torch.rand(10, 1, generator=generator, dtype=D)
    y = truth(X[:, 0]) + 1e-2 * torch.randn(10, generator=generator, dtype=D)
    pde = PDE(lambda p, v, d, c: d("xx"), LINE, rhs=lambda x: (x > 0.5).double())
    with pytest.warns(UserWarning, match="equation is met to"):
        solved = solve(pde, [Dirichlet("boundary")], [Sensors(X, y, 1e-2)], n_collocation=60)
    x = LINE.nodes(100)
    mean, variance = solved.posterior.marginals(derivative(x, (0,)))
    assert solved.report.nugget > 1e-6
    assert ((mean - truth(x[:, 0])).abs() < 2 * variance.sqrt() + 1e-12).double().mean() >= 0.95
