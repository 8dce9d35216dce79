"""Draws: one seed is one function at any rows, with the moments that the model predicts."""

import numpy as np
import pytest

from mercer import GPClassifier, GPCountRegressor, GPRegressor
from mercer.kernels import Matern52, PolynomialKernel
from mercer.likelihoods import Gaussian

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


@pytest.mark.parametrize("kernel", ["matern52", "rbf", "linear", "rbf + linear"])
def test_one_seed_is_one_function_at_any_rows(kernel):
    model = GPRegressor(kernel, optimizer=None).fit(X, Y)
    together = model.sample_y(X_NEW, 3, random_state=7)
    assert together.shape == (6, 3)
    np.testing.assert_allclose(model.sample_y(X_NEW[2:4], 3, random_state=7), together[2:4], rtol=1e-9)
    np.testing.assert_array_equal(model.sample_y(X_NEW, 3, random_state=7), together)
    assert np.abs(model.sample_y(X_NEW, 3, random_state=8) - together).min() > 0
    generator = np.random.RandomState(7)
    np.testing.assert_array_equal(model.sample_y(X_NEW, 3, random_state=generator), together)
    assert np.abs(model.sample_y(X_NEW, 3, random_state=generator) - together).min() > 0


def test_a_kernel_without_spectrum_gives_joint_draws_and_says_so():
    model = GPRegressor(PolynomialKernel(power=2), optimizer=None).fit(X, Y)
    assert not model.posterior_.pathwise
    with pytest.warns(UserWarning, match="samples are joint draws at these rows and differ between calls"):
        draws = model.sample_y(X_NEW, 4000)
    mean, covariance = model.predict(X_NEW, return_cov=True, latent=True)
    variance = np.diag(covariance)
    assert (np.abs(draws.mean(1) - mean) < 4.5 * np.sqrt(variance / 4000)).all()
    error = np.sqrt((np.outer(variance, variance) + covariance**2) / 4000)
    assert (np.abs(np.cov(draws) - covariance) < 4.5 * error).all()


def seeds(sample, **options):
    """Thirty-two draws from each of forty seeds, which all have random features of their own."""
    return [sample(X_NEW, 32, random_state=seed, **options) for seed in range(40)]


def assert_expectation(draws, statistic, expected):
    """The mean of a statistic over seeds is as expected, within 4.5 of its standard errors over seeds."""
    found = np.stack([statistic(draw) for draw in draws])
    assert (np.abs(found.mean(0) - expected) < 4.5 * found.std(0) / np.sqrt(len(draws))).all()


@pytest.mark.parametrize("latent", [True, False])
def test_draws_have_the_moments_of_the_prediction(latent):
    model = GPRegressor(KERNEL, likelihood=Gaussian(0.9), optimizer=None).fit(X, Y)
    mean, covariance = model.predict(X_NEW, return_cov=True, latent=latent)
    centred = [draw - mean[:, None] for draw in seeds(model.sample_y, latent=latent)]
    assert_expectation(centred, lambda c: c.mean(1), 0.0)
    assert_expectation(centred, lambda c: c @ c.T / 32, covariance)


def test_draws_of_outputs_keep_their_units():
    model = GPRegressor(optimizer=None).fit(X, np.column_stack([Y, -1e3 * Y]))
    mean, std = model.predict(X_NEW, return_std=True, latent=True)
    assert model.sample_y(X_NEW, 5).shape == (6, 2, 5)
    scores = [(draw - mean[..., None]) / std[..., None] for draw in seeds(model.sample_y)]
    assert_expectation(scores, lambda z: z.mean(-1), 0.0)
    assert_expectation(scores, lambda z: (z**2).mean(-1), 1.0)
    assert_expectation(scores, lambda z: (z[:, 0] * z[:, 1]).mean(-1), 0.0)


def test_noise_of_draws_is_the_known_noise():
    """Draws with and without noise share their functions, so that the difference is the noise alone."""
    model = GPRegressor(KERNEL, optimizer=None).fit(X, Y, noise_variance=NOISE)
    functions = model.sample_y(X_NEW, 4000)
    for given, variance in ((4.0, 4.0), (None, NOISE.mean())):
        noise = model.sample_y(X_NEW, 4000, latent=False, noise_variance=given) - functions
        np.testing.assert_allclose(noise.var(1), variance, rtol=4.5 * np.sqrt(2 / 4000))


@pytest.mark.parametrize("likelihood", ["logit", "ordinal", "softmax"])
def test_drawn_labels_have_the_predicted_frequencies(likelihood):
    y = TWO if likelihood == "logit" else THREE
    model = GPClassifier(likelihood=likelihood, optimizer=None).fit(X, np.array(["ash", "elm", "oak"])[y])
    assert model.sample_y(X_NEW, 5).shape == ((6, 3, 5) if likelihood == "softmax" else (6, 5))
    draws = seeds(model.sample_y, latent=False)
    assert draws[0].shape == (6, 32) and set(draws[0].flat) <= set(model.classes_)
    for j, name in enumerate(model.classes_):
        assert_expectation(draws, lambda labels, name=name: (labels == name).mean(1), model.predict_proba(X_NEW)[:, j])


@pytest.mark.parametrize("likelihood", ["poisson", "negative_binomial"])
def test_drawn_counts_have_the_predicted_moments(likelihood):
    model = GPCountRegressor(likelihood=likelihood, optimizer=None).fit(X, COUNTS, exposure=EXPOSURE)
    exposure = np.linspace(0.5, 3, 6)
    mean, std = model.predict(X_NEW, return_std=True, exposure=exposure)
    draws = seeds(model.sample_y, latent=False, exposure=exposure)
    assert all((draw == np.round(draw)).all() for draw in draws)
    assert_expectation(draws, lambda y: y.mean(1), mean)
    assert_expectation(draws, lambda y: ((y - mean[:, None]) ** 2).mean(1), std**2)
    log_rate, spread = model.predict(X_NEW, return_std=True, latent=True)
    rates = seeds(model.sample_y)
    assert_expectation(rates, lambda f: f.mean(1), log_rate)
    assert_expectation(rates, lambda f: ((f - log_rate[:, None]) ** 2).mean(1), spread**2)
