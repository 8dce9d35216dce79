"""The suite of differential equations, its peers, and the script, at small sizes."""

import json
import math
import subprocess
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
ONE = {
    "poisson_1d_single_sin": lambda x: -1e4 * torch.sin(100 * x),
    "poisson_1d_x2_add_sinx": lambda x: -25e4 * torch.sin(500 * x) - 4,
    "poisson_1d_x_time_sinx": lambda x: 400 * torch.cos(200 * x) - 4e4 * x * torch.sin(200 * x),
    "allencahn_1d_single_sin": lambda x: -1e4 * torch.sin(100 * x) + torch.sin(100 * x) ** 3 - torch.sin(100 * x),
}


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _pde_suite

    return _pde_suite


@pytest.fixture
def peers(suite):
    import _pde_peers

    return _pde_peers


def case(suite, name):
    (found,) = [each for each in suite.CASES if each.name == name]
    return found


def test_the_suite_is_that_of_the_reference(suite):
    sizes = {each.name: (each.nodes, each.frequency_scale) for each in suite.CASES}
    assert len(sizes) == 11
    assert sizes["poisson_1d_mix_sin"] == ((900,), 30.0) and sizes["allencahn_2d_mix_sincos"] == ((400, 400), 30.0)
    assert sizes["poisson_2d_sin_add_cos"] == ((200, 200), 20.0) and sizes["poisson_1d_x2_add_sinx"] == ((400,), 100.0)
    assert [each.name for each in suite.CASES if each.boundary_weight != 200] == ["advection_sin"]


