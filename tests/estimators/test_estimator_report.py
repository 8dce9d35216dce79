"""What the report and the diagnosis say of a fit."""

import json

import gpytorch
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

from mercer import GPClassifier, GPCountRegressor, GPRegressor
from mercer.kernels import RBF, Matern52
from mercer.likelihoods import Gaussian

rng = np.random.default_rng(0)
N = 60
X = rng.normal(size=(N, 2))
Y = np.sin(2 * X[:, 0]) + 0.1 * rng.normal(size=N)
TARGETS = {
    GPRegressor: Y,
    GPClassifier: (Y + 0.2 * rng.normal(size=N) > 0).astype(int),
    GPCountRegressor: rng.poisson(np.exp(1 + Y)),
}
TASKS = pytest.mark.parametrize("task", TARGETS)
unconverged = pytest.mark.filterwarnings("ignore:.*did not converge")


def wave():
    """A periodic signal whose period the default start misses."""
    x = np.linspace(0, 10, 50)[:, None]
    return x, np.sin(2 * np.pi * x[:, 0] / 1.7) + 0.1 * np.random.default_rng(0).normal(size=50)


def test_the_report_says_what_ran_and_why():
    model = GPRegressor(random_state=0).fit(X, Y)
    report = model.fit_report_
    assert (report.family, report.engine, report.evidence, report.likelihood) == (
        "exact",
        "conjugate",
        "exact",
        "Gaussian",
    )
    assert "n = 60" in report.family_reason and "closed form" in report.engine_reason
    assert (report.n_rows, report.n_iter, report.converged, report.dtype, report.device) == (
        N,
        model.n_iter_,
        True,
        "float64",
        "cpu",
    )
    assert report.n_evaluations >= report.n_iter == len(report.evidence_trace)
    assert report.evidence_trace[-1] == pytest.approx(report.log_marginal_likelihood, abs=1e-6)
    assert report.log_marginal_likelihood == model.log_marginal_likelihood_value_
    assert report.seconds > 0 and report.memory_mb > 1 and report.jitter == 0.0
    assert report.notes == ["Added an outputscale to MaternKernel."]
    assert report.warnings == []
    text = str(report)
    for part in (
        "family      exact",
        "engine      conjugate",
        "converged after",
        "nats",
        "float64 on cpu",
        "note        Added",
    ):
        assert part in text
    assert GPClassifier(engine="laplace", optimizer=None).fit(X, TARGETS[GPClassifier]).fit_report_.engine_reason == (
        "chosen by the user"
    )


@TASKS
@unconverged
def test_the_report_is_plain_json(task):
    report = task(max_iter=2, n_restarts=1, random_state=0).fit(X, TARGETS[task]).fit_report_
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain == report.to_dict()
    assert plain["warnings"] and "WARNING     hyperparameters did not converge" in str(report)


