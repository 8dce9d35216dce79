"""The dual update of tied sites is a natural-gradient step of SVGP's bound in q(u) = N(m, S)."""

import pytest
import torch
from inducing_toys import Z, kernel_of, problem, q_of_u
from oracles import inducing as oracle
from toys import X, normal

from mercer._typing import Sites
from mercer.inference.objective import expected_log_prob

NAMES = ["gaussian", "probit", "logit", "poisson", "student_t", "negative_binomial", "ordinal"]
COVARIANCES = oracle.covariances(kernel_of(), Z, X)


@torch.no_grad()
def started(model, plan, data):
    """The engine's state at arbitrary sites."""
    return model.engine.init(model, plan, data, Sites(normal(9, seed=3), 0.2 + normal(9, seed=4).square()))


def expectation_parameters(posterior):
    """(m, S + m mᵀ) as leaves."""
    m, S = q_of_u(posterior)
    return m.requires_grad_(), (S + m.outer(m)).detach().requires_grad_()


def data_term(model, data, first, second):
    """Σ E_q[log p] and what it is made of, as a function of expectation parameters."""
    mean, covariance = oracle.predict(*COVARIANCES, first, second - first.outer(first))
    found = expected_log_prob(model, data, mean, covariance.diagonal())
    return found, mean


@pytest.mark.parametrize("name", NAMES)
def test_gradient_in_expectation_parameters_is_the_tied_target(name):
    """∇ Σℓ in (m, S + m mᵀ) is (Aᵀ(α + β m), −½ Aᵀ diag(β) A): what `tied` makes of the sites (α + β m, β)."""
    model, plan, data = problem(name)
    state = started(model, plan, data)
    first, second = expectation_parameters(state.posterior)
    found, mean = data_term(model, data, first, second)
    slopes = torch.autograd.grad(found.value.sum(), (first, second))
    A = COVARIANCES[1].T @ torch.linalg.inv(COVARIANCES[0])
    pull = found.alpha + found.beta * mean.detach()
    torch.testing.assert_close(slopes[0], A.T @ pull, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slopes[1], -0.5 * A.T @ found.beta.diag() @ A, rtol=1e-12, atol=1e-12)
    tied = state.posterior.with_sites(Sites(pull, found.beta)).tied()
    torch.testing.assert_close(tied.linear, slopes[0], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(tied.precision, -2.0 * slopes[1], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("step_size", [0.3, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_a_dual_step_is_a_gradient_step_in_natural_parameters(name, step_size):
    """η ← η + ρ ∂ELBO/∂μ with the dense KL and autograd through the whole bound."""
    model, plan, data = problem(name)
    state = started(model, plan, data)
    first, second = expectation_parameters(state.posterior)
    S = second - first.outer(first)
    bound = data_term(model, data, first, second)[0].value.sum() - oracle.kl(COVARIANCES[0], first, S)
    slopes = torch.autograd.grad(bound, (first, second))
    S = S.detach()
    linear = torch.linalg.solve(S, first.detach()) + step_size * slopes[0]
    expected = torch.linalg.inv(torch.linalg.inv(S) - 2.0 * step_size * slopes[1])
    reached = state.posterior.with_sites(state.sites.blend(state.target, step_size))
    m, found = q_of_u(reached)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(m, expected @ linear, rtol=1e-11, atol=1e-11)
