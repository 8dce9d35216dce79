"""Domains, conditions and equations as data: points, dry runs, linearity, linearisations, refusals."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mercer.pde import PDE, Box, Dirichlet, Initial, Neumann, NormalDerivative, Periodic, Positive, Real, Robin
from mercer.pde.equation import LinearisationError
from mercer.pde.rows import derivative
from mercer.pde.solve import solve

D = torch.float64
LINE = Box(x=(0, 1))
PLANE = Box(x=(-1, 1), t=(0, 2))
FAR = Box(x=(1e9, 1e9 + 1))


def zeros(pde, X):
    return [torch.zeros(len(X), dtype=D) for _ in pde.requests]


# ---------------------------------------------------------------------------------------------------------- domains


def test_nodes_include_the_ends_and_midpoints_none_of_them():
    X = PLANE.nodes((3, 5))
    assert X.shape == (15, 2)
    assert X.amin(0).tolist() == [-1, 0] and X.amax(0).tolist() == [1, 2]
    middle = PLANE.midpoints((3, 5))
    assert middle.shape == (8, 2)
    assert torch.cdist(middle, X).min() > 0.2
    assert not PLANE.outside(X).any() and PLANE.outside(X + 1e-3).any()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(20, 400))
def test_scattered_points_fill_the_box_evenly(d, n):
    box = Box(**{name: (0, 1) for name in "xyz"[:d]})
    X = box.scattered(n)
    assert X.shape == (n, d) and not box.outside(X).any()
    # every half of the box along each axis gets its half of the points
    assert ((X < 0.5).double().mean(0) - 0.5).abs().max() < 4 / math.sqrt(n)
    assert torch.cdist(X, box.scattered(n, 0.123)).min() > 0


def test_faces_are_found_by_their_equation():
    assert PLANE.face("x=-1") == (0, False) and PLANE.face("t = 2") == (1, True)
    X = PLANE.on_face(1, False, 7, most=100)
    assert X.shape == (7, 2) and (X[:, 1] == 0).all()
    assert torch.equal(X[:, 0], torch.linspace(-1, 1, 7, dtype=D))
    few = PLANE.on_face(0, True, 1000, most=20)
    assert few.shape == (20, 2) and {0.0, 2.0} <= set(few[:, 1].tolist())


def test_faces_far_from_the_origin_are_told_apart():
    assert FAR.face("x=1000000001.0") == (0, True) and FAR.face("x=1e9") == (0, False)
    short = Box(x=(1e6, 1e6 + 1e-4))
    assert short.face(f"x={short.upper[0]!r}") == (0, True) and short.face("x=1000000") == (0, False)
    assert repr(FAR) == "Box(x=(1e+09, 1000000001.0))" and repr(LINE) == "Box(x=(0, 1))"


@pytest.mark.parametrize("n", [20, np.int64(20), [20, 20], np.array([20, 20])])
def test_counts_are_any_integers(n):
    assert PLANE.counts(n) == (20, 20)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Box(), "one to three axes"),
        (lambda: Box(a=(0, 1), b=(0, 1), c=(0, 1), e=(0, 1)), "one to three axes"),
        (lambda: Box(xy=(0, 1)), "one letter"),
        (lambda: Box(x=(1, 0)), "lower to an upper"),
        (lambda: PLANE.face("x=0.5"), "not a face"),
        (lambda: PLANE.face("z=0"), "axes x, t"),
        (lambda: PLANE.face("x"), "one of its ends"),
        (lambda: FAR.face("x=1000000000.5"), r"ends at 1e\+09 and 1000000001\.0"),
        (lambda: PLANE.nodes(1), "at least 2"),
        (lambda: PLANE.counts(20.0), "n_collocation must be an integer"),
        (lambda: PLANE.counts((20, 20.5)), "n_collocation must be an integer"),
        (lambda: PLANE.order("xz"), "axes x, t"),
    ],
)
def test_boxes_refuse_what_is_not_there(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------------------------------------------- conditions


def applied(L, u):
    """Apply a functional to a function given with its derivatives, {index: callable of X}."""
    return sum(term.coefficient * u[term.index](term.X) for term in L)


SMOOTH = {
    (0, 0): lambda X: torch.sin(X[:, 0]) * torch.exp(X[:, 1]),
    (1, 0): lambda X: torch.cos(X[:, 0]) * torch.exp(X[:, 1]),
    (0, 1): lambda X: torch.sin(X[:, 0]) * torch.exp(X[:, 1]),
    (2, 0): lambda X: -torch.sin(X[:, 0]) * torch.exp(X[:, 1]),
    (3, 0): lambda X: -torch.cos(X[:, 0]) * torch.exp(X[:, 1]),
}


@pytest.mark.parametrize(
    "condition",
    [
        Dirichlet("x=1", lambda t: math.sin(1) * torch.exp(t)),
        Dirichlet("boundary", lambda x, t: torch.sin(x) * torch.exp(t)),
        Neumann("x=-1", lambda t: -math.cos(1) * torch.exp(t)),
        Neumann("t=0", lambda x: -torch.sin(x)),
        Robin("x=1", 2.0, -1.0, lambda t: (2 * math.sin(1) - math.cos(1)) * torch.exp(t)),
        NormalDerivative("x=-1", 2, lambda t: math.sin(1) * torch.exp(t)),
        NormalDerivative("x=-1", 3, lambda t: math.cos(1) * torch.exp(t)),
        NormalDerivative("boundary", 3, lambda x, t: -x.sign() * torch.cos(x) * torch.exp(t)),
        Initial(lambda x: torch.sin(x)),
        Initial(lambda x: torch.sin(x), order=1),
    ],
)
def test_conditions_hold_for_the_function_they_were_made_of(condition):
    L, target = condition.rows(PLANE, 6)
    torch.testing.assert_close(applied(L, SMOOTH), target, rtol=0, atol=1e-14)


def test_boundary_leaves_time_alone():
    L, _ = Dirichlet("boundary", 0.0).rows(PLANE, 5)
    assert set(L[0].X[:, 0].tolist()) == {-1.0, 1.0}


def test_periodic_compares_both_ends_and_their_slopes():
    wave = {
        (0, 0): lambda X: torch.sin(math.pi * X[:, 0]) + X[:, 1],
        (1, 0): lambda X: math.pi * torch.cos(math.pi * X[:, 0]),
    }
    L, target = Periodic("x").rows(PLANE, 4)
    assert len(target) == 8 and not target.any()
    assert applied(L, wave).abs().max() < 1e-14
    tilted = dict(wave) | {(1, 0): lambda X: X[:, 0]}
    assert applied(L, tilted)[4:].tolist() == [2.0] * 4


@pytest.mark.parametrize(
    ("condition", "error", "message"),
    [
        (Dirichlet("x=1", lambda t: t.float()), TypeError, "float64 only"),
        (Dirichlet("x=1", lambda t: t[:2]), ValueError, "one number per point"),
        (Dirichlet("x=1", lambda t: t / 0), ValueError, "not finite"),
        (Dirichlet("x=1", 0.0, field="v"), ValueError, "fields u"),
        (Robin("x=1", 0.0, 0.0), ValueError, "not zero"),
        (Initial(0.0, time="y"), ValueError, "axes x, t"),
        (Dirichlet("x=1", lambda x, t: t), TypeError, r"Dirichlet\('x=1'\) is a function of t; .* \(x, t\)"),
        (Initial(lambda: 1.0), TypeError, "Initial is a function of x"),
        (Dirichlet("x=1", lambda t: None), TypeError, "one number per point, got NoneType"),
        (Dirichlet("x=1", lambda t: 1j * t), TypeError, "complex"),
        (Dirichlet("x=1", "0"), TypeError, "a number or a function, got str"),
        (Dirichlet("x=1", torch.zeros(3)), ValueError, r"one number or a function of t, got shape \(3,\)"),
        (Dirichlet("x=1", math.nan), ValueError, "not finite"),
    ],
)
def test_conditions_refuse_what_makes_no_row(condition, error, message):
    with pytest.raises(error, match=message):
        condition.rows(PLANE, 5)


def test_orders_that_are_none_are_refused():
    for make in (lambda: Initial(0.0, order=-1), lambda: Periodic("x", order=0), lambda: NormalDerivative("x=1", 1)):
        with pytest.raises(ValueError, match=r"order of .* must be an integer of at least"):
            make()


def test_a_box_of_time_alone_has_no_boundary():
    with pytest.raises(ValueError, match="use Initial"):
        Dirichlet("boundary").rows(Box(t=(0, 1)), 5)
    with pytest.raises(TypeError, match="of no coordinate, so that a number"):
        Dirichlet("x=0", lambda x: x).rows(LINE, 5)


def test_numbers_that_functions_return_keep_their_digits():
    assert Dirichlet("x=1", lambda t: 0.1).rows(PLANE, 3)[1].tolist() == [0.1] * 3
    assert Dirichlet("x=1", torch.full((1,), 0.1, dtype=D)).rows(PLANE, 3)[1].tolist() == [0.1] * 3


def test_a_beam_on_two_supports():
    """u⁗ = f with u = u″ = 0 at both ends; the third derivative is odd, so that its sign at a lower end counts."""
    u = lambda x: torch.sin(2 * math.pi * x) + 0.2 * torch.sin(7 * math.pi * x)  # noqa: E731
    force = lambda x: math.pi**4 * (16 * torch.sin(2 * math.pi * x) + 480.2 * torch.sin(7 * math.pi * x))  # noqa: E731
    pde = PDE(lambda p, v, d, c: d("xxxx"), LINE, rhs=force)
    shear = math.pi**3 * (8 + 0.2 * 343)  # −u‴(0)
    for moments in ([NormalDerivative("boundary", 2)], [NormalDerivative("x=1", 2), NormalDerivative("x=0", 3, shear)]):
        conditions = [Dirichlet("boundary"), *moments]
        assert sum(condition.per_axis(LINE)[0] for condition in conditions) == 4
        solved = solve(pde, conditions, n_collocation=60)
        X = LINE.nodes(100)
        assert float((solved.posterior.mean(derivative(X, (0,))) - u(X[:, 0])).abs().max()) < 1e-7


def test_a_grid_refuses_normal_derivatives_of_higher_order():
    pde = PDE(lambda p, u, d, c: d("xxxx"), LINE, rhs=1.0)
    conditions = [Dirichlet("boundary"), NormalDerivative("boundary", 2)]
    for method in ("grid", "sylvester"):
        with pytest.raises((TypeError, ValueError), match="NormalDerivative"):
            solve(pde, conditions, method=method, n_collocation=20)


# -------------------------------------------------------------------------------------------------------- equations


@pytest.mark.parametrize(
    ("residual", "linear", "requests"),
    [
        (lambda p, u, d, c: d("xx"), True, {(0, (2, 0))}),
        (lambda p, u, d, c: d("t") + p.x * d("xx") - 3, True, {(0, (0, 1)), (0, (2, 0))}),
        (lambda p, u, d, c: d("t") + u * d("x"), False, {(0, (0, 1)), (0, (0, 0)), (0, (1, 0))}),
        (lambda p, u, d, c: d("tx") + u, True, {(0, (1, 1)), (0, (0, 0))}),
        (lambda p, u, d, c: d("xx") + 1e-6 * torch.sin(u), False, {(0, (2, 0)), (0, (0, 0))}),
        (lambda p, u, d, c: d("t") - u * (1 - u / 1e12), False, {(0, (0, 1)), (0, (0, 0))}),
        (lambda p, u, d, c: d("xx") + u**3 / 1e16, False, {(0, (2, 0)), (0, (0, 0))}),
        (lambda p, u, d, c: d("xx") + u**3 * 1e12, False, {(0, (2, 0)), (0, (0, 0))}),
        # constants that cancel, and coefficients far from one, cost digits but not linearity
        (lambda p, u, d, c: d("t") - 3e4 * ((u - 300) + 299 + p.x), True, {(0, (0, 1)), (0, (0, 0))}),
        (lambda p, u, d, c: 1e9 * d("xx") + torch.exp(20 * p.t) * (u - 3e6), True, {(0, (2, 0)), (0, (0, 0))}),
    ],
)
def test_dry_run_and_probe(residual, linear, requests):
    pde = PDE(residual, PLANE)
    assert pde.linear is linear and set(pde.requests) == requests


@settings(max_examples=20, deadline=None)
@given(st.floats(-3, 3), st.floats(-3, 3), st.integers(0, 1000))
def test_linearisation_is_the_tangent(a, b, seed):
    """J u₀ − target = N[u₀] − f, and J is the derivative along any direction."""
    pde = PDE(lambda p, u, d, c: d("xx") * u + a * torch.sin(u) + b * p.x, LINE, rhs=lambda x: x**2)
    X = LINE.scattered(5)
    generator = torch.Generator().manual_seed(seed)
    values, direction = ([torch.randn(5, generator=generator, dtype=D) for _ in pde.requests] for _ in range(2))
    ((L, target),) = pde.linearise(X, values)
    given_values = dict(zip(pde.requests, values, strict=True))
    at = sum(term.coefficient * given_values[(term.field, term.index)] for term in L)
    expected = pde.evaluate(X, values)[0] - pde.target(X)[0]
    torch.testing.assert_close(at - target, expected, rtol=1e-12, atol=1e-12)
    h = 1e-6
    up, down = (pde.evaluate(X, [v + s * h * e for v, e in zip(values, direction, strict=True)])[0] for s in (1, -1))
    J, _ = pde.jacobian(X, values)
    slope = sum(j[0] * e for j, e in zip(J, direction, strict=True))
    torch.testing.assert_close((up - down) / (2 * h), slope, rtol=1e-6, atol=1e-7)


def test_gradients_reach_coefficients():
    pde = PDE(lambda p, u, d, c: d("xx") + c.kappa * u, LINE, unknowns={"kappa": Positive(20.0)})
    assert pde.linear and float(pde.initial_coefficients()["kappa"]) == 20
    kappa = torch.tensor(3.0, dtype=D, requires_grad=True)
    ((L, _),) = pde.linearise(LINE.scattered(4), zeros(pde, LINE.scattered(4)), {"kappa": kappa})
    total = sum(term.coefficient.sum() for term in L if term.index == (0,))
    assert float(torch.autograd.grad(total, kappa)[0]) == 4.0


def test_systems_have_one_functional_per_equation():
    pde = PDE(lambda p, u, d, c: (d("x", "u") - u.v, d("x", "v") + u["u"]), LINE, rhs=(0.0, 1.0), fields=("u", "v"))
    assert pde.linear and pde.n_equations == 2
    first, second = pde.linearise(LINE.scattered(3), zeros(pde, LINE.scattered(3)))
    assert {(t.field, t.index) for t in first[0]} == {(0, (1,)), (1, (0,))}
    assert {(t.field, t.index) for t in second[0]} == {(1, (1,)), (0, (0,))}
    assert first[1].tolist() == [0, 0, 0] and second[1].tolist() == [1, 1, 1]


def test_symbol_of_the_wave_operator_vanishes_on_its_waves():
    pde = PDE(lambda p, u, d, c: d("tt") - 4 * d("xx"), PLANE)
    J, _ = pde.jacobian(PLANE.scattered(4), zeros(pde, PLANE.scattered(4)))
    on, off = pde.symbol(torch.tensor([[1.5, 3.0], [1.5, 2.0]], dtype=D), J)
    assert on.abs() < 1e-9 and off.abs() > 100


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PDE(lambda p, u, d, c: p.x, LINE), ValueError, "does not use the unknown"),
        (lambda: PDE(lambda p, u, d, c: d("y"), LINE), ValueError, "axes x"),
        (lambda: PDE(lambda p, u, d, c: d("xx").float(), LINE), TypeError, "float64 only"),
        (lambda: PDE(lambda p, u, d, c: 3.0, LINE), ValueError, "must return a tensor"),
        (lambda: PDE(lambda p, u, d, c: u * c.beta, LINE), AttributeError, "no 'beta'"),
        (lambda: PDE(lambda p, u, d, c: p.y * u, LINE), AttributeError, "no 'y'"),
        (lambda: PDE(lambda p, u, d, c: u, LINE, rhs=(0.0, 1.0)), ValueError, "1 equation"),
        (lambda: PDE(lambda p, u, d, c: d("x") + u.v, LINE, fields=("u", "v")), ValueError, "of which field"),
        (lambda: PDE(lambda p, u, d, c: u, LINE, fields=("u", "u")), ValueError, "different names"),
        (lambda: PDE(lambda p, u, d, c: u, LINE, unknowns={"k": Real()}), ValueError, "does not use the unknown 'k'"),
        (lambda: PDE(lambda p, u, d, c: (p.x - 0.5).sqrt() * u, LINE), ValueError, "not finite at x=.*whatever u is"),
        (lambda: PDE(lambda p, u, d, c: u, PLANE, rhs=lambda x: x).target(PLANE.nodes(2)), TypeError, "rhs is a.* t"),
        (lambda: Positive(-1.0), ValueError, "positive coefficient"),
        (lambda: Real(0.0, lower=1.0), ValueError, "lower < init"),
    ],
)
def test_equations_refuse_what_they_cannot_read(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("residual", "message"),
    [
        (lambda p, u, d, c: d("xx") + d("x") / p.x, "the equation or one of its slopes is not finite at x=0"),
        (lambda p, u, d, c: d("x") + torch.sqrt(u), "not finite at x=0.* u₀"),
        (lambda p, u, d, c: d("x") - 1 / u, "not finite at x=0.* u₀"),
        (lambda p, u, d, c: d("x") ** 2, "no linearisation at u = 0"),
    ],
)
def test_what_has_no_linearisation_says_where(residual, message):
    pde = PDE(residual, LINE)
    with pytest.raises(LinearisationError, match=message):
        pde.linearise(LINE.nodes(5), zeros(pde, LINE.nodes(5)))


def test_an_equation_says_what_it_is():
    pde = PDE(lambda p, u, d, c: d("t") - c.k * d("xx"), PLANE, unknowns={"k": Positive(1.0)})
    assert repr(pde) == "PDE(u on Box(x=(-1, 1), t=(0, 2)): order 2 in x, 1 in t, linear, unknown k)"


def test_single_precision_is_refused():
    pde = PDE(lambda p, u, d, c: d("xx"), LINE)
    with pytest.raises(TypeError, match="float64 only"):
        pde.evaluate(torch.rand(3, 1), [torch.zeros(3)])


@pytest.mark.parametrize("residual", [lambda p, u: u, "u"])
def test_residuals_of_other_arguments_are_refused_in_words(residual):
    with pytest.raises(TypeError, match=r"the residual .* \(p, u, d, c\)"):
        PDE(residual, Box(x=(0, 1)))
