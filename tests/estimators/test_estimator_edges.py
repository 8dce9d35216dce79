"""Awkward but legal rows get a correct answer: odd scales, types and shapes, repeats, extreme weights."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.estimator_gp import Regression, matern52

from mercer import GPClassifier, GPCountRegressor, GPRegressor

rng = np.random.default_rng(0)
N = 12
X = rng.normal(size=(N, 2))
TARGETS = {
    GPRegressor: np.sin(X[:, 0]) + 0.1 * rng.normal(size=N),
    GPClassifier: np.tile([0, 1, 1], 4),
    GPCountRegressor: rng.poisson(3, size=N),
}
TASKS = pytest.mark.parametrize("task", TARGETS)
quick = settings(max_examples=25, deadline=None, derandomize=True)


def answers(model, X_new):
    """Predictions of any task as finite arrays."""
    if isinstance(model, GPClassifier):
        found = [np.asarray(model.predict_proba(X_new))]
        assert (found[0] >= 0).all()
        np.testing.assert_allclose(found[0].sum(1), 1.0, rtol=1e-12)
    else:
        found = [np.asarray(a) for a in (*model.predict(X_new, return_std=True), model.predict(X_new))]
        assert (found[1] > 0).all()
    assert all(np.isfinite(a).all() for a in found)
    return found


@st.composite
def awkward_rows(draw):
    """Rows with columns of every kind: (as a user might have them, the same numbers centred and scaled)."""
    n, d = draw(st.integers(1, 8)), draw(st.integers(1, 10))
    # halves, thirds and repeats: rows coincide, and float16 holds them exactly
    base = np.array(draw(st.lists(st.integers(-4, 4), min_size=n * d, max_size=n * d)), dtype=float).reshape(n, d) / 2
    kind = draw(st.sampled_from(["scaled", "float32", "float16", "integer", "object", "frame", "list", "tensor"]))
    spread = np.where(base.std(0) > 0, base.std(0), 1.0)
    clean = (base - base.mean(0)) / spread
    if kind == "scaled":
        scale = 10.0 ** np.array(draw(st.lists(st.integers(-12, 12), min_size=d, max_size=d)))
        shift = np.array(draw(st.lists(st.sampled_from([0.0, 3.0, -100.0]), min_size=d, max_size=d)))
        return scale * (base + shift), clean
    convert = {
        "float32": lambda: base.astype(np.float32),
        "float16": lambda: base.astype(np.float16),
        "integer": lambda: (2 * base).astype(int),
        "object": lambda: base.astype(object),
        "frame": lambda: pd.DataFrame(
            {f"x{j}": column.astype("int8" if j % 2 else "O") for j, column in enumerate(2 * base.T)}
        ),
        "list": base.tolist,
        "tensor": lambda: torch.as_tensor(base, dtype=torch.float32),
    }
    return convert[kind](), clean


CONFIGURATIONS = [
    (GPRegressor, {}),
    (GPRegressor, {"dtype": "float32"}),
    (GPRegressor, {"likelihood": "student_t"}),
    (GPRegressor, {"likelihood": "student_t", "engine": "laplace"}),
    (GPClassifier, {}),
    (GPClassifier, {"likelihood": "ordinal", "engine": "power_ep"}),
    (GPCountRegressor, {}),
    (GPCountRegressor, {"likelihood": "negative_binomial", "engine": "laplace"}),
]


@pytest.mark.parametrize(("task", "params"), CONFIGURATIONS)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(rows=awkward_rows(), seed=st.integers(0, 99))
def test_awkward_rows_give_the_answer_of_clean_ones(task, params, rows, seed):
    """Scales of 1e±12, shifts, one row, fewer rows than columns, constant columns, repeated rows with other targets."""
    awkward, clean = rows
    y = np.random.default_rng(seed).integers(0, 3, size=len(clean))
    model = task(optimizer=None, **params)
    if task is GPClassifier and len(np.unique(y)) < 2:
        with pytest.raises(ValueError, match="at least 2 classes"):
            model.fit(awkward, y)
        return
    found, expected = (answers(model.fit(some, y), some) for some in (awkward, clean))
    for one, other in zip(found, expected, strict=True):
        digits = 1e-5 if isinstance(awkward, torch.Tensor) else 1e-7  # a float32 tensor gets its predictions in float32
        np.testing.assert_allclose(one, other, rtol=digits, atol=digits)


@pytest.mark.filterwarnings("ignore:.*did not converge")
@pytest.mark.parametrize(("task", "params"), CONFIGURATIONS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(rows=awkward_rows(), seed=st.integers(0, 99))
def test_learning_from_awkward_rows_ends_in_finite_answers(task, params, rows, seed):
    awkward, _ = rows
    y = np.random.default_rng(seed).integers(0, 3, size=len(awkward))
    if task is GPClassifier:
        y[:2] = [0, 1][: len(y)]
        if len(y) < 2:
            return
    model = task(max_iter=2, **params).fit(awkward, y)
    answers(model, awkward)
    assert np.isfinite(model.log_marginal_likelihood_value_)
    assert np.isfinite(model.theta_).all()


@quick
@given(rows=awkward_rows(), seed=st.integers(0, 99), exponent=st.integers(-12, 12))
def test_regression_of_awkward_rows_is_the_dense_formula(rows, seed, exponent):
    """Targets of scale 1e±12 that contradict each other at repeated rows; a constant target has unit scale."""
    _, clean = rows
    y = 10.0**exponent * np.random.default_rng(seed).integers(-2, 3, size=len(clean))
    model = GPRegressor(optimizer=None).fit(clean, y)
    ell = model.kernel_.base_kernel.lengthscale.detach().numpy()[0]
    amplitude = model.kernel_.outputscale.item()
    oracle = Regression(matern52(clean, clean, ell, amplitude), y, model.noise_variance_, mean=y.mean())
    new = clean + 0.3
    mean, covariance = oracle.predict(matern52(new, clean, ell, amplitude), matern52(new, new, ell, amplitude))
    found, std = model.predict(new, return_std=True)
    np.testing.assert_allclose(found, mean, rtol=1e-8, atol=1e-8 * amplitude**0.5)
    np.testing.assert_allclose(std, np.sqrt(np.diag(covariance) + model.noise_variance_), rtol=1e-8)
    assert model.log_marginal_likelihood_value_ == pytest.approx(oracle.log_evidence(), rel=1e-8, abs=1e-8)


@TASKS
def test_a_column_of_targets_is_the_targets(task):
    y = TARGETS[task]
    plain = answers(task(optimizer=None).fit(X, y), X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's advice to ravel y
        column = answers(task(optimizer=None).fit(X, y[:, None]), X)
    for one, other in zip(column, plain, strict=True):
        np.testing.assert_array_equal(one.reshape(other.shape), other)


@TASKS
def test_numbers_as_objects_and_nullable_columns_are_numbers(task):
    y = TARGETS[task]
    expected = answers(task(optimizer=None).fit(X, y), X)
    frame = pd.DataFrame({"a": pd.array(X[:, 0], dtype="Float64"), "b": X[:, 1].astype(object)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = task(optimizer=None).fit(frame, pd.Series(y.astype(object)))
        for one, other in zip(answers(model, frame), expected, strict=True):
            np.testing.assert_array_equal(one, other)


@TASKS
def test_one_number_as_weight_is_that_weight_for_every_row(task):
    y = TARGETS[task]
    one, other = (answers(task(optimizer=None).fit(X, y, sample_weight=w), X) for w in (2.0, np.full(N, 2.0)))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.filterwarnings("ignore:.*predictions lose 13 of 16 digits")
@TASKS
@pytest.mark.parametrize("weight", [1e-300, 1e-12, 1e12])
def test_extreme_weights_give_the_prior_or_the_data(task, weight):
    """Little weight leaves the overall level, and every prediction near it; much weight reproduces the targets."""
    y = TARGETS[task].astype(float)
    model = task(optimizer=None).fit(X, y, sample_weight=np.full(N, weight))
    found = answers(model, X)[0]
    value = found[:, 1] if task is GPClassifier else found
    if weight > 1:
        np.testing.assert_allclose(value[y > 0], y[y > 0], rtol=0.05)
    else:
        assert np.ptp(value) < 1e-3 * np.abs(value).max()


@pytest.mark.parametrize("engine", ["dual", "laplace", "power_ep"])
def test_robust_noise_of_mostly_equal_targets_starts_from_their_spread(engine):
    """The median absolute deviation of seven zeros and five ones is zero."""
    y = np.repeat([0.0, 1.0], [7, 5])
    model = GPRegressor(likelihood="student_t", engine=engine, optimizer=None).fit(X, y)
    assert model.likelihood_.value_of("scale", torch.zeros(())).item() == pytest.approx(0.1**0.5)
    assert model.converged_
    answers(model, X)


def test_an_unstandardised_scale_far_from_one_is_warned_of():
    with pytest.warns(UserWarning, match=r"standardize=False and a column varies by 9.*e-13"):
        model = GPRegressor(standardize=False, optimizer=None).fit(1e-12 * X / X.std(0) * 0.95, TARGETS[GPRegressor])
    assert "standardize=False and a column varies by" in str(model.fit_report_)


def test_counts_that_are_not_integers_are_warned_of():
    with pytest.warns(UserWarning, match="y holds values that are not integers"):
        model = GPCountRegressor(optimizer=None).fit(X, TARGETS[GPCountRegressor] / 2)
    assert "not integers" in model.fit_report_.warnings[0]


def test_rates_beyond_the_cap_are_warned_of():
    model = GPCountRegressor("linear", optimizer=None).fit(X, TARGETS[GPCountRegressor])
    with pytest.warns(UserWarning, match=r"GPCountRegressor: \d+ predicted log rate\(s\) above 30 were held there"):
        assert np.isfinite(model.predict(1e3 * X)).all()
