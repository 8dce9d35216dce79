"""Grid solutions by least squares and by Newton's method: known solutions, gradients, and what is refused."""

import math

import numpy as np
import pytest
import torch

from mercer.kernels import RBF, GaussianMixture, StudentMixture
from mercer.linalg.cholesky import Solution
from mercer.linalg.gmres import gmres
from mercer.pde.axes import Axis, Interpolant
from mercer.pde.conditions import Dirichlet, Initial, Neumann, Periodic
from mercer.pde.domain import Box
from mercer.pde.equation import PDE, LinearisationError
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


@pytest.mark.parametrize("nugget", [1e-12, 1e-5])
def test_newton_and_least_squares_agree(monkeypatch, nugget):
    # an axis may have had to raise its nugget
    monkeypatch.setattr("mercer.pde.grid.Axis", lambda *a, **more: Axis(*a, nugget=nugget, **more))
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


def projection(n=20, kernel=None, nugget=1e-12, weight=1.0):
    pde, conditions, _ = poisson(1.0, 6.0)
    equation = GridEquation(pde, pde.domain.axes(n))
    kernel = kernel or StudentMixture(weight=[0.5, 1.0], lengthscale=[0.3, 0.4], frequency=[0.0, 1.3])
    axes = [Axis(equation.nodes[0], kernel, nugget)]
    sides = [side for condition in conditions for side in condition_sides(condition, pde.domain, axes)]
    return Projection(equation, Elimination(equation.shape, sides), [kernel], weight, [nugget])


@pytest.mark.parametrize(
    ("ell", "nugget", "bound"),  # v at its cap, between the bounds, and at its floor
    [(None, 1e-12, "cap"), (0.3, 1e-6, None), (0.3, 1e-4, None), (0.6, 1e-4, "floor")],
)
def test_the_gradient_of_the_profiled_objective_is_that_of_differences(ell, nugget, bound):
    kernel = None if ell is None else GaussianMixture(weight=[0.5], lengthscale=[ell], frequency=[0.0])
    found = projection(kernel=kernel, nugget=nugget)
    theta = found.theta.read()

    def J(point):
        found.theta.write(point)
        solution = found.solve(1e-6, loosest=1e-2)
        return found.objective(solution), solution

    (value, gradient), solution = J(theta)
    assert solution.status == "ok" and solution.stats["capped"] == (bound == "cap")
    scale = float(solution.stats["precisions"][1] * found.rhs.square().mean())
    where = "cap" if scale > 0.99e12 else "floor" if scale < 1.01e4 else None
    assert where == bound and value == pytest.approx(solution.stats["objective"], rel=1e-9)
    for i in range(len(theta)):
        step = np.zeros_like(theta)
        step[i] = 1e-4
        numeric = (J(theta + step)[0][0] - J(theta - step)[0][0]) / 2e-4
        assert gradient[i] == pytest.approx(numeric, rel=1e-3, abs=1e-3 * np.abs(gradient).max())


@pytest.mark.parametrize("weight", [1.0, 7.0])
def test_values_and_objective_are_those_of_dense_algebra(weight):
    kernel = GaussianMixture(weight=[0.5], lengthscale=[0.2], frequency=[0.0])
    found = projection(9, kernel, nugget=1e-4, weight=weight)
    solution = found.solve(0.3)  # so little is asked that the prior and the conditions both count
    tau, v = solution.stats["precisions"]
    axis = Axis(found.equation.nodes[0], kernel, 1e-4)
    C = axis.gram(0).detach() + 1e-4 * axis.scale * torch.eye(9).double()
    A = axis.gram(2).detach()[1:-1] @ torch.linalg.inv(C)
    B = torch.eye(9).double()[[0, 8]]
    H = torch.linalg.inv(C) + v * A.mT @ A + weight * tau * B.mT @ B
    u = torch.linalg.solve(H, v * A.mT @ found.rhs + weight * tau * B.mT @ found.target)
    torch.testing.assert_close(solution.value, u, rtol=0, atol=1e-8 * float(u.abs().max()))
    gap, residual = B @ u - found.target, A @ u - found.rhs
    prior = -0.5 * torch.logdet(C) - 0.5 * u @ torch.linalg.solve(C, u)
    boundary = 0.5 * 2 * tau.log() - 0.5 * tau * gap @ gap
    fit = 0.5 * 7 * v.log() - 0.5 * v * residual @ residual
    assert solution.stats["objective"] == pytest.approx(float(prior + weight * boundary + fit), rel=1e-8)
    assert float(gap.abs().max()) > 1e-3


