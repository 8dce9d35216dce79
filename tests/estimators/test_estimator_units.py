"""Units: what a user sets and reads is in the units of the data, and predictions do not depend on them."""

import gpytorch
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.estimator_gp import Regression, matern52

from mercer import GPClassifier, GPCountRegressor, GPRegressor
from mercer.kernels import (
    RBF,
    Constant,
    Linear,
    Matern52,
    Periodic,
    RationalQuadratic,
    kernel_params,
    prepare,
)
from mercer.likelihoods import Gaussian, StudentT

rng = np.random.default_rng(0)
N = 25
X = rng.normal([3.0, -70.0], [0.2, 40.0], size=(N, 2))
SIGNAL = np.sin(5 * X[:, 0]) + 0.02 * X[:, 1]
REAL = 400.0 + 30.0 * (SIGNAL + 0.2 * rng.standard_t(4, size=N))
COUNTS = rng.poisson(np.exp(SIGNAL + 2))
TWO = np.digitize(SIGNAL, [np.median(SIGNAL)])
THREE = np.digitize(SIGNAL, np.quantile(SIGNAL, [0.3, 0.7]))
X_NEW = rng.normal([3.0, -70.0], [0.2, 40.0], size=(6, 2))
FITS = {
    "gaussian": (GPRegressor(), REAL),
    "gaussian with a mean": (GPRegressor(mean=gpytorch.means.ConstantMean()), REAL),
    "student_t": (GPRegressor(likelihood="student_t"), REAL),
    "student_t laplace": (GPRegressor(likelihood="student_t", engine="laplace"), REAL),
    "student_t power_ep": (GPRegressor(likelihood=StudentT(scale=10.0), engine="power_ep"), REAL),
    "logit": (GPClassifier(), TWO),
    "logit laplace": (GPClassifier(engine="laplace"), TWO),
    "logit power_ep": (GPClassifier(engine="power_ep"), TWO),
    "probit": (GPClassifier(likelihood="probit"), TWO),
    "softmax": (GPClassifier(), THREE),
    "ordinal": (GPClassifier(likelihood="ordinal"), THREE),
    "ordinal laplace": (GPClassifier(likelihood="ordinal", engine="laplace"), THREE),
    "ordinal power_ep": (GPClassifier(likelihood="ordinal", engine="power_ep"), THREE),
    "poisson": (GPCountRegressor(), COUNTS),
    "poisson laplace": (GPCountRegressor(engine="laplace"), COUNTS),
    "poisson power_ep": (GPCountRegressor(engine="power_ep"), COUNTS),
    "negative_binomial": (GPCountRegressor(likelihood="negative_binomial"), COUNTS),
    "negative_binomial laplace": (GPCountRegressor(likelihood="negative_binomial", engine="laplace"), COUNTS),
}
KERNELS = {
    "lengthscales": Matern52([0.3, 55.0], outputscale=250.0),
    "sum": RBF([0.3, 55.0], outputscale=9.0) + Linear([4.0, 0.01]) + Constant(77.0),
    "product": RationalQuadratic([0.3, 55.0], 1.4, outputscale=9.0) * Periodic([1.0, 30.0], [1.2, 0.7]),
    "one column": RBF(0.3, active_dims=[0], outputscale=2.0) + Matern52(12.0, active_dims=[1], outputscale=3.0),
    "sum under a scale": gpytorch.kernels.ScaleKernel(RBF([0.3, 55.0]) + Linear([4.0, 0.01])),
}


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    a=st.tuples(*[st.floats(-6, 6).map(lambda e: 10.0**e)] * 2),
    b=st.tuples(*[st.floats(-10, 10)] * 2),
    c=st.floats(-6, 6).map(lambda e: 10.0**e),
    flip=st.booleans(),
    d=st.floats(-10, 10),
)
def test_other_units_of_X_and_y_change_nothing_but_units(a, b, c, flip, d):
    """Digits are lost only where a shift is larger than the spread of what it shifts (here at most a factor 10⁴)."""
    a, c = np.array(a), -c if flip else c
    b, d = np.array(b) * a * X.std(axis=0), d * abs(c) * REAL.std()
    model = GPRegressor(optimizer=None)
    mean, std = model.fit(X, REAL).predict(X_NEW, return_std=True)
    evidence, theta = model.log_marginal_likelihood_value_, model.theta_
    model.fit(a * X + b, c * REAL + d)
    mean_moved, std_moved = model.predict(a * X_NEW + b, return_std=True)
    np.testing.assert_allclose((mean_moved - d) / c, mean, atol=1e-8 * REAL.std())
    np.testing.assert_allclose(std_moved / abs(c), std, rtol=1e-8)
    assert model.log_marginal_likelihood_value_ + N * np.log(abs(c)) == pytest.approx(evidence, rel=1e-8)
    unit = {"outputscale": 2 * np.log(abs(c)), "noise_variance": 2 * np.log(abs(c))}
    unit |= {f"lengthscale[{j}]": np.log(a[j]) for j in range(2)}
    expected = [value + unit[name.rpartition(".")[2]] for name, value in zip(model.theta_names_, theta, strict=True)]
    np.testing.assert_allclose(model.theta_, expected, atol=1e-8)


