"""Separable equations on a grid: the dense interior system, known solutions, and points off the nodes."""

import math

import pytest
import torch

from mercer.kernels import GaussianMixture, Linear, StudentMixture, derivative_gram
from mercer.linalg.cholesky import NotPositiveDefiniteError
from mercer.pde.axes import Axis, Interpolant
from mercer.pde.conditions import Dirichlet, Initial, Neumann, Periodic, Robin
from mercer.pde.domain import Box
from mercer.pde.sides import Elimination, Side, condition_sides
from mercer.pde.sylvester import apply, averaged, differentiate, separate, solve_sylvester


def points(a, b, n):
    return torch.linspace(a, b, n, dtype=torch.float64)


def axes_of(domain, shape, *, spectrum=StudentMixture, frequency=(0.0, 1.0), ell=1.0, nugget=1e-12):
    kernel = spectrum(weight=[1.0] * len(frequency), lengthscale=ell, frequency=list(frequency))
    return [Axis(x, kernel, nugget) for x in domain.axes(shape)]


def mesh(axes):
    return torch.meshgrid(*(axis.nodes for axis in axes), indexing="ij")


def constant(axes, **orders):
    shape = [len(axis) for axis in axes]
    return {index: torch.full(shape, value, dtype=torch.float64) for index, value in orders.items()}


def relative(value, expected):
    return float((value - expected).norm() / expected.norm())


def laplace(axes, extra=0.0):
    shape, d = [len(axis) for axis in axes], len(axes)
    found = {tuple(2 * int(k == j) for k in range(d)): torch.ones(shape, dtype=torch.float64) for j in range(d)}
    return found | ({(0,) * d: torch.full(shape, extra, dtype=torch.float64)} if extra else {})


def everywhere(domain, axes, u):
    """Dirichlet sides from the values of a solution at all nodes."""
    sides = []
    for j, axis in enumerate(axes):
        for node in (0, len(axis) - 1):
            sides.append(Side(j, node, axis.derivative(0)[node], u.narrow(j, node, 1)))
    return sides


