"""Solvers L and F: against dense oracles, against each other, and what conditioning must obey whatever the numbers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import derivatives as oracle

from mercer.kernels import RBF, GaussianMixture, Matern52, StudentMixture, Term, functional_gram
from mercer.linalg.cholesky import NotPositiveDefiniteError
from mercer.pde import PDE, Box, Dirichlet
from mercer.pde.basis import Features, quadrature
from mercer.pde.dense import DensePosterior, rows_gram
from mercer.pde.features import FeaturePosterior
from mercer.pde.gauss_newton import equation_rows, gauss_newton
from mercer.pde.rows import Rows, derivative

D = torch.float64
WEIGHT, ELL, MU = (torch.tensor(v, dtype=D) for v in ([1.0, 0.5], [[0.5], [0.4]], [[0.0], [2.0]]))
LINE = Box(x=(0, 1))


def kernel():
    return GaussianMixture(weight=WEIGHT, lengthscale=ELL, frequency=MU)


def features(kernels, box=LINE, spare=14):
    return Features(kernels, [0.5 * (a + b) for a, b in zip(box.lower, box.upper, strict=True)], box.lengths, spare)


def operator(X):
    """u″ + x u′ − 3u."""
    one = torch.ones(len(X), dtype=D)
    return (Term(one, X, (2,)), Term(X[:, 0], X, (1,)), Term(-3 * one, X, (0,)))


def problem(n=12, noise=1e-2):
    """Rows that u = sin 7x fulfils, sensors with noise."""
    X, ends, places = LINE.scattered(n), torch.tensor([[0.0], [1.0]], dtype=D), LINE.scattered(5, 0.3)
    u = lambda X: torch.sin(7 * X[:, 0])  # noqa: E731
    target = -52 * u(X) + X[:, 0] * 7 * torch.cos(7 * X[:, 0])
    drawn = noise**0.5 * torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=D)
    return [
        Rows(operator(X), target),
        Rows(derivative(ends, (0,)), u(ends), "condition"),
        Rows(derivative(places, (0,)), u(places) + drawn, "sensor", torch.full((5,), noise, dtype=D)),
    ]


AT = derivative(LINE.scattered(15, 0.7), (1,))


def test_solver_l_is_dense_conditioning_on_nested_derivatives():
    rows, eta = problem(), 1e-6
    function = oracle.mixture("gaussian", WEIGHT, ELL, MU)

    def covariance(left, right):
        total = 0.0
        for a in left:
            for b in right:
                block = oracle.nested(function, a.X, b.X, a.index, b.index)
                total = total + a.coefficient[:, None] * block * b.coefficient
        return total.numpy()

    parts = [part.functional for part in rows]
    G = np.block([[covariance(a, b) for b in parts] for a in parts])
    R = eta * np.diag(G) + torch.cat([part.noise() for part in rows]).numpy()
    y = torch.cat([part.target for part in rows]).numpy()
    cross = np.vstack([covariance(a, AT) for a in parts])
    solved = np.linalg.solve(G + np.diag(R), np.column_stack([y, cross]))
    expected = cross.T @ solved[:, 0], covariance(AT, AT) - cross.T @ solved[:, 1:]
    found = DensePosterior([kernel()], rows, [eta])
    mean, joint = found.joint(AT)
    scale = np.abs(covariance(AT, AT)).max()
    np.testing.assert_allclose(mean, expected[0], rtol=0, atol=1e-10 * np.abs(expected[0]).max())
    np.testing.assert_allclose(joint, expected[1], rtol=0, atol=1e-10 * scale)
    np.testing.assert_allclose(found.marginals(AT)[1], np.diag(expected[1]), rtol=0, atol=1e-10 * scale)
    sign, log_det = np.linalg.slogdet(G + np.diag(R))
    evidence = -0.5 * y @ solved[:, 0] - 0.5 * log_det - 0.5 * len(y) * math.log(2 * math.pi)
    assert sign == 1 and abs(found.log_evidence - evidence) < 1e-8 * abs(evidence)


@pytest.mark.parametrize("rows", [problem(40), problem(40)[:2]], ids=["sensors", "exact"])
def test_features_and_dense_are_the_same_posterior(rows):
    eta = 1e-8
    F, L = FeaturePosterior(features([kernel()]), rows, eta), DensePosterior([kernel()], rows, [eta])
    (mean, variance), (expected, spread) = F.marginals(AT), L.marginals(AT)
    assert (mean - expected).abs().max() < 1e-9 * expected.abs().max()
    prior = float(functional_gram([kernel()], AT).detach().diagonal().max()) * L.amplitude
    assert (variance - spread).abs().max() < 1e-9 * prior
    assert abs(F.log_evidence - L.log_evidence) < 1e-5
    assert abs(F.scale / L.scale - 1) < 1e-6
    for left, right in zip(F.joint(AT), L.joint(AT), strict=True):
        assert (left - right).abs().max() < 1e-9 * max(prior, float(expected.abs().max()))


@settings(max_examples=25, deadline=None)
@given(st.floats(0.08, 3.0), st.floats(0.0, 20.0), st.integers(0, 2), st.integers(0, 2))
def test_features_reproduce_the_kernel(ell, mu, a, b):
    mixture = GaussianMixture(weight=[0.7], lengthscale=[[ell]], frequency=[[mu if mu > 1e-3 else 0.0]])
    X = LINE.scattered(20)
    L, M = derivative(X, (a,)), derivative(X, (b,))
    F = features([mixture], spare=16)
    found, expected = F.evaluate(L) @ F.evaluate(M).mT, functional_gram([mixture], L, M)
    size = (functional_gram([mixture], L).diagonal().max() * functional_gram([mixture], M).diagonal().max()).sqrt()
    # the trapezoidal rule of short windows is accurate to the window six lengthscales away, exp(-18)
    assert (found - expected).abs().max() < (1e-8 if ell > 0.25 else 1e-5) * size


def test_features_are_only_the_combinations_that_are_there():
    box = Box(x=(0, 1), y=(0, 1))
    pairs = GaussianMixture(weight=[1.0, 1.0], lengthscale=[[2.0, 2.0]] * 2, frequency=[[3.0, 0.0], [0.0, 5.0]])
    n = len(quadrature(0.5, 3)[0])
    F = features([pairs], box, spare=3)
    assert F.size == 2 * (2 * n * n) == F.evaluate(derivative(box.scattered(4), (0, 0))).shape[1]


def test_quadrature_contains_the_centre_of_a_line():
    for ratio in (0.3, 2.0, 4.0, 8.0, 30.0):
        nodes, weights = quadrature(ratio)
        assert len(nodes) % 2 == 1 and abs(nodes[len(nodes) // 2]) < 1e-12
        assert abs(weights.sum() - 1) < 1e-12
        b = ratio / math.sqrt(2)  # the window over the whole domain
        assert abs(weights @ np.cos(2 * b * nodes) - math.exp(-(b**2))) < 1e-3


@pytest.mark.parametrize("solver", ["features", "dense"])
def test_gradient_of_the_evidence(solver):
    """Against differences, in weights, lengthscales, frequencies, coefficients, targets and noise."""
    prior, X = kernel(), LINE.scattered(12)
    numbers = torch.tensor([2.0, 0.3, 1.5], dtype=D)  # coefficient, forcing, log noise

    def rows(z):
        L = (Term(torch.ones(12, dtype=D), X, (2,)), Term(z[0] * (1 + X[:, 0]), X, (0,)))
        seen = derivative(LINE.scattered(5, 0.3), (0,))
        noise = (2 * z[2]).exp().expand(5)
        return [Rows(L, z[1] * X[:, 0]), Rows(seen, torch.arange(5, dtype=D), "sensor", noise)]

    basis = features([prior])
    held = 1e-6 * torch.ones(17, dtype=D)

    def condition(z):
        if solver == "features":
            return FeaturePosterior(basis, rows(z), 1e-6, held)
        return DensePosterior([prior], rows(z), [1e-6], held)

    leaf = numbers.clone().requires_grad_()
    live = rows(leaf)
    found = condition(numbers)
    by_noise = found.backward(live)
    torch.cat([part.noise() for part in live]).backward(by_noise)

    def difference(tensor, place, h=1e-5):
        values = []
        for sign in (1, -1):
            tensor.data[place] += sign * h
            values.append(condition(numbers).log_evidence)
            tensor.data[place] -= sign * h
        return (values[0] - values[1]) / (2 * h)

    for i in range(3):
        assert abs(difference(numbers, i) - float(leaf.grad[i])) < 1e-5 * float(leaf.grad.abs().max())
    for parameter in prior.parameters():
        for place in np.ndindex(*parameter.shape):
            expected = difference(parameter, place)
            assert abs(expected - float(parameter.grad[place])) < 1e-5 * max(1.0, abs(expected))


@pytest.mark.parametrize("solver", ["features", "dense"])
def test_order_of_conditioning_does_not_matter_and_rows_never_raise_variance(solver):
    rows, eta = problem(), 1e-8

    def condition(parts):
        return (
            FeaturePosterior(features([kernel()]), parts, eta)
            if solver == "features"
            else DensePosterior([kernel()], parts, [eta])
        )

    whole = condition(rows)
    turned = condition(rows[::-1])
    assert (whole.mean(AT) - turned.mean(AT)).abs().max() < 1e-8 * whole.mean(AT).abs().max()
    assert abs(whole.log_evidence - turned.log_evidence) < 1e-8 * abs(whole.log_evidence)
    if solver == "features":
        later = condition(rows[:1]).condition(rows[1:])
        assert (whole.mean(AT) - later.mean(AT)).abs().max() < 1e-8 * whole.mean(AT).abs().max()
        assert abs(whole.log_evidence - later.log_evidence) < 1e-8 * abs(whole.log_evidence)
    before = None
    for k in (3, 2, 1):
        found = condition(rows[-k:])
        variance = found.marginals(AT)[1] / found.amplitude
        prior = functional_gram([kernel()], AT).diagonal().max()
        if before is not None:
            assert (before <= variance + 1e-8 * prior).all()
        before = variance


def test_memory_of_features_does_not_grow_with_rows(monkeypatch):
    """Rows pass through the factorisation in blocks of at most a few times m."""
    import mercer.pde.features as module

    seen = []
    original = module._triangle
    monkeypatch.setattr(module, "_triangle", lambda A: seen.append(len(A)) or original(A))
    F = features([kernel()])
    FeaturePosterior(F, [Rows(operator(LINE.scattered(3000)), torch.zeros(3000, dtype=D))], 1e-8)
    assert len(seen) > 3 and max(seen) <= 2 * max(2 * F.size, 256) + 2 * F.size


@pytest.mark.parametrize("solver", ["features", "dense"])
def test_prior_draws_solved_back_are_calibrated(solver):
    """u ~ GP, f = N u with the nugget's noise: the mean of z² of u elsewhere is 1."""
    F, eta = features([kernel()]), 1e-6
    X = LINE.scattered(8)
    blank = [Rows(operator(X), torch.zeros(8, dtype=D)), problem()[1]]
    generator = torch.Generator().manual_seed(3)
    at = derivative(LINE.scattered(10, 0.7), (0,))
    phi, held = (torch.cat([F.evaluate(part.functional) for part in blank]).detach(), F.evaluate(at).detach())
    R = eta * phi.square().sum(1)
    squares, scales = [], []
    for _ in range(50):
        theta = torch.randn(F.size, generator=generator, dtype=D)
        y = phi @ theta + R.sqrt() * torch.randn(10, generator=generator, dtype=D)
        rows = [Rows(blank[0].functional, y[:8]), Rows(blank[1].functional, y[8:])]
        found = FeaturePosterior(F, rows, eta) if solver == "features" else DensePosterior([kernel()], rows, [eta])
        mean, variance = found.marginals(at)
        squares.append(float(((held @ theta - mean).square() / (variance / found.amplitude)).mean()))
        scales.append(found.scale)
    assert 0.7 < np.mean(squares) < 1.3
    assert 0.8 < np.mean(scales) < 1.2


