"""The dual fixed point is the best Gaussian: the optimum of the bound over every mean and covariance."""

import numpy as np
import pytest
import torch
from oracles import likelihoods as likelihood_oracle
from oracles import variational as oracle
from scipy import special
from toys import gram_matrix, problem

from mercer.inference import run
from mercer.inference.objective import expected_log_prob

ROWS = 6
LOG_DENSITIES = {
    "probit": lambda y: lambda f: special.log_ndtr((2 * y - 1) * f),
    "logit": lambda y: lambda f: special.log_expit((2 * y - 1) * f),
    "poisson": lambda y: lambda f: y * f - np.exp(f) - special.gammaln(y + 1),
    "student_t": lambda y: lambda f: likelihood_oracle.student_t(y, f, 4.0, 0.4),
}


def converged(name):
    model, plan, data = problem(name, mean=None, rows=ROWS)
    if name == "student_t":  # narrow beside v: as fine a rule as the oracle's
        model.likelihood.n_nodes = 400
    inference = run(model, plan, data)
    assert inference.converged
    return model, data, inference.state


@pytest.mark.parametrize("name", LOG_DENSITIES)
def test_fixed_point_is_the_optimum_found_by_lbfgs(name):
    model, data, state = converged(name)
    K, log_density = gram_matrix(model, data).numpy(), LOG_DENSITIES[name](data.y.numpy())
    bound, mean, covariance = oracle.optimum(K, log_density)
    assert state.value == pytest.approx(bound, rel=1e-8)
    m, S = (item.detach().numpy() for item in state.posterior.joint(data.X))
    np.testing.assert_allclose(m, mean, atol=1e-6)
    np.testing.assert_allclose(S, covariance, atol=1e-6)


def test_the_student_t_optimum_has_negative_sites():
    """Otherwise the comparison above says nothing about them."""
    assert float(converged("student_t")[2].sites.precision.min()) < -0.01


@pytest.mark.parametrize("name", [*LOG_DENSITIES, "negative_binomial", "ordinal"])
def test_fixed_point_has_zero_gradient_and_the_representer_form(name):
    """m = K α and S⁻¹ = K⁻¹ + diag β, in the notation of Opper and Archambeau."""
    model, data, state = converged(name)
    with torch.no_grad():
        K = gram_matrix(model, data)
        m, v = state.posterior.at_data()
        _, alpha, beta = expected_log_prob(model, data, m, v)
        torch.testing.assert_close(m, K @ alpha, rtol=1e-6, atol=1e-6)
        S = state.posterior.joint(data.X)[1]
        eye = torch.eye(ROWS, dtype=K.dtype)
        torch.testing.assert_close(S @ (eye + beta.diag() @ K), K, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["probit", "logit", "poisson", "negative_binomial", "ordinal"])
def test_log_concave_likelihoods_have_positive_sites(name):
    assert bool((converged(name)[2].sites.precision > 0).all())
