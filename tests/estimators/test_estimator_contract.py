"""The scikit-learn contract beyond its own suite: parameters, search, routing, names, tags, copies and parallel use."""

import pickle

import numpy as np
import pandas as pd
import pytest
import sklearn
from joblib import Parallel, delayed
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import get_tags

from mercer import GPClassifier, GPCountRegressor, GPRegressor
from mercer.inference import Dual, PowerEP
from mercer.kernels import RBF, Linear, Matern52, kernel_params
from mercer.likelihoods import Bernoulli

rng = np.random.default_rng(0)
N = 30
X = rng.normal(size=(N, 2))
TARGETS = {
    GPRegressor: np.sin(2 * X[:, 0]) + 0.1 * rng.normal(size=N),
    GPClassifier: (X[:, 0] > 0).astype(int),
    GPCountRegressor: rng.poisson(np.exp(1 + X[:, 0])),
}
TASKS = pytest.mark.parametrize("task", TARGETS)


# ------------------------------------------------------------------ parameters


@TASKS
def test_parameters_of_kernel_and_engine_have_nested_names(task):
    model = task(Matern52([1.0, 2.0], outputscale=3.0), engine=PowerEP(power=0.5))
    params = model.get_params()
    assert params["kernel__outputscale"] == pytest.approx(3.0)
    assert params["kernel__base_kernel__lengthscale"] == pytest.approx([1.0, 2.0])
    assert (params["engine__power"], params["engine__damping"]) == (0.5, 1.0)
    assert not any("__" in name for name in model.get_params(deep=False))
    assert task(RBF()).get_params()["kernel__lengthscale"] is None


@TASKS
def test_nested_values_are_set_on_copies(task):
    kernel, engine = RBF(0.5), Dual(step_size=0.3)
    model, other = task(kernel, engine=engine), task(kernel, engine=engine)
    assert model.set_params(kernel__lengthscale=2.0, engine__step_size=0.7, max_iter=9) is model
    assert model.get_params()["kernel__lengthscale"] == pytest.approx(2.0)
    assert (model.engine.step_size, model.max_iter) == (0.7, 9)
    assert other.get_params()["kernel__lengthscale"] == pytest.approx(0.5)
    assert engine.step_size == 0.3


@TASKS
def test_an_object_and_its_parameter_can_be_set_together(task):
    model = task().set_params(kernel__lengthscale=2.0, kernel=RBF(0.5))
    assert model.get_params()["kernel__lengthscale"] == pytest.approx(2.0)


@TASKS
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lengthscale", "Invalid parameter 'lengthscale' for estimator GP"),
        ("kernle__lengthscale", "Invalid parameter 'kernle' for estimator GP"),
        ("kernel__lengthscale", r"Invalid parameter 'kernel__lengthscale': kernel=None .*Pass an object"),
        ("engine__step_size", r"engine='auto' has no parameter 'step_size'"),
    ],
)
def test_unknown_parameters_are_named(task, name, message):
    with pytest.raises(ValueError, match=message):
        task().set_params(**{name: 1.0})


def test_unknown_parameters_of_objects_list_the_known_ones():
    with pytest.raises(ValueError, match="kernel has no parameter 'period'; it has lengthscale"):
        GPRegressor(RBF(1.0)).set_params(kernel__period=1.0)
    with pytest.raises(ValueError, match=r"engine__rate.*Dual has \['batch_size', 'memory', .*'step_size'\]"):
        GPRegressor(engine=Dual()).set_params(engine__rate=1.0)
    with pytest.raises(ValueError, match="lengthscale of RBFKernel must"):
        GPRegressor(RBF(1.0)).set_params(kernel__lengthscale=-1.0)


@TASKS
def test_clone_has_the_parameters_and_nothing_learned(task):
    model = task(RBF([0.4, 0.6]) + Linear(2.0), n_restarts=2, random_state=3).set_params(max_iter=1)
    copy = clone(model)
    assert copy.kernel is not model.kernel
    assert kernel_params(copy.kernel) == kernel_params(model.kernel)
    assert (copy.n_restarts, copy.random_state, copy.max_iter) == (2, 3, 1)
    with pytest.raises(NotFittedError):
        copy.predict(X)


