"""Bad input gets an error that names the argument and leaves the estimator as it was."""

import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
