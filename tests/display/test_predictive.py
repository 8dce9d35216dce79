"""PredictiveDisplay: what is drawn is what the estimator predicted."""

import builtins

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from mercer import GPClassifier, GPCountRegressor, GPRegressor
from mercer.display import PredictiveDisplay


def fitted_regressor(X, y):
    return GPRegressor("rbf", optimizer=None).fit(X, y)


def test_bands_are_gaussian_quantiles_of_the_prediction(wave):
    X, y = wave
    model = fitted_regressor(X, y)
    display = PredictiveDisplay.from_estimator(model, X, y, resolution=15, target_name="height (m)")
    mean, std = model.predict(display.axes[0][:, None], return_std=True)
    for level in (0.5, 0.95):
        lower, upper = display.bands[level]
        np.testing.assert_allclose(lower, norm.ppf(0.5 - level / 2, mean, std))
        np.testing.assert_allclose(upper, norm.ppf(0.5 + level / 2, mean, std))
    assert display.ax_.get_ylabel() == "height (m)"
    assert display.figure_ is display.ax_.figure


def test_latent_bands_are_narrower(wave):
    X, y = wave
    model = fitted_regressor(X, y)
    observed = PredictiveDisplay.from_estimator(model, X, resolution=9).bands[0.95]
    latent = PredictiveDisplay.from_estimator(model, X, resolution=9, latent=True).bands[0.95]
    assert np.all(latent[1] - latent[0] < observed[1] - observed[0])


def test_samples_are_drawn_on_the_given_axes(wave):
    import matplotlib.pyplot as plt

    X, y = wave
    ax = plt.subplots()[1]
    display = PredictiveDisplay.from_estimator(fitted_regressor(X, y), X, resolution=12, n_samples=3, ax=ax)
    assert display.samples.shape == (12, 3)
    assert display.ax_ is ax


def test_slice_holds_other_columns_at_their_median():
    generator = np.random.default_rng(2)
    frame = pd.DataFrame(generator.standard_normal((25, 3)), columns=["a", "b", "c"])
    model = fitted_regressor(frame, frame["b"].to_numpy())
    display = PredictiveDisplay.from_estimator(model, frame, feature="b", resolution=7)
    rows = frame.median().to_frame().T.loc[[0] * 7].assign(b=display.axes[0])
    np.testing.assert_allclose(display.mean, model.predict(rows))
    assert display.ax_.get_xlabel() == "b"
    assert "2 columns" in display.ax_.get_title(loc="left")


def test_two_columns_of_a_classifier_become_a_plane(quadrants):
    X, y = quadrants
    display = PredictiveDisplay.from_estimator(GPClassifier(optimizer=None).fit(X, y), X, y, resolution=6)
    assert display.kind == "plane"
    assert display.probabilities.shape == (36, 2)
    assert len(display.figure_.axes) == 2  # the plane and its colour bar


def test_three_classes_are_drawn_as_a_plane_and_as_curves(quadrants):
    X, _ = quadrants
    y = np.digitize(X[:, 0], [-0.5, 0.5])
    model = GPClassifier(optimizer=None).fit(X, y)
    assert PredictiveDisplay.from_estimator(model, X, y, resolution=6).probabilities.shape == (36, 3)
    curves = PredictiveDisplay.from_estimator(model, X, y, feature=0, resolution=6)
    assert curves.kind == "curve"
    assert len(curves.ax_.get_legend().get_texts()) == 3


def test_binary_curve_is_the_probability_of_the_second_class(wave):
    X, y = wave
    model = GPClassifier(optimizer=None).fit(X, y > 0)
    display = PredictiveDisplay.from_estimator(model, X, y > 0, resolution=8)
    drawn = display.ax_.get_lines()[0].get_ydata()
    np.testing.assert_allclose(drawn, model.predict_proba(display.axes[0][:, None])[:, 1])


def test_count_intervals_are_whole_numbers(wave):
    X, y = wave
    counts = np.random.default_rng(3).poisson(np.exp(1 + y))
    display = PredictiveDisplay.from_estimator(GPCountRegressor(optimizer=None).fit(X, counts), X, counts, resolution=8)
    lower, upper = display.bands[0.95]
    assert display.kind == "step"
    np.testing.assert_array_equal(lower, np.round(lower))
    assert np.all(lower >= 0)
    assert np.all(upper >= lower)


def test_predictions_are_sorted_before_they_are_joined():
    display = PredictiveDisplay.from_predictions([2.0, 0.0, 1.0], [20.0, 0.0, 10.0], [1.0, 1.0, 1.0])
    np.testing.assert_array_equal(display.mean, [0.0, 10.0, 20.0])


@pytest.mark.parametrize("feature", ["nowhere", 5, (0, 1), (0, 1, 2)])
def test_impossible_features_are_named(feature):
    X = np.random.default_rng(4).standard_normal((10, 3))
    model = fitted_regressor(X, X[:, 0])
    with pytest.raises(ValueError, match=r"feature|column"):
        PredictiveDisplay.from_estimator(model, X, feature=feature)


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="equally long"):
        PredictiveDisplay.from_predictions([0.0, 1.0], [0.0], [1.0])


def test_missing_matplotlib_says_how_to_get_it(monkeypatch):
    real_import = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ImportError, match=r"pip install matplotlib"):
        PredictiveDisplay.from_predictions([0.0, 1.0], [0.0, 1.0], [1.0, 1.0])