def test_float32_is_said():
    model = GPRegressor(dtype="float32").fit(X, Y)
    assert "hyperparameters were learned in float32; the posterior is in float64" in model.fit_report_.notes
    assert model.posterior_.plan.X.dtype == torch.float64
    double = GPRegressor(dtype="float64", optimizer=None).fit(X, Y)
    single = GPRegressor(dtype="float32", optimizer=None).fit(X, Y)
    # only the hyperparameters have been rounded to float32
    for one, other in zip(single.predict(X, return_std=True), double.predict(X, return_std=True), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose([single.predict(row[None])[0] for row in X], single.predict(X), rtol=1e-10)


def test_a_constant_target_teaches_nothing_and_that_is_said():
    model = GPRegressor().fit(X, np.full(N, 7.0))
    np.testing.assert_allclose(model.predict(3 * X), 7.0, rtol=1e-12)
    assert "y is constant: hyperparameters say nothing" in str(model.fit_report_)


def codes(model):
    return [finding.code for finding in model.diagnose()]


def test_a_good_fit_has_no_findings():
    for task, y in TARGETS.items():
        assert task(RBF(ard=False), random_state=0).fit(X, y).diagnose() == [], task.__name__


def test_findings_name_the_column_and_the_cure():
    rows = np.column_stack([X, np.full(N, 3.0)])
    (finding,) = [f for f in GPRegressor(RBF(ard=False), optimizer=None).fit(rows, Y).diagnose()]
    assert finding.code == "constant_column"
    assert str(finding) == (
        "[constant_column] column 2 has one value only and carries no information. "
        "Drop it; predictions at other values of it are extrapolation."
    )
    frame = pd.DataFrame(rows, columns=["ash", "elm", "oak"])
    (finding,) = GPRegressor(optimizer=None).fit(frame, Y).diagnose()
    assert "column 'oak' has one value only" in finding.message


@pytest.mark.filterwarnings("ignore")
def test_every_finding_is_found():
    twice = np.concatenate([X, X[:5]])
    bounds = gpytorch.constraints.Interval(0.1, 0.2)
    narrow = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel(), outputscale_constraint=bounds)
    grid = np.linspace(0, 6, 40)[:, None]
    fits = {
        "constant_column": GPRegressor(optimizer=None).fit(np.column_stack([X, np.zeros(N)]), Y),
        "unscaled_columns": GPRegressor(standardize=False, optimizer=None).fit(X * [1, 1e5], Y),
        "duplicates": GPRegressor(optimizer=None).fit(twice, np.concatenate([Y, Y[:5] + 0.25])),
        "noise_at_floor": GPRegressor().fit(grid, np.sin(grid[:, 0])),
        "lengthscale_at_bound": GPRegressor().fit(X, np.sin(2 * X[:, 0])),
        "at_bound": GPRegressor(narrow).fit(X, Y),
        "several_optima": GPRegressor("periodic", n_restarts=8, random_state=0).fit(*wave()),
        "not_converged": GPRegressor(max_iter=1).fit(X, Y),
        "jitter": GPRegressor(RBF(30.0, outputscale=1e4), optimizer=None).fit(
            grid, np.sin(grid[:, 0]), noise_variance=1e-18
        ),
    }
    for code, model in fits.items():
        assert codes(model).count(code) == 1, (code, codes(model))
        assert all(f.message.endswith(".") and f.cure.endswith(".") for f in model.diagnose())


def test_a_floor_of_noise_that_the_user_raised_is_a_bound_and_no_interpolation():
    assert codes(GPRegressor("rbf", likelihood=Gaussian(bounds=(0.5, 2.0))).fit(X, Y)).count("noise_at_floor") == 0
    (finding,) = [
        f for f in GPRegressor(likelihood=Gaussian(bounds=(0.5, 2.0))).fit(X, Y).diagnose() if "noise" in f.message
    ]
    assert finding.message == "likelihood.noise_variance is at its lower bound."


def test_duplicates_are_measured_over_all_outputs_that_were_seen():
    rows = np.concatenate([X, X[:2]])
    y = np.column_stack([np.concatenate([Y, Y[:2]]), np.concatenate([Y, np.add(Y[:2], [0.5, 3.0])])])
    y[1, 1] = np.nan
    (finding,) = GPRegressor(optimizer=None).fit(rows, y).diagnose()
    assert finding.message.startswith("2 row(s) repeat the inputs of another row with another target")
    assert "largest deviation from their mean 0.25)" in finding.message
    labels = np.concatenate([TARGETS[GPClassifier], 1 - TARGETS[GPClassifier][:2]])
    (finding,) = GPClassifier(optimizer=None).fit(rows, labels).diagnose()
    assert finding.message == "2 row(s) repeat the inputs of another row with another label."


def test_more_precision_than_float64_has_is_warned_of():
    with pytest.warns(ConvergenceWarning, match="predictions lose 15 of 16 digits; raise the noise variance"):
        GPRegressor(Matern52(1.0, outputscale=1.0), optimizer=None).fit(X, Y, noise_variance=1e-15)
