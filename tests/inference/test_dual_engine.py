"""The dual engine: step control, any start, honesty about clamping."""

import numpy as np
import pytest
import torch
from toys import PROBLEMS, gram_matrix, normal, problem

from mercer._typing import Data, Sites
from mercer.inference import Dual, run
from mercer.inference.objective import evidence_lower_bound
from mercer.likelihoods import Poisson, StudentT

NAMES = sorted(PROBLEMS)


def shape(name):
    return (3, 9) if name == "softmax" else (9,)


def start(name, seed):
    return Sites(3.0 * normal(*shape(name), seed=seed), 5.0 * normal(*shape(name), seed=seed + 50).square())


@pytest.mark.parametrize("step_size", [5.0, 1.0, 0.05])
@pytest.mark.parametrize("name", NAMES)
def test_any_start_and_any_first_step_reach_the_same_fixed_point(name, step_size):
    model, plan, data = problem(name)
    expected = run(model, plan, data).state
    model, plan, data = problem(name, Dual(step_size=step_size, memory=0))
    for sites in (None, start(name, 1), start(name, 2)):
        found = run(model, plan, data, sites)
        assert found.converged
        # softmax averages over draws, and knows its fixed point to their resolution
        slack = 1e-4 if name == "softmax" else 1e-7
        assert found.state.value == pytest.approx(expected.value, abs=slack)
        atol = 1e-2 if name == "softmax" else 1e-5
        for one, other in zip(found.state.posterior.at_data(), expected.posterior.at_data(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=atol)


@pytest.mark.parametrize("memory", [0, 5])
@pytest.mark.parametrize("name", NAMES)
def test_accepted_steps_never_lower_the_bound(name, memory):
    model, plan, data = problem(name, Dual(step_size=5.0, memory=memory))
    slack = 1e-8 + model.likelihood.resolution * 9
    with torch.no_grad():
        for seed in range(3):
            state = model.engine.init(model, plan, data, start(name, seed))
            for _ in range(30):
                before = state.value
                state, _ = model.engine.step(model, plan, state, data)
                assert state.value >= before - slack * max(1.0, abs(before))
                bound = evidence_lower_bound(model, state.posterior, data)
                assert state.value == pytest.approx(float(bound), rel=1e-9)


def test_acceleration_saves_steps():
    counts = {}
    for memory in (0, 5):
        model, plan, data = problem("softmax", Dual(memory=memory))
        counts[memory] = run(model, plan, data).n_steps
        model, plan, data = problem("student_t", Dual(memory=memory))
        counts[memory] += run(model, plan, data).n_steps
    assert counts[5] < counts[0]


def test_extreme_counts_converge_from_nothing():
    """At zero latents the Newton target of a count of thousands lies at e^thousands."""
    model, plan, data = problem("poisson", mean=None)
    y = torch.tensor([0, 3000, 0, 2, 5000, 1, 0, 0, 40000], dtype=torch.float64)
    data = Data(data.X, y, data.weight)
    found = run(model, plan, data)
    assert found.converged
    m, _ = found.state.posterior.at_data()
    assert float(m[8].exp()) == pytest.approx(40000, rel=0.01)


def test_converged_sites_of_any_hyperparameters_are_a_safe_start():
    """Negative sites that a wide prior cannot bear are given up, not passed on as an error."""
    model, plan, data = problem("student_t", mean=None)
    bad = Sites(torch.zeros(9, dtype=torch.float64), torch.full((9,), -50.0, dtype=torch.float64))
    found = run(model, plan, data, bad)
    assert found.converged
    assert found.state.value == pytest.approx(run(model, plan, data).state.value, rel=1e-9)


def test_a_prior_that_is_not_finite_is_an_error_from_a_cold_start():
    model, plan, data = problem("probit")
    model.prior.kernel.base_kernel.raw_lengthscale.data.fill_(torch.nan)
    with pytest.raises(ArithmeticError):
        run(model, plan, data)


@pytest.mark.parametrize("seed", range(20))
def test_student_t_converges_with_outliers_and_says_when_it_clamped(seed):
    rng = np.random.default_rng(seed)
    model, plan, data = problem("student_t", mean=None)
    model.likelihood.get_parameter("log_scale").data.fill_(np.log(0.05 + 0.5 * rng.uniform()))
    y = torch.as_tensor(rng.normal(size=9) + 6.0 * (rng.uniform(size=9) < 0.3) * rng.normal(size=9))
    found = run(model, plan, Data(data.X, y, data.weight))
    assert found.converged or any("clamped" in note for note in found.notes), "neither converged nor noted"
    if not found.notes:
        # unclamped fixed points are stationary: λ2 = β exactly, negative ones included
        state = found.state
        assert float((state.target.precision - state.sites.precision).abs().max()) < 1e-3
    K = gram_matrix(model, data)
    eye = torch.eye(9, dtype=K.dtype)
    L = torch.linalg.cholesky(K)
    assert float(torch.linalg.eigvalsh(eye + L.T @ found.state.sites.precision.diag() @ L).min()) > 0


def test_weights_scale_sites_and_nothing_else():
    model, plan, data = problem("poisson")
    data = Data(data.X, data.y, 1.0 + normal(9, seed=3).square())
    state = run(model, plan, data).state
    m, v = state.posterior.at_data()
    found = Poisson().expected_log_prob(data.y, m, v)
    torch.testing.assert_close(state.sites.precision, data.weight * found.beta, rtol=1e-5, atol=1e-6)
    centred = m - 0.2
    torch.testing.assert_close(
        state.sites.linear, data.weight * (found.alpha + found.beta * centred), rtol=1e-5, atol=1e-6
    )


def test_step_reports_its_halvings():
    model, plan, data = problem("poisson", Dual(step_size=5.0, memory=0), mean=None)
    y = torch.tensor([0, 300, 0, 2, 500, 1, 0, 0, 4], dtype=torch.float64)
    data = Data(data.X, y, data.weight)
    with torch.no_grad():
        state = model.engine.init(model, plan, data)
        _, info = model.engine.step(model, plan, state, data)
    assert info["halvings"] > 0 and info["residual"] > 0 and not info["converged"]


def test_two_outputs_with_heavy_tails_are_two_fits():
    model, plan, data = problem("student_t")
    both = Data(data.X, torch.stack([data.y, data.y.flip(0)]), data.weight)
    found = run(model, plan, both)
    assert found.converged and found.state.sites.linear.shape == (2, 9)
    parts = [run(model, plan, Data(data.X, y, data.weight)).state.value for y in both.y]
    assert found.state.value == pytest.approx(sum(parts), rel=1e-8)
    assert isinstance(model.likelihood, StudentT)