@pytest.mark.parametrize("shape", [(7, 6), (4, 3, 5)])
def test_the_solution_is_that_of_the_dense_system_of_the_interior(shape):
    domain = Box(**{name: (0.0, 1.0 + j) for j, name in enumerate("xyz"[: len(shape)])})
    axes = axes_of(domain, shape, nugget=1e-6)
    generator = torch.Generator().manual_seed(0)
    u, rhs = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    coefficients = laplace(axes, -1.5)
    found = solve_sylvester(axes, coefficients, rhs, everywhere(domain, axes, u)).value
    # the same system, written out over all nodes: an equation per inner node, a value per node at a side
    n = math.prod(shape)
    system = -1.5 * torch.eye(n, dtype=torch.float64)
    for j, axis in enumerate(axes):
        factors = [axis.derivative(2) if k == j else torch.eye(m, dtype=torch.float64) for k, m in enumerate(shape)]
        dense = factors[0]
        for factor in factors[1:]:
            dense = torch.kron(dense, factor)
        system = system + dense
    inner = torch.ones(shape, dtype=torch.bool)
    for j, m in enumerate(shape):
        inner &= (torch.arange(m) % (m - 1) != 0).reshape([-1 if k == j else 1 for k in range(len(shape))])
    inner = inner.reshape(-1)
    A = system[inner][:, inner]
    b = rhs.reshape(-1)[inner] - system[inner][:, ~inner] @ u.reshape(-1)[~inner]
    expected = u.reshape(-1).clone()
    expected[inner] = torch.linalg.solve(A, b)
    torch.testing.assert_close(found.reshape(-1), expected, rtol=0, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize(("spectrum", "bound"), [(GaussianMixture, 1e-6), (StudentMixture, 1e-4)])
def test_fast_waves_in_two_dimensions_off_the_grid(spectrum, bound):
    end = 2 * math.pi
    domain = Box(x=(0, end), y=(0, end))
    axes = axes_of(domain, (80, 80), spectrum=spectrum, frequency=(0.0, 20 / end), ell=end / (math.sqrt(8)))
    X, Y = mesh(axes)
    u = torch.sin(20 * X) * torch.sin(20 * Y)
    done = solve_sylvester(axes, laplace(axes), -800 * u, everywhere(domain, axes, u))
    assert done.status == "ok" and done.stats["residual"] < 1e-10
    assert relative(done.value, u) < bound
    new = points(0, end, 61)
    expected = torch.outer(torch.sin(20 * new), torch.sin(20 * new))
    assert relative(done.stats["interpolant"].on([new, new], (0, 0)), expected) < bound


def test_the_nugget_of_predictions_is_one_that_noisy_values_can_bear():
    axes = axes_of(Box(x=(0, 1), y=(0, 1)), (40, 30), spectrum=GaussianMixture, frequency=[0.0, 3.0], ell=0.5)
    X, Y = mesh(axes)
    u = torch.sin(6 * math.pi * X) * torch.cos(2 * Y)
    noise = 1e-4 * torch.randn(u.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    clean, noisy = Interpolant(axes, u), Interpolant(axes, u + noise)
    assert max(clean.nuggets) < 1e-8 < min(noisy.nuggets)
    new = points(0, 1, 47)
    expected = torch.outer(torch.sin(6 * math.pi * new), torch.cos(2 * new))
    assert relative(clean.on([new, new], (0, 0)), expected) < 1e-7
    assert relative(noisy.on([new, new], (0, 0)), expected) < 2e-4
    # second derivatives magnify what noise there is, but not by the inverse of a nugget
    assert relative(noisy.on([new, new], (2, 0)), -((6 * math.pi) ** 2) * expected) < 5e-3


def test_scattered_points_and_products_of_points_agree():
    axes = axes_of(Box(x=(0, 1), y=(0, 2), z=(0, 1)), (9, 7, 5))
    X, Y, Z = mesh(axes)
    interpolant = Interpolant(axes, torch.sin(3 * X) * Y + Z**2)
    new = [points(0, 1, 6), points(0, 2, 3), points(0.1, 0.7, 4)]
    index = (1, 0, 2)
    scattered = interpolant.at(torch.cartesian_prod(*new), index, chunk=11)
    torch.testing.assert_close(scattered, interpolant.on(new, index).reshape(-1), rtol=0, atol=1e-11)
    assert len(interpolant.at(torch.zeros(0, 3, dtype=torch.float64), index)) == 0


def test_derivatives_at_the_nodes_are_those_of_the_interpolant():
    axes = axes_of(Box(x=(0, 1), y=(0, 2)), (20, 30), spectrum=GaussianMixture)
    X, Y = mesh(axes)
    u = torch.sin(3 * X) * torch.cos(2 * Y)
    assert relative(differentiate(axes, u, (1, 1)), -6 * torch.cos(3 * X) * torch.sin(2 * Y)) < 1e-4
    D1, D2 = axes[0].derivative(1), axes[1].derivative(1)
    torch.testing.assert_close(differentiate(axes, u, (1, 1)), D1 @ u @ D2.mT)


CASES = {
    "dirichlet": [Dirichlet("x=0", lambda t: torch.exp(-t)), Dirichlet("x=1", lambda t: math.cos(2.0) * torch.exp(-t))],
    "neumann": [Neumann("x=0", 0.0), Neumann("x=1", lambda t: -2 * math.sin(2.0) * torch.exp(-t))],
    "robin": [
        Robin("x=0", 1.0, 2.0, lambda t: torch.exp(-t)),
        Robin("x=1", 2.0, 1.0, lambda t: (2 * math.cos(2.0) - 2 * math.sin(2.0)) * torch.exp(-t)),
    ],
}


@pytest.mark.parametrize("name", CASES)
def test_heat_with_any_condition_at_the_ends(name):
    # u = cos(2x) e^-t solves u_t − u_xx = 3u; its source is written as the right-hand side
    domain = Box(x=(0, 1), t=(0, 1))
    axes = axes_of(domain, (24, 20), spectrum=GaussianMixture, frequency=[0.0], ell=0.7)
    X, T = mesh(axes)
    u = torch.cos(2 * X) * torch.exp(-T)
    one = torch.ones_like(u)
    conditions = [*CASES[name], Initial(lambda x: torch.cos(2 * x))]
    sides = [side for condition in conditions for side in condition_sides(condition, domain, axes)]
    done = solve_sylvester(axes, {(0, 1): one, (2, 0): -one}, 3 * u, sides)
    assert relative(done.value, u) < 1e-3


def test_a_wave_from_its_value_and_velocity_over_a_period():
    domain = Box(x=(0, 1), t=(0, 0.5))
    axes = axes_of(domain, (30, 24), spectrum=GaussianMixture, frequency=[0.0, 1.0], ell=0.6)
    X, T = mesh(axes)
    u = torch.sin(2 * math.pi * (X - T))
    one = torch.ones_like(u)
    conditions = [
        Periodic("x"),
        Initial(lambda x: torch.sin(2 * math.pi * x)),
        Initial(lambda x: -2 * math.pi * torch.cos(2 * math.pi * x), order=1),
    ]
    sides = [side for condition in conditions for side in condition_sides(condition, domain, axes)]
    assert relative(solve_sylvester(axes, {(0, 2): one, (2, 0): -one}, 0 * one, sides).value, u) < 1e-4


def test_the_boundary_of_a_box_in_one_condition():
    domain = Box(x=(0, 1), y=(0, 2))
    axes = axes_of(domain, (8, 6))
    sides = condition_sides(Dirichlet("boundary", lambda x, y: x + 10 * y), domain, axes)
    X, Y = mesh(axes)
    u = X + 10 * Y
    assert [(side.axis, side.node) for side in sides] == [(0, 0), (0, 7), (1, 0), (1, 5)]
    for side in sides:
        torch.testing.assert_close(side.target, u.narrow(side.axis, side.node, 1))
    whole = Elimination(u.shape, sides)
    torch.testing.assert_close(whole.extend(whole.restrict(u)), u)


@pytest.mark.parametrize("nodes", [(0,), (0, 5), (0, 1, 5)])
def test_values_at_the_sides_fulfil_their_conditions(nodes):
    generator = torch.Generator().manual_seed(len(nodes))
    shape = (6, 4)
    sides = [
        Side(0, node, torch.randn(6, generator=generator).double(), torch.randn(1, 4, generator=generator).double())
        for node in nodes
    ]
    elimination = Elimination(shape, sides)
    inside = torch.randn(6 - len(nodes), 4, generator=generator).double()
    U = elimination.extend(inside)
    torch.testing.assert_close(elimination.restrict(U), inside)
    for side in sides:
        torch.testing.assert_close(side.row @ U, side.target[0])
    free = elimination.extend(inside, homogeneous=True)
    T = torch.randn(6, 6, generator=generator).double()
    torch.testing.assert_close(elimination.reduce(T, 0) @ inside, (T @ free)[elimination.inner[0]])


def test_what_separates_and_what_does_not():
    axes = axes_of(Box(x=(0, 1), y=(0, 1)), (5, 4))
    X, Y = mesh(axes)
    one = torch.ones_like(X)
    assert [sorted(part) for part in separate({(2, 0): one, (0, 1): one, (0, 0): one})] == [[0, 2], [1]]
    parts = separate({(2, 0): 1 + X, (0, 2): Y, (0, 0): Y})
    assert [sorted(part) for part in parts] == [[2], [0, 2]]
    torch.testing.assert_close(parts[0][2], 1 + X[:, 0])
    for mixed in ({(1, 1): one}, {(2, 0): Y}, {(2, 0): one, (0, 0): X * Y}):
        assert separate(mixed) is None
        with pytest.raises(ValueError, match="not a sum"):
            solve_sylvester(axes, mixed, one, everywhere(None, axes, one))
    near = averaged({(2, 0): 1 + Y, (1, 1): one, (0, 0): X * Y})
    torch.testing.assert_close(near[0][2], torch.full((5,), 1.5, dtype=torch.float64))
    assert sorted(near[0]) == [0, 2] and not near[1]


def test_coefficients_that_vary_along_their_axis():
    domain = Box(x=(0, 1), y=(0, 1))
    axes = axes_of(domain, (25, 25), spectrum=GaussianMixture, frequency=[0.0], ell=0.5)
    X, Y = mesh(axes)
    u = torch.sin(2 * X) * torch.cos(Y)
    coefficients = {(2, 0): 1 + X, (0, 1): torch.exp(Y), (0, 2): torch.ones_like(X)}
    rhs = -4 * (1 + X) * u - torch.exp(Y) * torch.sin(2 * X) * torch.sin(Y) - u
    assert relative(apply(axes, coefficients, u), rhs) < 1e-3
    assert relative(solve_sylvester(axes, coefficients, rhs, everywhere(domain, axes, u)).value, u) < 1e-6


def test_conditions_that_do_not_determine_the_ends_are_refused():
    axes = axes_of(Box(x=(0, 1)), (6,))
    row = axes[0].derivative(0)[0]
    target = torch.zeros(1, dtype=torch.float64)
    with pytest.raises(ValueError, match="same node"):
        Elimination((6,), [Side(0, 0, row, target), Side(0, 0, row, target)])
    with pytest.raises(ValueError, match="at least one condition"):
        Elimination((6,), [])
    with pytest.raises(ValueError, match="do not determine"):
        Elimination((6,), [Side(0, 0, row, target), Side(0, 5, row, target)])
    with pytest.raises(TypeError, match="cannot use the condition int"):
        condition_sides(3, None, axes)


@pytest.mark.parametrize(
    "condition",
    [
        Neumann("x=0", -3.0),
        Neumann("x=1", 3 * math.cos(3.0)),
        Robin("x=1", 1.0, 2.0, math.sin(3.0) + 6 * math.cos(3.0)),
    ],
)
def test_slopes_are_outward_on_both_faces(condition):
    domain = Box(x=(0, 1))
    axes = axes_of(domain, (16,), spectrum=GaussianMixture, frequency=[0.0], ell=0.5)
    u = torch.sin(3 * axes[0].nodes)
    other = Dirichlet("x=1", math.sin(3.0)) if condition.where == "x=0" else Dirichlet("x=0", 0.0)
    sides = [side for each in (condition, other) for side in condition_sides(each, domain, axes)]
    found = solve_sylvester(axes, laplace(axes), -9 * u, sides).value
    torch.testing.assert_close(found, u, rtol=0, atol=1e-3)


@pytest.mark.parametrize("n", [12, 40])
def test_slopes_on_all_sides_leave_a_constant_open(n):
    domain = Box(x=(0, 1), y=(0, 1))
    axes = axes_of(domain, (n, n))
    X, _ = mesh(axes)
    slopes = condition_sides(Neumann("boundary"), domain, axes)
    rhs = torch.cos(math.pi * X)
    assert solve_sylvester(axes, laplace(axes), rhs, slopes).status == "nearly singular"
    assert solve_sylvester(axes, laplace(axes, -1.0), rhs, slopes).status == "ok"
    periods = [side for name in "xy" for side in condition_sides(Periodic(name), domain, axes)]
    assert solve_sylvester(axes, laplace(axes), rhs, periods).status == "nearly singular"


def test_an_eigenvalue_that_is_lost_in_the_nugget_is_confessed():
    axes = axes_of(Box(x=(0, 1)), (12,))
    sides = everywhere(None, axes, torch.zeros(12).double())
    inner = Elimination((12,), sides).reduce(axes[0].derivative(2), 0)
    lowest = torch.linalg.eigvals(inner).abs().min()
    rhs = torch.ones(12).double()
    for shift, status in ((lowest, "nearly singular"), (0.9 * lowest, "ok")):
        coefficients = {(2,): torch.ones(12).double(), (0,): shift * torch.ones(12).double()}
        assert solve_sylvester(axes, coefficients, rhs, sides).status == status


@pytest.mark.parametrize("values", [lambda x: (x - 0.4).abs(), lambda x: x.sqrt()])
def test_the_nugget_of_predictions_is_that_of_leaving_inner_nodes_out(values):
    axis = axes_of(Box(x=(0, 1)), (14,), spectrum=GaussianMixture, frequency=[0.0], ell=0.2)[0]
    u, K = values(axis.nodes), axis.gram(0).detach()
    ladder = [10.0**-k for k in range(2, 15)]
    losses = []
    for nugget in ladder:
        loss = 0.0
        for i in range(1, 13):  # the ends would be extrapolated
            kept = [k for k in range(14) if k != i]
            C = K[kept][:, kept] + nugget * axis.scale * torch.eye(13).double()
            loss += float(u[i] - K[i, kept] @ torch.linalg.solve(C, u[kept])) ** 2
        losses.append(loss)
    expected = next(nugget for nugget, loss in zip(ladder, losses, strict=True) if loss <= 1.5 * min(losses))
    assert Interpolant([axis], u).nuggets == pytest.approx([expected])


def test_an_axis_refuses_what_it_cannot_do():
    with pytest.raises(TypeError, match="float64"):
        Axis(torch.linspace(0, 1, 5), StudentMixture(frequency=[0.0]))
    with pytest.raises(ValueError, match="up to order 4"):
        Axis(points(0, 1, 5), StudentMixture(weight=[1.0], lengthscale=1.0, frequency=[1.0])).derivative(5)


def test_uneven_nodes_and_kernels_that_are_not_stationary_are_evaluated_in_full():
    kernel = StudentMixture(weight=[1.0, 0.5], lengthscale=[1.0, 0.3], frequency=[0.0, 2.0])
    even = Axis(points(0, 1, 9), kernel)
    torch.testing.assert_close(even.gram(1), even.cross(even.nodes, 1), rtol=0, atol=1e-12)
    torch.testing.assert_close(even.gram(2), even.cross(even.nodes, 2), rtol=0, atol=1e-11)
    uneven = Axis(points(0, 1, 9) ** 2, kernel)
    torch.testing.assert_close(uneven.gram(1), uneven.cross(uneven.nodes, 1), rtol=0, atol=1e-12)
    line = Axis(points(0, 1, 4), Linear(variance=1.0) + kernel)
    torch.testing.assert_close(line.gram(0), line.cross(line.nodes, 0))


def test_the_nugget_is_raised_until_the_axis_can_be_factored():
    smooth = GaussianMixture(weight=[1.0], lengthscale=3.0, frequency=[0.0])
    assert Axis(points(0, 1, 60), smooth, 1e-18).nugget > 1e-18
    with pytest.raises(NotPositiveDefiniteError, match=r"along axis 2 .* 60 nodes"):
        Axis(points(0, 1, 60), smooth, 1e-30, number=2)


@pytest.mark.parametrize(("shape", "index"), [((7, 6), (2, 0)), ((7, 6), (1, 1)), ((4, 3, 5), (0, 1, 2))])
def test_derivatives_and_predictions_are_those_of_the_dense_covariance(shape, index):
    domain = Box(**{name: (0.0, 1.0) for name in "xyz"[: len(shape)]})
    axes, nugget = axes_of(domain, shape, ell=0.4, nugget=1e-6), 1e-3
    u = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    X, new = domain.nodes(shape), domain.scattered(11)
    kernels = [axis.kernel for axis in axes]

    def dense(left, right, orders):
        """Covariance of ∂^orders at the rows of one with values at those of the other, pair by pair."""
        value = 1.0
        for j, order in enumerate(orders):
            value = (
                value * derivative_gram(kernels[j], left[:, j : j + 1], right[:, j : j + 1], (order,), (0,)).detach()
            )
        return value

    def whole(matrices):
        found = matrices[0]
        for matrix in matrices[1:]:
            found = torch.kron(found, matrix)
        return found

    # predictions have a nugget of their own in every factor
    C = whole([axis.gram(0).detach() + nugget * axis.scale * torch.eye(len(axis)).double() for axis in axes])
    expected = dense(new, X, index) @ torch.linalg.solve(C, u.reshape(-1))
    interpolant = Interpolant(axes, u, [nugget] * len(axes))
    assert interpolant.nuggets == pytest.approx([nugget] * len(axes))
    torch.testing.assert_close(interpolant.at(new, index), expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
    # at the nodes: the short form, derivatives of the interpolant along their own axes alone
    eye = [torch.eye(n, dtype=torch.float64) for n in shape]
    factors = [axis.gram(0).detach() + 1e-6 * axis.scale * e for axis, e in zip(axes, eye, strict=True)]
    short = [
        axis.gram(order).detach() @ torch.linalg.inv(factor) if order else e
        for axis, factor, order, e in zip(axes, factors, index, eye, strict=True)
    ]
    expected = (whole(short) @ u.reshape(-1)).reshape(shape)
    torch.testing.assert_close(
        differentiate(axes, u, index), expected, rtol=0, atol=1e-10 * float(expected.abs().max())
    )


def test_three_dimensions():
    domain = Box(x=(0, 1), y=(0, 1), z=(0, 1))
    axes = axes_of(domain, (16, 14, 15), spectrum=GaussianMixture, frequency=[0.0, 1.0], ell=0.5)
    X, Y, Z = mesh(axes)
    u = torch.sin(5 * X) * torch.cos(4 * Y) * torch.exp(Z)
    done = solve_sylvester(axes, laplace(axes, 2.0), -38 * u, everywhere(domain, axes, u))
    assert done.stats["residual"] < 1e-10 and relative(done.value, u) < 1e-5
    new = domain.scattered(30)
    expected = torch.sin(5 * new[:, 0]) * torch.cos(4 * new[:, 1]) * torch.exp(new[:, 2])
    assert relative(done.stats["interpolant"].at(new, (0, 0, 0)), expected) < 1e-5
