"""The published solver: its objective against a literal dense one, and its training."""

import math
import time

import pytest
import torch
from oracles import published_grid as oracle

from mercer.kernels import RBF
from mercer.pde.conditions import Dirichlet, Initial, Neumann, Robin
from mercer.pde.domain import Box
from mercer.pde.equation import PDE
from mercer.pde.grid import solve_grid
from mercer.pde.grid_equation import GridEquation
from mercer.pde.published import Parameters, Published, train


def drawn(shape, n_components, seed=0):
    """Return parameters that mean nothing."""
    generator = torch.Generator().manual_seed(seed)
    start = Parameters.start(shape, 1.5, n_components, torch.device("cpu"))
    with torch.no_grad():
        for tensor in start.tensors():
            tensor += 0.5 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return start


def one_axis(spectrum):
    domain = Box(x=(0, 2))
    pde = PDE(lambda p, u, d, c: d("xx") + u * (u**2 - 1) + p.x * d("x"), domain, rhs=lambda x: torch.cos(3 * x))
    conditions = [Dirichlet("x=0", 0.3), Dirichlet("x=2", -0.7)]
    equation = GridEquation(pde, domain.axes(9))
    x = equation.nodes[0]

    def residual(d):
        return d(2) + d(0) * (d(0) ** 2 - 1) + x * d(1)

    return Published(equation, conditions, spectrum, 200.0), residual, [((0,), 0.3), ((8,), -0.7)]


def two_axes(spectrum):
    domain = Box(x=(0, 1), y=(0, 2))
    pde = PDE(lambda p, u, d, c: d("xx") + d("yy") + 0.3 * d("xy") + u**3 - u, domain, rhs=lambda x, y: x - y)
    equation = GridEquation(pde, domain.axes((5, 4)))
    X, Y = torch.meshgrid(*equation.nodes, indexing="ij")

    def residual(d):
        return d(2, 0) + d(0, 2) + 0.3 * d(1, 1) + d(0, 0) ** 3 - d(0, 0)

    boundary = []
    for i in range(5):  # corners are on two sides
        boundary += [((i, j), float(X[i, j] * Y[i, j])) for j in (0, 3)]
    for j in range(4):
        boundary += [((i, j), float(X[i, j] * Y[i, j])) for i in (0, 4)]
    return Published(equation, [Dirichlet("boundary", lambda x, y: x * y)], spectrum, 500.0), residual, boundary


@pytest.mark.parametrize("spectrum", ["gaussian", "student"])
@pytest.mark.parametrize("problem", [one_axis, two_axes])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_objective_and_its_gradient_are_those_of_a_dense_one(problem, spectrum, seed):
    published, residual, boundary = problem(spectrum)
    equation = published.equation
    parameters = drawn(equation.shape, 3, seed)
    value = published(parameters)
    gradient = torch.autograd.grad(value, parameters.tensors())
    kernels = list(zip(parameters.log_weight, parameters.log_scale, parameters.frequency, strict=True))
    expected = oracle.objective(
        spectrum,
        equation.nodes,
        parameters.U,
        parameters.log_tau,
        parameters.log_v,
        kernels,
        residual,
        equation.rhs,
        boundary,
        published.boundary_weight,
    )
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    for found, truth in zip(gradient, torch.autograd.grad(expected, parameters.tensors()), strict=True):
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-9 * max(1.0, float(truth.abs().max())))


@pytest.mark.parametrize("problem", [one_axis, two_axes])
def test_the_objective_of_a_correction_is_that_of_the_sum_with_a_dense_one(problem):
    published, residual, boundary = problem("gaussian")
    equation = published.equation
    first = drawn(equation.shape, 3)
    second = Parameters.correction(first)
    assert float(second.log_tau) == float(first.log_tau) and not second.log_v and not second.U.any()
    assert all(weight.exp().tolist() == [1.0] for weight in second.log_weight)
    with torch.no_grad():
        for tensor in second.tensors():
            tensor += torch.linspace(-0.3, 0.4, tensor.numel(), dtype=torch.float64).reshape(tensor.shape)
    value = published.beyond(first)(second)
    gradient = torch.autograd.grad(value, second.tensors())
    kernels = [list(zip(p.log_weight, p.log_scale, p.frequency, strict=True)) for p in (first, second)]
    frozen = oracle.derivatives("gaussian", equation.nodes, first.U.detach(), kernels[0])
    expected = oracle.objective(
        "student",
        equation.nodes,
        second.U,
        second.log_tau,
        second.log_v,
        kernels[1],
        lambda d: residual(lambda *orders: d(*orders) + frozen(*orders).detach()),
        equation.rhs,
        [(place, value - first.U[place].detach()) for place, value in boundary],
        published.boundary_weight,
    )
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    for found, truth in zip(gradient, torch.autograd.grad(expected, second.tensors()), strict=True):
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-9 * max(1.0, float(truth.abs().max())))


def test_a_correction_takes_over_and_leaves_the_rest_as_it_is():
    pde, conditions = poisson()
    options = {"compat": True, "n_components": 4}
    first = solve_grid(pde, conditions, None, 16, max_iter=20, **options)
    both = solve_grid(pde, conditions, None, 16, max_iter=40, change_point=0.5, **options)
    mixture, correction = both.interpolant.parts
    torch.testing.assert_close(mixture.values, first.values, rtol=0, atol=0)
    torch.testing.assert_close(both.values, first.values + correction.values)
    assert correction.values.any() and both.report["n_iter"] == 40
    assert all(axis.kernel.n_components == 1 and not axis.kernel.frequency.any() for axis in correction.axes)


