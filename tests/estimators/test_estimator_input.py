"""Whatever is passed: a correct answer, or an error that names the argument and leaves the estimator as it was."""

import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
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


def with_entry(values, index, entry):
    """Return a float copy with one entry replaced."""
    values = np.array(values, dtype=float)
    values.flat[index] = entry
    return values


# ---------------------------------------------------------------------------------------- refusals

# what is wrong: (X, y, other arguments of fit) from (X, y), error, and what the message says
BAD = {
    "one-dimensional X": (lambda X, y: (X[:, 0], y, {}), ValueError, "(?s)2D array.*[Rr]eshape"),
    "three-dimensional X": (lambda X, y: (X[None], y, {}), ValueError, "dim 3"),
    "no X": (lambda X, y: (None, y, {}), ValueError, "2D array"),
    "no rows": (lambda X, y: (X[:0], y[:0], {}), ValueError, "0 sample"),
    "no columns": (lambda X, y: (X[:, :0], y, {}), ValueError, r"0 feature\(s\)"),
    "NaN in X": (lambda X, y: (with_entry(X, 3, np.nan), y, {}), ValueError, "X contains NaN"),
    "infinite X": (lambda X, y: (with_entry(X, 3, np.inf), y, {}), ValueError, "X contains infinity"),
    "complex X": (lambda X, y: (X + 1j, y, {}), ValueError, "Complex data not supported"),
    "text in X": (lambda X, y: (np.full((N, 1), "a"), y, {}), ValueError, "X must hold numbers"),
    "text in a column of X": (
        lambda X, y: (pd.DataFrame({"a": X[:, 0], "b": ["u"] * N}), y, {}),
        ValueError,
        "X must hold numbers.*'u'",
    ),
    "missing in a nullable column": (
        lambda X, y: (pd.DataFrame({"a": pd.array([None] + [1.0] * (N - 1), dtype="Float64")}), y, {}),
        ValueError,
        "X contains NaN",
    ),
    "column names of two types": (
        lambda X, y: (pd.DataFrame(X, columns=["a", 1]), y, {}),
        TypeError,
        "Feature names are only supported if all input features have string names",
    ),
    "sparse X": (lambda X, y: (scipy.sparse.csr_matrix(X), y, {}), TypeError, "Sparse data was passed for X"),
    "sparse array X": (lambda X, y: (scipy.sparse.csr_array(X), y, {}), TypeError, "Sparse data was passed for X"),
    "sparse tensor X": (lambda X, y: (torch.as_tensor(X).to_sparse(), y, {}), TypeError, "Sparse data was passed"),
    "complex tensor X": (lambda X, y: (torch.as_tensor(X) + 1j, y, {}), ValueError, "Complex data not supported"),
    "NaN in a tensor X": (
        lambda X, y: (torch.as_tensor(with_entry(X, 3, np.nan)), y, {}),
        ValueError,
        "X contains NaN or infinity",
    ),
    "one-dimensional tensor X": (lambda X, y: (torch.as_tensor(X[:, 0]), y, {}), ValueError, "X must be 2-D"),
    "empty tensor X": (lambda X, y: (torch.zeros(0, 2), y, {}), ValueError, "minimum of 1 sample"),
    "no y": (lambda X, y: (X, None, {}), ValueError, "requires y to be passed"),
    "short y": (lambda X, y: (X, y[:5], {}), ValueError, "y has 5 and X has 12"),
    "y is one number": (lambda X, y: (X, 1.0, {}), (ValueError, TypeError), "y cannot be used"),
    "three-dimensional y": (lambda X, y: (X, np.zeros((N, 2, 2)), {}), ValueError, "y|dim 3"),
    "infinite y": (lambda X, y: (X, with_entry(y, 2, np.inf), {}), ValueError, "y contains infinity"),
    "complex y": (lambda X, y: (X, y + 1j, {}), ValueError, "Complex data not supported"),
    "weights all zero": (
        lambda X, y: (X, y, {"sample_weight": np.zeros(N)}),
        ValueError,
        "[Ss]ample weights.*non-zero",
    ),
    "negative weight": (
        lambda X, y: (X, y, {"sample_weight": with_entry(np.ones(N), 4, -1)}),
        ValueError,
        "Negative.*sample_weight",
    ),
    "NaN weight": (
        lambda X, y: (X, y, {"sample_weight": with_entry(np.ones(N), 4, np.nan)}),
        ValueError,
        "sample_weight contains NaN",
    ),
    "infinite weight": (
        lambda X, y: (X, y, {"sample_weight": np.full(N, np.inf)}),
        ValueError,
        "sample_weight contains infinity",
    ),
    "short weights": (lambda X, y: (X, y, {"sample_weight": np.ones(5)}), ValueError, "sample_weight"),
    "two-dimensional weights": (
        lambda X, y: (X, y, {"sample_weight": np.ones((N, 1))}),
        ValueError,
        "[Ss]ample weights",
    ),
    "text weights": (lambda X, y: (X, y, {"sample_weight": ["a"] * N}), ValueError, "sample_weight cannot be used"),
}
FOR_ONE_TASK = [
    (GPRegressor, lambda X, y: (X, np.full(N, np.nan), {}), ValueError, "y contains no observed target"),
    (
        GPRegressor,
        lambda X, y: (X, with_entry(y, slice(1, None), np.nan), {"sample_weight": np.arange(N) > 0}),
        ValueError,
        "sample_weight is zero for every row whose y is observed",
    ),
    (GPRegressor, lambda X, y: (X, np.full(N, "a"), {}), ValueError, "y cannot be used"),
    (GPRegressor, lambda X, y: (X, 1e200 * y, {}), ValueError, "y varies by .*rescale y"),
    (GPRegressor, lambda X, y: (X, 1e-200 * y, {}), ValueError, "y varies by .*rescale y"),
    (GPRegressor, lambda X, y: (X, y, {"noise_variance": 0.0}), ValueError, "noise_variance must be positive"),
    (
        GPRegressor,
        lambda X, y: (X, y, {"noise_variance": [1.0] * 5}),
        ValueError,
        r"noise_variance must have shape \(12,",
    ),
    (GPRegressor, lambda X, y: (X, y, {"noise_variance": [np.nan] * N}), ValueError, "noise_variance contains NaN"),
    (GPRegressor, lambda X, y: (X, y, {"noise_variance": "a"}), ValueError, "noise_variance cannot be used"),
    (GPRegressor, lambda X, y: (None, y, {"noise_variance": 1.0}), ValueError, "2D array"),
    (GPClassifier, lambda X, y: (X, with_entry(y, 2, np.nan), {}), ValueError, "y contains NaN"),
    (GPClassifier, lambda X, y: (X, np.zeros(N), {}), ValueError, r"at least 2 classes .* 1 class: \[0.0\]"),
    (GPClassifier, lambda X, y: (X, y, {"sample_weight": y == 1}), ValueError, "classes with positive weight"),
    (GPClassifier, lambda X, y: (X, X[:, 0], {}), ValueError, "Unknown label type"),
    (GPClassifier, lambda X, y: (X, np.column_stack([y, y]), {}), ValueError, "y cannot be used"),
    (GPCountRegressor, lambda X, y: (X, y - 5, {}), ValueError, "y must hold counts, and -.* is negative"),
    (GPCountRegressor, lambda X, y: (X, np.column_stack([y, y]), {}), ValueError, "y should be a 1d array"),
    (GPCountRegressor, lambda X, y: (X, 1e15 * y, {}), ValueError, "y reaches .* per unit of exposure"),
    (GPCountRegressor, lambda X, y: (X, y, {"exposure": 0.0}), ValueError, "exposure must be positive in every row"),
    (GPCountRegressor, lambda X, y: (X, y, {"exposure": [1.0, 2.0]}), ValueError, r"exposure must have shape \(12,"),
    (GPCountRegressor, lambda X, y: (X, y, {"exposure": "a"}), ValueError, "exposure cannot be used"),
]
PARAMETERS = [
    ({"kernel": "rfb"}, ValueError, "kernel='rfb' is not understood"),
    ({"kernel": 3}, TypeError, "kernel must be"),
    ({"likelihood": "gauss"}, ValueError, "likelihood='gauss'"),
    ({"likelihood": None}, TypeError, "likelihood must be"),
    ({"mean": "zero"}, TypeError, "mean must be None or a gpytorch Mean"),
    ({"family": "sparse"}, ValueError, "family='sparse' is unknown; choose one of"),
    ({"family": None}, TypeError, "family must be"),
    ({"engine": "newton"}, ValueError, "engine='newton' is unknown; choose one of"),
    ({"engine": 1}, TypeError, "engine must be"),
    ({"optimizer": "adam"}, ValueError, "'optimizer' parameter"),
    ({"n_restarts": -1}, ValueError, "'n_restarts' parameter"),
    ({"max_iter": 0}, ValueError, "'max_iter' parameter"),
    ({"standardize": "yes"}, ValueError, "'standardize' parameter"),
    ({"dtype": "float16"}, ValueError, "'dtype' parameter"),
    ({"device": "abacus"}, ValueError, "device='abacus' cannot be used"),
    ({"device": "meta"}, ValueError, "device='meta' cannot be used"),
    ({"device": 2.5}, ValueError, "device=2.5 cannot be used"),
    ({"warm_start": 2}, ValueError, "'warm_start' parameter"),
    ({"verbose": "loud"}, ValueError, "'verbose' parameter"),
    ({"random_state": "dice"}, ValueError, "'random_state' parameter"),
]
WRONG_TASK = [
    (GPRegressor, {"likelihood": "poisson"}, "likelihood='poisson' is not for real targets.*GPCountRegressor"),
    (GPRegressor, {"likelihood": "probit"}, "likelihood='probit' is not for real targets.*GPClassifier"),
    (GPRegressor, {"likelihood": "student_t", "engine": "conjugate"}, "engine='conjugate' needs a Gaussian likelihood"),
    (GPClassifier, {"likelihood": "gaussian"}, "likelihood='gaussian' is not for classes"),
    (GPClassifier, {"likelihood": "softmax", "engine": "laplace"}, "engine='laplace' handles one latent function"),
    (GPCountRegressor, {"likelihood": "gaussian"}, "likelihood='gaussian' is not for counts"),
    (GPCountRegressor, {"engine": "conjugate"}, "engine='conjugate' needs a Gaussian likelihood"),
]


