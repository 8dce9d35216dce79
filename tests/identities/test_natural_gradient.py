"""The dual update is a natural-gradient step on the evidence lower bound."""

import pytest
import torch
from toys import gram_matrix, normal, problem

from mercer._typing import Sites
from mercer.inference.objective import expected_log_prob

NAMES = ["gaussian", "probit", "logit", "poisson", "student_t", "negative_binomial", "ordinal"]


@pytest.mark.parametrize("name", NAMES)
def test_gradient_in_expectation_parameters_is_the_target_site(name):
    """∇ Σℓ in (E[g], E[g²]) is (α + β m, −½ β)."""
    model, _, data = problem(name)
    first = 0.5 * normal(9, seed=1)
    second = first.square() + 0.2 + normal(9, seed=2).square()
    first.requires_grad_(), second.requires_grad_()
    found = expected_log_prob(model, data, first, second - first.square())
    slopes = torch.autograd.grad(found.value.sum(), (first, second))
    torch.testing.assert_close(slopes[0], found.alpha + found.beta * first.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slopes[1], -0.5 * found.beta, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("step_size", [0.3, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_dual_step_is_a_gradient_step_in_natural_parameters(name, step_size):
    """η ← η + ρ ∂ELBO/∂μ with dense expectation parameters μ = (E[g], E[g gᵀ]) and autograd through the bound."""
    model, plan, data = problem(name)
    K = gram_matrix(model, data)
    sites = Sites(normal(9, seed=3), 0.2 + normal(9, seed=4).square())
    with torch.no_grad():
        state = model.engine.init(model, plan, data, sites)
        m, S = state.posterior.joint(data.X)
        m = m - model.prior.mean_at(data.X)
    first, second = m.clone().requires_grad_(), (S + m.outer(m)).requires_grad_()
    mean, cov = first, second - first.outer(first)
    kl = torch.linalg.solve(K, cov + mean.outer(mean)).trace() - torch.linalg.slogdet(cov)[1]
    bound = expected_log_prob(model, data, mean, cov.diagonal()).value.sum() - 0.5 * kl
    slope_first, slope_second = torch.autograd.grad(bound, (first, second))
    S_inverse = torch.linalg.inv(S)
    natural = S_inverse @ m + step_size * slope_first, S_inverse - 2 * step_size * slope_second
    reached = state.sites.blend(state.target, step_size)
    size = float(S_inverse.abs().max())
    torch.testing.assert_close(reached.linear, natural[0], rtol=1e-9, atol=1e-11 * size)
    expected = torch.linalg.inv(K) + reached.precision.diag()
    torch.testing.assert_close(expected, natural[1], rtol=1e-9, atol=1e-11 * size)
