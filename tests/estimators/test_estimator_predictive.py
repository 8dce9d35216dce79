"""What a fitted model says of rows: known noise, leave-one-out, densities and scores against oracles."""

import numpy as np
import pytest
from oracles import likelihoods as density
from oracles.estimator_gp import Regression, matern52
from scipy import integrate, stats
from sklearn.metrics import accuracy_score, d2_tweedie_score, r2_score

from mercer import GPClassifier, GPCountRegressor, GPRegressor
from mercer.kernels import RBF, Linear, Matern52
from mercer.likelihoods import Gaussian, NegativeBinomial, StudentT

rng = np.random.default_rng(0)
N = 22
X = rng.uniform(-2, 2, size=(N, 2))
ELL, AMPLITUDE = np.array([1.2, 2.0]), 30.0
SIGNAL = np.sin(2 * X[:, 0]) + 0.4 * X[:, 1]
Y = 100 + 5 * SIGNAL + rng.normal(size=N)
NOISE = rng.uniform(0.2, 3.0, size=N)
TWO = (SIGNAL + 0.3 * rng.normal(size=N) > 0).astype(int)
THREE = np.digitize(SIGNAL, [-0.5, 0.5])
EXPOSURE = rng.uniform(0.5, 3.0, size=N)
COUNTS = rng.poisson(EXPOSURE * np.exp(SIGNAL + 1))
X_NEW = rng.uniform(-2, 2, size=(6, 2))
KERNEL = Matern52(list(ELL), outputscale=AMPLITUDE)


def dense(rows, y, noise):
    """The dense regression on some rows with the kernel above; the prior mean is the mean of y."""
    return Regression(matern52(X[rows], X[rows], ELL, AMPLITUDE), y[rows], noise[rows], y[rows].mean())


# ------------------------------------------------------------------ known noise


def test_known_noise_of_every_row_is_the_dense_formula():
    model = GPRegressor(KERNEL, optimizer=None).fit(X, Y, noise_variance=NOISE)
    oracle = dense(np.arange(N), Y, NOISE)
    mean, covariance = oracle.predict(matern52(X_NEW, X, ELL, AMPLITUDE), matern52(X_NEW, X_NEW, ELL, AMPLITUDE))
    variance = np.diag(covariance)
    new_noise = rng.uniform(0.1, 1, size=6)
    for given, added in ((None, NOISE.mean()), (0.7, 0.7), (new_noise, new_noise)):
        found, std = model.predict(X_NEW, return_std=True, noise_variance=given)
        np.testing.assert_allclose(found, mean, rtol=1e-9)
        np.testing.assert_allclose(std, np.sqrt(variance + added), rtol=1e-9)
        found = model.predict(X_NEW, return_cov=True, noise_variance=given)[1]
        np.testing.assert_allclose(found, covariance + added * np.eye(6), rtol=1e-8, atol=1e-8)
        found = model.log_predictive_density(X_NEW, mean + 1, noise_variance=given)
        np.testing.assert_allclose(found, stats.norm.logpdf(1, 0, np.sqrt(variance + added)), rtol=1e-9)
    np.testing.assert_allclose(model.predict(X_NEW, return_std=True, latent=True)[1], np.sqrt(variance), rtol=1e-9)
    assert model.log_marginal_likelihood_value_ == pytest.approx(oracle.log_evidence(), rel=1e-9)
    assert model.noise_variance_ is None
    assert not any("noise" in name for name in model.theta_names_)


def test_known_noise_is_in_units_of_y_for_every_output():
    outputs = np.column_stack([Y, 1e3 * Y, -Y / 7])
    model = GPRegressor(Matern52(list(ELL)), optimizer=None).fit(X, outputs, noise_variance=NOISE)
    found, std = model.predict(X_NEW, return_std=True, noise_variance=0.3)
    for j in range(3):
        kernel = Matern52(list(ELL), outputscale=outputs[:, j].var())
        alone = GPRegressor(kernel, optimizer=None).fit(X, outputs[:, j], noise_variance=NOISE)
        expected = alone.predict(X_NEW, return_std=True, noise_variance=0.3)
        np.testing.assert_allclose(found[:, j], expected[0], rtol=1e-8)
        np.testing.assert_allclose(std[:, j], expected[1], rtol=1e-8)


def test_one_number_of_noise_is_that_noise_in_every_row():
    one, other = (
        GPRegressor(KERNEL, optimizer=None).fit(X, Y, noise_variance=given).predict(X_NEW)
        for given in (0.4, np.full(N, 0.4))
    )
    np.testing.assert_array_equal(one, other)


# ------------------------------------------------------------------ leave one out


