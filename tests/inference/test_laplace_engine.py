"""The Laplace engine against algorithms 3.1 and 3.2 of Rasmussen and Williams, and beyond log-concave data."""

import numpy as np
import pytest
import torch
from oracles import laplace as oracle
from oracles import likelihoods as likelihood_oracle
from scipy import special, stats
from toys import X_NEW, gram_matrix, normal, problem

from mercer._typing import Data, Sites
from mercer.inference import Laplace, run
from mercer.kernels import gram


def probit(y):
    sign = 2 * y - 1

    def ratio(f):
        return np.exp(stats.norm.logpdf(f) - special.log_ndtr(sign * f))

    return (
        lambda f: special.log_ndtr(sign * f),
        lambda f: sign * ratio(f),
        lambda f: ratio(f) ** 2 + sign * f * ratio(f),
    )


def logit(y):
    pi = special.expit
    return lambda f: special.log_expit((2 * y - 1) * f), lambda f: y - pi(f), lambda f: pi(f) * (1 - pi(f))


def poisson(y):
    return lambda f: y * f - np.exp(f) - special.gammaln(y + 1), lambda f: y - np.exp(f), np.exp


ORACLES = {"probit": probit, "logit": logit, "poisson": poisson}


@pytest.mark.parametrize("name", ORACLES)
@torch.no_grad()
def test_mode_evidence_and_predictions_follow_the_textbook(name):
    model, plan, data = problem(name, Laplace(), mean=None)
    inference = run(model, plan, data)
    assert inference.converged
    K = gram_matrix(model, data).numpy()
    log_prob, slope, curvature = ORACLES[name](data.y.numpy())
    mode, evidence = oracle.mode(K, log_prob, slope, curvature)
    posterior = inference.state.posterior
    np.testing.assert_allclose(posterior.at_data()[0], mode, rtol=1e-7, atol=1e-8)
    found = model.engine.objective(model, plan, inference.state, data)
    assert float(found) == pytest.approx(evidence, rel=1e-9)
    K_new = gram(model.prior.kernel, X_NEW, data.X).numpy()
    mean, variance = oracle.predict(K, K_new, np.full(len(X_NEW), 1.2), mode, slope, curvature)
    np.testing.assert_allclose(posterior.marginals(X_NEW)[0], mean, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(posterior.marginals(X_NEW)[1], variance, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["probit", "poisson", "negative_binomial", "ordinal", "student_t"])
@torch.no_grad()
def test_the_mode_is_stationary_and_steps_climb(name):
    model, plan, data = problem(name, Laplace())
    state = model.engine.init(model, plan, data, Sites(3.0 * normal(9, seed=1), normal(9, seed=2).square()))
    for _ in range(60):
        before = state.value
        state, info = model.engine.step(model, plan, state, data)
        assert state.value >= before - 1e-9 * max(1.0, abs(before))
    assert info["converged"]
    m, _ = state.posterior.at_data()
    push = model.likelihood.log_prob_derivatives(data.y, m).d1
    torch.testing.assert_close(m - 0.2, gram_matrix(model, data) @ push, rtol=1e-7, atol=1e-7)


@torch.no_grad()
def test_student_t_covariance_is_the_inverse_hessian_with_its_negative_entries():
    model, plan, data = problem("student_t", Laplace(), mean=None)
    state = run(model, plan, data).state
    m, S = state.posterior.joint(data.X)
    W = -model.likelihood.log_prob_derivatives(data.y, m).d2
    assert float(W.min()) < 0
    K = gram_matrix(model, data)
    torch.testing.assert_close(S @ (torch.linalg.inv(K) + W.diag()), torch.eye(9, dtype=K.dtype), rtol=0, atol=1e-6)
    # the joint density at the mode, from definitions
    log_joint = sum(likelihood_oracle.student_t(y, f, 4.0, 0.4) for y, f in zip(data.y.numpy(), m.numpy(), strict=True))
    log_joint += stats.multivariate_normal.logpdf(m.numpy(), np.zeros(9), K.numpy())
    evidence = log_joint + 0.5 * np.linalg.slogdet(2 * np.pi * S.numpy())[1]
    found = model.engine.objective(model, plan, state, data)
    assert float(found) == pytest.approx(evidence, rel=1e-9)


def test_a_mode_without_negative_definite_curvature_is_noted():
    """Two groups of targets far apart, under a prior that nearly ties them: the middle is a saddle or flat."""
    model, _, _ = problem("student_t", Laplace(), mean=None)
    model.prior.kernel.base_kernel.lengthscale = 50.0
    model.prior.kernel.outputscale = 100.0
    y = torch.tensor([-4.0, 4.0, -4.0, 4.0, -4.0, 4.0, -4.0, 4.0, 0.0], dtype=torch.float64)
    X = torch.linspace(0, 1, 9, dtype=torch.float64).unsqueeze(-1)
    data = Data(X, y, torch.ones(9, dtype=torch.float64))
    found = run(model, model.family.plan(model.prior, X, model.policy), data)
    assert found.converged or found.notes


def test_extreme_counts_converge_from_nothing():
    model, plan, data = problem("poisson", Laplace(), mean=None)
    y = torch.tensor([0, 3000, 0, 2, 5000, 1, 0, 0, 40000], dtype=torch.float64)
    found = run(model, plan, Data(data.X, y, data.weight))
    assert found.converged and float(found.state.posterior.at_data()[0][8].exp()) == pytest.approx(40000, rel=0.01)