def assert_refused_and_unchanged(model, arguments, error, message):
    """``fit`` fails with the message, and every attribute is the very object that it was."""
    before = dict(model.__dict__)
    bad_X, bad_y, extra = arguments
    with pytest.raises(error, match=message), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's casts on the way to the error
        model.fit(bad_X, bad_y, **extra)
    assert model.__dict__.keys() == before.keys()
    assert all(model.__dict__[name] is value for name, value in before.items())


@pytest.fixture(scope="module")
def fitted():
    """One small fitted model per task."""
    return {task: task(optimizer=None).fit(X, y) for task, y in TARGETS.items()}


@TASKS
@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_named_and_leave_the_model_as_it_was(task, case, fitted):
    change, error, message = BAD[case]
    assert_refused_and_unchanged(fitted[task], change(X, TARGETS[task]), error, message)


@pytest.mark.parametrize(("task", "change", "error", "message"), FOR_ONE_TASK)
def test_what_one_task_refuses_is_named(task, change, error, message, fitted):
    assert_refused_and_unchanged(fitted[task], change(X, TARGETS[task]), error, message)


@TASKS
@pytest.mark.parametrize(("params", "error", "message"), PARAMETERS)
def test_bad_parameters_are_named(task, params, error, message, fitted):
    model = fitted[task]
    good = model.get_params(deep=False)
    model.set_params(**params)
    assert_refused_and_unchanged(model, (X, TARGETS[task], {}), error, message)
    model.set_params(**good)


