"""What data said of values at some places, moved to others: nothing is lost that the new places can carry."""

import math

import pytest
import torch
from inducing_toys import Z, kernel_of, q_of_u
from oracles import inducing as oracle
from toys import DTYPE, X_NEW, X, normal

from mercer._typing import Sites
from mercer.families import Inducing, Prior
from mercer.families.inducing_plan import InducingPlan
from mercer.families.tied import GaussianStatistics, Projection, TiedSites
from mercer.kernels import Linear, Matern52
from mercer.policy import NumericalPolicy

POLICY = NumericalPolicy()
PRIOR = Prior(Matern52(0.8, outputscale=1.2))
MORE = torch.tensor([[-0.6], [1.7], [2.75]], dtype=DTYPE)
ELSEWHERE = torch.tensor([[0.0], [0.8], [1.1], [2.9]], dtype=DTYPE)  # one of which stays
SITES = Sites(normal(3, 9, seed=1), 0.1 + normal(3, 9, seed=2).square())


def conditioned(places, sites, rows=X, rest=None, prior=PRIOR):
    plan = InducingPlan(rows, places, POLICY, rest=rest)
    return Inducing(len(places)).condition(prior, plan, sites)


def from_tied(places, tied, prior=PRIOR):
    """The posterior of tied sites alone, without a single row."""
    none = tied.linear[..., :0]
    return conditioned(places, Sites(none, none), X[:0], tied, prior)


