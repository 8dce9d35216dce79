"""Saved or pickled, a fitted estimator predicts the same bits; a file that says anything unknown is refused."""

import json
import pickle

import gpytorch
import numpy as np
import pandas as pd
import pytest
import safetensors
import safetensors.torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

import mercer
from mercer import GPClassifier, GPCountRegressor, GPRegressor

rng = np.random.default_rng(0)
X = rng.uniform(size=(30, 2))
Y = np.sin(5 * X[:, 0]) + 0.1 * rng.normal(size=30)
NAMES = np.array(["ash", "elm", "oak"])[np.digitize(X[:, 0], [0.3, 0.7])]
COUNTS = rng.poisson(np.exp(1 + X[:, 0]))
FITS = {
    "default": lambda: GPRegressor(max_iter=5).fit(X, Y),
    "sum": lambda: GPRegressor("rbf + linear", max_iter=3).fit(X, Y),
    "product": lambda: GPRegressor("periodic * rbf", max_iter=3).fit(X, Y),
    "frame": lambda: GPRegressor(max_iter=3).fit(pd.DataFrame(X, columns=["a", "b"]), Y),
    "student_t": lambda: GPRegressor(likelihood="student_t", max_iter=3).fit(X, Y),
    "outputs": lambda: GPRegressor(max_iter=3).fit(X, np.column_stack([Y, Y**2])),
    "known noise": lambda: GPRegressor(max_iter=3).fit(X, Y, noise_variance=0.01),
    "float32": lambda: GPRegressor(dtype="float32", max_iter=3).fit(X, Y),
    "laplace": lambda: GPClassifier(engine="laplace", max_iter=3).fit(X, NAMES == "oak"),
    "probit": lambda: GPClassifier(likelihood="probit", engine="power_ep", max_iter=3).fit(X, NAMES == "oak"),
    "softmax": lambda: GPClassifier(max_iter=3).fit(X, NAMES),
    "ordinal": lambda: GPClassifier(likelihood="ordinal", max_iter=3).fit(X, NAMES),
    "poisson": lambda: GPCountRegressor(max_iter=3).fit(X, COUNTS, exposure=1 + X[:, 1]),
    "negative_binomial": lambda: GPCountRegressor(likelihood="negative_binomial", max_iter=3).fit(X, COUNTS),
}
pytestmark = pytest.mark.filterwarnings("ignore")


def numbers(model):
    """Everything that a model says about new rows, its training rows and its evidence."""
    new = np.linspace(0, 1, 8).reshape(4, 2)
    if hasattr(model, "feature_names_in_"):
        new = pd.DataFrame(new, columns=model.feature_names_in_)
    if isinstance(model, GPClassifier):
        found = [model.predict_proba(new), model.loo_predict_proba()]
    else:
        found = [*model.predict(new, return_std=True), *model.loo_predict(return_std=True)]
    value, gradient = model.log_marginal_likelihood(model.theta_, eval_gradient=True)
    return [*found, np.asarray(value), gradient, model.sample_y(new, 2, random_state=3)]


def assert_same(one, other):
    for a, b in zip(numbers(one), numbers(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", FITS)
def test_a_loaded_model_says_the_same_to_the_bit(name, tmp_path):
    model = FITS[name]()
    path = tmp_path / "model.mercer"
    model.save(path)
    loaded = mercer.load(path)
    assert_same(model, loaded)
    assert str(loaded.fit_report_) == str(model.fit_report_)
    assert loaded.diagnose() == model.diagnose()
    assert repr(clone(loaded)) == repr(clone(model))
    assert [p.name for p in tmp_path.iterdir()] == ["model.mercer"]


@pytest.mark.parametrize("name", ["default", "softmax", "poisson"])
def test_pickles_before_and_after_predict_agree(name):
    model = FITS[name]()
    before = pickle.loads(pickle.dumps(model))
    numbers(model)
    after = pickle.loads(pickle.dumps(model))
    assert_same(before, after)
    assert_same(before, model)


def test_a_loaded_model_fits_on():
    model = GPRegressor(max_iter=3, warm_start=True).fit(X, Y)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(model.fit(X, Y).theta_, again.fit(X, Y).theta_)


def test_an_unfitted_model_is_not_saved(tmp_path):
    with pytest.raises(NotFittedError):
        GPRegressor().save(tmp_path / "model.mercer")
    assert not list(tmp_path.iterdir())


class Own(gpytorch.kernels.RBFKernel):
    """A class that a reader of the file does not have."""


def test_a_class_of_the_user_is_refused_by_name(tmp_path):
    model = GPRegressor(Own(), max_iter=2).fit(X, Y)
    with pytest.raises(TypeError, match=r"Own.*pickle"):
        model.save(tmp_path / "model.mercer")
    assert not list(tmp_path.iterdir())


def tampered(path, change):
    """Rewrite the JSON document of a saved model."""
    with safetensors.safe_open(path, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        document = json.loads(opened.metadata()["mercer"])
    change(document)
    safetensors.torch.save_file(tensors, path, metadata={"mercer": json.dumps(document)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=99), "version 99"),
        (lambda d: d.update(format="other"), "not a model"),
        (lambda d: d["estimator"].update({"class": "os.system"}), r"os\.system"),
        (lambda d: d["estimator"].update({"$": "call"}), "call"),
        (lambda d: d.pop("estimator"), "damaged"),
        (lambda d: d.update(estimator=[1]), "does not hold"),
    ],
)
def test_what_the_format_does_not_know_is_refused(change, message, tmp_path):
    path = tmp_path / "model.mercer"
    FITS["default"]().save(path)
    tampered(path, change)
    with pytest.raises(ValueError, match=message):
        mercer.load(path)


def test_damaged_and_absent_files_are_named(tmp_path):
    path = tmp_path / "model.mercer"
    with pytest.raises(FileNotFoundError, match=r"model\.mercer"):
        mercer.load(path)
    FITS["default"]().save(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="damaged"):
        mercer.load(path)