def test_training_starts_where_the_reference_does():
    start = Parameters.start((4, 3), 20.0, 5, torch.device("cpu"))
    assert not start.U.any() and start.U.shape == (4, 3)
    assert float(start.log_tau.detach()) == float(start.log_v.detach()) == 0
    assert start.frequency[1].tolist() == [0.0, 5.0, 10.0, 15.0, 20.0]
    torch.testing.assert_close(start.log_weight[0].exp().sum(), torch.tensor(1.0, dtype=torch.float64))
    kernel = start.kernel(0, "student")
    torch.testing.assert_close(kernel.lengthscale, torch.ones(5, 1, dtype=torch.float64))
    assert start.kernel(0, "gaussian").lengthscale[0, 0].item() == pytest.approx(math.sqrt(0.5))


def poisson():
    domain = Box(x=(0, 1))
    pde = PDE(lambda p, u, d, c: d("xx"), domain, rhs=lambda x: -((2 * math.pi) ** 2) * torch.sin(2 * math.pi * x))
    return pde, [Dirichlet("boundary", lambda x: torch.sin(2 * math.pi * x))]


def test_training_goes_the_way_of_the_reference_and_returns_its_last_state():
    # sin(100x) with 400 nodes: the reference's own log has 0.2756 as the best error of its first 100 steps
    domain = Box(x=(0, 2 * math.pi))
    pde = PDE(lambda p, u, d, c: d("xx"), domain, rhs=lambda x: -1e4 * torch.sin(100 * x))
    x = torch.linspace(0, 2 * math.pi, 300, dtype=torch.float64)[:, None]
    exact, seen = torch.sin(100 * x[:, 0]), {}

    def look(step, solution):
        if step in (50, 100):
            seen[step] = float((solution().mean(x) - exact).norm() / exact.norm())

    conditions = [Dirichlet("boundary", lambda x: torch.sin(100 * x))]
    done = solve_grid(pde, conditions, None, 400, compat=True, max_iter=100, on_iteration=look)
    assert done.status == "steps" and done.report["n_iter"] == 100 and done.report["method"] == "published"
    assert seen[50] == pytest.approx(0.50, abs=0.01) and seen[100] == pytest.approx(0.262, abs=0.002)
    assert seen[100] == float((done.mean(x) - exact).norm() / exact.norm())
    assert done.trace[-1] > done.trace[0]


def test_what_the_published_training_does_not_use_is_refused():
    pde, conditions = poisson()
    with pytest.raises(ValueError, match="kernels cannot be given with compat=True"):
        solve_grid(pde, conditions, [RBF(0.5)], 16, compat=True)
    with pytest.raises(ValueError, match="at least one condition"):
        solve_grid(pde, [], None, 16, compat=True)


def test_time_ends_the_training():
    pde, conditions = poisson()
    began = time.perf_counter()
    done = solve_grid(pde, conditions, None, 24, compat=True, seconds=0.2, n_components=4)
    assert done.status == "seconds" and 0 < done.report["n_iter"] < 100_000
    assert time.perf_counter() - began < 5


def test_the_values_at_the_nodes_are_those_of_the_interpolant():
    pde, conditions = poisson()
    done = solve_grid(pde, conditions, None, 16, compat=True, max_iter=30, n_components=4)
    # the nugget is the training's, 1e-6 of nothing, which smooths a little
    found = done.mean(done.axes[0].nodes[:, None])
    torch.testing.assert_close(found, done.values, rtol=0, atol=1e-3 * float(done.values.abs().max()) + 1e-6)


def test_a_covariance_that_cannot_be_factored_ends_the_training():
    equation = GridEquation(poisson()[0], Box(x=(0, 1)).axes(12))
    published = Published(equation, poisson()[1], "gaussian")
    published.grams = lambda parameters, j, order: (
        -torch.eye(12, dtype=torch.float64) * parameters.log_weight[j].exp()[0]
    )
    done = train(published, max_iter=5)
    assert done.n_iter == 0 and "not positive definite" in done.status


def test_conditions_on_slopes_are_refused():
    pde, _ = poisson()
    for condition in (Neumann("x=0"), Robin("x=0", 1.0, 1.0)):
        with pytest.raises(ValueError, match="values alone"):
            solve_grid(pde, [condition], None, 8, compat=True, max_iter=1)
    domain = Box(x=(0, 1), t=(0, 1))
    wave = PDE(lambda p, u, d, c: d("tt") - d("xx"), domain)
    with pytest.raises(ValueError, match="values alone"):
        solve_grid(wave, [Initial(0.0, order=1)], None, 8, compat=True, max_iter=1)


def test_an_initial_value_and_a_scaled_value_are_conditions_on_values():
    domain = Box(x=(0, 1), t=(0, 1))
    pde = PDE(lambda p, u, d, c: d("t") - d("xx"), domain)
    conditions = [Initial(lambda x: x), Robin("x=1", 2.0, 0.0, lambda t: 2 + t)]
    published = Published(GridEquation(pde, domain.axes((4, 3))), conditions, "student")
    assert published.boundary.tolist() == [0, 3, 6, 9, 9, 10, 11]
    torch.testing.assert_close(published.target[-3:], torch.tensor([1.0, 1.25, 1.5], dtype=torch.float64))