def assert_close(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_the_matrix_and_the_gap_are_those_of_the_conditional():
    kernel, move = kernel_of(), Projection(PRIOR, Z, ELSEWHERE, POLICY)
    crossed = oracle.between(kernel, Z, ELSEWHERE)
    expected = crossed @ torch.linalg.inv(oracle.between(kernel, ELSEWHERE, ELSEWHERE))
    assert_close((move.matrix, move.gap), (expected, oracle.between(kernel, Z, Z) - expected @ crossed.T), 1e-12)
    assert (move.matrix[1] == torch.tensor([0.0, 0.0, 1.0, 0.0])).all()  # 1.1 stays as it is
    assert not move.gap[1].any() and not move.gap[:, 1].any()


@torch.no_grad()
def test_tied_sites_give_the_posterior_of_their_rows():
    posterior = conditioned(Z, SITES)
    again = from_tied(Z, posterior.tied())
    assert_close(again.joint(X_NEW), posterior.joint(X_NEW), 1e-12)
    assert_close(again.marginals(X_NEW), posterior.marginals(X_NEW), 1e-12)


@torch.no_grad()
def test_more_places_change_no_prediction_and_lose_nothing():
    posterior = conditioned(Z, SITES)
    tied, wider = posterior.tied(), torch.cat([MORE[:1], Z, MORE[1:]])
    move = Projection(PRIOR, Z, wider, POLICY)
    assert tied.loss(move).tolist() == [0.0, 0.0, 0.0]
    moved = tied.project(move)
    assert_close(from_tied(wider, moved).joint(X_NEW), posterior.joint(X_NEW), 1e-12)
    back = moved.project(Projection(PRIOR, wider, Z, POLICY))
    assert_close((back.linear, back.precision), (tied.linear, tied.precision), 1e-11)


@torch.no_grad()
def test_crowded_places_change_no_prediction_either():
    """Pairs of places 1e-5 apart: what carries K_uu is the share of variance that each has of its own."""
    wider = torch.cat([Z, Z + 1e-5])
    posterior = conditioned(Z, SITES)
    moved = posterior.tied().project(Projection(PRIOR, Z, wider, POLICY))
    assert float(torch.linalg.cond(oracle.between(kernel_of(), wider, wider))) > 1e9
    assert_close(from_tied(wider, moved).joint(X_NEW), posterior.joint(X_NEW), 1e-9)


@torch.no_grad()
def test_the_loss_is_zero_only_where_the_new_places_span_the_old_ones():
    tied = conditioned(Z, SITES).tied()
    for k in range(4):
        fewer = Z[torch.arange(4) != k]
        move = Projection(PRIOR, Z, fewer, POLICY)
        assert bool((tied.loss(move) > 1e-3).all())
        assert float(torch.linalg.eigvalsh(move.gap).min()) > -1e-14
    # a line through the origin is known from any two of its values
    linear = Prior(Linear(0.7))
    plane = torch.tensor([[0.3, 1.0], [-1.0, 0.4], [0.9, 0.2]], dtype=DTYPE)
    sites = TiedSites(normal(3, seed=3), torch.eye(3, dtype=DTYPE))
    spanned, not_spanned = (Projection(linear, plane, rows, POLICY) for rows in (2.0 * plane[:2], 2.0 * plane[:1]))
    assert 0.0 <= float(sites.loss(spanned)) < 1e-8 < 1e-2 < float(sites.loss(not_spanned))


@torch.no_grad()
def test_the_loss_is_what_jensen_gives_away():
    """log E[t(u)] over p(u | u') against E[log t(u)], to first order in a small t: the variance is what is lost."""
    tied = TiedSites(torch.zeros(4, dtype=DTYPE), 1e-6 * torch.eye(4, dtype=DTYPE))
    move = Projection(PRIOR, Z, ELSEWHERE, POLICY)
    apart = from_tied(Z, tied)
    moved = from_tied(ELSEWHERE, tied.project(move))
    gap = moved.log_normaliser()[0] - apart.log_normaliser()[0]
    assert float(gap) == pytest.approx(float(tied.loss(move)), rel=1e-4)


@pytest.mark.parametrize("places", [ELSEWHERE, torch.cat([Z, MORE])], ids=["elsewhere", "more"])
@torch.no_grad()
def test_projection_and_new_data_are_streaming_sparse_regression(places):
    """The optimal q and the bound of Bui, Nguyen and Turner (2017), which are written with D = N⁻¹."""
    kernel, noise = kernel_of(), 0.3
    first, second = X[:6], X[6:]
    y = normal(9, seed=5)
    old = conditioned(Z, Sites(y[:6] / noise, torch.full((6,), 1 / noise, dtype=DTYPE)), first)
    m, S = q_of_u(old)
    bound, m_new, S_new = oracle.streaming(kernel, Z, m, S, places, second, y[6:], noise * torch.eye(3, dtype=DTYPE))

    tied, move = old.tied(), Projection(PRIOR, Z, places, POLICY)
    sites = Sites(y[6:] / noise, torch.full((3,), 1 / noise, dtype=DTYPE))
    found = conditioned(places, sites, second, tied.project(move))
    before = from_tied(Z, tied).log_normaliser()[0]
    value = found.log_evidence() - 1.5 * math.log(2 * math.pi * noise) - tied.loss(move) - before
    assert float(value) == pytest.approx(float(bound), abs=1e-11)
    assert_close(q_of_u(found), (m_new, S_new), 1e-12)
    Kuu, Kus = oracle.between(kernel, places, places), kernel(places, X_NEW)
    assert_close(found.joint(X_NEW), oracle.predict(Kuu, Kus, kernel(X_NEW, X_NEW), m_new, S_new), 1e-12)


@torch.no_grad()
def test_rows_in_any_order_and_split_are_the_batch():
    """Fixed places, Gaussian sites: sums."""
    order = torch.tensor([4, 0, 8, 2, 6, 1, 3, 5, 7])
    tied = TiedSites.none(Z, (3,))
    for rows in order.split([1, 4, 3, 1]):
        tied = tied + conditioned(Z, Sites(SITES.linear[:, rows], SITES.precision[:, rows]), X[rows]).tied()
    assert_close(from_tied(Z, tied).joint(X_NEW), conditioned(Z, SITES).joint(X_NEW), 1e-12)


@torch.no_grad()
def test_statistics_that_moved_give_the_bound_at_any_noise():
    """What new places do not explain stays in the residual: Σ_old ℓ of the specification, section 4."""
    y, places = normal(9, seed=5), torch.cat([Z, MORE])
    one = torch.ones(9, dtype=DTYPE)
    unit = conditioned(Z, Sites(y, one))
    Kuu, Kuf, Kff = oracle.covariances(kernel_of(), Z, X)
    left = (Kff - Kuf.T @ torch.linalg.inv(Kuu) @ Kuf).trace()
    statistics = GaussianStatistics(unit.tied(), one.sum(), y.square().sum(), left)
    for target in (Z, places, ELSEWHERE):
        move = Projection(PRIOR, Z, target, POLICY)
        moved = statistics.project(move)
        for noise in (0.05, 0.6):
            tied = moved.tied(torch.tensor(noise, dtype=DTYPE))
            process = from_tied(target, tied)
            m, S = q_of_u(process)
            second = (moved.sums.precision * (S + m.outer(m))).sum()
            quadratic = moved.squares - 2.0 * moved.sums.linear @ m + second + moved.residual
            value = -0.5 * (9 * math.log(2 * math.pi * noise) + quadratic / noise)
            K = oracle.between(kernel_of(), target, target)
            found = value - oracle.kl(K, m, S)
            # the same by Titsias's formula, with the old conditional mean of f where places are moved
            crossed = oracle.between(kernel_of(), Z, target)
            through = crossed.T @ torch.linalg.inv(Kuu) @ Kuf
            expected = oracle.collapsed_bound(K, through, Kff, y, noise * torch.eye(9, dtype=DTYPE))
            assert float(found) == pytest.approx(float(expected), rel=1e-12)