@pytest.mark.filterwarnings("ignore:.*did not converge")
@pytest.mark.parametrize("name", ["gaussian", "student_t", "logit", "softmax", "ordinal", "poisson"])
def test_learning_takes_the_same_path_in_other_units(name):
    model, y = FITS[name]
    a, b = np.array([1e3, 1e-4]), np.array([7.0, 0.1])
    c, d = (0.01, -3.0) if name in ("gaussian", "student_t") else (1, 0)

    def told(X, y, X_new, c, d):
        fitted = model.set_params(max_iter=3).fit(X, y)
        if isinstance(fitted, GPClassifier):
            return fitted.predict_proba(X_new)
        return (fitted.predict(X_new) - d) / c

    here, there = told(X, y, X_NEW, 1, 0), told(a * X + b, c * y + d, a * X_NEW + b, c, d)
    np.testing.assert_allclose(there, here, rtol=1e-6)


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_is_what_was_set_when_nothing_is_learned(name):
    kernel = KERNELS[name]
    model = GPRegressor(kernel, likelihood=Gaussian(30.0), optimizer=None).fit(X, REAL)
    prepared, _ = prepare(kernel, 2)
    found = kernel_params(model.kernel_)
    for path, value in kernel_params(prepared).items():
        if value is not None:
            np.testing.assert_allclose(found[path], value, rtol=1e-10, err_msg=path)
    assert model.noise_variance_ == pytest.approx(30.0, rel=1e-10)
    assert kernel_params(kernel) == kernel_params(model.kernel), "fit changed the user's kernel"


def test_a_lengthscale_for_columns_of_different_scales_becomes_one_per_column_and_says_so():
    model = GPRegressor(Matern52(0.5, ard=False, outputscale=90.0), optimizer=None).fit(X, REAL)
    np.testing.assert_allclose(model.kernel_.base_kernel.lengthscale.detach(), [[0.5, 0.5]], rtol=1e-10)
    assert "base_kernel.lengthscale was one number and is now one per column" in str(model.fit_report_)


def test_one_lengthscale_in_standardised_units_is_reported_as_a_geometric_mean():
    model = GPRegressor(Matern52(ard=False), optimizer=None).fit(X, REAL)
    in_user_units = model.kernel_.base_kernel.lengthscale.detach().numpy()[0]
    np.testing.assert_allclose(in_user_units / in_user_units[0], X.std(axis=0) / X.std(axis=0)[0], rtol=1e-10)
    theta = dict(zip(model.theta_names_, model.theta_, strict=True))
    assert theta["kernel.base_kernel.lengthscale"] == pytest.approx(np.log(in_user_units).mean())
    assert theta["kernel.outputscale"] == pytest.approx(np.log(REAL.var()))
    assert model.log_marginal_likelihood(model.theta_) == pytest.approx(model.log_marginal_likelihood_value_, rel=1e-12)


