"""Grid solutions by least squares and by Newton's method: known solutions, gradients, and what is refused."""

import math

import numpy as np
import pytest
import torch

from mercer.kernels import GaussianMixture, StudentMixture
from mercer.linalg.cholesky import Solution
from mercer.linalg.gmres import gmres
from mercer.pde.axes import Axis
from mercer.pde.conditions import Dirichlet, Initial, Neumann, Periodic
from mercer.pde.domain import Box
from mercer.pde.equation import PDE
from mercer.pde.grid import SMALL, _solved, solve_grid
from mercer.pde.grid_equation import GridEquation
from mercer.pde.grid_kernels import kernels_of_data
from mercer.pde.grid_newton import newton
from mercer.pde.projection import Projection
from mercer.pde.sides import Elimination, condition_sides
from mercer.pde.sylvester import solve_sylvester
from mercer.pde.unknowns import Positive


def lines(domain, n=67):
    return [torch.linspace(a, b, n, dtype=torch.float64) for a, b in zip(domain.lower, domain.upper, strict=True)]


def error(solution, domain, u):
    points = lines(domain)
    exact = u(*torch.meshgrid(*points, indexing="ij"))
    return float((solution.mean_on(points) - exact).norm() / exact.norm())


def poisson(end=2 * math.pi, omega=30.0):
    domain = Box(x=(0, end))
    pde = PDE(lambda p, u, d, c: d("xx"), domain, rhs=lambda x: -(omega**2) * torch.sin(omega * x))
    return pde, [Dirichlet("boundary", lambda x: torch.sin(omega * x))], lambda x: torch.sin(omega * x)


def allen_cahn(end=1.0, omega=12.0):
    def u(x, y):
        return torch.sin(omega * x) * torch.cos(3 * y)

    domain = Box(x=(0, end), y=(0, 1))
    pde = PDE(
        lambda p, u, d, c: d("xx") + d("yy") + u * (u**2 - 1),
        domain,
        rhs=lambda x, y: -(omega**2 + 9) * u(x, y) + u(x, y) ** 3 - u(x, y),
    )
    return pde, [Dirichlet("boundary", u)], u


@pytest.mark.parametrize("spectrum", ["student", "gaussian"])
def test_a_fast_wave_in_one_dimension(spectrum):
    pde, conditions, u = poisson()
    found = solve_grid(pde, conditions, None, 130, spectrum=spectrum, max_iter=0)
    assert found.status == "ok" and len(found.trace) == 1 and found.report["method"] == "variable projection"
    assert error(found, pde.domain, u) < 1e-4
    assert found.report["shifted_residual"] < 1e-4
    assert any(abs(mu - 30 / (2 * math.pi)) < 1e-6 for mu in found.axes[0].kernel.frequency[:, 0].tolist())


@pytest.mark.parametrize("shape", [(24, 16), (45, 30)])
def test_an_equation_that_is_not_linear_in_two_dimensions(shape):
    pde, conditions, u = allen_cahn()
    found = solve_grid(pde, conditions, None, shape, spectrum="gaussian", max_iter=0)
    small = math.prod(shape) <= SMALL
    assert found.status == "ok"
    assert found.report["method"] == ("variable projection" if small else "Newton")
    assert error(found, pde.domain, u) < 1e-5


def test_derivatives_and_scattered_points():
    pde, conditions, _ = allen_cahn()
    found = solve_grid(pde, conditions, None, (45, 30), spectrum="gaussian")
    X = pde.domain.scattered(50)
    torch.testing.assert_close(found.mean(X), torch.sin(12 * X[:, 0]) * torch.cos(3 * X[:, 1]), rtol=0, atol=1e-5)
    slope = -36 * torch.cos(12 * X[:, 0]) * torch.sin(3 * X[:, 1])
    torch.testing.assert_close(found.mean(X, (1, 1)), slope, rtol=0, atol=1e-2)


def test_newton_and_least_squares_agree():
    pde, conditions, _ = allen_cahn(omega=5.0)
    equation = GridEquation(pde, pde.domain.axes((14, 12)))
    kernels = [StudentMixture(weight=[1.0, 1.0], lengthscale=[0.5, 0.5], frequency=[0.0, 0.8]) for _ in range(2)]
    by_steps, by_rows = (_solved(equation, conditions, kernels, None, small, 1.0, None) for small in (False, True))
    assert by_steps.status == by_rows.status == "ok"
    # one has v = τ = ∞, the other the caps
    torch.testing.assert_close(by_rows.values, by_steps.values, rtol=0, atol=1e-6)


