"""The dual fixed point with inducing points is the best q(u): the optimum of SVGP's bound over every m and S."""

import math

import pytest
import torch
from inducing_toys import Z, kernel_of, problem, q_of_u
from oracles import inducing as oracle
from toys import X

from mercer.inference import Dual, run
from mercer.inference.objective import expected_log_prob
from mercer.linalg.cholesky import NotPositiveDefiniteError

COVARIANCES = oracle.covariances(kernel_of(), Z, X)


def student_t(y, f):
    """Four degrees of freedom, scale 0.4."""
    constant = math.lgamma(2.5) - math.lgamma(2.0) - 0.5 * math.log(4 * math.pi * 0.4**2)
    return constant - 2.5 * torch.log1p(((y - f) / 0.4) ** 2 / 4.0)


LOG_DENSITIES = {
    "probit": lambda y, f: torch.special.log_ndtr((2 * y - 1) * f),
    "logit": lambda y, f: torch.nn.functional.logsigmoid((2 * y - 1) * f),
    "poisson": lambda y, f: y * f - f.exp() - torch.lgamma(y + 1),
    "student_t": student_t,
}


def converged(name, engine=None):
    model, plan, data = problem(name, engine, mean=None, tol=1e-18)
    if name == "student_t":  # narrow beside v: as fine a rule as the oracle's
        model.likelihood.n_nodes = 400
    inference = run(model, plan, data)
    assert inference.converged
    return model, data, inference.state


@pytest.mark.parametrize("name", LOG_DENSITIES)
def test_the_fixed_point_is_the_optimum_found_by_lbfgs(name):
    _, data, state = converged(name)
    bound, m, S = oracle.optimum(*COVARIANCES, lambda f: LOG_DENSITIES[name](data.y, f))
    assert state.value == pytest.approx(float(bound), abs=1e-11)
    for found, expected in zip(q_of_u(state.posterior), (m, S), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-8)  # as far as L-BFGS gets


def test_the_student_t_optimum_has_negative_sites():
    """Otherwise the comparison above says nothing about them."""
    assert float(converged("student_t")[2].sites.precision.min()) < -0.01


@pytest.mark.parametrize("name", [*LOG_DENSITIES, "negative_binomial", "ordinal"])
def test_the_fixed_point_has_the_representer_form(name):
    """m = K_uf α and S⁻¹ = K_uu⁻¹ + Aᵀ diag(β) A."""
    model, data, state = converged(name)
    Kuu, Kuf, _ = COVARIANCES
    with torch.no_grad():
        _, alpha, beta = expected_log_prob(model, data, *state.posterior.at_data())
        m, S = q_of_u(state.posterior)
        torch.testing.assert_close(m, Kuf @ alpha, rtol=1e-9, atol=1e-9)
        expected = oracle.q_of_sites(Kuu, Kuf, alpha, beta)[1]
        torch.testing.assert_close(S, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("step_size", [1.0, 5.0])
@pytest.mark.parametrize("memory", [0, 5])
@pytest.mark.parametrize("name", ["logit", "poisson", "student_t", "softmax"])
def test_accepted_steps_climb_whatever_the_first_step_size(name, memory, step_size):
    expected = run(*problem(name)).state.value
    model, plan, data = problem(name, Dual(step_size, memory))
    slack = model.likelihood.resolution * data.n_rows
    with torch.no_grad():
        state = model.engine.init(model, plan, data)
        for _ in range(100):
            before = state.value
            state, info = model.engine.step(model, plan, state, data)
            assert state.value >= before - 1e-9 * abs(before) - slack
            if info["converged"]:
                break
    assert info["converged"] and state.value == pytest.approx(expected, rel=1e-11, abs=1e-8 * (name == "softmax"))


@pytest.mark.parametrize("name", ["logit", "poisson", "student_t", "softmax"])
@torch.no_grad()
def test_without_control_steps_of_five_lead_away(name):
    """What the test above guards against."""
    model, plan, data = problem(name)
    state = model.engine.init(model, plan, data)
    for _ in range(20):
        sites = state.sites.blend(state.target, 5.0)
        try:
            _ = state.posterior.with_sites(sites).state
        except NotPositiveDefiniteError:
            return
        before, state = state, model.engine.init(model, plan, data, sites)
        if not state.value > before.value - 1.0:
            return
    raise AssertionError("constant steps of five do no harm here")