@pytest.mark.parametrize("known", [False, True])
def test_leaving_a_row_out_is_fitting_without_it(known):
    """The prior mean, a constant, is that of all rows, as hyperparameters are held."""
    noise = NOISE if known else np.full(N, 0.9)
    model = GPRegressor(KERNEL, likelihood=Gaussian(0.9), optimizer=None)
    model.fit(X, Y, noise_variance=noise if known else None)
    mean, std = model.loo_predict(return_std=True)
    latent = model.loo_predict(return_std=True, latent=True)[1]
    for i in range(N):
        rest = np.delete(np.arange(N), i)
        oracle = Regression(matern52(X[rest], X[rest], ELL, AMPLITUDE), Y[rest], noise[rest], Y.mean())
        expected, covariance = oracle.predict(matern52(X[[i]], X[rest], ELL, AMPLITUDE), np.array([[AMPLITUDE]]))
        assert mean[i] == pytest.approx(expected[0], rel=1e-9)
        assert latent[i] == pytest.approx(np.sqrt(covariance[0, 0]), rel=1e-7)
        assert std[i] == pytest.approx(np.sqrt(covariance[0, 0] + noise[i]), rel=1e-8)


def test_a_row_of_weight_two_loses_one_of_its_two():
    weight = 1.0 + (np.arange(N) % 2)
    rows = np.repeat(np.arange(N), weight.astype(int))
    model = GPRegressor(KERNEL, likelihood=Gaussian(0.9), optimizer=None)
    weighted = model.fit(X, Y, sample_weight=weight).loo_predict(return_std=True)
    apart = X[rows] * (1 + 1e-12 * rng.normal(size=(len(rows), 2)))  # equal rows would be merged into weights again
    for found, written_out in zip(weighted, model.fit(apart, Y[rows]).loo_predict(return_std=True), strict=True):
        np.testing.assert_allclose(found[rows], written_out, rtol=1e-8)


FITS = {
    "student_t": (GPRegressor(likelihood=StudentT(scale=1.0), optimizer=None), Y),
    "logit": (GPClassifier(optimizer=None), TWO),
    "logit laplace": (GPClassifier(engine="laplace", optimizer=None), TWO),
    "probit power_ep": (GPClassifier(likelihood="probit", engine="power_ep", optimizer=None), TWO),
    "softmax": (GPClassifier(optimizer=None), THREE),
    "poisson": (GPCountRegressor(optimizer=None), COUNTS),
}


def means(model, rows):
    """Probabilities, or predicted means as a column."""
    return model.predict_proba(rows) if isinstance(model, GPClassifier) else model.predict(rows)[:, None]


@pytest.mark.parametrize("name", FITS)
def test_leaving_a_row_out_is_close_to_fitting_without_it(name):
    """The sites of the others depend on the row, so that this is approximate: far less than leaving it in would err."""
    model, y = FITS[name]
    model.set_params(standardize=False).fit(X, y)
    inside = means(model, X)
    loo = model.loo_predict_proba() if isinstance(model, GPClassifier) else model.loo_predict()[:, None]
    refit = np.empty_like(inside)
    for i in range(N):
        weight = np.ones(N)
        weight[i] = 1e-9  # not zero: all classes stay, and a count's level moves by nothing that matters
        refit[i] = means(model.fit(X, y, sample_weight=weight), X[[i]])[0]
    assert np.abs(loo - refit).mean() < 0.25 * np.abs(inside - refit).mean()


# ------------------------------------------------------------------ densities


def numerically(log_density, m, s):
    """log ∫ p(y|f) N(f; m, s²) df by adaptive quadrature."""
    value, _ = integrate.quad(
        lambda f: np.exp(log_density(f)) * stats.norm.pdf(f, m, s),
        m - 12 * s,
        m + 12 * s,
        epsabs=0,
        epsrel=1e-11,
        limit=500,
    )
    return np.log(value)


def test_regression_densities_are_the_integral_over_the_latent():
    rows = X_NEW
    for likelihood in (Gaussian(0.9), StudentT(scale=0.8)):
        model = GPRegressor(KERNEL, likelihood=likelihood, optimizer=None).fit(X, Y)
        m, s = model.predict(rows, return_std=True, latent=True)
        y = m + np.linspace(-4, 6, 6)
        if isinstance(likelihood, Gaussian):
            expected = [numerically(lambda f, y=y[i]: density.gaussian(y, f, 0.9), m[i], s[i]) for i in range(6)]
        else:
            expected = [numerically(lambda f, y=y[i]: density.student_t(y, f, 4.0, 0.8), m[i], s[i]) for i in range(6)]
        np.testing.assert_allclose(model.log_predictive_density(rows, y), expected, rtol=1e-8)


def test_class_densities_are_the_integral_over_the_latent():
    for likelihood in ("logit", "probit", "ordinal"):
        y = THREE if likelihood == "ordinal" else TWO
        model = GPClassifier(likelihood=likelihood, optimizer=None, standardize=False).fit(X, y)
        m, v = (t.detach().numpy() for t in model.posterior_.marginals(model.posterior_.plan.X[:6]))
        rows = model.posterior_.plan.X[:6].numpy()
        cuts = model.likelihood_.cutpoints.detach().numpy() if likelihood == "ordinal" else None
        for label in model.classes_:
            found = model.log_predictive_density(rows, np.full(6, label))
            p = {
                "logit": lambda f, label=label: density.logit(label, f),
                "probit": lambda f, label=label: density.probit(label, f),
                "ordinal": lambda f, label=label, cuts=cuts: density.ordinal(label, f, cuts),
            }[likelihood]
            expected = [numerically(p, m[i], np.sqrt(v[i])) for i in range(6)]
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)
            np.testing.assert_allclose(np.exp(found), model.predict_proba(rows)[:, label], rtol=1e-10)