def test_a_linear_equation_takes_one_step_and_is_sylvesters():
    domain = Box(x=(0, 1), y=(0, 1))

    def u(x, y):
        return torch.sin(9 * x) * torch.exp(y)

    pde = PDE(lambda p, u, d, c: d("xx") + d("yy") + 2 * u, domain, rhs=lambda x, y: -78 * u(x, y))
    equation = GridEquation(pde, domain.axes((30, 35)))
    axes = [Axis(x, StudentMixture(weight=[1.0], lengthscale=[0.5], frequency=[0.0])) for x in equation.nodes]
    sides = condition_sides(Dirichlet("boundary", u), domain, axes)
    done = newton(equation, axes, Elimination(equation.shape, sides))
    coefficients, target = equation.linearise([torch.zeros_like(equation.rhs)] * len(equation.indices))
    direct = solve_sylvester(axes, coefficients, target, sides)
    assert done.status == "ok" and len(done.stats["trace"]) == 1
    torch.testing.assert_close(done.value, direct.value, rtol=0, atol=1e-9)


def test_a_linear_equation_whose_coefficients_do_not_separate():
    domain = Box(x=(0, 1), y=(0, 1))

    def u(x, y):
        return torch.sin(4 * x + y)

    def rhs(x, y):
        return (-(2 + torch.sin(x * y)) * 16 - 1 - 4 * 0.3) * u(x, y)

    pde = PDE(lambda p, u, d, c: (2 + torch.sin(p.x * p.y)) * d("xx") + d("yy") + 0.3 * d("xy"), domain, rhs=rhs)
    found = solve_grid(pde, [Dirichlet("boundary", u)], None, 36, spectrum="gaussian")
    assert found.status == "ok" and found.report["linear_iterations"] < 40
    assert error(found, domain, u) < 1e-5


def test_waves_come_from_the_data_where_there_is_no_forcing():
    domain = Box(x=(0, 1), t=(0, 1))
    pde = PDE(lambda p, u, d, c: 20 * d("x") + d("t"), domain)

    def u(x, t):
        return torch.sin(x - 20 * t)

    conditions = [Initial(lambda x: torch.sin(x)), Dirichlet("x=0", lambda t: torch.sin(-20 * t))]
    found = solve_grid(pde, conditions, None, 60)
    assert any(abs(mu - 20 / (2 * math.pi)) < 1e-4 for mu in found.axes[1].kernel.frequency[:, 0].tolist())
    assert error(found, domain, u) < 1e-4


def test_heat_with_a_flux_and_a_period():
    domain = Box(x=(0, 1), t=(0, 0.5))
    heat = PDE(lambda p, u, d, c: d("t") - 0.05 * d("xx"), domain)

    def cosine(x, t):
        return torch.exp(-0.05 * (2 * math.pi) ** 2 * t) * torch.cos(2 * math.pi * x)

    start = Initial(lambda x: torch.cos(2 * math.pi * x))
    waves = GaussianMixture(weight=[1.0, 1.0], lengthscale=[0.5, 0.5], frequency=[0.0, 1.0])
    kernels = [waves, GaussianMixture(weight=[1.0], lengthscale=[0.3], frequency=[0.0])]
    for conditions in ([Periodic("x"), start], [Neumann("x=0"), Neumann("x=1"), start]):
        assert error(solve_grid(heat, conditions, kernels, (24, 30), max_iter=0), domain, cosine) < 1e-4


def projection(n=20, spectrum="student"):
    pde, conditions, _ = poisson(1.0, 6.0)
    equation = GridEquation(pde, pde.domain.axes(n))
    mixture = GaussianMixture if spectrum == "gaussian" else StudentMixture
    kernel = mixture(weight=[0.5, 1.0], lengthscale=[0.3, 0.4], frequency=[0.0, 1.3])
    axes = [Axis(equation.nodes[0], kernel)]
    sides = [side for condition in conditions for side in condition_sides(condition, pde.domain, axes)]
    return Projection(equation, Elimination(equation.shape, sides), [kernel])


def test_the_gradient_of_the_profiled_objective_is_that_of_differences():
    found = projection()
    theta = found.theta.read()

    def J(point):
        found.theta.write(point)
        solution = found.solve(1e-4)
        return found.objective(solution), solution

    (value, gradient), solution = J(theta)
    assert value == pytest.approx(solution.stats["objective"], rel=1e-9)
    for i in range(len(theta)):
        step = np.zeros_like(theta)
        step[i] = 1e-4
        numeric = (J(theta + step)[0][0] - J(theta - step)[0][0]) / 2e-4
        assert gradient[i] == pytest.approx(numeric, rel=1e-3, abs=1e-3 * np.abs(gradient).max())


def test_learning_raises_the_objective_and_finds_the_frequency():
    found = projection()
    trace = found.learn(30)
    assert max(trace) > trace[0] + 1
    assert found.solve(1e-6).stats["objective"] == pytest.approx(max(trace), rel=1e-6)


def test_kernels_are_learned_only_where_that_helps():
    pde, conditions, u = poisson(1.0, 30.0)
    off = [StudentMixture(weight=[1.0, 1.0], lengthscale=[0.3, 0.3], frequency=[0.0, 4.5])]
    plain, learned = (solve_grid(pde, conditions, off, 40, max_iter=k) for k in (0, 25))
    assert learned.report["shifted_residual"] <= plain.report["shifted_residual"]
    assert learned.report["learned"] and error(learned, pde.domain, u) < 1e-3 * error(plain, pde.domain, u)
    assert off[0].frequency[1].item() == pytest.approx(4.5)  # a copy was learned


