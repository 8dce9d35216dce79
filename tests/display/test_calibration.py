"""CalibrationDisplay: coverage, PIT and reliability against their definitions."""

import numpy as np
import pytest
from scipy.stats import norm

from mercer import GPClassifier, GPCountRegressor, GPRegressor
from mercer.display import CalibrationDisplay


def test_coverage_counts_targets_inside_central_intervals():
    generator = np.random.default_rng(0)
    mean, std = generator.standard_normal(50), generator.uniform(0.5, 2, 50)
    y = generator.normal(mean, std)
    display = CalibrationDisplay.from_predictions(y, mean=mean, std=std)
    for level in (0.2, 0.5, 0.95):
        inside = np.abs(y - mean) <= norm.ppf(0.5 + level / 2) * std
        assert display.coverage(level) == pytest.approx(inside.mean())
    np.testing.assert_allclose(display.pit, norm.cdf(y, mean, std))
    assert len(display.ax_) == 2


def test_pit_of_sampled_counts_is_uniform_when_the_model_is_true():
    generator = np.random.default_rng(1)
    n = 2000
    rate = generator.uniform(0.5, 8, n)
    draws = generator.poisson(rate[:, None], (n, 400))
    display = CalibrationDisplay.from_predictions(generator.poisson(rate), samples=draws, kind="coverage")
    error = np.sqrt(display.nominal * (1 - display.nominal) / n + 1 / 400)
    assert np.all(np.abs(display.empirical - display.nominal) < 4 * error)
    assert np.all((display.pit >= 0) & (display.pit <= 1))


def test_estimator_and_its_predictions_give_the_same_numbers(wave):
    X, y = wave
    model = GPRegressor("rbf", optimizer=None).fit(X[::2], y[::2])
    mean, std = model.predict(X[1::2], return_std=True)
    from_model = CalibrationDisplay.from_estimator(model, X[1::2], y[1::2], kind="pit")
    from_numbers = CalibrationDisplay.from_predictions(y[1::2], mean=mean, std=std, kind="pit")
    np.testing.assert_array_equal(from_model.pit, from_numbers.pit)


def test_other_likelihoods_are_judged_by_their_draws(wave):
    X, y = wave
    counts = np.random.default_rng(2).poisson(np.exp(1 + y))
    for model in (GPCountRegressor(optimizer=None), GPRegressor(likelihood="student_t", optimizer=None)):
        display = CalibrationDisplay.from_estimator(model.fit(X, counts), X, counts)
        assert np.all((display.pit >= 0) & (display.pit <= 1))


def test_exposure_reaches_the_draws(wave):
    X, y = wave
    exposure = np.where(np.arange(30) % 2, 50.0, 1.0)
    counts = np.random.default_rng(5).poisson(exposure * np.exp(1 + y))
    model = GPCountRegressor().fit(X, counts, exposure=exposure)
    told = CalibrationDisplay.from_estimator(model, X, counts, exposure=exposure)
    untold = CalibrationDisplay.from_estimator(model, X, counts)
    assert told.coverage(0.95) > 0.8
    assert untold.coverage(0.95) < 0.6


def test_reliability_shows_one_line_of_a_binary_and_all_of_a_ternary_problem(quadrants):
    X, y = quadrants
    binary = CalibrationDisplay.from_estimator(GPClassifier(optimizer=None).fit(X, y), X, y)
    assert [text.get_text() for text in binary.ax_.get_legend().get_texts()].count("class same") == 1
    labels = np.arange(40) % 3
    probabilities = np.full((40, 3), 1 / 3)
    ternary = CalibrationDisplay.from_predictions(labels, probabilities=probabilities)
    lines = [line for line in ternary.ax_.get_lines() if line.get_label().startswith("class")]
    assert [float(line.get_ydata()[0]) for line in lines] == pytest.approx([14 / 40, 13 / 40, 13 / 40])


def test_one_column_of_probabilities_is_the_second_class():
    display = CalibrationDisplay.from_predictions([0, 1, 1], probabilities=[0.2, 0.8, 0.9])
    np.testing.assert_allclose(display.probabilities.sum(axis=1), 1.0)
    np.testing.assert_array_equal(display.hits[:, 1], [0, 1, 1])


def test_wrong_requests_are_named():
    with pytest.raises(ValueError, match="mean and std, or samples, or probabilities"):
        CalibrationDisplay.from_predictions([1.0, 2.0])
    with pytest.raises(ValueError, match="kind"):
        CalibrationDisplay.from_predictions([1.0], mean=[1.0], std=[1.0], kind="all")
    with pytest.raises(ValueError, match="shape"):
        CalibrationDisplay.from_predictions([0, 1], probabilities=np.ones((3, 2)))
    with pytest.raises(ValueError, match="rows"):
        CalibrationDisplay.from_predictions([0, 1], samples=np.ones((3, 2)))