@pytest.mark.parametrize("name", ONE)
def test_forcings_are_those_written_by_hand(suite, name):
    found = case(suite, name)
    x = torch.linspace(*found.bounds["x"], 57, dtype=torch.float64)
    expected = ONE[name](x)
    torch.testing.assert_close(found.forcing(x), expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


def test_forcings_in_two_dimensions(suite):
    found = case(suite, "poisson_2d_sin_add_cos")
    x, y = (torch.rand(40, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in (0, 1))
    expected = sum(
        -436 * torch.sin(6 * z) * torch.cos(20 * z) - 240 * torch.cos(6 * z) * torch.sin(20 * z) for z in (x, y)
    )
    torch.testing.assert_close(found.forcing(x, y), expected)
    # advection has none, because its solution needs none
    advection = case(suite, "advection_sin")
    assert float(advection.forcing(x, y).abs().max()) < 1e-11 * 200 and advection.pde.rhs == 0.0


def test_solvers_see_equations_and_conditions(suite):
    linear = {each.name: each.pde.linear for each in suite.CASES}
    assert all(linear[name] != name.startswith("allencahn") for name in linear)
    advection = case(suite, "advection_sin")
    shown = [condition.faces(advection.domain) for condition in advection.conditions]
    assert shown == [[(1, False)], [(0, False)]]
    shown = [condition.faces(advection.domain) for condition in advection.published_conditions]
    assert shown == [[(0, False), (0, True)], [(1, False)], [(1, True)]]
    for each in (case(suite, "advection_sin"), case(suite, "allencahn_2d_mix_sincos")):
        for condition in each.published_conditions:
            functional, target = condition.rows(each.domain, 5)
            torch.testing.assert_close(target, each.exact(*functional[0].X.unbind(1)))


def test_the_error_is_relative_and_over_the_test_points(suite):
    small = case(suite, "poisson_2d_sin_sin").reduced(12, 0.05)
    assert small.nodes == (12, 12) and small.test_points().shape == (1600, 2)
    assert suite.relative_error(small.truth(), small) == 0
    assert suite.relative_error(1.01 * small.truth().reshape(40, 40), small) == pytest.approx(0.01)


def test_inverse_problems_have_the_truth_in_their_data(suite):
    problems = {problem.name: problem for problem in suite.inverse_problems()}
    assert len(problems["helmholtz"].y) == 15 and len(problems["heat"].y) == 30
    assert problems["helmholtz"].truth == {"kappa": 50.0} and not problems["steady"].identified
    x = problems["helmholtz"].X[:, 0]
    expected = torch.sin(2 * math.pi * x) + 0.3 * torch.sin(20 * x)
    assert 0 < float((problems["helmholtz"].y - expected).abs().max()) < 5e-3
    # the forcing is that of κ = 50
    h = 1e-4
    u = [torch.sin(2 * math.pi * (x + s)) + 0.3 * torch.sin(20 * (x + s)) for s in (-h, 0.0, h)]
    second = (u[0] - 2 * u[1] + u[2]) / h**2
    torch.testing.assert_close(second + 50 * u[1], problems["helmholtz"].pde.rhs(x), rtol=0, atol=1e-3)


# (case, part of the domain): a few waves on 40 nodes
SMALL = {
    "poisson_1d_mix_sin": 0.2,
    "allencahn_1d_single_sin": 0.03,
    "poisson_2d_sin_sin": 0.02,
    "allencahn_2d_mix_sincos": 0.1,
    "advection_sin": 0.05,
}


@pytest.mark.parametrize("name", SMALL)
def test_classical_peers_solve_small_problems(suite, peers, name):
    small = case(suite, name).reduced(40, SMALL[name])
    differences, spectral = peers.finite_differences(small), peers.chebyshev(small)
    assert differences.shape == spectral.shape == (40,) * len(small.nodes)
    assert suite.relative_error(torch.as_tensor(differences), small) < 0.02
    assert suite.relative_error(torch.as_tensor(spectral), small) < 1e-9


def test_the_network_learns_something_slow(suite, peers, monkeypatch):
    slow = case(suite, "poisson_1d_single_sin").reduced(20, 0.004)  # less than half a period
    clock = SimpleNamespace(perf_counter=count().__next__)  # on which a step takes a second
    monkeypatch.setattr(peers, "time", clock)
    (few, early), (many, late) = peers.network(slow, [2.0, 250.0])
    assert (few, many) == (2, 250)
    assert suite.relative_error(torch.as_tensor(late), slow) < 0.3 < suite.relative_error(torch.as_tensor(early), slow)


def test_the_script_ends_with_its_keys():
    pytest.importorskip("mercer.estimators.pde")
    names = ("poisson_1d_single_sin", "allencahn_1d_sin_cos", "advection_sin")
    sizes = ("--nodes", "40", "--part", "0.05", "--grid-factor", "2", "--limit", "1")
    command = [sys.executable, str(BENCHMARKS / "pde.py"), "--only", *names, *sizes]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout.strip().splitlines()[-1])
    assert set(values) == {*(f"{key}_{name}" for name in names for key in ("error", "seconds")), "worst_coverage"}
    assert all(0 <= values[f"error_{name}"] < 1e-4 for name in names)
    assert 0 <= values["worst_coverage"] <= 1
    for peer in (
        "published grid, equal time",
        "Chebyshev",
        "finite differences",
        "network (PINN), ",
    ):
        assert peer in done.stdout
    assert "unknown coefficients" not in done.stdout


def test_what_runs_is_what_was_asked_for(suite, monkeypatch, capsys):
    import pde as script

    ran = []
    monkeypatch.setattr(script, "auto", Mock())
    monkeypatch.setattr(script, "inverse", lambda: ran.append("inverse"))

    def measure(case, factor, limit, at_least):
        ran.append((case.name, at_least))
        return {"error": 0.0, "seconds": 1.0, "coverage": 1.0, "residual": 0.0}, []

    monkeypatch.setattr(script, "measure", measure)
    for options, expected in (
        ([], [*((each.name, 0.0) for each in suite.CASES), "inverse"]),
        (["--only", "advection_sin", "--at-least", "9"], [("advection_sin", 9.0)]),
        (["--only", "inverse"], ["inverse"]),
    ):
        ran.clear()
        monkeypatch.setattr(sys, "argv", ["pde.py", *options])
        script.main()
        assert ran == expected
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {}


def test_training_lasts_at_least_as_long_as_asked_for(suite, monkeypatch):
    import pde as script

    trained = []
    scores = {"error": 0.0, "seconds": 0.5, "coverage": 1.0, "method": "features"}
    monkeypatch.setattr(script, "auto", lambda case: scores)
    monkeypatch.setattr(script, "ours_on_grid", lambda case: (0.0, 0.0))
    looks = SimpleNamespace(steps_at_short=1, at_short=1.0, best=1.0)
    found = SimpleNamespace(report={"n_iter": 7})
    monkeypatch.setattr(script, "published", lambda case, short, long: (trained.append(long), (looks, 1.0, found))[1])
    monkeypatch.setattr(script, "network", lambda case, marks: [(3, case.truth().numpy())] * 2)
    small = case(suite, "poisson_1d_single_sin").reduced(12, 0.02)
    for at_least in (0.0, 30.0):
        _, rows = script.measure(small, 4.0, 1.5, at_least)
        assert rows[3][1] == trained[-1] and "7 steps" in rows[3][0]
    assert trained == [1.5, 30.0] and rows[-1][0] == "network (PINN), 3 steps"
