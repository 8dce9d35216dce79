"""With Gaussian noise inducing points give Titsias's bound and q, and with all rows among them the exact process."""

import math

import pytest
import torch
import toys
from inducing_toys import Z, kernel_of, problem, q_of_u
from oracles import inducing as oracle
from toys import X_NEW, X, normal

from mercer._typing import Data, Sites
from mercer.inference import Conjugate, run

NOISE, MEAN = 0.3, 0.2
WEIGHT = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0, 1.0, 0.2, 1.0, 1.5], dtype=X.dtype)


def titsias(data, places=Z):
    """Bound, m and S by the formulas of 2009, rows of weight w counting as w rows."""
    Kuu, Kuf, Kff = oracle.covariances(kernel_of(), places, X)
    y, R = data.y - MEAN, torch.diag(NOISE / data.weight)
    more = -0.5 * ((data.weight - 1) * math.log(2 * math.pi * NOISE) + data.weight.log()).sum()
    return oracle.collapsed_bound(Kuu, Kuf, Kff, y, R) + more, *oracle.optimal_q(Kuu, Kuf, y, R)


def predict(m, S, places=Z):
    kernel = kernel_of()
    Kuu = oracle.between(kernel, places, places)
    mean, covariance = oracle.predict(Kuu, kernel(places, X_NEW), kernel(X_NEW, X_NEW), m, S)
    return mean + MEAN, covariance


def close(found, expected, rtol):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("seed", range(4))
def test_one_step_from_any_start_is_titsias(seed):
    model, plan, data = problem("gaussian", mean=MEAN)
    data = Data(data.X, data.y, WEIGHT)
    start = Sites(5.0 * normal(9, seed=seed), 10.0 * normal(9, seed=seed + 50).square())
    bound, m, S = titsias(data)
    with torch.no_grad():
        state = model.engine.init(model, plan, data, start if seed else None)
        assert abs(state.value - bound) > 0.1
        state, info = model.engine.step(model, plan, state, data)
        assert info["halvings"] == 0 and state.value == pytest.approx(float(bound), rel=1e-12)
        close(q_of_u(state.posterior), (m, S), 1e-12)
        close(state.posterior.joint(X_NEW), predict(m, S), 1e-12)


def test_the_conjugate_engine_gives_the_collapsed_bound():
    model, plan, data = problem("gaussian", Conjugate(), mean=MEAN)
    data = Data(data.X, data.y, WEIGHT)
    bound, m, S = titsias(data)
    with torch.no_grad():
        state = run(model, plan, data).state
        found = model.engine.objective(model, plan, state, data)
        close(state.posterior.joint(X_NEW), predict(m, S), 1e-12)
    assert float(found) == pytest.approx(float(bound), rel=1e-12)


def test_with_all_rows_among_the_places_the_process_is_exact():
    """What is left is the variance that inducing values have of their own, 1e-10, times a condition number."""
    model, plan, data = problem("gaussian", Conjugate(), places=X.flip(0))
    exact, exact_plan, _ = toys.problem("gaussian", Conjugate())
    with torch.no_grad():
        found, expected = run(model, plan, data).state, run(exact, exact_plan, data).state
        close(found.posterior.joint(X_NEW), expected.posterior.joint(X_NEW), 5e-9)
        values = [
            model.engine.objective(model, plan, found, data),
            exact.engine.objective(exact, exact_plan, expected, data),
        ]
    assert float(values[0]) == pytest.approx(float(values[1]), rel=1e-8) and values[0] < values[1]


def test_more_places_never_lower_the_bound_and_the_evidence_is_above_it():
    """Titsias (2009), section 3.2; fewer places lose nats here, so that the order means something."""
    values = []
    for k in range(1, 10):
        model, plan, data = problem("gaussian", Conjugate(), places=X[torch.tensor([4, 0, 8, 2, 6, 1, 3, 5, 7])[:k]])
        with torch.no_grad():
            values.append(float(model.engine.objective(model, plan, run(model, plan, data).state, data)))
    exact, plan, data = toys.problem("gaussian", Conjugate())
    with torch.no_grad():
        values.append(float(exact.engine.objective(exact, plan, run(exact, plan, data).state, data)))
    assert values == sorted(values) and values[1] < values[-1] - 1.0


@pytest.mark.parametrize("name", ["gaussian", "student_t"])
def test_shifting_targets_and_mean_together_changes_nothing(name):
    """Sites are of f − μ: a slip would show, since K_fu K_uu⁻¹ does not map a constant to itself."""
    outcomes = []
    for shift in (0.0, 0.7):
        model, plan, data = problem(name, mean=MEAN + shift)
        with torch.no_grad():
            state = run(model, plan, Data(data.X, data.y + shift, data.weight)).state
            mean, covariance = state.posterior.joint(X_NEW)
        outcomes.append((torch.tensor(state.value), mean - shift, covariance))
    close(*outcomes, 1e-9 if name == "gaussian" else 1e-6)
