"""A spectral mixture in the estimators: found, learned, reported in the user's units, saved."""

import numpy as np
import pytest
from sklearn.base import clone

from mercer import GPClassifier, GPRegressor, load
from mercer.kernels import GaussianMixture, MixtureKernel, StudentMixture

RNG = np.random.default_rng(0)
X = RNG.uniform(0, 30, 90)[:, None]


def waves(x):
    return 5 * np.sin(2 * np.pi * 0.9 * x[:, 0]) + 2 * np.sin(2 * np.pi * 0.25 * x[:, 0]) + 100


Y = waves(X) + 0.1 * RNG.normal(size=len(X))


@pytest.fixture(scope="module")
def model():
    return GPRegressor(GaussianMixture(3), max_iter=40).fit(X, Y)


def test_frequencies_are_those_of_the_data_and_the_waves_go_on(model):
    frequency = np.sort(model.kernel_.frequency.detach().numpy()[:, 0])
    np.testing.assert_allclose(frequency, [0, 0.25, 0.9], atol=2e-3)
    beyond = np.linspace(30, 45, 60)[:, None]
    mean, std = model.predict(beyond, return_std=True, latent=True)
    error = np.abs(mean - waves(beyond))
    assert error.max() < 0.5 and np.mean(error < 3 * std) > 0.9
    assert any("starts from 2 wave(s)" in note for note in model.fit_report_.notes)


def test_clone_and_file_give_the_same_predictions(model, tmp_path):
    model.save(tmp_path / "waves.mercer")
    loaded = load(tmp_path / "waves.mercer")
    assert isinstance(loaded.kernel_, MixtureKernel)
    np.testing.assert_array_equal(loaded.predict(X), model.predict(X))
    again = clone(model).fit(X, Y)
    np.testing.assert_array_equal(again.predict(X), model.predict(X))
    assert model.kernel.raw_frequency.detach().abs().max() == 0  # the user's kernel stays unset


def test_units_do_not_matter():
    options = {"optimizer": None}
    kernel = GaussianMixture(weight=[4.0, 20.0], lengthscale=[20.0, 30.0], frequency=[0.0, 0.9])
    moved = GaussianMixture(weight=[400.0, 2000.0], lengthscale=[2.0, 3.0], frequency=[0.0, 9.0])
    first = GPRegressor(kernel, **options).fit(X, Y).predict(X, return_std=True)
    second = GPRegressor(moved, **options).fit(X / 10, 10 * Y).predict(X / 10, return_std=True)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_allclose(10 * one, other, rtol=1e-7)


def test_a_frequency_can_be_set_by_name_and_draws_are_functions():
    model = GPRegressor(GaussianMixture(frequency=[0.0, 1.0]), optimizer=None)
    model.set_params(kernel__frequency=0.9, kernel__weight=[4.0, 20.0])
    assert model.get_params()["kernel__frequency"] == pytest.approx(0.9)
    model.fit(X, Y)
    assert model.posterior_.pathwise
    np.testing.assert_allclose(model.sample_y(X[:5], 2), model.sample_y(X, 2)[:5], rtol=1e-8)


def test_strings_and_other_tasks():
    names = GPRegressor("student_mixture + linear", max_iter=3).fit(X[:40], Y[:40]).theta_names_
    assert "kernel.kernels.0.frequency[0]" in names
    labels = np.sin(2 * np.pi * 0.25 * X[:, 0]) > 0
    classifier = GPClassifier(StudentMixture(2), max_iter=10).fit(X, labels)
    assert classifier.score(X, labels) > 0.9