@TASKS
def test_fit_changes_no_parameter(task):
    kernel = RBF([0.4, 0.6])
    model = task(kernel, max_iter=2)
    before = model.get_params()
    with pytest.warns(UserWarning, match="did not converge"):
        model.fit(X, TARGETS[task])
    after = model.get_params()
    assert model.kernel is kernel
    assert {k: v for k, v in before.items() if k != "kernel"} == {k: v for k, v in after.items() if k != "kernel"}


# ------------------------------------------------------------------ search, pipelines, routing


@TASKS
def test_grid_search_over_a_lengthscale_picks_the_better_one(task):
    """One lengthscale explains the data, the other makes noise of them."""
    search = GridSearchCV(task(RBF(1.0), optimizer=None), {"kernel__lengthscale": [1e-3, 1.0]}, cv=3)
    search.fit(X, TARGETS[task])
    assert search.best_params_ == {"kernel__lengthscale": 1.0}
    assert search.best_estimator_.get_params()["kernel__lengthscale"] == pytest.approx(1.0)
    assert np.ptp(search.cv_results_["mean_test_score"]) > 0.01


@TASKS
def test_parallel_search_gives_the_numbers_of_a_serial_one(task):
    model = task(optimizer=None)
    serial, parallel = (
        cross_validate(model, X, TARGETS[task], cv=3, n_jobs=n_jobs, return_train_score=True) for n_jobs in (None, 2)
    )
    for name in ("test_score", "train_score"):
        np.testing.assert_allclose(parallel[name], serial[name], rtol=1e-10)


@TASKS
def test_a_fitted_model_predicts_in_other_processes(task):
    model = task(optimizer=None).fit(X, TARGETS[task])
    parts = Parallel(n_jobs=2)(delayed(model.predict)(part) for part in np.array_split(X, 2))
    np.testing.assert_allclose(np.concatenate(parts), model.predict(X), rtol=1e-10)


@TASKS
def test_pickled_models_predict_the_same_bits(task):
    model = task(optimizer=None).fit(X, TARGETS[task])
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict(X), model.predict(X))
    np.testing.assert_array_equal(again.theta_, model.theta_)
    np.testing.assert_array_equal(again.sample_y(X, 2), model.sample_y(X, 2))


@TASKS
def test_weights_are_routed_through_a_pipeline_and_a_search(task):
    weight = np.arange(N) % 3
    y = TARGETS[task]
    with sklearn.config_context(enable_metadata_routing=True):
        last = task(optimizer=None).set_fit_request(sample_weight=True).set_score_request(sample_weight=True)
        pipeline = make_pipeline(StandardScaler().set_fit_request(sample_weight=False), last)
        fitted = pipeline.fit(X, y, sample_weight=weight)
        search = GridSearchCV(pipeline, {f"{task.__name__.lower()}__standardize": [True]}, cv=3, error_score="raise")
        found = search.fit(X, y, sample_weight=weight)
    expected = task(optimizer=None).fit(StandardScaler().fit_transform(X), y, sample_weight=weight)
    unweighted = task(optimizer=None).fit(X, y)
    theta, value = expected.theta_, expected.log_marginal_likelihood_value_
    for model in (fitted[-1], found.best_estimator_[-1]):
        np.testing.assert_allclose(model.theta_, theta, rtol=1e-10)
        assert model.log_marginal_likelihood_value_ == pytest.approx(value, rel=1e-10)
    assert abs(unweighted.log_marginal_likelihood_value_ - value) > 0.1


def test_noise_and_exposure_are_routed():
    noise, exposure = rng.uniform(0.1, 1.0, size=N), rng.uniform(1, 4, size=N)
    with sklearn.config_context(enable_metadata_routing=True):
        regressor = GPRegressor(optimizer=None).set_fit_request(noise_variance=True)
        fitted = make_pipeline(StandardScaler(), regressor).fit(X, TARGETS[GPRegressor], noise_variance=noise)
        counts = GPCountRegressor(optimizer=None).set_fit_request(exposure=True).set_predict_request(exposure=True)
        pipeline = make_pipeline(StandardScaler(), counts).fit(X, TARGETS[GPCountRegressor], exposure=exposure)
        routed = pipeline.predict(X, exposure=exposure)
    direct = GPRegressor(optimizer=None).fit(X, TARGETS[GPRegressor], noise_variance=noise)
    np.testing.assert_allclose(fitted.predict(X), direct.predict(X), rtol=1e-8, atol=1e-8)
    direct = GPCountRegressor(optimizer=None).fit(X, TARGETS[GPCountRegressor], exposure=exposure)
    np.testing.assert_allclose(routed, direct.predict(X, exposure=exposure), rtol=1e-7)