def test_samples_have_the_posterior_moments():
    for found in (FeaturePosterior(features([kernel()]), problem(), 1e-6), DensePosterior([kernel()], problem())):
        draws = found.sample(AT, 4000, torch.Generator().manual_seed(0))
        mean, variance = found.marginals(AT)
        error = (draws.mean(1) - mean).abs() / (variance / 4000).sqrt()
        assert draws.shape == (15, 4000) and error.max() < 5
        assert (draws.var(1) / variance - 1).abs().max() < 6 * math.sqrt(2 / 4000)


def test_feature_samples_are_functions():
    """Equal seeds give the same draw wherever it is evaluated."""
    found = FeaturePosterior(features([kernel()]), problem(), 1e-6)
    X = LINE.scattered(9)
    whole = found.sample(derivative(X, (0,)), 3, torch.Generator().manual_seed(5))
    part = found.sample(derivative(X[4:], (0,)), 3, torch.Generator().manual_seed(5))
    torch.testing.assert_close(whole[4:], part, rtol=0, atol=1e-10)


def test_gauss_newton_is_one_step_for_a_linear_equation_from_anywhere():
    pde = PDE(lambda p, u, d, c: d("xx") + p.x * u, LINE, rhs=lambda x: torch.sin(6 * x))
    X, ends = LINE.nodes(25), [Rows(*Dirichlet("boundary", 0.3).rows(LINE, 2), "condition")]

    def condition(rows):
        return DensePosterior([RBF(0.3)], rows, [1e-8])

    direct = condition([*equation_rows(pde, X, [torch.zeros(25, dtype=D)] * 2), *ends]).mean(AT)
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(25, generator=generator, dtype=D) for _ in pde.requests]
    found = gauss_newton(pde, X, ends, condition, start)
    assert found.n_steps == 1
    assert (found.posterior.mean(AT) - direct).abs().max() < 1e-10 * direct.abs().max()


