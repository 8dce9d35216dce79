"""RelevanceDisplay: sd over length scale, in any unit of the column."""

import numpy as np
import pandas as pd
import pytest

from mercer import GPRegressor
from mercer.display import RelevanceDisplay
from mercer.kernels import RBF, Linear, Periodic, ScaleKernel


def test_relevance_is_free_of_units():
    generator = np.random.default_rng(0)
    X = generator.standard_normal((40, 2))
    y = np.sin(2 * X[:, 0])
    metres = RelevanceDisplay.from_estimator(GPRegressor("rbf").fit(X, y), X)
    X_mm = X * [1000.0, 1.0]
    millimetres = RelevanceDisplay.from_estimator(GPRegressor("rbf").fit(X_mm, y), X_mm)
    (first,), (second,) = metres.relevance.values(), millimetres.relevance.values()
    np.testing.assert_allclose(first, second, rtol=1e-4)
    assert metres.names[0] == "x0"


def test_explicit_length_scales_are_read_in_the_units_of_the_columns():
    frame = pd.DataFrame({"a": [0.0, 2.0, 0.0, 2.0], "b": [0.0, 0.0, 30.0, 30.0]})
    model = GPRegressor(RBF(lengthscale=[0.5, 60.0]), optimizer=None).fit(frame, [0.0, 1.0, 0.0, 1.0])
    display = RelevanceDisplay.from_estimator(model, frame)
    assert display.names == ["a", "b"]
    (row,) = display.relevance.values()
    np.testing.assert_allclose(row, [1.0 / 0.5, 15.0 / 60.0])


def test_every_part_with_a_length_scale_has_its_bars():
    X = np.random.default_rng(1).standard_normal((20, 2))
    seasonal = Periodic(period=2.0, lengthscale=1.0, active_dims=[1])
    kernel = ScaleKernel(RBF(active_dims=[0])) + ScaleKernel(seasonal) + Linear()
    display = RelevanceDisplay.from_estimator(GPRegressor(kernel, optimizer=None).fit(X, X[:, 0]), X)
    assert sorted(display.relevance) == ["Periodic", "RBF"]
    assert np.isnan(display.relevance["RBF"]).sum() == 1
    # Near zero, the periodic kernel is an RBF of length scale p√ℓ/2π.
    assert np.nanmax(display.relevance["Periodic"]) == pytest.approx(np.pi * X[:, 1].std())


def test_only_the_most_relevant_columns_are_shown():
    display = RelevanceDisplay.from_predictions([0.1, 3.0, 1.0], ["a", "b", "c"], max_features=2)
    assert display.names == ["b", "c"]
    assert [text.get_text() for text in display.ax_.get_yticklabels()] == ["b", "c"]


def test_a_kernel_without_length_scale_is_refused():
    X = np.random.default_rng(2).standard_normal((10, 1))
    model = GPRegressor(Linear(), optimizer=None).fit(X, X[:, 0])
    with pytest.raises(ValueError, match="length scale"):
        RelevanceDisplay.from_estimator(model, X)