@pytest.mark.parametrize(("task", "params", "message"), WRONG_TASK)
def test_likelihoods_and_engines_of_another_task_are_refused(task, params, message):
    with pytest.raises(ValueError, match=message):
        task(**params).fit(X, TARGETS[task])


@TASKS
@quick
@given(
    name=st.sampled_from(["kernel", "likelihood", "family", "engine", "optimizer", "dtype", "device"]),
    text=st.text(max_size=8).filter(
        lambda t: t not in ("auto", "exact", "cpu", "dual", "rbf", "rq", "linear", "logit")
    ),
)
def test_unknown_words_are_refused_by_parameter(task, name, text):
    with pytest.raises(ValueError, match=name):
        task(**{"optimizer": None, name: text}).fit(X, TARGETS[task])


@TASKS
@quick
@given(
    where=st.sampled_from(["X", "sample_weight"]), index=st.integers(0, N - 1), bad=st.sampled_from([np.nan, np.inf])
)
def test_one_bad_number_anywhere_is_found(task, where, index, bad, fitted):
    rows, extra = X, {}
    if where == "X":
        rows = with_entry(X, index, bad)
    else:
        extra = {where: with_entry(np.ones(N), index, bad)}
    assert_refused_and_unchanged(fitted[task], (rows, TARGETS[task], extra), ValueError, f"{where} contains")


@TASKS
def test_new_rows_must_have_the_columns_of_fit(task, fitted):
    model = fitted[task]
    for bad, message in [
        (X[:, :1], "X has 1 features, but .* is expecting 2"),
        (torch.as_tensor(X[:, :1]), "X has 1 features, but .* is expecting 2"),
        (X[0], "2D array"),
        (with_entry(X, 1, np.nan), "X contains NaN"),
        (X[:0], "0 sample"),
        (1e60 * X, "X holds values more than 1e\\+50 times the spread"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.predict(bad)
    with pytest.raises(ValueError, match="n_samples must be a positive integer, got 0"):
        model.sample_y(X, 0)
    with pytest.raises(ValueError, match="y has 5 and X has 12"):
        model.log_predictive_density(X, TARGETS[task][:5])


def test_predictions_refuse_what_the_model_cannot_use(fitted):
    regressor, counts = fitted[GPRegressor], fitted[GPCountRegressor]
    with pytest.raises(ValueError, match="return_std and return_cov"):
        regressor.predict(X, return_std=True, return_cov=True)
    with pytest.raises(ValueError, match="noise_variance must be positive"):
        regressor.predict(X, return_std=True, noise_variance=-1.0)
    with pytest.raises(ValueError, match=r"y has shape \(12, 2\), and fit had one column"):
        regressor.log_predictive_density(X, np.zeros((N, 2)))
    with pytest.raises(ValueError, match="exposure must be positive"):
        counts.predict(X, exposure=0.0)
    with pytest.raises(ValueError, match="y holds the label 7, which is not among classes_"):
        fitted[GPClassifier].log_predictive_density(X, np.full(N, 7))
    robust = GPRegressor(likelihood="student_t", optimizer=None).fit(X, TARGETS[GPRegressor])
    with pytest.raises(ValueError, match="noise_variance is for Gaussian noise and this model has StudentT"):
        robust.predict(X, return_std=True, noise_variance=1.0)


# ---------------------------------------------------------------------------------------- answers


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