@pytest.mark.parametrize("name", ["features", "student"])
def test_gauss_newton_solves_allen_cahn_in_few_steps(name):
    box = Box(x=(0, 2 * math.pi))
    u = lambda x: torch.sin(6 * x) * torch.cos(100 * x)  # noqa: E731
    second = lambda x: -10036 * u(x) - 1200 * torch.cos(6 * x) * torch.sin(100 * x)  # noqa: E731
    pde = PDE(lambda p, v, d, c: d("xx") + v * (v**2 - 1), box, rhs=lambda x: second(x) + u(x) * (u(x) ** 2 - 1))
    X, ends = box.nodes(400), [Rows(*Dirichlet("boundary", u).rows(box, 2), "condition")]
    frequency = [[0.0], [94 / (2 * math.pi)], [106 / (2 * math.pi)]]
    make = StudentMixture if name == "student" else GaussianMixture
    prior = make(weight=[1.0] * 3, lengthscale=[[math.pi]] * 3, frequency=frequency)

    def condition(rows):
        if name == "student":
            return DensePosterior([prior], rows)
        return FeaturePosterior(features([prior], box, spare=8), rows)

    found = gauss_newton(pde, X, ends, condition)
    points = box.scattered(100)
    error = found.posterior.mean(derivative(points, (0,))) - u(points[:, 0])
    assert found.status == "converged" and found.n_steps <= 6
    assert error.norm() / u(points[:, 0]).norm() < 1e-5


def test_ladder_of_nuggets_ends_with_a_cure():
    X = torch.zeros(5, 1, dtype=D)
    rows = [Rows(derivative(X, (0,)), torch.zeros(5, dtype=D))]
    assert DensePosterior([Matern52(0.3)], rows).nugget >= 1e-10
    with pytest.raises(NotPositiveDefiniteError, match="features"):
        DensePosterior([Matern52(0.3)], rows, [0.0])


def test_rows_gram_is_that_of_the_joined_functional():
    rows = problem()
    G = rows_gram([kernel()], rows).detach()
    for i, left in enumerate(rows):
        for j, right in enumerate(rows):
            first = [sum(map(len, rows[:k])) for k in (i, j)]
            block = G[first[0] : first[0] + len(left), first[1] : first[1] + len(right)]
            expected = functional_gram([kernel()], left.functional, right.functional).detach()
            torch.testing.assert_close(block, expected, rtol=1e-12, atol=1e-9)


def test_features_need_gaussian_lines():
    with pytest.raises(TypeError, match="GaussianMixture"):
        features([StudentMixture(frequency=[0.0])])
