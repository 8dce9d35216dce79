"""The dual bound with inducing points: sites held fixed, q_θ(u) follows the prior and the places."""

import numpy as np
import pytest
import torch
from inducing_toys import Z, kernel_of, problem
from oracles import inducing as oracle
from toys import DTYPE, normal

from mercer._typing import Data
from mercer.families import Inducing, Prior
from mercer.families.inducing_plan import InducingPlan
from mercer.inference import Conjugate, Dual, run
from mercer.inference.evidence import Evidence
from mercer.inference.objective import evidence_lower_bound, expected_log_prob
from mercer.inference.theta import ThetaVector
from mercer.kernels import Matern52
from mercer.likelihoods import Bernoulli, Gaussian
from mercer.model import Model
from mercer.policy import NumericalPolicy

NAMES = ["probit", "poisson", "student_t", "negative_binomial"]


def covariances(model, plan):
    """K_uu, K_uf and K_ff of the model where it stands, by the closed formula."""
    kernel = model.prior.kernel
    return oracle.covariances(kernel_of(kernel.base_kernel.lengthscale, kernel.outputscale), plan.Z, plan.X)


def bound_of_q(model, plan, data, m, S):
    """Σ E_q[log p] − KL[N(m, S) ‖ p_θ(u)] from dense matrices; expectations are the likelihood's own."""
    Kuu, Kuf, Kff = covariances(model, plan)
    mean, covariance = oracle.predict(Kuu, Kuf, Kff, m, S)
    return expected_log_prob(model, data, mean, covariance.diagonal()).value.sum() - oracle.kl(Kuu, m, S)


def following(model, plan, sites):
    """m and S of q_θ(u) ∝ p_θ(u) ∏ t(aᵢᵀu)."""
    Kuu, Kuf, _ = covariances(model, plan)
    return oracle.q_of_sites(Kuu, Kuf, sites.linear, sites.precision)


@pytest.mark.parametrize("name", NAMES)
def test_the_dual_bound_is_the_bound_of_the_q_that_follows_theta(name):
    model, plan, data = problem(name, learned=True)
    sites = run(model, plan, data).state.sites
    vector = ThetaVector(model, plan)
    theta = vector.read()
    for seed in range(5):
        vector.write(theta + 0.2 * np.random.default_rng(seed).normal(size=len(theta)))
        with torch.no_grad():
            expected = bound_of_q(model, plan, data, *following(model, plan, sites))
            found = evidence_lower_bound(model, model.family.condition(model.prior, plan, sites), data)
        assert float(found) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_three_gradients_agree_at_the_fixed_point_those_in_places_too(name):
    """Of the engine's objective, of the dual bound, and of SVGP's bound whose N(m, S) stands still."""
    model, plan, data = problem(name, learned=True, tol=1e-18)
    state = run(model, plan, data).state
    vector = ThetaVector(model, plan)
    with torch.no_grad():
        m, S = following(model, plan, state.sites)
    gradients = []
    for objective in (
        lambda: model.engine.objective(model, plan, state, data),
        lambda: evidence_lower_bound(model, model.family.condition(model.prior, plan, state.sites), data),
        lambda: bound_of_q(model, plan, data, m, S),
    ):
        vector.zero_grad()
        objective().backward()
        gradients.append(vector.gradient())
    places = np.array([each.startswith("plan.Z") for each in vector.names])
    assert places.sum() == len(Z) and np.abs(gradients[0][places]).max() > 0.1 < np.abs(gradients[0][~places]).max()
    # what the fixed point is known to
    np.testing.assert_allclose(gradients[1], gradients[0], rtol=0, atol=2e-8)
    np.testing.assert_allclose(gradients[2], gradients[0], rtol=0, atol=2e-8)


