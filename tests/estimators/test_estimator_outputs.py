"""Several outputs and missing targets: each output is a regression of its own on the rows where it was seen."""

import numpy as np
import pytest
from oracles.estimator_gp import Regression, matern52

from mercer import GPCountRegressor, GPRegressor
from mercer.kernels import Matern52
from mercer.likelihoods import Gaussian

rng = np.random.default_rng(0)
N = 25
X = rng.normal([2.0, -30.0], [0.5, 10.0], size=(N, 2))
ELL = [0.6, 15.0]
Y = np.column_stack([np.sin(3 * X[:, 0]), 500 + 20 * X[:, 1], -1e-3 * X[:, 0]]) + rng.normal(size=(N, 3)) * [
    0.1,
    40,
    1e-4,
]
GAPS = Y.copy()
GAPS[2:9, 0] = np.nan
GAPS[5:15, 1] = np.nan
X_NEW = rng.normal([2.0, -30.0], [0.5, 10.0], size=(7, 2))


def oracle(j, weight=None):
    """Output j by the dense formula: unit amplitude and a tenth of noise, in units of its own variance."""
    seen = ~np.isnan(GAPS[:, j])
    y, variance = GAPS[seen, j], np.nanvar(GAPS[:, j])
    return Regression(matern52(X[seen], X[seen], ELL, variance), y, 0.1 * variance, y.mean()), X[seen], variance


@pytest.mark.parametrize("gaps", [False, True])
def test_each_output_is_a_regression_of_its_own(gaps):
    y = GAPS if gaps else Y
    together = GPRegressor(Matern52(ELL), optimizer=None).fit(X, y)
    mean, std = together.predict(X_NEW, return_std=True)
    latent = together.predict(X_NEW, return_cov=True, latent=True)[1]
    density = together.log_predictive_density(X_NEW, np.full((7, 3), Y.mean(0)))
    loo = together.loo_predict(return_std=True)
    assert mean.shape == std.shape == density.shape == (7, 3)
    assert latent.shape == (7, 7, 3)
    evidence = 0.0
    for j in range(3):
        seen = ~np.isnan(y[:, j])
        alone = GPRegressor(Matern52(ELL), optimizer=None).fit(X[seen], y[seen, j])
        evidence += alone.log_marginal_likelihood_value_
        for found, expected in zip((mean, std), alone.predict(X_NEW, return_std=True), strict=True):
            np.testing.assert_allclose(found[:, j], expected, rtol=1e-8)
        expected = alone.predict(X_NEW, return_cov=True, latent=True)[1]
        np.testing.assert_allclose(latent[..., j], expected, rtol=1e-8, atol=1e-10 * expected.max())
        expected = alone.log_predictive_density(X_NEW, np.full(7, Y[:, j].mean()))
        np.testing.assert_allclose(density[:, j], expected, rtol=1e-8)
        for found, expected in zip(loo, alone.loo_predict(return_std=True), strict=True):
            np.testing.assert_allclose(found[seen, j], expected, rtol=1e-8)
        assert together.noise_variance_[j] == pytest.approx(alone.noise_variance_, rel=1e-8)
    assert together.log_marginal_likelihood_value_ == pytest.approx(evidence, rel=1e-8)
    assert "variances are in units of the variance of each output" in str(together.fit_report_)


def test_outputs_with_gaps_are_the_dense_formula():
    model = GPRegressor(Matern52(ELL), optimizer=None).fit(X, GAPS)
    mean, std = model.predict(X_NEW, return_std=True)
    evidence = 0.0
    for j in range(3):
        regression, rows, variance = oracle(j)
        expected, covariance = regression.predict(
            matern52(X_NEW, rows, ELL, variance), matern52(X_NEW, X_NEW, ELL, variance)
        )
        np.testing.assert_allclose(mean[:, j], expected, rtol=1e-8)
        np.testing.assert_allclose(std[:, j], np.sqrt(np.diag(covariance) + 0.1 * variance), rtol=1e-8)
        evidence += regression.log_evidence()
    assert model.log_marginal_likelihood_value_ == pytest.approx(evidence, rel=1e-8)


def test_outputs_share_what_is_learned():
    """The gradient of the joint evidence is that of the sum over outputs, also with gaps."""
    model = GPRegressor(optimizer=None).fit(X, GAPS)
    theta, step = model.theta_ + np.linspace(0.3, -0.3, 4), 1e-4
    _, gradient = model.log_marginal_likelihood(theta, eval_gradient=True)
    slopes = [
        (model.log_marginal_likelihood(theta + step * e) - model.log_marginal_likelihood(theta - step * e)) / (2 * step)
        for e in np.eye(4)
    ]
    np.testing.assert_allclose(gradient, slopes, rtol=0, atol=1e-6 * np.abs(slopes).max())


