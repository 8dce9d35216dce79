"""The benchmark scripts run, print their tables and end with the promised JSON line; sizes here are tiny."""

import gc
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def harness(monkeypatch):
    """The shared module, imported as the scripts import it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _harness

    return _harness


@pytest.fixture
def data(tmp_path):
    """A data folder with small files of the layout the benchmarks read."""
    generator = np.random.default_rng(0)
    for name, d in (
        ("uci/kin40k", 3),
        ("uci/protein", 4),
        ("spatial/nycflights13", 4),
        ("classification/banana", 2),
    ):
        n = 120
        X = generator.standard_normal((n, d)).astype(np.float32)
        X = np.column_stack([X, np.full(n, 7, np.float32)])  # a constant column, to be dropped
        smooth = np.sin(X[:, 0]) + 0.5 * X[:, 1]
        # classes overlap, else the amplitude grows to wherever each peer's bounds stop it
        y = (
            (smooth + generator.standard_normal(n) > 0).astype(np.uint8)
            if name.endswith("banana")
            else smooth + 0.1 * X[:, 1] ** 2
        )
        test = np.packbits(generator.random((n, 10)) < 0.1, axis=0)
        path = tmp_path / f"{name}.npz"
        path.parent.mkdir(exist_ok=True)
        np.savez(path, X=X, y=y, test=test)
    return tmp_path


def last_line(script, *arguments):
    """Run a script and return the JSON object on its last line."""
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout.strip().splitlines()[-1])
    assert all(math.isfinite(value) for value in values.values())
    return values


def test_exact_script(data):
    values = last_line("exact.py", "--data", data, "--n-fit", 50, "--n-eval", 60, "--repeats", 1)
    assert set(values) == {
        "fit_speedup_sklearn",
        "fit_speedup_gpytorch",
        "evidence_gap_nats",
        "eval_over_bare",
        "peak_mb",
    }
    assert values["evidence_gap_nats"] < 0.5


def test_classify_script(data):
    values = last_line("classify.py", "--data", data, "--n-banana", 60, "--n-digits", 120)
    assert set(values) == {
        "banana_speedup",
        "banana_logloss_gap",
        "banana_speedup_default",
        "banana_logloss_gap_default",
        "digits_error",
        "digits_logloss",
        "digits_seconds",
    }
    assert abs(values["banana_logloss_gap"]) < 1e-3  # the same model at the same optimum
    assert values["digits_error"] < 0.5


def test_memory_script():
    values = last_line("memory.py", "--n-train", 1000, "--n-test", 2000, 200_000)
    assert values["mean_only_memory_ratio"] < 1.2
    # kept results between freed temporaries, or one copy of the inputs per step, would cost more than this
    assert values["increment_large_mb"] < values["increment_small_mb"] + 40


def test_vecchia_script(data):
    pytest.importorskip("gpboost")
    sizes = ("--n-protein", 80, "--n-field", 150, "--n-poisson", 80, "--n-flights", 80, "--n-test", 30)
    values = last_line("vecchia.py", "--data", data, *sizes)
    gaussian = {"seconds", "rmse", "nlpd"}
    sides = {"protein": gaussian, "field": gaussian, "poisson": {"seconds", "dev"}}
    assert set(values) == {
        *(f"{case}_{side}{score}" for case, scores in sides.items() for side in ("", "gpboost_") for score in scores),
        *(f"{case}_{key}" for case in ("protein", "field") for key in ("speedup", "nlpd_gap")),
        "poisson_speedup",
        "poisson_dev_gap",
        *(f"flights_{key}" for key in gaussian | {"peak_mb"}),
    }
    assert abs(values["field_nlpd_gap"]) < 0.2


def test_dkl_quality_script(tmp_path):
    cases, picture = ["gaussian_d2", "bernoulli_d5"], tmp_path / "quality.png"
    few = ("--n", 80, "--n-test", 20, "--n-neighbors", 8, "--more-neighbors", 15, "--n-inducing", 15, "--epochs", 2)
    values = last_line("dkl_quality.py", "--only", *cases, *few, "--picture", picture)
    sparse = ["sites", "free", "free_slow", "mean_field"]
    scores = {name: ["rmse", "nlpd", "kl", "kl_same_prior", "seconds"] for name in sparse}
    scores |= {"svgp": ["rmse", "nlpd", "kl", "seconds"], "dense": ["rmse", "nlpd", "seconds"]}
    ratios = ("kl_ratio", "kl_ratio_same_prior")
    assert set(values) == {
        *(f"{score}_{name}_{case}" for case in cases for name in scores for score in scores[name]),
        *(f"{ratio}_{case}{m}" for ratio in ratios for case in cases for m in ("", "_m8", "_m15")),
        *(f"worst_{ratio}" for ratio in ratios),
    }
    assert values["worst_kl_ratio_same_prior"] > 10
    assert all(values[f"kl{kind}_sites_{case}"] >= 0 for kind in ("", "_same_prior") for case in cases)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_scaling_script():
    values = last_line("scaling.py", "--n", 1000, 10_000, "--repeats", 1)
    assert set(values) == {
        *(
            f"{form}_{key}_{n}"
            for form in ("response", "latent")
            for key in ("seconds", "plan_seconds", "mb")
            for n in ("1e3", "1e4")
        ),
        *(f"{form}{key}_ratio_1e4" for form in ("", "response_", "latent_") for key in ("time", "memory")),
    }
    assert values["memory_ratio_1e4"] < 15


def test_loading_standardises_with_training_statistics(harness, data):
    split = harness.load(data, "uci/kin40k", n_train=70)
    assert split.X.shape == (70, 3)
    np.testing.assert_allclose(split.X.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(split.y.std(), 1)
    assert abs(split.y_test.mean()) > 1e-6


def test_every_other_row_can_be_test(harness, data):
    split = harness.load(data, "classification/banana", n_train=50, rest_is_test=True, classes=True)
    assert len(split.y) + len(split.y_test) == 120
    assert split.y.dtype.kind == "i"


def test_missing_data_are_named(harness, tmp_path):
    with pytest.raises(SystemExit, match="--data"):
        harness.load(tmp_path, "uci/kin40k")


def test_interleaved_times_everyone_in_every_round(harness):
    rounds = []
    seconds = harness.interleaved({"a": lambda i: rounds.append(("a", i)), "b": lambda i: rounds.append(("b", i))}, 2)
    assert rounds == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert set(seconds) == {"a", "b"}


def test_peak_memory_sees_a_temporary(harness):
    gc.collect()  # what earlier tests left must not be given back in between
    before = harness.resident_mb()
    harness.reset_peak()
    np.ones(30_000_000).sum()
    assert harness.resident_mb("VmHWM") > before + 100


def test_a_failing_child_shows_its_error(harness, tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("raise ValueError('broken inside')")
    with pytest.raises(RuntimeError, match="broken inside"):
        harness.child(str(script))


def test_table_aligns_columns(harness, capsys):
    harness.table("title", ["", "seconds"], [["ours", 1.23456], ["theirs", 12.0]])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "title"
    assert lines[-2].endswith("1.235")
    assert len({len(line) for line in lines[2:]}) == 1
