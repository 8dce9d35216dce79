"""The dual bound: sites held fixed, q_θ follows the prior."""

import numpy as np
import pytest
import torch
from toys import gram_matrix, problem

from mercer.inference import Conjugate, run
from mercer.inference.objective import evidence_lower_bound, expected_log_prob
from mercer.inference.theta import ThetaVector

NAMES = ["probit", "poisson", "student_t", "negative_binomial"]


def dense_bound(model, data, mean, covariance):
    """Σ E_q[log p] − KL[q ‖ p_θ] for any q of the centred latent, from dense matrices."""
    K = gram_matrix(model, data)
    value = expected_log_prob(model, data, mean, covariance.diagonal()).value.sum()
    kl = torch.linalg.solve(K, covariance + mean.outer(mean)).trace() - len(mean)
    return value - 0.5 * (kl + torch.linalg.slogdet(K)[1] - torch.linalg.slogdet(covariance)[1])


@pytest.mark.parametrize("name", NAMES)
def test_the_dual_bound_is_the_bound_of_the_q_that_follows_theta(name):
    model, plan, data = problem(name)
    sites = run(model, plan, data).state.sites
    vector = ThetaVector(model)
    theta = vector.read()
    for seed in range(5):
        vector.write(theta + 0.2 * np.random.default_rng(seed).normal(size=len(theta)))
        with torch.no_grad():
            posterior = model.family.condition(model.prior, plan, sites)
            m, S = posterior.joint(data.X)
            expected = dense_bound(model, data, m - model.prior.mean_at(data.X), S)
            found = evidence_lower_bound(model, posterior, data)
        assert float(found) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_three_gradients_agree_at_the_fixed_point(name):
    """Of the engine's objective, of the dual bound, and of the bound whose q = N(m, S) stands still."""
    model, plan, data = problem(name)
    state = run(model, plan, data).state
    vector = ThetaVector(model)
    gradients = []
    with torch.no_grad():
        m, S = state.posterior.joint(data.X)
        m = m - model.prior.mean_at(data.X)

    def standing():
        K = torch.linalg.cholesky(_gram(model, data))
        value = expected_log_prob(model, data, m, S.diagonal()).value.sum()
        second = torch.cholesky_solve(S + m.outer(m), K).trace()
        return value - 0.5 * (second + 2 * K.diagonal().log().sum())

    for objective in (
        lambda: model.engine.objective(model, plan, state, data),
        lambda: evidence_lower_bound(model, model.family.condition(model.prior, plan, state.sites), data),
        standing,
    ):
        vector.zero_grad()
        objective().backward()
        gradients.append(vector.gradient())
    assert np.abs(gradients[0]).max() > 0.1
    np.testing.assert_allclose(gradients[1], gradients[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gradients[2], gradients[0], rtol=1e-6, atol=1e-6)


def _gram(model, data):
    return model.prior.kernel(data.X).to_dense()


def test_frozen_gaussian_sites_give_the_evidence_at_every_kernel_hyperparameter():
    """The collapsed bound: y/σ² and 1/σ² do not depend on the kernel."""
    model, plan, data = problem("gaussian")
    sites = run(model, plan, data).state.sites
    exact, _, _ = problem("gaussian", Conjugate())
    own, other = ThetaVector(model), ThetaVector(exact)
    kernel = np.array([name.startswith("kernel") for name in own.names])
    for seed in range(5):
        theta = own.read() + kernel * np.random.default_rng(seed).normal(size=len(own))
        own.write(theta), other.write(theta)
        with torch.no_grad():
            bound = evidence_lower_bound(model, model.family.condition(model.prior, plan, sites), data)
            evidence = exact.engine.objective(exact, plan, run(exact, plan, data).state, data)
        assert float(bound) == pytest.approx(float(evidence), rel=1e-9)


def test_following_theta_is_tighter_than_standing_still():
    """Why sites are kept and not moments: away from the converged θ the dual bound loses less."""
    model, plan, data = problem("probit")
    state = run(model, plan, data).state
    with torch.no_grad():
        m, S = state.posterior.joint(data.X)
        m = m - model.prior.mean_at(data.X)
        model.prior.kernel.base_kernel.lengthscale = 1.6
        best = run(model, plan, data).state.value
        followed = evidence_lower_bound(model, model.family.condition(model.prior, plan, state.sites), data)
        stood = dense_bound(model, data, m, S)
    assert stood < followed < best
    assert best - followed < 0.1 * (best - stood)