def test_robust_outputs_are_regressions_of_their_own():
    y = GAPS[:, [0, 2]]
    together = GPRegressor(Matern52(ELL), likelihood="student_t", optimizer=None).fit(X, y)
    scale = together.likelihood_.value_of("scale", together.posterior_.plan.X).item()
    mean, std = together.predict(X_NEW, return_std=True)
    for j in range(2):
        seen = ~np.isnan(y[:, j])
        alone = GPRegressor(Matern52(ELL), likelihood="student_t", optimizer=None).fit(X[seen], y[seen, j])
        # one scale serves both outputs in units of their spread; alone each starts from its own
        alone.set_params(likelihood=type(alone.likelihood_)(scale=scale * np.nanstd(y[:, j]))).fit(X[seen], y[seen, j])
        for found, expected in zip((mean, std), alone.predict(X_NEW, return_std=True), strict=True):
            np.testing.assert_allclose(found[:, j], expected, rtol=1e-6)


def test_one_column_of_targets_keeps_its_shape_and_units():
    flat, column = (GPRegressor(Matern52(ELL), optimizer=None).fit(X, y) for y in (Y[:, 1], Y[:, 1:2]))
    np.testing.assert_array_equal(column.predict(X_NEW), flat.predict(X_NEW)[:, None])
    np.testing.assert_array_equal(column.theta_, flat.theta_)
    assert column.predict(X_NEW, return_cov=True)[1].shape == (7, 7, 1)
    assert column.sample_y(X_NEW, 4).shape == (7, 1, 4)
    assert column.noise_variance_ == pytest.approx([flat.noise_variance_])
    assert column.kernel_.outputscale.item() == pytest.approx(Y[:, 1].var())


def test_noise_of_several_outputs_can_be_set_for_each():
    noise = np.array([[0.05], [0.2], [0.4]])  # in units of each output's variance
    model = GPRegressor(Matern52(ELL), likelihood=Gaussian(noise), optimizer=None).fit(X, Y)
    np.testing.assert_allclose(model.noise_variance_, noise[:, 0] * Y.var(axis=0), rtol=1e-10)
    variance = Y[:, 1].var()
    regression = Regression(matern52(X, X, ELL, variance), Y[:, 1], 0.2 * variance, Y[:, 1].mean())
    mean, _ = regression.predict(matern52(X_NEW, X, ELL, variance), matern52(X_NEW, X_NEW, ELL, variance))
    np.testing.assert_allclose(model.predict(X_NEW)[:, 1], mean, rtol=1e-8)


@pytest.mark.parametrize("likelihood", ["gaussian", "student_t"])
def test_a_row_without_target_is_absent(likelihood):
    """With standardize=False; otherwise the inputs of that row still count for the units of X."""
    y, seen = GAPS[:, 0], ~np.isnan(GAPS[:, 0])
    unit = (X - X.mean(0)) / X.std(0)
    model = GPRegressor(likelihood=likelihood, standardize=False, optimizer=None)
    value = model.fit(unit, y).log_marginal_likelihood_value_
    mean, loo = model.predict(unit), model.loo_predict()
    assert "7 row(s) without weight or target dropped" in str(model.fit_report_)
    model.fit(unit[seen], y[seen])
    np.testing.assert_array_equal(mean, model.predict(unit))
    assert value == model.log_marginal_likelihood_value_
    np.testing.assert_array_equal(np.isnan(loo), ~seen)
    np.testing.assert_array_equal(loo[seen], model.loo_predict())


def test_a_missing_count_is_absent():
    y = rng.poisson(3, size=N).astype(float)
    y[4:8] = np.nan
    seen = ~np.isnan(y)
    one = GPCountRegressor(optimizer=None, standardize=False).fit(X / 10, y)
    other = GPCountRegressor(optimizer=None, standardize=False).fit(X[seen] / 10, y[seen])
    np.testing.assert_array_equal(one.predict(X_NEW / 10), other.predict(X_NEW / 10))


def test_unseen_targets_have_no_density():
    model = GPRegressor(optimizer=None).fit(X, GAPS)
    np.testing.assert_array_equal(np.isnan(model.log_predictive_density(X, GAPS)), np.isnan(GAPS))
