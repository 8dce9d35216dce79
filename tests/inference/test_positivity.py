"""Negative curvature is met in the way that was asked for: allowed, clamped, or bent along the geodesic."""

from dataclasses import dataclass

import pytest
import torch
from inducing_toys import q_of_u
from minibatch_toys import covariances, problem
from oracles import inducing as oracle
from toys import DTYPE, normal

from mercer._typing import Sites
from mercer.families.tied import TiedSites
from mercer.inference import Dual, run
from mercer.inference.minibatch import tied_by_batches
from mercer.inference.objective import evidence_lower_bound, expected_log_prob
from mercer.inference.riemann import Geodesic, damping, expected_log_damping, second_order


def improper(seed=0):
    """A problem with a state from which a whole step is refused."""
    model, plan, data = problem("student_t", Dual(positivity="riemann", memory=0), seed=seed, weighted=False)
    sites = Sites(0.3 * normal(60, seed=7), torch.full((60,), 0.3, dtype=DTYPE))
    with torch.no_grad():
        return model, plan, data, model.engine.init(model, plan, data, sites)


def test_the_second_order_term_is_that_of_the_geodesic():
    """½ [P + (P + ρG) P⁻¹ (P + ρG)], positive definite for every G."""
    root = torch.linalg.cholesky(torch.eye(4, dtype=DTYPE) + normal(4, 4, seed=1) @ normal(4, 4, seed=1).T)
    P, G = root @ root.T, normal(4, 4, seed=2)
    G = -10.0 * (G + G.T)
    line = P + 0.7 * G
    expected = 0.5 * (P + line @ torch.linalg.inv(P) @ line)
    found = line + second_order(root, G, 0.7)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert float(torch.linalg.eigvalsh(line)[0]) < 0 < float(torch.linalg.eigvalsh(found)[0])