def test_precisions_that_do_not_settle_are_confessed(monkeypatch):
    kernel = GaussianMixture(weight=[0.5], lengthscale=[0.3], frequency=[0.0])
    found = projection(kernel=kernel, nugget=1e-6)
    assert found.solve(1e-6, loosest=1e-2).status == "ok"
    monkeypatch.setattr("mercer.pde.projection._PROFILES", 2)
    assert found.solve(1e-6, loosest=1e-2).status == "not converged"


@pytest.mark.parametrize("d", [1, 2])
def test_a_kernel_that_cannot_meet_the_equation_is_asked_for_less(d):
    if d == 1:
        pde, conditions, u = poisson(1.0, 6.0)
        shape, bound = 100, 4e-3
    else:
        domain = Box(x=(0, 1), y=(0, 1))

        def u(x, y):
            return torch.sin(6 * x) * torch.cos(3 * y)

        pde = PDE(lambda p, u, d, c: d("xx") + d("yy"), domain, rhs=lambda x, y: -45 * u(x, y))
        conditions, shape, bound = [Dirichlet("boundary", u)], 24, 5e-3
    found = solve_grid(pde, conditions, [RBF(1.0)] * d, shape, max_iter=0)
    assert not found.report["capped"] and len(found.trace) == 1
    # at 1e-8 it is rounding, and with precisions of residuals nothing, that is solved for
    assert found.report["tolerance"] == 1e-6 and error(found, pde.domain, u) < bound


def test_learning_raises_the_objective_and_finds_the_frequency():
    found = projection()
    trace = found.learn(30)
    assert max(trace) > trace[0] + 1
    assert found.solve(1e-6, loosest=1e-2).stats["objective"] == pytest.approx(max(trace), rel=1e-3)


def test_kernels_that_lead_nowhere_are_not_learned(monkeypatch):
    found, solve = projection(), Projection.solve
    theta, calls = found.theta.read(), []

    def failing(self, tolerance, *a, **more):
        calls.append(tolerance)
        if len(calls) > 1:
            raise LinearisationError("not finite")
        return solve(self, tolerance, *a, **more)

    monkeypatch.setattr(Projection, "solve", failing)
    assert len(found.learn(5)) == 1 and len(calls) > 1
    np.testing.assert_allclose(found.theta.read(), theta, rtol=1e-12)
    calls.clear()
    pde, conditions, _ = poisson(1.0, 30.0)
    off = [StudentMixture(weight=[1.0, 1.0], lengthscale=[0.3, 0.3], frequency=[0.0, 4.5])]
    solved = solve_grid(pde, conditions, off, 40)
    assert solved.status == "ok" and not solved.report["learned"]


def test_a_solution_that_the_equation_is_not_finite_between_nodes_of_has_an_infinite_residual():
    pde = PDE(lambda p, u, d, c: d("x") + torch.log(1 - u), Box(x=(0, 1)))
    equation = GridEquation(pde, pde.domain.axes(8))
    axes = [Axis(equation.nodes[0], GaussianMixture(weight=[1.0], lengthscale=[0.5], frequency=[0.0]))]
    inside, outside = (Interpolant(axes, torch.full((8,), value).double()) for value in (0.5, 1.5))
    assert equation.shifted_residual(outside) == math.inf > equation.shifted_residual(inside)


def test_kernels_are_learned_only_where_that_helps():
    pde, conditions, u = poisson(1.0, 30.0)
    off = [StudentMixture(weight=[1.0, 1.0], lengthscale=[0.3, 0.3], frequency=[0.0, 4.5])]
    plain, learned = (solve_grid(pde, conditions, off, 40, max_iter=k) for k in (0, 25))
    assert learned.report["shifted_residual"] <= plain.report["shifted_residual"]
    assert learned.report["learned"] and error(learned, pde.domain, u) < 1e-3 * error(plain, pde.domain, u)
    assert off[0].frequency[1].item() == pytest.approx(4.5)  # a copy was learned


def test_precisions_are_those_of_the_residuals_within_bounds():
    mean = float(projection().rhs.square().mean())
    solution = projection().solve(1e-6, loosest=1e-2)
    assert solution.stats["capped"] and float(solution.stats["precisions"][1]) == pytest.approx(1e12 / mean)
    found = projection(kernel=GaussianMixture(weight=[0.5], lengthscale=[0.3], frequency=[0.0]), nugget=1e-6)
    between = found.solve(1e-6, loosest=1e-2)
    precision = float(between.stats["precisions"][1])
    assert not between.stats["capped"] and 1e4 / mean < precision < 1e12 / mean
    assert precision == pytest.approx(1 / between.stats["trace"][-1] ** 2, rel=2e-3)
    fixed = found.solve(1e-6)
    assert not fixed.stats["capped"] and float(fixed.stats["precisions"][1]) == pytest.approx(1e12 / mean)


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


