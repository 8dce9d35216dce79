"""What must not change a result."""

import subprocess
import sys

import pytest
import torch
from toys import X_NEW, problem

from mercer._typing import Data
from mercer.inference import Conjugate, Dual, Laplace, PowerEP, run

SHIFT = 0.7


def outcome(model, plan, data):
    with torch.no_grad():
        state = run(model, plan, data).state
        mean, variance = state.posterior.marginals(X_NEW)
        return float(model.engine.objective(model, plan, state, data)), mean, variance


def same(one, other, shift=0.0):
    assert one[0] == pytest.approx(other[0], rel=1e-8)
    torch.testing.assert_close(one[1], other[1] + shift, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one[2], other[2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("engine", [Conjugate(), Dual(), Laplace(), PowerEP()], ids=lambda e: e.name)
def test_shifting_targets_and_mean_together_changes_nothing(engine):
    model, plan, data = problem("gaussian", engine, mean=0.2)
    moved, _, _ = problem("gaussian", engine, mean=0.2 + SHIFT)
    shifted = Data(data.X, data.y + SHIFT, data.weight)
    same(outcome(moved, plan, shifted), outcome(model, plan, data), SHIFT)


@pytest.mark.parametrize("engine", [Dual(), Laplace()], ids=lambda e: e.name)
def test_a_student_t_target_shifts_with_the_mean(engine):
    model, plan, data = problem("student_t", engine, mean=0.0)
    moved, _, _ = problem("student_t", engine, mean=SHIFT)
    same(outcome(moved, plan, Data(data.X, data.y + SHIFT, data.weight)), outcome(model, plan, data), SHIFT)


@pytest.mark.parametrize("engine", [Dual(), Laplace(), PowerEP()], ids=lambda e: e.name)
def test_exposure_is_a_shift_of_the_log_rate(engine):
    """Poisson with exposure e at mean μ is Poisson without exposure at mean μ + log e."""
    model, plan, data = problem("poisson", engine, mean=0.2)
    moved, _, _ = problem("poisson", engine, mean=0.2 + SHIFT)
    exposure = {"exposure": torch.full((9,), SHIFT, dtype=torch.float64).exp()}
    same(outcome(moved, plan, data), outcome(model, plan, Data(data.X, data.y, data.weight, exposure)), SHIFT)


@pytest.mark.parametrize("engine", [Dual(), Laplace(), PowerEP()], ids=lambda e: e.name)
@pytest.mark.parametrize("name", ["probit", "logit"])
def test_exchanging_the_classes_mirrors_the_latent(engine, name):
    model, plan, data = problem(name, engine, mean=0.2)
    mirrored, _, _ = problem(name, engine, mean=-0.2)
    value, mean, variance = outcome(mirrored, plan, Data(data.X, 1 - data.y, data.weight))
    same((value, -mean, variance), outcome(model, plan, data))


def test_softmax_of_two_outputs_is_symmetric_in_the_classes():
    model, plan, data = problem("softmax", mean=None)
    value, mean, _ = outcome(model, plan, data)
    order = torch.tensor([2, 0, 1])
    renamed = Data(data.X, order[data.y.long()].to(data.y), data.weight)
    value_renamed, mean_renamed, _ = outcome(model, plan, renamed)
    # the draws are shared by the classes, so that the names matter to their resolution only
    assert value_renamed == pytest.approx(value, rel=1e-2)
    torch.testing.assert_close(mean_renamed[order], mean, rtol=0, atol=5e-2)


def test_importing_botorch_changes_no_bit():
    script = """
import torch
from mercer._typing import Sites
from mercer.families import Exact, Prior
from mercer.kernels import Matern52, Periodic
from mercer.policy import NumericalPolicy

def answer():
    X = torch.linspace(0, 5, 900, dtype=torch.float64).unsqueeze(-1)
    sites = Sites(50 * X.sin().squeeze(-1), torch.full((900,), 50.0, dtype=torch.float64))
    prior = Prior(Matern52(0.7, outputscale=1.3) * Periodic(2.0, 1.0))
    posterior = Exact().condition(prior, Exact().plan(prior, X, NumericalPolicy()), sites)
    return torch.stack([*posterior.marginals(X[::90] + 0.03), posterior.log_evidence().expand(10)]).detach()

before = answer()
import botorch
assert torch.equal(before, answer())
"""
    subprocess.run([sys.executable, "-c", script], check=True)
