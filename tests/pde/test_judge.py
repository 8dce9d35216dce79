"""What a solution confesses: what is left open, contradictions, steps that failed, nodes that did not suffice."""

import math
import warnings

import pytest
import torch

from mercer.kernels import GaussianMixture
from mercer.pde import PDE, Box, Dirichlet, Initial, Neumann, Periodic, Sensors
from mercer.pde.basis import Features
from mercer.pde.dense import DensePosterior
from mercer.pde.features import FeaturePosterior
from mercer.pde.rows import Rows, derivative
from mercer.pde.solve import solve

D = torch.float64
LINE, PLANE = Box(x=(0, 1)), Box(x=(0, 1), t=(0, 1))
PI = math.pi


def solved(*problem, **options):
    """Return the solution and the warnings of the library that came with it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = solve(*problem, **options)
    assert [str(w.message) for w in caught if w.category is UserWarning] == found.report.warnings
    return found, " ".join(found.report.warnings)


def at(found, x):
    """Return mean and standard deviation of u at points of a line."""
    mean, variance = found.posterior.marginals(derivative(torch.as_tensor(x, dtype=D).reshape(-1, 1), (0,)))
    return mean, variance.sqrt()


LAPLACE = PDE(lambda p, u, d, c: d("xx"), LINE)
SINE = PDE(lambda p, u, d, c: d("xx"), LINE, rhs=lambda x: -((2 * PI) ** 2) * torch.sin(2 * PI * x))
RESONANT = PDE(lambda p, u, d, c: d("xx") + PI**2 * u, LINE)


@pytest.mark.parametrize("method", ["features", "dense"])
@pytest.mark.parametrize(
    ("pde", "conditions"),
    [(LAPLACE, [Neumann("boundary")]), (SINE, [Periodic("x")]), (RESONANT, [Dirichlet("boundary")])],
)
def test_what_equation_and_conditions_leave_open_is_warned_of(pde, conditions, method):
    found, said = solved(pde, conditions, n_collocation=64, method=method)
    assert found.report.left_open > 0.01 and "constant or an eigenfunction" in said
    assert at(found, 0.4)[1] > 1e-2


@pytest.mark.parametrize("method", ["features", "dense"])
@pytest.mark.parametrize("pde", [LAPLACE, SINE])
def test_what_is_determined_leaves_no_more_than_the_nugget(pde, method):
    found, said = solved(pde, [Dirichlet("boundary")], n_collocation=64, method=method)
    # rows next to each other leave a few nuggets; variances of a dense solver are differences of numbers of order one
    assert found.report.left_open < max(1e3 * found.report.nugget, 1e-13) and not said


def test_zero_data_have_a_standard_deviation_all_the_same():
    found, _ = solved(LAPLACE, [Dirichlet("boundary")], n_collocation=64)
    mean, std = at(found, [0.2, 0.7])
    assert found.report.scale == 0 and not mean.any() and (std > 0).all() and (std < 1e-8).all()


def contracted(n_rows, n_draws=200):
    """Return z² of u(0.3), variance reported, for draws of the prior whose u″ is known exactly at n points."""
    kernel = GaussianMixture(weight=[1.0], lengthscale=0.5, frequency=[[0.0]])
    features = Features([kernel], [0.5], [1.0])
    phi = features.evaluate(derivative(LINE.scattered(n_rows), (2,))).detach()
    held = derivative(torch.tensor([[0.3]], dtype=D), (0,))
    value = features.evaluate(held).detach()
    generator, squares = torch.Generator().manual_seed(0), []
    for _ in range(n_draws):
        theta = torch.randn(features.size, generator=generator, dtype=D)
        rows = [Rows(derivative(LINE.scattered(n_rows), (2,)), phi @ theta)]
        mean, variance = FeaturePosterior(features, rows, 1e-20).marginals(held)
        squares.append(float((value @ theta - mean).square() / variance))
    return torch.tensor(squares)


@pytest.mark.parametrize("n_rows", [8, 256])
def test_the_reported_variance_does_not_shrink_with_rows_that_say_nothing_new(n_rows):
    squares = contracted(n_rows)
    # z² is χ²₁ over χ²_k/k with k ≥ 8 rows or weights: its mean is k/(k − 2) < 4/3, its variance below 8
    assert abs(squares.mean() - 7 / 6) < 4 * math.sqrt(8 / len(squares))


def test_both_solvers_share_the_quadratic_form_out_among_what_rows_determine():
    kernel = GaussianMixture(weight=[1.0, 0.3], lengthscale=0.5, frequency=[[0.0], [2.0]])
    features = Features([kernel], [0.5], [1.0])
    rows = [Rows(derivative(LINE.scattered(60), (0,)), torch.sin(5 * LINE.scattered(60)[:, 0]))]
    phi = features.evaluate(rows[0].functional).detach()
    G = phi @ phi.mT
    R = 1e-6 * G.diagonal().diag()
    inverse = torch.linalg.inv(G + R)
    y = rows[0].target
    scale = float(y @ inverse @ y / (G * inverse).sum())
    assert FeaturePosterior(features, rows, 1e-6).scale == pytest.approx(scale, rel=1e-6)
    assert DensePosterior([kernel], rows, [1e-6]).scale == pytest.approx(scale, rel=1e-3)  # features are a quadrature


def test_conditions_that_contradict_each_other_are_named():
    _, said = solved(LAPLACE, [Dirichlet("x=0", 0.0), Dirichlet("x=0", 1.0), Dirichlet("x=1")], n_collocation=64)
    assert "Dirichlet('x=0') contradicts another condition" in said


def u(x):
    return torch.exp(x) * torch.sin(3 * x)


FORCED = PDE(lambda p, v, d, c: d("xx"), LINE, rhs=torch.func.vmap(torch.func.grad(torch.func.grad(u))))


def readings(n, shift, noise):
    generator = torch.Generator().manual_seed(0)
    X = torch.rand(n, 1, generator=generator, dtype=D)
    return X, u(X[:, 0]) + shift + noise * torch.randn(n, generator=generator, dtype=D)


@pytest.mark.parametrize(("shift", "noise"), [(1.0, 1e-3), (0.0, 1e-3), (0.0, None)])
def test_sensors_that_contradict_the_equation_are_warned_of(shift, noise):
    sensors = [Sensors(*readings(20, shift, 1e-3), noise)]
    found, said = solved(FORCED, [Dirichlet("boundary", u)], sensors, n_collocation=64)
    assert ("observations contradict them" in said) == bool(shift) and bool(said) == bool(shift)
    if noise is None:  # the sd of a sample's sd is 1/√(2n) of it
        assert found.report.noise == pytest.approx(1e-3, rel=4 / math.sqrt(40)) and "learned" in str(found.report)


def test_each_of_several_sensors_is_judged_by_itself():
    good, bad = Sensors(*readings(200, 0.0, 1e-3), 1e-3), Sensors(*readings(1, 1e-2, 0.0), 1e-3)
    found, said = solved(FORCED, [Dirichlet("boundary", u)], [good, bad], n_collocation=64)
    assert found.report.residual < 1e-3
    assert "1 observation(s) of u are 10 standard deviations" in said and "200 obs" not in said


def test_systems_count_the_conditions_of_all_fields_together():
    """u′ = v, v′ = f needs two conditions, both of them on u."""
    pde = PDE(
        lambda p, w, d, c: (d("x", "u") - w.v, d("x", "v")),
        LINE,
        rhs=(0.0, lambda x: torch.sin(3 * x)),
        fields=("u", "v"),
    )
    _, said = solved(pde, [Dirichlet("boundary", field="u")], n_collocation=64)
    assert not said


def test_equations_that_need_no_condition_are_not_warned_of():
    """x u′ + u = 2x has one solution that is smooth at 0."""
    pde = PDE(lambda p, v, d, c: p.x * d("x") + v, LINE, rhs=lambda x: 2 * x)
    found, said = solved(pde, [], n_collocation=64)
    assert not said and abs(at(found, 0.7)[0] - 0.7) < 1e-6
    radial = PDE(lambda p, v, d, c: d("xx") + d("x") / p.x, LINE, rhs=4.0)
    found, said = solved(radial, [Dirichlet("x=1", 1.0)], n_collocation=64)
    assert not said and abs(at(found, 0.7)[0] - 0.49) < 1e-6


def test_few_features_do_not_hide_that_a_condition_lacks():
    heat = PDE(lambda p, v, d, c: d("t") - d("xx"), PLANE)
    _, said = solved(heat, [Initial(0.0), Dirichlet("x=0")], n_collocation=12)
    assert "x (1 of 2)" in said


def test_the_tail_of_a_pulse_is_judged_by_the_pulse():
    def pulse(x):
        return torch.exp(-50 * (x - 0.5).square())

    pde = PDE(lambda p, v, d, c: d("xx"), LINE, rhs=lambda x: 100 * (100 * (x - 0.5).square() - 1) * pulse(x))
    _, said = solved(pde, [Dirichlet("boundary", pulse)], n_collocation=60, method="sylvester")
    assert not said


@pytest.mark.parametrize("method", ["grid", "sylvester"])
def test_grids_warn_of_a_free_constant(method):
    pde = PDE(lambda p, v, d, c: d("xx"), LINE, rhs=lambda x: torch.cos(PI * x))
    _, said = solved(pde, [Neumann("boundary")], n_collocation=40, method=method)
    assert "leave a constant open" in said


def test_steps_that_do_not_converge_are_warned_of():
    bratu = PDE(lambda p, v, d, c: d("xx") + 5 * torch.exp(v), LINE)  # no real solution beyond 3.51
    found, said = solved(bratu, [Dirichlet("boundary")], n_collocation=64)
    assert "Gauss–Newton ended" in said and found.report.status != "converged"
    found, said = solved(PDE(lambda p, v, d, c: d("xx") + torch.exp(v), LINE), [Dirichlet("boundary")])
    assert found.report.status == "converged" and not said


@pytest.mark.parametrize(
    ("residual", "truth"),
    [
        (lambda p, v, d, c: d("t") - torch.sqrt(v), lambda t: (1 + t / 2) ** 2),
        (lambda p, v, d, c: d("t") - 1 / v, lambda t: torch.sqrt(1 + 2 * t)),
    ],
)
def test_equations_without_a_slope_at_zero_start_from_their_conditions(residual, truth):
    found, said = solved(PDE(residual, Box(t=(0, 2))), [Initial(1.0)])
    t = torch.linspace(0, 2, 30, dtype=D)
    mean, std = at(found, t)
    assert (mean - truth(t)).abs().max() < 1e-8 and ((mean - truth(t)).abs() < 2 * std).all() and not said


def test_predator_and_prey_over_a_whole_cycle():
    pde = PDE(
        lambda p, u, d, c: (d("t", "a") - 1.5 * u.a + u.a * u.b, d("t", "b") + u.b - u.a * u.b),
        Box(t=(0, 6)),
        fields=("a", "b"),
    )
    found, said = solved(pde, [Initial(1.5, field="a"), Initial(0.7, field="b")])
    X = Box(t=(0, 6)).nodes(50)
    a, b = (found.posterior.mean(derivative(X, (0,), field)) for field in (0, 1))
    # a − log a + b − 1.5 log b is constant along the truth
    kept = a - a.log() + b - 1.5 * b.log()
    assert (kept - kept[0]).abs().max() < 1e-8 and a.max() > 2 and not said


def test_a_layer_that_the_data_do_not_show_gets_more_nodes():
    eps = 1e-3
    pde = PDE(lambda p, v, d, c: d("x") - eps * d("xx"), LINE, rhs=1.0)
    found, said = solved(pde, [Dirichlet("boundary")])
    x = torch.linspace(0, 1, 400, dtype=D)
    assert found.report.n_nodes[0] > 256 and not said
    assert (at(found, x)[0] - x + torch.exp((x - 1) / eps)).abs().max() < 1e-6
    fixed, _ = solved(pde, [Dirichlet("boundary")], n_collocation=100)
    assert fixed.report.n_nodes == (100,)


def test_the_report_has_the_nodes_of_the_solution_that_was_kept():
    rough = PDE(lambda p, v, d, c: d("xx"), LINE, rhs=lambda x: (x - 0.3).abs().sqrt())
    found, _ = solved(rough, [Dirichlet("boundary")])
    # two conditions beside the nodes, of which there may be more than rows
    assert found.report.n_rows - 2 <= found.report.n_nodes[0] == found.problem.counts[0]


def test_the_report_is_json_and_reads_well():
    found, _ = solved(LAPLACE, [Dirichlet("boundary")], n_collocation=20, method="sylvester")
    values = found.report.to_dict()
    assert values["scale"] is None and values["points_per_wavelength"] is None and values["method"] == "sylvester"
    assert "nan" not in str(found.report) and "inf" not in str(found.report)
