"""Power EP against the sequential textbook algorithm, and its variational limit."""

import numpy as np
import pytest
import torch
from oracles import expectation_propagation as oracle
from scipy import integrate, stats
from toys import X_NEW, gram_matrix, normal, problem

from mercer._typing import Data, Sites
from mercer.inference import Dual, PowerEP, run
from mercer.kernels import gram


@torch.no_grad()
def test_probit_follows_the_textbook():
    model, plan, data = problem("probit", PowerEP(), mean=None)
    inference = run(model, plan, data)
    assert inference.converged
    K = gram_matrix(model, data).numpy()
    nu, tau, evidence = oracle.fit(K, 2 * data.y.numpy() - 1)
    state = inference.state
    np.testing.assert_allclose(state.sites.linear, nu, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.sites.precision, tau, rtol=1e-5, atol=1e-6)
    assert float(model.engine.objective(model, plan, state, data)) == pytest.approx(evidence, rel=1e-9)
    K_new = gram(model.prior.kernel, X_NEW, data.X).numpy()
    mean, variance = oracle.predict(K, K_new, np.full(len(X_NEW), 1.2), nu, tau)
    np.testing.assert_allclose(state.posterior.marginals(X_NEW)[0], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.posterior.marginals(X_NEW)[1], variance, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["probit", "logit", "poisson", "student_t", "ordinal"])
def test_a_single_row_is_exact(name):
    """One site, no approximation in the evidence: it is ∫ p(y | f) N(f; μ, k) df, for the power of one."""
    model, plan, data = problem(name, PowerEP(), rows=1)
    inference = run(model, plan, data)
    assert inference.converged

    def joint(f):
        density = float(model.likelihood.log_prob(data.y, torch.tensor([f], dtype=torch.float64)).detach())
        return np.exp(density) * stats.norm.pdf(f, 0.2, np.sqrt(1.2))

    moments = [integrate.quad(lambda f, k=k: f**k * joint(f), -9, 9, epsabs=1e-12, limit=200)[0] for k in range(3)]
    with torch.no_grad():
        value = model.engine.objective(model, plan, inference.state, data)
        m, v = inference.state.posterior.at_data()
    mean = moments[1] / moments[0]
    assert float(value) == pytest.approx(np.log(moments[0]), rel=1e-6)
    assert float(m) == pytest.approx(mean, rel=1e-6)
    assert float(v) == pytest.approx(moments[2] / moments[0] - mean**2, rel=1e-6)


@pytest.mark.parametrize("name", ["probit", "poisson"])
@torch.no_grad()
def test_small_powers_tend_to_the_variational_answer_at_first_order(name):
    model, plan, data = problem(name, Dual())
    best = run(model, plan, data).state
    gaps = []
    for power in (0.02, 0.01):
        model, plan, data = problem(name, PowerEP(power=power))
        state = run(model, plan, data).state
        gaps.append(state.value - best.value)
        np.testing.assert_allclose(state.posterior.at_data()[0], best.posterior.at_data()[0], atol=2 * power)
    assert gaps[0] == pytest.approx(2 * gaps[1], rel=0.05)
    assert 0 < gaps[1] < 0.01


@pytest.mark.parametrize("name", ["probit", "poisson", "student_t"])
def test_any_start_and_damping_reach_the_same_fixed_point(name):
    model, plan, data = problem(name, PowerEP())
    expected = run(model, plan, data).state
    for engine in (PowerEP(damping=0.3, memory=0), PowerEP()):
        model, plan, data = problem(name, engine)
        found = run(model, plan, data, Sites(2.0 * normal(9, seed=1), normal(9, seed=2).square()))
        assert found.converged
        assert found.state.value == pytest.approx(expected.value, rel=1e-8)


def test_evidence_is_close_to_the_truth_of_a_small_problem():
    """Three probit rows: EP against brute-force integration, within its known accuracy of about 1e-3 nats."""
    model, plan, data = problem("probit", PowerEP(), mean=None, rows=3)
    value = run(model, plan, data).state.value
    K = gram_matrix(model, data).numpy()
    # p(y) is an orthant probability of y ∘ (f + ε)
    sign = np.diag(2 * data.y.numpy() - 1)
    truth = stats.multivariate_normal.logcdf(np.zeros(3), np.zeros(3), sign @ (K + np.eye(3)) @ sign, abseps=1e-9)
    assert value == pytest.approx(truth, abs=5e-3)


@pytest.mark.parametrize("options", [{"power": 0.0}, {"power": 1.5}, {"damping": 0.0}, {"damping": -1.0}])
def test_parameters_outside_their_range_are_refused(options):
    with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
        PowerEP(**options)


@pytest.mark.parametrize("power", [1.0, 0.5])
@torch.no_grad()
def test_weight_three_is_the_row_three_times(power):
    model, plan, data = problem("poisson", PowerEP(power=power))
    weight = torch.tensor([1, 3, 1, 1, 2, 1, 1, 1, 1])
    weighted = run(model, plan, Data(data.X, data.y, weight.to(data.X))).state
    repeated = data.rows(torch.arange(9).repeat_interleave(weight))
    expected = run(model, model.family.plan(model.prior, repeated.X, model.policy), repeated).state
    assert weighted.value == pytest.approx(expected.value, rel=1e-9)
    for one, other in zip(weighted.posterior.marginals(X_NEW), expected.posterior.marginals(X_NEW), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_a_fractional_weight_is_that_fraction_of_a_replicate():
    """Two half rows are one row, for the power that removes at most a whole site."""
    model, plan, data = problem("probit", PowerEP(power=0.5))
    whole = run(model, plan, data).state
    rows = torch.cat([torch.arange(9), torch.arange(9)])
    halves = Data(data.X[rows], data.y[rows], torch.full((18,), 0.5, dtype=torch.float64))
    split = run(model, model.family.plan(model.prior, halves.X, model.policy), halves).state
    # the same as half the power on whole rows
    model, plan, data = problem("probit", PowerEP(power=0.25))
    quarter = run(model, plan, data).state
    assert split.value == pytest.approx(quarter.value, rel=1e-8)
    assert split.value != pytest.approx(whole.value, rel=1e-8)