def test_precisions_are_those_of_the_residuals_up_to_a_cap():
    found = projection()
    solution = found.solve(1e-6)
    assert solution.stats["capped"]
    assert float(solution.stats["log_v"].exp()) == pytest.approx(1e12 / float(found.rhs.square().mean()))
    loose = found.solve(1e-16)  # nothing can meet that
    residual = found._residual(found._rows()[1], loose.stats["white"]).detach()
    assert not loose.stats["capped"]
    assert float(loose.stats["log_v"].exp()) == pytest.approx(len(residual) / float(residual.square().sum()))


def test_the_kernels_are_those_of_forcing_and_data():
    domain = Box(x=(0, 1), y=(0, 1))

    def u(x, y):
        return torch.sin(40 * x) + torch.cos(25 * y)

    pde = PDE(
        lambda p, u, d, c: d("xx") + d("yy"),
        domain,
        rhs=lambda x, y: -1600 * torch.sin(40 * x) - 625 * torch.cos(25 * y),
    )
    equation = GridEquation(pde, domain.axes(40))
    axes = [Axis(x, StudentMixture(weight=[1.0], lengthscale=[0.5], frequency=[0.0])) for x in equation.nodes]
    found = kernels_of_data(equation, condition_sides(Dirichlet("boundary", u), domain, axes), "student")
    for kernel, omega in zip(found, (40, 25), strict=True):
        frequencies = kernel.frequency[:, 0].tolist()
        assert frequencies[0] == 0 and len(frequencies) == 2
        assert frequencies[1] == pytest.approx(omega / (2 * math.pi), rel=1e-6)


def test_time_ends_newtons_method():
    pde, conditions, _ = allen_cahn()
    equation = GridEquation(pde, pde.domain.axes(20))
    axes = [Axis(x, StudentMixture(weight=[1.0], lengthscale=[0.3], frequency=[0.0])) for x in equation.nodes]
    elimination = Elimination(equation.shape, condition_sides(conditions[0], pde.domain, axes))
    done = newton(equation, axes, elimination, deadline=0.0)
    assert done.status == "seconds" and len(done.stats["trace"]) == 1
    assert newton(equation, axes, elimination, max_iter=1).status == "not converged"


def test_there_is_no_standard_deviation():
    pde, conditions, _ = poisson(1.0, 3.0)
    found = solve_grid(pde, conditions, None, 20, max_iter=0)
    with pytest.raises(NotImplementedError, match="method='features' or 'dense'"):
        found.std(torch.zeros(1, 1).double())


def test_what_a_grid_does_not_do_is_refused():
    domain = Box(x=(0, 1))
    unknown = PDE(lambda p, u, d, c: c.k * d("xx"), domain, unknowns={"k": Positive(1.0)})
    with pytest.raises(ValueError, match="does not learn coefficients"):
        solve_grid(unknown, [], None, 10)
    system = PDE(lambda p, u, d, c: (d("x", "u") - u.v, d("x", "v") + u.u), domain, fields=("u", "v"))
    with pytest.raises(ValueError, match="one equation of one field"):
        solve_grid(system, [], None, 10)
    pde, conditions, _ = poisson()
    with pytest.raises(ValueError, match="one kernel per axis"):
        solve_grid(pde, conditions, [], 10)


def test_three_dimensions_that_are_not_linear():
    domain = Box(x=(0, 1), y=(0, 1), t=(0, 1))

    def u(x, y, t):
        return torch.sin(3 * x) * torch.cos(2 * y) * torch.exp(-t)

    def rhs(x, y, t):
        return (-1 + 13 * 0.1) * u(x, y, t) + u(x, y, t) ** 3

    pde = PDE(lambda p, u, d, c: d("t") - 0.1 * (d("xx") + d("yy")) + u**3, domain, rhs=rhs)
    conditions = [Dirichlet("boundary", u), Initial(lambda x, y: u(x, y, 0 * x))]
    found = solve_grid(pde, conditions, None, (16, 14, 14), spectrum="gaussian")
    X = domain.scattered(40)
    torch.testing.assert_close(found.mean(X), u(*X.unbind(1)), rtol=0, atol=2e-4)
    assert found.status == "ok" and found.report["method"] == "Newton"


def test_a_linear_solve_that_leads_nowhere_ends_newtons_method(monkeypatch):
    pde, conditions, _ = allen_cahn()
    hopeless = Solution(torch.zeros(30, 30, dtype=torch.float64), "not converged", {"iterations": 60, "residual": 0.9})
    taken = []

    def solve(product, rhs, inverse, **options):
        taken.append(rhs)
        return gmres(product, rhs, inverse, **options) if len(taken) == 1 else hopeless

    monkeypatch.setattr("mercer.pde.grid_newton.gmres", solve)
    found = solve_grid(pde, conditions, None, (40, 40))
    assert found.status == "stalled" and len(taken) == 2 and len(found.trace) == 1
