"""A spectral mixture in the estimators: found, learned, reported in the user's units, saved."""

import warnings

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning

from mercer import GPClassifier, GPRegressor, load
from mercer.kernels import GaussianMixture, MixtureKernel, ScaleKernel, StudentMixture

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


@pytest.mark.parametrize("optimizer", [None, "lbfgs"])
@pytest.mark.parametrize(
    "make", [lambda: ScaleKernel(GaussianMixture(2)), lambda: GaussianMixture(2) * GaussianMixture(2)]
)
def test_units_of_y_do_not_matter_where_the_mixture_is_a_part(make, optimizer):
    x = np.linspace(0, 10, 40)[:, None]
    y = 5 * np.sin(2 * x[:, 0]) + 100 + 0.3 * np.random.default_rng(1).normal(size=40)
    options = {"optimizer": optimizer, "max_iter": 5}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a few steps are enough to compare
        one = GPRegressor(make(), **options).fit(x, y).predict(x, return_std=True)
        for size in (1e-4, 1e4):
            other = GPRegressor(make(), **options).fit(x, size * y).predict(x, return_std=True)
            for mine, its in zip(one, other, strict=True):
                np.testing.assert_allclose(its, size * mine, rtol=1e-6)


def test_a_few_steps_from_the_start_fit_in_any_units():
    x = np.linspace(0, 10, 40)[:, None]
    signal = 5 * np.sin(2 * x[:, 0]) + 100
    y = signal + 0.3 * np.random.default_rng(1).normal(size=40)
    for size in (1e-4, 1.0, 1e4):
        model = GPRegressor(ScaleKernel(GaussianMixture(2))).fit(x, size * y)
        assert np.sqrt(np.mean((model.predict(x) / size - signal) ** 2)) < 0.15


def test_outputs_at_alternate_rows_and_slopes_alone_are_learned_from():
    odd = np.arange(len(X)) % 2 == 1
    y = waves(X / 2) + 0.1 * np.random.default_rng(2).normal(size=len(X))
    both = np.column_stack([np.where(odd, np.nan, y), np.where(odd, y, np.nan)])
    found = GPRegressor(GaussianMixture(3), max_iter=40).fit(X / 2, both).kernel_.frequency.detach().numpy()
    np.testing.assert_allclose(np.sort(found[:, 0]), [0, 0.25, 0.9], atol=5e-3)
    x = np.linspace(0, 6, 40)[:, None]
    model = GPRegressor(GaussianMixture(2), max_iter=60)
    model.fit(x, 3 * np.cos(3 * x[:, 0]), noise_variance=1e-4, derivative=np.ones((40, 1)))
    np.testing.assert_allclose(model.predict(x, derivative=0), 3 * np.cos(3 * x[:, 0]), atol=0.05)


def test_a_frequency_can_be_set_by_name_and_draws_are_functions():
    model = GPRegressor(GaussianMixture(frequency=[0.0, 1.0]), optimizer=None)
    model.set_params(kernel__frequency=[0.0, 0.9], kernel__weight=[4.0, 20.0])
    assert model.get_params()["kernel__frequency"] == pytest.approx([0.0, 0.9])
    model.fit(X, Y)
    assert model.posterior_.pathwise
    np.testing.assert_allclose(model.sample_y(X[:5], 2), model.sample_y(X, 2)[:5], rtol=1e-8)


def test_strings_and_other_tasks():
    names = GPRegressor("student_mixture + linear", max_iter=3).fit(X[:40], Y[:40]).theta_names_
    assert "kernel.kernels.0.frequency[0]" in names
    labels = np.sin(2 * np.pi * 0.25 * X[:, 0]) > 0
    classifier = GPClassifier(StudentMixture(2), max_iter=10).fit(X, labels)
    assert classifier.score(X, labels) > 0.9