def test_theta_is_the_kernel_and_the_noise_and_the_evidence_is_that_of_the_data():
    model = GPRegressor().fit(X, REAL)
    ell, amplitude = model.kernel_.base_kernel.lengthscale.detach().numpy()[0], model.kernel_.outputscale.item()
    named = dict(zip(model.theta_names_, np.exp(model.theta_), strict=True))
    np.testing.assert_allclose([named[f"kernel.base_kernel.lengthscale[{j}]"] for j in range(2)], ell, rtol=1e-10)
    assert named["kernel.outputscale"] == pytest.approx(amplitude, rel=1e-10)
    assert named["likelihood.noise_variance"] == pytest.approx(model.noise_variance_, rel=1e-10)

    def oracle(ell, amplitude, noise):
        return Regression(matern52(X, X, ell, amplitude), REAL, noise, mean=REAL.mean()).log_evidence()

    expected = oracle(ell, amplitude, model.noise_variance_)
    assert model.log_marginal_likelihood_value_ == pytest.approx(expected, rel=1e-8)
    elsewhere = np.add(model.theta_, [0.5, -0.4, 0.3, -0.2])
    values = dict(zip(model.theta_names_, np.exp(elsewhere), strict=True))
    expected = oracle(
        np.array([values[f"kernel.base_kernel.lengthscale[{j}]"] for j in range(2)]),
        values["kernel.outputscale"],
        values["likelihood.noise_variance"],
    )
    assert model.log_marginal_likelihood(list(elsewhere)) == pytest.approx(expected, rel=1e-8)


def test_the_learned_kernel_and_noise_make_the_same_model_again():
    with pytest.warns(UserWarning, match="did not converge"):
        learned = GPRegressor("rbf + linear", max_iter=5).fit(X, REAL)
    again = GPRegressor(learned.kernel_, likelihood=Gaussian(learned.noise_variance_), optimizer=None).fit(X, REAL)
    for one, other in zip(again.predict(X_NEW, return_std=True), learned.predict(X_NEW, return_std=True), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8)


@pytest.mark.parametrize("name", FITS)
def test_gradient_of_the_evidence_is_its_slope(name):
    """Central differences of step h err by h² and by rounding over h, each about 1e-7 of the largest slope.

    Sites that were averaged over draws stop at the residual √(resolution/100), which bounds the error there.
    """
    model, y = FITS[name]
    model.set_params(optimizer=None).fit(X, y)
    theta, step = model.theta_ + np.linspace(0.3, -0.3, len(model.theta_)), 3e-4
    _, gradient = model.log_marginal_likelihood(theta, eval_gradient=True)
    slopes = [
        (model.log_marginal_likelihood(theta + step * e) - model.log_marginal_likelihood(theta - step * e)) / (2 * step)
        for e in np.eye(len(theta))
    ]
    rtol = max(3e-6, (1e-2 * model.likelihood_.resolution) ** 0.5)
    np.testing.assert_allclose(gradient, slopes, rtol=0, atol=rtol * np.abs(slopes).max())


@pytest.mark.parametrize("name", FITS)
def test_theta_round_trip(name):
    model, y = FITS[name]
    model.set_params(optimizer=None).fit(X, y)
    assert len(model.theta_) == len(model.theta_names_) > 1
    assert model.log_marginal_likelihood(model.theta_) == pytest.approx(model.log_marginal_likelihood_value_, rel=1e-9)
    assert model.log_marginal_likelihood() == model.log_marginal_likelihood_value_
    assert np.isscalar(model.log_marginal_likelihood_value_)


def test_a_theta_of_the_wrong_length_or_without_evidence_is_refused():
    model = GPRegressor(optimizer=None).fit(X, REAL)
    with pytest.raises(
        ValueError, match=r"theta must have shape \(4,\), one entry per name in theta_names_; got \(2,\)"
    ):
        model.log_marginal_likelihood([0.0, 1.0])
    before = model.theta_
    with pytest.raises(ValueError, match="theta"):
        model.log_marginal_likelihood(np.full(4, np.nan))
    np.testing.assert_array_equal(model.theta_, before)
