"""Tied sites are log densities of u: they add, scale and move like these."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inducing_toys import kernels_of_their_own
from oracles import inducing as oracle
from toys import DTYPE, normal

from mercer._typing import Sites
from mercer.families import Inducing, Prior
from mercer.families.inducing_plan import InducingPlan
from mercer.families.tied import GaussianStatistics, Projection, TiedSites, inducing_covariance, inducing_factor
from mercer.kernels import RBF, Linear, Matern52
from mercer.linalg.cholesky import NotPositiveDefiniteError
from mercer.policy import NumericalPolicy

POLICY = NumericalPolicy()
PRIOR = Prior(Matern52([0.5, 0.8], outputscale=1.4))
X = torch.rand(12, 2, generator=torch.Generator().manual_seed(0), dtype=DTYPE)
Z, ELSEWHERE = X[:5] + 0.07, X[5:9] - 0.05
SITES = Sites(normal(3, 12, seed=1), 0.1 + normal(3, 12, seed=2).square())


def posterior(sites=SITES, rows=slice(None), places=Z, prior=PRIOR):
    rows = torch.arange(len(X))[rows]
    plan = InducingPlan(X[rows], places, POLICY)
    return Inducing(5).condition(prior, plan, Sites(sites.linear[..., rows], sites.precision[..., rows]))


def assert_tied(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found.linear, expected.linear, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.precision, expected.precision, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_sites_of_all_rows_are_the_sum_of_those_of_some():
    whole = posterior()
    some, others = torch.arange(0, 12, 2), torch.arange(1, 12, 2)
    assert_tied(whole.tied(some) + whole.tied(others), whole.tied())
    assert_tied(whole.tied() - whole.tied(others), posterior(rows=slice(0, 12, 2)).tied())
    assert_tied(whole.tied() + TiedSites.none(Z, (3,)), whole.tied())
    none = whole.tied(torch.arange(0))
    assert not none.linear.any() and not none.precision.any()


@torch.no_grad()
def test_a_power_of_the_sites_is_that_of_every_row():
    twice = posterior(Sites(2.0 * SITES.linear, 2.0 * SITES.precision)).tied()
    assert_tied(posterior().tied().scale(2.0), twice)
    powers = torch.tensor([0.5, 1.0, 3.0], dtype=DTYPE)
    each = Sites(powers[:, None] * SITES.linear, powers[:, None] * SITES.precision)
    assert_tied(posterior().tied().scale(powers), posterior(each).tied())
    shared = posterior(Sites(SITES.linear, SITES.precision[0])).tied()
    assert shared.precision.shape == (5, 5)
    each = Sites(each.linear * 0 + powers[:, None] * SITES.linear, powers[:, None] * SITES.precision[0])
    assert_tied(shared.scale(powers), posterior(each).tied())


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 6),
    more=st.integers(0, 4),
    d=st.integers(1, 3),
    shape=st.sampled_from([(), (1,), (3,)]),
    seed=st.integers(0, 999),
)
@torch.no_grad()
def test_sites_move_as_the_expectation_given_the_new_values(m, more, d, shape, seed):
    """E_{p(u | u')}[νᵀu − ½ uᵀN u], and what it leaves out."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(m + more, d, generator=generator, dtype=DTYPE)
    old, new = places[:m], places[m // 2 :]  # some stay
    kernel = Matern52([0.7] * d, outputscale=1.2)
    root = normal(*shape, m, m, seed=seed)
    tied = TiedSites(normal(*shape, m, seed=seed + 1), root @ root.mT)
    move = Projection(Prior(kernel), old, new, POLICY)
    crossed = oracle.between(lambda A, B: oracle.matern52(A, B, 0.7, 1.2), old, new)
    K = oracle.between(lambda A, B: oracle.matern52(A, B, 0.7, 1.2), old, old)
    Knew = oracle.between(lambda A, B: oracle.matern52(A, B, 0.7, 1.2), new, new)
    P = crossed @ torch.linalg.inv(Knew)
    condition = float(torch.linalg.cond(Knew))
    moved = tied.project(move)
    assert_tied(moved, TiedSites(tied.linear @ P, P.T @ tied.precision @ P), 1e-14 * condition + 1e-12)
    expected = 0.5 * (tied.precision * (K - P @ crossed.T)).sum((-2, -1))
    torch.testing.assert_close(tied.loss(move), expected, rtol=1e-8, atol=1e-14 * condition + 1e-11)
    assert bool((tied.loss(move) >= -1e-12).all())
    torch.testing.assert_close(moved.precision, moved.precision.mT, rtol=0, atol=0)


@torch.no_grad()
def test_places_that_stay_keep_what_is_known_of_them_to_the_bit():
    move = Projection(PRIOR, Z, torch.cat([ELSEWHERE, Z]), POLICY)
    tied = posterior().tied()
    moved = tied.project(move)
    assert torch.equal(moved.linear[..., 4:], tied.linear) and not moved.linear[..., :4].any()
    assert torch.equal(moved.precision[..., 4:, 4:], tied.precision)
    assert tied.loss(move).tolist() == [0.0, 0.0, 0.0]


@torch.no_grad()
def test_latents_with_kernels_of_their_own_move_each_by_its_own():
    kernel, sites = kernels_of_their_own(), Sites(SITES.linear[:2], SITES.precision[:2])
    tied = posterior(sites, prior=Prior(kernel)).tied()
    moved = tied.project(Projection(Prior(kernel), Z, ELSEWHERE, POLICY))
    loss = tied.loss(Projection(Prior(kernel), Z, ELSEWHERE, POLICY))
    for i in range(2):
        move = Projection(Prior(kernel[i]), Z, ELSEWHERE, POLICY)
        alone = posterior(Sites(sites.linear[i], sites.precision[i]), prior=Prior(kernel[i])).tied()
        assert_tied(TiedSites(moved.linear[i], moved.precision[i]), alone.project(move))
        assert float(loss[i]) == pytest.approx(float(alone.loss(move)), rel=1e-10)


# ---- statistics of rows with Gaussian noise


def statistics_of(rows, y, weight):
    """What `GaussianStatistics` says that it holds."""
    unit = posterior(Sites(weight * y, weight), rows)
    A = torch.linalg.solve(inducing_covariance(PRIOR, Z, POLICY), PRIOR.kernel(Z, X[rows]).to_dense())
    left = 1.4 - (A * PRIOR.kernel(Z, X[rows]).to_dense()).sum(0)
    own = weight[rows]
    return GaussianStatistics(unit.tied(), own.sum(), (own * y[rows].square()).sum(), (own * left).sum())


@torch.no_grad()
def test_statistics_give_sites_and_bound_at_any_noise():
    y, weight = normal(12, seed=4), torch.arange(1.0, 13.0, dtype=DTYPE) / 5
    first, second = (statistics_of(rows, y, weight) for rows in (slice(0, 5), slice(5, 12)))
    whole = first + second
    kernel = lambda A, B: PRIOR.kernel(A, B).to_dense()  # noqa: E731
    covariances = oracle.covariances(kernel, Z, X)
    for noise in (0.01, 0.5):
        tied = whole.tied(torch.tensor(noise, dtype=DTYPE))
        assert_tied(tied, posterior(Sites(weight * y / noise, weight / noise)).tied(), 1e-10)
        m, S = oracle.q_of_form("U", covariances[0], tied.linear, tied.precision)
        quadratic = whole.squares - 2.0 * whole.sums.linear @ m + whole.residual
        quadratic = quadratic + (whole.sums.precision * (S + m.outer(m))).sum()
        data_term = -0.5 * (whole.count * math.log(2 * math.pi * noise) + quadratic / noise)
        value = data_term - oracle.kl(covariances[0], m, S)
        R = torch.diag(noise / weight)
        more = -0.5 * ((weight - 1) * math.log(2 * math.pi * noise) + weight.log()).sum()
        assert float(value) == pytest.approx(float(oracle.collapsed_bound(*covariances, y, R) + more), rel=1e-10)
    back = whole - second
    assert_tied(back.sums, first.sums)
    for name in ("count", "squares", "residual"):
        torch.testing.assert_close(getattr(back, name), getattr(first, name), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(getattr(whole.scale(0.3), name), 0.3 * getattr(whole, name))
    assert_tied(whole.scale(0.3).sums, whole.sums.scale(0.3))


@torch.no_grad()
def test_statistics_of_outputs_have_noise_and_powers_of_their_own():
    y, one = normal(2, 12, seed=4), torch.ones(12, dtype=DTYPE)
    each = [statistics_of(slice(None), row, one) for row in y]
    sums = TiedSites(torch.stack([s.sums.linear for s in each]), each[0].sums.precision)
    rest = (torch.stack([getattr(s, name) for s in each]) for name in ("count", "squares", "residual"))
    both, factors = GaussianStatistics(sums, *rest), torch.tensor([0.5, 2.0], dtype=DTYPE)
    tied, scaled = both.tied(factors), both.scale(factors)
    for name in ("count", "squares", "residual"):
        assert torch.equal(getattr(GaussianStatistics.none(Z, (2,)) + both, name), getattr(both, name))
    for i, factor in enumerate(factors.tolist()):
        assert_tied(TiedSites(tied.linear[i], tied.precision[i]), each[i].sums.scale(1.0 / factor))
        assert_tied(TiedSites(scaled.sums.linear[i], scaled.sums.precision[i]), each[i].sums.scale(factor))
        assert float(scaled.squares[i]) == pytest.approx(factor * float(each[i].squares))


def test_sites_follow_the_noise_by_gradient():
    whole = statistics_of(slice(None), normal(12, seed=4), torch.ones(12, dtype=DTYPE))
    noise = torch.tensor(0.3, dtype=DTYPE)
    slope = torch.autograd.functional.jacobian(lambda s: whole.tied(s).linear, noise)
    torch.testing.assert_close(slope, -whole.sums.linear / noise**2)


@torch.no_grad()
def test_what_new_places_do_not_explain_goes_to_the_residual():
    whole = statistics_of(slice(None), normal(12, seed=4), torch.ones(12, dtype=DTYPE))
    move = Projection(PRIOR, Z, ELSEWHERE, POLICY)
    moved = whole.project(move)
    assert float(moved.residual) > float(whole.residual) + 0.1
    # prior variance of the rows is in the residual or in the sums
    before = whole.residual + (whole.sums.precision * inducing_covariance(PRIOR, Z, POLICY)).sum()
    after = moved.residual + (moved.sums.precision * inducing_covariance(PRIOR, ELSEWHERE, POLICY)).sum()
    assert float(after) == pytest.approx(float(before), rel=1e-12)
    assert moved.count == whole.count and moved.squares == whole.squares


# ---- factors


@pytest.mark.parametrize(("dtype", "share"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@torch.no_grad()
def test_inducing_values_have_a_share_of_variance_of_their_own(dtype, share):
    kernel, places = Matern52([0.5, 0.8], outputscale=1.4).to(dtype), Z.to(dtype)
    K = inducing_covariance(Prior(kernel), places, NumericalPolicy(dtype=dtype))
    off = (K - kernel(places).to_dense()).diagonal()
    torch.testing.assert_close(off, torch.full_like(off, 1.4 * share), rtol=0.1, atol=0)
    L, jitter = inducing_factor(Prior(kernel), places, NumericalPolicy(dtype=dtype))
    torch.testing.assert_close(L @ L.mT, K)
    assert jitter == 0.0


def test_a_place_without_variance_is_factored_by_jitter_and_keeps_its_gradient():
    """A line through the origin is known there."""
    kernel = Linear(0.7)
    places = torch.tensor([[0.0], [1.0], [2.0]], dtype=DTYPE, requires_grad=True)
    L, jitter = inducing_factor(Prior(kernel), places, POLICY)
    assert jitter in POLICY.jitter_ladder[1:]
    expected = 0.7 * places @ places.T + jitter * 0.7 * 5 / 3 * torch.eye(3, dtype=DTYPE)
    expected = expected + 1e-10 * expected.diagonal().diag()
    torch.testing.assert_close((L @ L.mT).detach(), expected.detach(), rtol=1e-9, atol=1e-14)
    (slope,) = torch.autograd.grad((L @ L.mT)[2, 1], places)
    torch.testing.assert_close(slope, torch.tensor([[0.0], [1.4], [0.7]], dtype=DTYPE), rtol=1e-6, atol=1e-6)


def test_places_without_numbers_are_refused_by_name():
    with pytest.raises(NotPositiveDefiniteError, match="inducing points holds NaN"):
        inducing_factor(Prior(RBF(0.5)), torch.full((3, 1), torch.nan, dtype=DTYPE), POLICY)