def test_frozen_gaussian_sites_give_the_collapsed_bound_at_every_kernel_and_place():
    """y/σ² and 1/σ² depend on neither; the conjugate engine's gradient is that of the formula, in the noise too."""
    model, plan, data = problem("gaussian", learned=True)
    sites = run(model, plan, data).state.sites
    exact, _, _ = problem("gaussian", Conjugate())
    own, other = ThetaVector(model, plan), ThetaVector(exact, plan)
    moving = np.array([name.startswith(("kernel", "plan")) for name in own.names])
    theta = own.read()
    for seed in range(5):
        moved = theta + 0.4 * moving * np.random.default_rng(seed).normal(size=len(theta))
        own.write(moved), other.write(moved)
        with torch.no_grad():
            bound = evidence_lower_bound(model, model.family.condition(model.prior, plan, sites), data)
        other.zero_grad()
        noise = exact.likelihood.value_of("noise_variance", data.y)
        y = data.y - exact.prior.mean_at(data.X)
        collapsed = oracle.collapsed_bound(*covariances(exact, plan), y, noise * torch.eye(len(y), dtype=DTYPE))
        collapsed.backward()
        expected = other.gradient()
        value, gradient = Evidence(exact, plan, data)(moved)
        assert float(bound) == pytest.approx(collapsed.item(), rel=1e-12)
        assert value == pytest.approx(collapsed.item(), rel=1e-12)
        np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-9)


# ---- what to hold fixed while θ moves: section 2.2 of the specification

N, M = 60, 10
MOVES = [(0.5, 1.0), (1.0, 1.0), (0.7, 2.0), (0.7, 0.5)]


def toy(likelihood):
    """Matérn-5/2 at (0.7, 1) on a line; returns the model, a plan with ten places, and the data."""
    rows = torch.sort(6.0 * torch.rand(N, 1, generator=torch.Generator().manual_seed(0), dtype=DTYPE), 0).values
    signal = torch.sin(2.0 * rows.squeeze(-1)) + 0.5 * torch.cos(5.0 * rows.squeeze(-1))
    y = signal + 0.3 * normal(N, seed=1)
    y = y if isinstance(likelihood, Gaussian) else (y > 0).to(DTYPE)
    policy = NumericalPolicy(tol=1e-13, max_inner=1000)
    model = Model(Prior(Matern52(0.7, outputscale=1.0)), likelihood, Inducing(M), Dual(), policy)
    plan = InducingPlan(rows, torch.linspace(0.2, 5.8, M, dtype=DTYPE).unsqueeze(-1), policy)
    return model, plan, Data(rows, y, torch.ones(N, dtype=DTYPE))


@pytest.mark.parametrize("likelihood", [Gaussian(0.09), Bernoulli("logit")], ids=["gaussian", "bernoulli"])
def test_sites_per_row_and_tied_at_u_stay_tight_while_theta_moves_and_other_forms_do_not(likelihood):
    """Nats lost against the bound that is climbed again: the reason for what is stored."""
    model, plan, data = toy(likelihood)
    state = run(model, plan, data).state
    with torch.no_grad():
        Kuu = covariances(model, plan)[0]
        m, S = following(model, plan, state.sites)
        forms = {form: oracle.dual_form(form, Kuu, m, S) for form in "UKW"}
        tied = state.posterior.tied()
        torch.testing.assert_close(tied.precision, forms["U"][1], rtol=1e-6, atol=1e-6)
    vector = ThetaVector(model)
    theta = vector.read()
    for lengthscale, outputscale in MOVES:
        vector.write(np.concatenate([np.log([outputscale, lengthscale]), theta[2:]]))
        with torch.no_grad():
            best = run(model, plan, data).state.value
            K = covariances(model, plan)[0]
            values = {form: bound_of_q(model, plan, data, *oracle.q_of_form(form, K, *forms[form])) for form in "UKW"}
            values["rows"] = evidence_lower_bound(model, model.family.condition(model.prior, plan, state.sites), data)
            values["moments"] = bound_of_q(model, plan, data, m, S)
        lost = {kept: best - float(value) for kept, value in values.items()}
        assert lost["rows"] < lost["U"] + 1e-9 and lost["U"] < lost["moments"]
        assert 3.0 * lost["U"] < min(lost["K"], lost["W"])
        if model.likelihood.conjugate:
            assert abs(lost["rows"]) < 1e-9 and lost["U"] < 0.5 and min(lost["K"], lost["W"]) > 10.0
        if lengthscale == 0.7:  # what rows say of u does not depend on the amplitude
            assert lost["U"] == pytest.approx(lost["rows"], abs=1e-9)
