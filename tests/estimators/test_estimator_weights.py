"""A row of weight 2 is the row twice and a row of weight 0 is absent, in every number that a user can see."""

import numpy as np
import pytest
from oracles.estimator_gp import Regression, matern52

from mercer import GPClassifier, GPCountRegressor, GPRegressor
from mercer.kernels import Matern52
from mercer.likelihoods import Gaussian

rng = np.random.default_rng(0)
N = 24
X = rng.uniform(-2, 2, size=(N, 2))
SIGNAL = np.sin(2 * X[:, 0]) + 0.5 * X[:, 1]
WEIGHT = rng.integers(0, 4, size=N)
ROWS = np.repeat(np.arange(N), WEIGHT)
X_NEW = rng.uniform(-2, 2, size=(10, 2))
TARGETS = {
    "real": SIGNAL + 0.3 * rng.standard_t(3, size=N),
    "two": (SIGNAL + 0.5 * rng.normal(size=N) > 0).astype(int),
    "three": np.digitize(SIGNAL + 0.3 * rng.normal(size=N), [-0.5, 0.5]),
    "count": rng.poisson(np.exp(SIGNAL + 1)),
}
LIKELIHOODS = {
    "gaussian": (GPRegressor, "real"),
    "student_t": (GPRegressor, "real"),
    "logit": (GPClassifier, "two"),
    "probit": (GPClassifier, "two"),
    "ordinal": (GPClassifier, "three"),
    "poisson": (GPCountRegressor, "count"),
    "negative_binomial": (GPCountRegressor, "count"),
}
PAIRS = [(name, engine) for name in LIKELIHOODS for engine in ("dual", "laplace", "power_ep")]
PAIRS += [("gaussian", "conjugate"), ("softmax", "dual")]


def estimator(likelihood, engine="auto", **params):
    """Return an estimator and its targets."""
    task, target = (GPClassifier, "three") if likelihood == "softmax" else LIKELIHOODS[likelihood]
    return task(likelihood=likelihood, engine=engine, **params), TARGETS[target]


def numbers(model):
    """Predictions, log evidence, its gradient, and the hyperparameters."""
    if isinstance(model, GPClassifier):
        found = {"probabilities": model.predict_proba(X_NEW)}
    else:
        found = dict(zip(("mean", "std"), model.predict(X_NEW, return_std=True), strict=True))
    value, gradient = model.log_marginal_likelihood(eval_gradient=True)
    return {**found, "theta": model.theta_, "evidence": np.array([value]), "gradient": gradient}


def assert_equal(one, other, rtol=1e-7):
    """Agreement relative to the largest entry of each kind of number."""
    for name, expected in other.items():
        np.testing.assert_allclose(one[name], expected, rtol=0, atol=rtol * np.abs(expected).max(), err_msg=name)


@pytest.mark.parametrize(("likelihood", "engine"), PAIRS)
def test_weights_are_counts_of_rows_that_nothing_can_merge(likelihood, engine):
    """The copies differ in the thirteenth digit, so that they enter the algebra as rows of their own."""
    model, y = estimator(likelihood, engine, optimizer=None)
    weighted = numbers(model.fit(X, y, sample_weight=WEIGHT))
    nudge = 1 + 1e-13 * np.random.default_rng(1).normal(size=(len(ROWS), 2))
    written_out = numbers(model.fit(X[ROWS] * nudge, y[ROWS]))
    assert model.fit_report_.n_rows == len(ROWS) > np.count_nonzero(WEIGHT)
    assert_equal(weighted, written_out)


@pytest.mark.parametrize("likelihood", [*LIKELIHOODS, "softmax"])
def test_weights_and_copies_learn_the_same_hyperparameters(likelihood):
    model, y = estimator(likelihood, max_iter=4)
    start = model.set_params(optimizer=None).fit(X, y).theta_
    with pytest.warns(UserWarning, match="did not converge"):
        weighted = numbers(model.set_params(optimizer="lbfgs").fit(X, y, sample_weight=WEIGHT))
        copies = numbers(model.fit(X[ROWS], y[ROWS]))
    assert_equal(weighted, copies)
    assert np.abs(weighted["theta"] - start).max() > 0.1


@pytest.mark.parametrize("known", [False, True])
def test_gaussian_weights_are_rows_written_out_in_the_dense_formula(known):
    """Integer weights, with one noise level or a known one per row."""
    y, ell = TARGETS["real"], np.array([1.0, 2.0])
    noise = rng.uniform(0.1, 0.4, size=N) if known else np.full(N, 0.2)
    model = GPRegressor(Matern52(list(ell), outputscale=1.5), likelihood=Gaussian(0.2), optimizer=None)
    model.fit(X, y, sample_weight=WEIGHT, noise_variance=noise if known else None)
    K = matern52(X[ROWS], X[ROWS], ell, 1.5)
    oracle = Regression(K, y[ROWS], noise[ROWS], mean=np.average(y, weights=WEIGHT))
    mean, covariance = oracle.predict(matern52(X_NEW, X[ROWS], ell, 1.5), matern52(X_NEW, X_NEW, ell, 1.5))
    found, std = model.predict(X_NEW, return_std=True, latent=True)
    np.testing.assert_allclose(found, mean, rtol=1e-8)
    np.testing.assert_allclose(std, np.sqrt(np.diag(covariance)), rtol=1e-8)
    assert model.log_marginal_likelihood_value_ == pytest.approx(oracle.log_evidence(), rel=1e-8)


def test_a_fractional_weight_divides_the_noise_and_counts_as_a_fraction_of_an_observation():
    y, ell, noise = TARGETS["real"], np.array([1.0, 2.0]), 0.2
    weight = rng.uniform(0.3, 2.5, size=N)
    model = GPRegressor(Matern52(list(ell), outputscale=1.5), likelihood=Gaussian(noise), optimizer=None)
    model.fit(X, y, sample_weight=weight)
    oracle = Regression(matern52(X, X, ell, 1.5), y, noise / weight, mean=np.average(y, weights=weight))
    extra = -0.5 * ((weight - 1) * np.log(2 * np.pi * noise) + np.log(weight)).sum()
    assert model.log_marginal_likelihood_value_ == pytest.approx(oracle.log_evidence() + extra, rel=1e-8)
    mean, _ = oracle.predict(matern52(X_NEW, X, ell, 1.5), matern52(X_NEW, X_NEW, ell, 1.5))
    np.testing.assert_allclose(model.predict(X_NEW), mean, rtol=1e-8)


def test_merged_and_dropped_rows_are_said():
    y = TARGETS["real"]
    report = GPRegressor(optimizer=None).fit(X[ROWS], y[ROWS]).fit_report_
    assert f"{len(ROWS) - np.count_nonzero(WEIGHT)} repeated row(s) merged" in str(report)
    report = GPRegressor(optimizer=None).fit(X, y, sample_weight=WEIGHT).fit_report_
    assert f"{np.count_nonzero(WEIGHT == 0)} row(s) without weight" in str(report)