@torch.no_grad()
def test_two_steps_on_the_geodesic_are_the_dense_formulas():
    """P ← P + ρG + ½ρ² G P⁻¹ G and ν ← P_new m + ρ (Aᵀα − K⁻¹ m), the second from a posterior that has the factor."""
    model, plan, data, state = improper()
    Kuu, Kuf, _ = covariances(model, plan, data)
    A, posterior, target = Kuf.T @ torch.linalg.inv(Kuu), state.posterior, state.target
    for rho in (0.8, 0.5):
        m, S = q_of_u(posterior)
        P, mean, v = torch.linalg.inv(S), posterior.mean_at_data, posterior.variance_at_data
        _, alpha, beta = expected_log_prob(model, data, mean, v)
        G = torch.linalg.inv(Kuu) + A.T @ beta.diag() @ A - P
        P_new = P + rho * G + 0.5 * rho**2 * G @ S @ G
        nu = P_new @ m + rho * (A.T @ alpha - torch.linalg.solve(Kuu, m))
        posterior = Geodesic(posterior, plan, target).step(rho)
        found_m, found_S = q_of_u(posterior)
        torch.testing.assert_close(found_S, torch.linalg.inv(P_new), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(found_m, torch.linalg.solve(P_new, nu), rtol=1e-6, atol=1e-8)
        expected = expected_log_prob(model, data, posterior.mean_at_data, posterior.variance_at_data)
        target = Sites(expected.alpha + expected.beta * posterior.mean_at_data, expected.beta)
        assert isinstance(damping(posterior, plan), TiedSites)


@torch.no_grad()
def test_a_step_of_tied_sites_on_all_rows_is_that_on_the_geodesic():
    model, plan, data, state = improper()
    how = {"step_size": 0.7, "positivity": "riemann", "start": state.posterior.tied()}
    found = tied_by_batches(model, plan.Z, [data], 60, **how).posterior
    expected = Geodesic(state.posterior, plan, state.target).step(0.7)
    for one, other in zip(q_of_u(found), q_of_u(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@torch.no_grad()
def test_the_bound_of_a_damped_posterior_is_that_of_its_q():
    model, plan, data, state = improper()
    posterior = Geodesic(state.posterior, plan, state.target).step(0.3)
    bound = evidence_lower_bound(model, posterior, data) - expected_log_damping(posterior, plan)
    m, S = q_of_u(posterior)
    v, mean = posterior.variance_at_data, posterior.mean_at_data
    expected = expected_log_prob(model, data, mean, v).value.sum() - oracle.kl(covariances(model, plan, data)[0], m, S)
    assert float(bound) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("memory", [0, 5])
@pytest.mark.parametrize("seed", range(3))
def test_allow_and_riemann_have_the_same_optimum_and_clamp_another(seed, memory):
    """Identity 4: with a tenth of outliers, at which the curvature of some rows is negative."""
    found = {}
    for positivity in ("allow", "riemann", "clamp"):
        engine = Dual(memory=memory, positivity=positivity)
        found[positivity] = run(*problem("student_t", engine, seed=seed, weighted=False, tol=1e-15))
        assert found[positivity].converged
    allow, riemann, clamp = (found[each].state for each in ("allow", "riemann", "clamp"))
    assert float(allow.sites.precision.min()) < -0.01
    assert riemann.value == pytest.approx(allow.value, abs=1e-8)
    torch.testing.assert_close(riemann.sites.precision, allow.sites.precision, rtol=0, atol=1e-5)
    assert riemann.posterior.plan.rest is None
    assert clamp.value < allow.value - 1e-7 and float(clamp.sites.precision.min()) >= 0
    assert not any("biased" in note for each in ("allow", "riemann") for note in found[each].notes)
    n_clamped = int((allow.sites.precision < 0).sum())
    assert f"{n_clamped} sites of negative curvature were clamped: the fixed point is biased" in found["clamp"].notes


def test_the_clamped_fixed_point_is_right_but_for_the_curvature():
    """λ2 = max(β, 1e-8), and the mean is where its gradient vanishes."""
    model, plan, data = problem("student_t", Dual(positivity="clamp"), tol=1e-16)
    state = run(model, plan, data).state
    with torch.no_grad():
        m, v = state.posterior.mean_at_data, state.posterior.variance_at_data
        _, alpha, beta = expected_log_prob(model, data, m, v)
        precision = torch.where(beta < 0, 1e-8, data.weight * beta)
        torch.testing.assert_close(state.sites.precision, precision, rtol=1e-5, atol=1e-6)
        _, Kuf, _ = covariances(model, plan, data)
        torch.testing.assert_close(q_of_u(state.posterior)[0], Kuf @ (data.weight * alpha), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_clamped_sites_have_settled_where_the_engine_says_so(seed):
    """A bound that hardly changes says nothing of a fixed point away from its top."""
    model, plan, data = problem("student_t", Dual(positivity="clamp"), n=200, seed=seed, tol=1e-9)
    last = run(model, plan, data)
    with torch.no_grad():
        _, info = model.engine.step(model, plan, last.state, data)
    assert last.converged and info["residual"] < 1e-4


@dataclass(frozen=True)
class Geodesics(Dual):
    """Takes no other steps."""

    def _candidates(self, plan, state, target):
        return super()._candidates(plan, state, target)[1:]


def test_steps_on_the_geodesic_alone_lead_to_the_optimum_and_are_not_done():
    """As long as the factor is there the sites are not all of the posterior."""
    engine = Geodesics(memory=0, positivity="riemann")
    found = run(*problem("student_t", engine, weighted=False, max_inner=100))
    assert found.state.value == pytest.approx(run(*problem("student_t", weighted=False)).state.value, abs=1e-8)
    assert damping(found.state.posterior, found.state.posterior.plan.given(None)) is not None
    assert not found.converged


@pytest.mark.parametrize("name", ["probit", "softmax"])
def test_clamping_does_nothing_where_curvature_is_positive(name):
    one, other = (run(*problem(name, Dual(positivity=each))) for each in ("allow", "clamp"))
    assert torch.equal(one.state.sites.linear, other.state.sites.linear) and one.notes == other.notes


@pytest.mark.parametrize("step_size", [1.0, 5.0])
def test_riemannian_steps_climb_and_are_taken(step_size):
    """The factor that keeps the posterior proper on the way is gone in the end."""
    model, plan, data = problem("student_t", Dual(step_size, 0, positivity="riemann"), seed=1, weighted=False)
    engine = model.engine
    damped = []
    with torch.no_grad():
        state = engine.init(model, plan, data)
        for _ in range(100):
            before = state.value
            state, info = engine.step(model, plan, state, data)
            assert state.value >= before - 1e-9 * abs(before)
            damped.append(damping(state.posterior, plan) is not None)
            if info["converged"]:
                break
    assert info["converged"] and any(damped) and not damped[-1]
    assert state.value == pytest.approx(run(*problem("student_t", seed=1, weighted=False)).state.value, abs=1e-8)