def test_count_densities_are_the_integral_over_the_log_rate():
    exposure = np.linspace(0.5, 3, 6)
    y = np.array([0, 1, 3, 6, 12, 30])
    for likelihood in ("poisson", NegativeBinomial(0.4)):
        model = GPCountRegressor(likelihood=likelihood, optimizer=None).fit(X, COUNTS, exposure=EXPOSURE)
        m, s = model.predict(X_NEW, return_std=True, latent=True)
        found = model.log_predictive_density(X_NEW, y, exposure=exposure)
        for i in range(6):
            if likelihood == "poisson":
                log_density = lambda f, i=i: density.poisson(y[i], f, exposure[i])  # noqa: E731
            else:
                log_density = lambda f, i=i: density.negative_binomial(y[i], f, 0.4, exposure[i])  # noqa: E731
            assert found[i] == pytest.approx(numerically(log_density, m[i], s[i]), rel=1e-7)


@pytest.mark.parametrize("likelihood", ["logit", "probit", "softmax", "ordinal"])
def test_probabilities_sum_to_one_and_agree_with_their_logarithm(likelihood):
    y = TWO if likelihood in ("logit", "probit") else THREE
    model = GPClassifier(likelihood=likelihood, optimizer=None).fit(X, y)
    far = np.concatenate([X_NEW, 1e6 * X_NEW])
    proba = model.predict_proba(far)
    assert (proba > 0).all()
    np.testing.assert_allclose(proba.sum(1), 1, rtol=1e-13)
    np.testing.assert_allclose(np.exp(model.predict_log_proba(far)), proba, rtol=1e-12)
    np.testing.assert_array_equal(model.predict(far), model.classes_[proba.argmax(1)])
    assert model.log_predictive_density(X, y).mean() == pytest.approx(
        np.log(model.predict_proba(X)[np.arange(N), y]).mean(), rel=1e-12
    )


def test_moments_of_counts_are_those_of_the_mixture():
    """E y = e E exp f, Var y = E y + a E μ² + Var μ, for f normal."""
    for likelihood, dispersion in (("poisson", 0.0), (NegativeBinomial(0.4), 0.4)):
        model = GPCountRegressor(likelihood=likelihood, optimizer=None).fit(X, COUNTS, exposure=EXPOSURE)
        m, s = model.predict(X_NEW, return_std=True, latent=True)
        mean, std = model.predict(X_NEW, return_std=True, exposure=2.0)
        expected = 2 * np.exp(m + s**2 / 2)
        second = expected**2 * np.exp(s**2)
        np.testing.assert_allclose(mean, expected, rtol=1e-10)
        np.testing.assert_allclose(std**2, expected + dispersion * second + second - expected**2, rtol=1e-9)


# ------------------------------------------------------------------ scores


def test_scores_are_those_of_scikit_learn():
    weight = np.linspace(0, 1, N)
    regressor = GPRegressor(optimizer=None).fit(X, Y)
    assert regressor.score(X, Y, weight) == r2_score(Y, regressor.predict(X), sample_weight=weight)
    outputs = np.column_stack([Y, SIGNAL])
    several = GPRegressor(optimizer=None).fit(X, outputs)
    assert several.score(X, outputs) == r2_score(outputs, several.predict(X))
    classifier = GPClassifier(optimizer=None).fit(X, THREE)
    assert classifier.score(X, THREE, weight) == accuracy_score(THREE, classifier.predict(X), sample_weight=weight)
    counts = GPCountRegressor(optimizer=None).fit(X, COUNTS, exposure=EXPOSURE)
    assert counts.score(X, COUNTS, weight, exposure=EXPOSURE) == d2_tweedie_score(
        COUNTS, counts.predict(X, exposure=EXPOSURE), sample_weight=weight, power=1
    )


def test_a_sum_of_kernels_predicts_the_sum():
    """The posterior mean under two kernels is one gain times the residual, whatever the parts are called."""
    kernel = RBF([0.7, 0.7], outputscale=9.0) + Linear([2.0, 0.5])
    model = GPRegressor(kernel, likelihood=Gaussian(0.9), optimizer=None, standardize=False).fit(X, Y)

    def gram(a, b):
        squared = ((a[:, None] - b) ** 2).sum(-1) / 0.7**2
        return 9 * np.exp(-0.5 * squared) + (a * [2.0, 0.5]) @ b.T

    oracle = Regression(gram(X, X), Y, 0.9)
    mean, covariance = oracle.predict(gram(X_NEW, X), gram(X_NEW, X_NEW))
    found, std = model.predict(X_NEW, return_std=True, latent=True)
    np.testing.assert_allclose(found, mean, rtol=1e-8)
    np.testing.assert_allclose(std, np.sqrt(np.diag(covariance)), rtol=1e-7)
