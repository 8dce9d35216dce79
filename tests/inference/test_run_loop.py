"""The inner loop: it stops, says why, and passes on what the engine noted."""

from dataclasses import replace

import pytest
import torch
from toys import problem

from mercer.inference import Conjugate, Dual, Laplace, PowerEP, run
from mercer.inference.base import State


class Scripted:
    """An engine whose steps report what a script says."""

    name, evidence = "scripted", "approximation"

    def __init__(self, *infos):
        self.infos = list(infos)

    def init(self, model, plan, data, sites=None):
        return State(sites, None, 0.0)

    def step(self, model, plan, state, data):
        info = {"converged": False, "change": 1.0, **self.infos[min(int(state.value), len(self.infos) - 1)]}
        return replace(state, value=state.value + 1.0), info


def outcome(*infos, max_inner=5):
    model, plan, data = problem("probit", Scripted(*infos), max_inner=max_inner)
    return run(model, plan, data)


def test_the_loop_ends_at_convergence():
    found = outcome({}, {}, {"converged": True})
    assert found.converged and found.n_steps == 3 and found.state.value == 3.0


def test_the_loop_ends_when_the_engine_stalls():
    found = outcome({}, {"stalled": True})
    assert not found.converged and found.n_steps == 2


def test_running_out_of_steps_is_not_convergence():
    found = outcome({}, max_inner=4)
    assert not found.converged and found.n_steps == 4


def test_notes_of_all_steps_are_kept_once_each_in_order():
    found = outcome({"notes": ("b", "a")}, {"notes": ("a",)}, {"notes": ("c",), "converged": True})
    assert found.notes == ("b", "a", "c")


def test_no_graph_is_recorded():
    model, plan, data = problem("probit")
    assert not run(model, plan, data).state.sites.linear.requires_grad


@pytest.mark.parametrize("engine", [Conjugate(), Dual(), Laplace(), PowerEP()], ids=lambda e: e.name)
def test_targets_that_are_all_missing_leave_the_prior(engine):
    model, plan, data = problem("gaussian", engine)
    data = replace(data, y=torch.full_like(data.y, torch.nan))
    found = run(model, plan, data)
    assert found.converged
    with torch.no_grad():
        value = model.engine.objective(model, plan, found.state, data)
        m, v = found.state.posterior.at_data()
    assert float(value) == pytest.approx(0.0, abs=1e-12)
    torch.testing.assert_close(m, torch.full_like(m, 0.2))
    torch.testing.assert_close(v, torch.full_like(v, 1.2))
