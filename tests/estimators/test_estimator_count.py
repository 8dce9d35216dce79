"""Counts: what exposure means, and limits in which the answer is known."""

import numpy as np
import pytest
from scipy import optimize, stats

from mercer import GPCountRegressor
from mercer.kernels import RBF, Constant
from mercer.likelihoods import NegativeBinomial

rng = np.random.default_rng(0)
N = 40
X = rng.uniform(-2, 2, size=(N, 1))
EXPOSURE = rng.uniform(0.5, 5, size=N)
Y = rng.poisson(EXPOSURE * np.exp(1 + np.sin(2 * X[:, 0])))
X_NEW = np.linspace(-2, 2, 5)[:, None]
LIKELIHOODS = pytest.mark.parametrize("likelihood", ["poisson", "negative_binomial"])


@LIKELIHOODS
def test_exposure_multiplies_the_expected_count(likelihood):
    model = GPCountRegressor(likelihood=likelihood, optimizer=None).fit(X, Y, exposure=EXPOSURE)
    rate = model.predict(X_NEW)
    np.testing.assert_allclose(model.predict(X_NEW, exposure=3.0), 3 * rate, rtol=1e-12)
    each = np.linspace(1, 2, 5)
    np.testing.assert_allclose(model.predict(X_NEW, exposure=each), each * rate, rtol=1e-12)
    latent = model.predict(X_NEW, return_std=True, latent=True)
    for one, other in zip(latent, model.predict(X_NEW, True, latent=True, exposure=each), strict=True):
        np.testing.assert_array_equal(one, other)


@LIKELIHOODS
@pytest.mark.parametrize("engine", ["dual", "laplace", "power_ep"])
def test_exposure_in_other_units_scales_the_rate(likelihood, engine):
    """Hours instead of days: the log rate moves by a constant, which the mean takes up, and nothing else changes."""
    model = GPCountRegressor(likelihood=likelihood, engine=engine, optimizer=None)
    days = model.fit(X, Y, exposure=EXPOSURE)
    rate, evidence, theta = days.predict(X_NEW), days.log_marginal_likelihood_value_, days.theta_
    hours = model.fit(X, Y, exposure=24 * EXPOSURE)
    np.testing.assert_allclose(24 * hours.predict(X_NEW), rate, rtol=1e-7)
    np.testing.assert_allclose(hours.predict(X_NEW, exposure=24.0), rate, rtol=1e-7)
    assert hours.log_marginal_likelihood_value_ == pytest.approx(evidence, rel=1e-8)
    moved = [np.log(24.0) if name == "mean.constant" else 0.0 for name in hours.theta_names_]
    np.testing.assert_allclose(theta - hours.theta_, moved, atol=1e-10)


def test_one_exposure_for_all_rows_is_no_exposure_in_another_unit():
    plain = GPCountRegressor(optimizer=None).fit(X, Y)
    scaled = GPCountRegressor(optimizer=None).fit(X, Y, exposure=4.0)
    np.testing.assert_allclose(scaled.predict(X_NEW, exposure=4.0), plain.predict(X_NEW), rtol=1e-8)


def test_rows_at_one_place_add_up_for_poisson():
    """Counts at equal inputs are one count with the sum of the exposures, up to a factor that f does not see."""
    split = rng.binomial(Y, 0.5)
    twice = np.concatenate([X, X])
    apart = GPCountRegressor(optimizer=None, standardize=False)
    apart.fit(twice, np.concatenate([split, Y - split]), exposure=np.concatenate([EXPOSURE, EXPOSURE]) / 2)
    together = GPCountRegressor(optimizer=None, standardize=False).fit(X, Y, exposure=EXPOSURE)
    for one, other in zip(apart.predict(X_NEW, True), together.predict(X_NEW, True), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-7)
    lost = stats.binom.logpmf(split, Y, 0.5).sum()
    assert apart.log_marginal_likelihood_value_ == pytest.approx(
        together.log_marginal_likelihood_value_ + lost, rel=1e-8
    )


def test_weight_is_replication_and_exposure_is_not():
    heavy = GPCountRegressor(optimizer=None).fit(X, Y, sample_weight=np.full(N, 2.0), exposure=EXPOSURE)
    long = GPCountRegressor(optimizer=None).fit(X, 2 * Y, exposure=2 * EXPOSURE)
    # for the Poisson law both double the information; only the density of the data differs
    np.testing.assert_allclose(heavy.predict(X_NEW), long.predict(X_NEW), rtol=1e-6)
    assert abs(heavy.log_marginal_likelihood_value_ - long.log_marginal_likelihood_value_) > 1


def test_a_constant_rate_is_that_of_a_lognormal_prior():
    """One latent number: the dense posterior is a one-dimensional integral, which Laplace expands at the mode."""
    model = GPCountRegressor(Constant(0.5), engine="laplace", optimizer=None).fit(X, Y, exposure=EXPOSURE)
    mean = np.log(Y.sum() / EXPOSURE.sum())

    def slope(f):
        return Y.sum() - EXPOSURE.sum() * np.exp(f) - (f - mean) / 0.5

    mode = optimize.brentq(slope, mean - 3, mean + 3, xtol=1e-14)
    variance = 1 / (EXPOSURE.sum() * np.exp(mode) + 1 / 0.5)
    m, s = model.predict(X_NEW, return_std=True, latent=True)
    np.testing.assert_allclose(m, mode, rtol=1e-9)
    np.testing.assert_allclose(s, np.sqrt(variance), rtol=1e-7)


def test_little_dispersion_is_poisson():
    poisson = GPCountRegressor(RBF(1.0), optimizer=None).fit(X, Y, exposure=EXPOSURE)
    likelihood = NegativeBinomial(1e-7, bounds=(1e-8, 1.0))
    other = GPCountRegressor(RBF(1.0), likelihood=likelihood, optimizer=None).fit(X, Y, exposure=EXPOSURE)
    for one, expected in zip(other.predict(X_NEW, True), poisson.predict(X_NEW, True), strict=True):
        np.testing.assert_allclose(one, expected, rtol=1e-4)


def test_overdispersion_is_learned():
    """Counts from a negative binomial law: the dispersion is found and beats the Poisson law in evidence."""
    rows = np.random.default_rng(1).uniform(-2, 2, size=(150, 1))
    rate = np.random.default_rng(2).gamma(1 / 0.8, 0.8, size=150) * np.exp(2 + np.sin(2 * rows[:, 0]))
    y = np.random.default_rng(3).poisson(rate)
    wide = GPCountRegressor("rbf", likelihood="negative_binomial").fit(rows, y)
    narrow = GPCountRegressor("rbf").fit(rows, y)
    assert wide.log_marginal_likelihood_value_ > narrow.log_marginal_likelihood_value_ + 10
    dispersion = np.exp(wide.theta_[wide.theta_names_.index("likelihood.dispersion")])
    assert 0.5 < dispersion < 1.2


def test_no_events_at_all_is_a_small_rate():
    model = GPCountRegressor().fit(X, np.zeros(N))
    rate = model.predict(X_NEW)
    assert ((rate > 0) & (rate < 1)).all()


def test_the_learned_rate_is_near_the_true_one():
    model = GPCountRegressor("rbf").fit(X, Y, exposure=EXPOSURE)
    m, s = model.predict(X_NEW, return_std=True, latent=True)
    assert (np.abs(m - 1 - np.sin(2 * X_NEW[:, 0])) < 4 * s).all()
    assert (s < 0.5).all()