@pytest.mark.parametrize("small", [True, False])
def test_steps_are_shortened_where_whole_ones_lead_away(small):
    domain = Box(x=(0, 1))

    def u(x):
        return torch.sin(3 * x)

    def steep(u):  # nearly a step, beyond which Newton's steps are far too long
        return -2000 * torch.atan(20 * (u - 0.5))

    pde = PDE(lambda p, u, d, c: d("xx") + steep(u), domain, rhs=lambda x: -9 * u(x) + steep(u(x)))
    equation = GridEquation(pde, domain.axes(30))
    kernels = [GaussianMixture(weight=[1.0], lengthscale=[0.3], frequency=[0.0])]
    found = _solved(equation, [Dirichlet("boundary", u)], kernels, None, small, 1.0, None)
    assert found.status == "ok"
    torch.testing.assert_close(found.values, u(equation.nodes[0]), rtol=0, atol=1e-5)


def test_time_ends_least_squares():
    pde, conditions, _ = allen_cahn()
    equation = GridEquation(pde, pde.domain.axes(12))
    kernels = [StudentMixture(weight=[1.0], lengthscale=[0.3], frequency=[0.0]) for _ in range(2)]
    found = _solved(equation, conditions, kernels, None, True, 1.0, 0.0)
    assert found.status == "seconds" and len(found.trace) == 1
    ended = solve_grid(pde, conditions, None, 12, seconds=0.0)
    assert ended.status == "seconds" and "search" not in ended.report


def test_slopes_on_all_sides_leave_a_constant_open():
    domain = Box(x=(0, 1), y=(0, 1))
    for rhs in (1.0, lambda x, y: torch.cos(math.pi * x)):
        pde = PDE(lambda p, u, d, c: d("xx") + d("yy"), domain, rhs=rhs)
        assert solve_grid(pde, [Neumann("boundary")], None, 40).status == "nearly singular"
    held = [Neumann("x=0"), Neumann("x=1"), Neumann("y=0"), Dirichlet("y=1")]
    assert solve_grid(pde, held, None, 40).status == "ok"
    damped = PDE(lambda p, u, d, c: d("xx") + d("yy") - u, domain, rhs=rhs)
    assert solve_grid(damped, [Neumann("boundary")], None, 40).status == "ok"


def test_a_small_wave_of_u_under_a_loud_forcing_is_left_out():
    domain = Box(x=(0, 1))
    pde = PDE(
        lambda p, u, d, c: d("xx"), domain, rhs=lambda x: -25 * torch.sin(5 * x) - 1e-8 * 400**2 * torch.sin(400 * x)
    )
    equation = GridEquation(pde, domain.axes(400))
    axes = [Axis(equation.nodes[0], StudentMixture(weight=[1.0], lengthscale=[0.5], frequency=[0.0]))]
    sides = condition_sides(Dirichlet("boundary", 0.0), domain, axes)
    (kernel,) = kernels_of_data(equation, sides, "student")
    # 6e-5 of the forcing, and 1e-8 of u
    assert kernel.frequency[:, 0].tolist() == pytest.approx([0.0, 5 / (2 * math.pi)], abs=1e-5)


def test_an_equation_that_is_not_finite_at_the_start_is_refused():
    pde = PDE(lambda p, u, d, c: d("xx") + torch.log(u), Box(x=(0, 1)))
    with pytest.raises(ValueError, match=r"not finite at u = 0.*another unknown"):
        solve_grid(pde, [Dirichlet("boundary", 1.0)], None, 20)


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
    with pytest.raises(ValueError, match="at least one condition"):
        solve_grid(pde, [], None, 10)
    with pytest.raises(ValueError, match=r"n_collocation .* is 3"):
        solve_grid(pde, conditions, None, 3)
    both = GaussianMixture(weight=[1.0], lengthscale=[[0.5, 0.5]], frequency=[[0.0, 1.0]])
    pde, conditions, _ = allen_cahn()
    with pytest.raises(ValueError, match="one kernel of one column per axis; axis 1"):
        solve_grid(pde, conditions, [RBF(0.5), both], 10)
    for name, value in {"frequency_scale": 3.0, "n_components": 4, "change_point": 0.5, "on_iteration": print}.items():
        with pytest.raises(ValueError, match=f"{name}: for compat=True only"):
            solve_grid(pde, conditions, None, 10, **{name: value})
    found = solve_grid(pde, conditions, None, 10, max_iter=0)
    for X in (torch.zeros(4, 3), torch.zeros(4, 1), torch.zeros(4)):
        with pytest.raises(ValueError, match="one column per axis"):
            found.mean(X.double())


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