def test_cross_validated_probabilities_come_out_of_the_box():
    proba = cross_val_predict(GPClassifier(optimizer=None), X, TARGETS[GPClassifier], method="predict_proba", cv=3)
    assert proba.shape == (N, 2)
    assert -np.log(proba[np.arange(N), TARGETS[GPClassifier]]).mean() < np.log(2)


# ------------------------------------------------------------------ columns, tags


@TASKS
def test_columns_are_known_by_name(task):
    frame = pd.DataFrame(X, columns=["ash", "elm"])
    model = task(optimizer=None).fit(frame, TARGETS[task])
    assert model.feature_names_in_.tolist() == ["ash", "elm"]
    assert model.n_features_in_ == 2
    np.testing.assert_allclose(
        model.predict(frame), task(optimizer=None).fit(X, TARGETS[task]).predict(X), rtol=1e-10, atol=1e-12
    )
    with pytest.raises(ValueError, match="Feature names must be in the same order"):
        model.predict(frame[["elm", "ash"]])
    with pytest.raises(ValueError, match="Feature names unseen at fit time:\n- oak"):
        model.predict(frame.rename(columns={"elm": "oak"}))
    with pytest.warns(UserWarning, match="X does not have valid feature names"):
        model.predict(X)
    model.fit(X, TARGETS[task])
    assert not hasattr(model, "feature_names_in_")


def test_kernels_choose_columns_by_name():
    frame = pd.DataFrame(X, columns=["ash", "elm"])
    named = GPRegressor(RBF(0.7, active_dims=["elm"]), optimizer=None).fit(frame, TARGETS[GPRegressor])
    placed = GPRegressor(RBF(0.7, active_dims=[1]), optimizer=None).fit(X, TARGETS[GPRegressor])
    np.testing.assert_allclose(named.predict(frame), placed.predict(X), rtol=1e-12)
    with pytest.raises(ValueError, match="X has no column 'oak'"):
        GPRegressor(RBF(active_dims=["oak"])).fit(frame, TARGETS[GPRegressor])
    with pytest.raises(ValueError, match="selects the column 'elm' by name, but X has no column names"):
        GPRegressor(RBF(active_dims=["elm"])).fit(X, TARGETS[GPRegressor])


def test_tags_say_what_each_task_takes():
    regressor, classifier, counts = (get_tags(task()) for task in TARGETS)
    assert (regressor.estimator_type, classifier.estimator_type, counts.estimator_type) == (
        "regressor",
        "classifier",
        "regressor",
    )
    assert regressor.target_tags.multi_output
    assert not counts.target_tags.multi_output and counts.target_tags.positive_only
    assert classifier.classifier_tags.multi_class
    for binary in ({"likelihood": "probit"}, {"likelihood": Bernoulli()}, {"engine": "laplace"}, {"engine": PowerEP()}):
        assert not get_tags(GPClassifier(**binary)).classifier_tags.multi_class
        with pytest.raises(ValueError, match="Only binary classification is supported with"):
            GPClassifier(**binary).fit(X, np.arange(N) % 3)
    assert get_tags(GPClassifier(likelihood="ordinal", engine="laplace")).classifier_tags.multi_class


@TASKS
def test_lists_are_rows(task):
    model = task(optimizer=None).fit(X.tolist(), TARGETS[task].tolist())
    np.testing.assert_array_equal(model.predict(X.tolist()), task(optimizer=None).fit(X, TARGETS[task]).predict(X))


@TASKS
def test_nothing_is_answered_before_fit(task):
    model = task()
    for ask in (
        lambda: model.predict(X),
        lambda: model.sample_y(X),
        lambda: model.theta_,
        lambda: model.theta_names_,
        lambda: model.log_marginal_likelihood(),
        lambda: model.diagnose(),
        lambda: model.log_predictive_density(X, TARGETS[task]),
        model.loo_predict_proba if task is GPClassifier else model.loo_predict,
    ):
        with pytest.raises(NotFittedError, match=f"This {task.__name__} instance is not fitted yet"):
            ask()
