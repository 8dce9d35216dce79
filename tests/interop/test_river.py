"""RiverRegressor and RiverClassifier: batches of rows give what partial_fit gives, and river's own checks pass."""

import builtins
import importlib
import pickle
import sys

import numpy as np
import pandas as pd
import pytest

from mercer import GPClassifier, GPCountRegressor, GPRegressor
from mercer.kernels import RBF
from mercer.sequential import Stream

river = pytest.importorskip("river")
from river import checks, evaluate, metrics, preprocessing, proba  # noqa: E402

from mercer.interop.river import RiverClassifier, RiverRegressor  # noqa: E402

STREAM = Stream(n_inducing=15, memory=20, hyperparameters="frozen", dense_rows=0)
SLOW = {"check_bounded_memory_growth", "check_shuffle_features_no_impact", "check_emerging_features"}
SLOW |= {"check_disappearing_features", "check_radically_disappearing_features", "check_predict_one_pure"}
# no estimator is made without the one that it wraps
SKIPPED = {"check_init_has_default_params_for_tests"}


def regressor(**options):
    return RiverRegressor(GPRegressor(RBF(1.0), optimizer=None, random_state=0), **options)


def classifier(**options):
    return RiverClassifier(GPClassifier(RBF(1.0), optimizer=None, random_state=0), **options)


def stream(n_rows, seed=0):
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(n_rows, 2))
    return [({"a": a, "b": b}, np.sin(2 * a) + b) for a, b in rows.tolist()]


class TwoClasses(RiverClassifier):
    """A classifier for river's data sets with two classes: their labels are announced, not guessed."""

    _multiclass = False


def checked(model):
    return [pytest.param(model, check, id=f"{type(model).__name__}-{check.__name__}") for check in _wanted(model)]


def _wanted(model):
    return [check for check in checks.yield_checks(model) if check.__name__ not in SKIPPED]


def _split(slow):
    fast = {"stream": STREAM, "family": "inducing", "optimizer": None, "random_state": 0}
    models = [
        RiverRegressor(GPRegressor("rbf", **fast), strict=False),
        TwoClasses(GPClassifier("rbf", **fast), classes=[False, True], strict=False),
    ]
    parameters = [parameter for model in models for parameter in checked(model)]
    is_slow = [
        parameter.values[1].__name__ in SLOW
        or (isinstance(parameter.values[0], TwoClasses) and hasattr(parameter.values[1], "keywords"))
        for parameter in parameters
    ]
    return [parameter for parameter, late in zip(parameters, is_slow, strict=True) if late == slow]


@pytest.mark.filterwarnings("ignore:.*nats were lost")
@pytest.mark.parametrize(("model", "check"), _split(slow=False))
def test_checks_of_river(model, check):
    check(model.clone())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*nats were lost")
@pytest.mark.parametrize(("model", "check"), _split(slow=True))
def test_slow_checks_of_river(model, check):
    check(model.clone())


def test_rows_one_by_one_are_batches_of_partial_fit():
    rows = stream(50)
    model, direct = regressor(batch_size=20), GPRegressor(RBF(1.0), optimizer=None, random_state=0)
    for x, y in rows:
        model.learn_one(x, y)
    assert model.n_waiting == 10
    frame, targets = pd.DataFrame([x for x, _ in rows]), np.array([y for _, y in rows])
    for start in (0, 20):
        direct.partial_fit(frame[start : start + 20], targets[start : start + 20])
    mean, std = direct.predict(frame[:3], return_std=True)
    assert [model.predict_one(x) for x, _ in rows[:3]] == pytest.approx(mean)
    assert model.predict_many(frame[:3]).tolist() == pytest.approx(mean)
    told = model.predict_one(rows[0][0], with_dist=True)
    assert isinstance(told, proba.Gaussian)
    assert (told.mu, told.sigma) == pytest.approx((mean[0], std[0]))
    assert list(model.model.feature_names_in_) == ["a", "b"]

    model.flush()
    direct.partial_fit(frame[40:], targets[40:])
    assert model.n_waiting == 0
    assert model.predict_one(rows[0][0]) == pytest.approx(direct.predict(frame[:1])[0])
    assert not hasattr(model.estimator, "posterior_")  # a copy learns


def test_rows_of_a_frame_join_those_that_wait():
    rows = stream(30)
    one, many = regressor(batch_size=25), regressor(batch_size=25)
    for x, y in rows:
        one.learn_one(x, y)
    for x, y in rows[:10]:
        many.learn_one(x, y)
    many.learn_many(pd.DataFrame([x for x, _ in rows[10:]]), pd.Series([y for _, y in rows[10:]]))
    assert one.n_waiting == many.n_waiting == 5
    assert one.predict_one(rows[0][0]) == many.predict_one(rows[0][0])


def test_columns_do_not_depend_on_the_order_of_dicts():
    rows = stream(20)
    one, other = regressor(batch_size=20), regressor(batch_size=20)
    for x, y in rows:
        one.learn_one(x, y)
        other.learn_one(dict(reversed(x.items())), y)
    assert one.predict_one({"a": 0.3, "b": -1.0}) == other.predict_one({"b": -1.0, "a": 0.3})
    numbered = regressor(batch_size=20)
    for x, y in rows:
        numbered.learn_one({1: x["b"], 0: x["a"]}, y)
    assert numbered.predict_one({0: 0.3, 1: -1.0}) == pytest.approx(one.predict_one({"a": 0.3, "b": -1.0}))


def test_weights_are_replication():
    rows = stream(12)
    weighted, twice = regressor(batch_size=12), regressor(batch_size=24)
    for x, y in rows:
        weighted.learn_one(x, y, w=2.0)
        for _ in range(2):
            twice.learn_one(x, y)
    assert weighted.predict_one(rows[0][0]) == pytest.approx(twice.predict_one(rows[0][0]), rel=1e-9)


def test_before_the_first_batch_the_targets_so_far_are_all_there_is():
    model = regressor(batch_size=50)
    x, frame = {"a": 0.0, "b": 0.0}, pd.DataFrame({"a": [0.0, 1.0], "b": [0.0, 1.0]})
    assert model.predict_one(x) == 0.0
    for y in (1.0, 3.0):
        model.learn_one(x, y)
    assert model.predict_one(x) == 2.0
    assert model.predict_many(frame).tolist() == [2.0, 2.0]
    assert model.predict_one(x, with_dist=True).n_samples == 2

    unknown, announced = classifier(), classifier(classes=["no", "yes"])
    assert (unknown.predict_proba_one(x), unknown.predict_one(x)) == ({}, None)
    assert unknown.predict_proba_many(frame).empty
    assert announced.predict_proba_one(x) == {"no": 0.5, "yes": 0.5}
    for model in (unknown, announced):
        model.learn_one(x, "yes")
    assert unknown.predict_proba_one(x) == {"yes": 1.0}
    assert announced.predict_proba_many(frame)["yes"].tolist() == pytest.approx([2 / 3, 2 / 3])


def test_a_classifier_waits_for_a_second_label():
    rows = stream(60)
    model = classifier(batch_size=10)
    for x, _ in rows[:15]:
        model.learn_one(x, "low")
    assert model.n_waiting == 15
    for x, y in rows[15:]:
        model.learn_one(x, "high" if y > 0 else "low")
    assert model.n_waiting == 0
    told = model.predict_proba_one(rows[0][0])
    assert sorted(told) == ["high", "low"]
    assert sum(told.values()) == pytest.approx(1.0)
    frame = pd.DataFrame([x for x, _ in rows], index=range(100, 160))
    pd.testing.assert_index_equal(model.predict_proba_many(frame).index, frame.index)
    assert model.predict_many(frame).tolist() == [model.predict_one(x) for x, _ in rows]
    with pytest.raises(ValueError, match=r"'middle'.*classes="):
        model.learn_one(rows[0][0], "middle")
    assert model.n_waiting == 0


def test_strict_rows_have_the_features_of_the_first():
    model = regressor(batch_size=4)
    model.learn_one({"a": 1.0, "b": 2.0}, 1.0)
    for wrong, message in (
        ({"a": 1.0}, "lacks the feature 'b'"),
        ({"a": 1.0, "b": None}, "lacks the feature 'b'"),
        ({"a": 1.0, "b": float("nan")}, "lacks the feature 'b'"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, "has the new feature 'c'"),
        ({"a": "blue", "b": 1.0}, "'a' is 'blue', which is no number"),
    ):
        with pytest.raises(ValueError, match=message):
            model.learn_one(wrong, 1.0)
    assert model.n_waiting == 1
    for i in range(3):
        model.learn_one({"a": float(i), "b": 2.0}, float(i))
    with pytest.raises(ValueError, match="StatImputer"):
        model.predict_one({"a": 1.0})


def test_lenient_rows_get_means_for_what_is_missing():
    strict, lenient = regressor(batch_size=10), regressor(batch_size=10, strict=False)
    rows = stream(10)
    for x, y in rows:
        strict.learn_one(x, y)
        lenient.learn_one(x, y)
    mean = np.mean([x["b"] for x, _ in rows])
    expected = strict.predict_one({"a": 0.5, "b": mean})
    assert lenient.predict_one({"a": 0.5}) == pytest.approx(expected)
    assert lenient.predict_one({"a": 0.5, "b": None, "new": 3.0}) == pytest.approx(expected)


def test_learning_goes_on_from_a_fitted_estimator():
    rows = stream(30)
    frame, targets = pd.DataFrame([x for x, _ in rows]), np.array([y for _, y in rows])
    fitted = GPRegressor(RBF(1.0), optimizer=None).fit(frame[["b", "a"]][:20], targets[:20])
    model = RiverRegressor(fitted, batch_size=10, strict=False)
    x = rows[25][0]
    assert model.predict_one(x) == pytest.approx(fitted.predict(frame[["b", "a"]][25:26])[0])
    filled = frame[["b", "a"]][25:26].assign(a=frame["a"][:20].mean())
    assert model.predict_one({"b": x["b"]}) == pytest.approx(fitted.predict(filled)[0])
    for x, y in rows[20:]:
        model.learn_one(x, y)
    assert model.model.fit_report_.n_rows == 30
    assert fitted.fit_report_.n_rows == 20
    unnamed = GPRegressor(RBF(1.0), optimizer=None).fit(frame.to_numpy(), targets)
    with pytest.raises(ValueError, match="without names"):
        RiverRegressor(unnamed)


def test_rows_still_wait_after_a_batch_that_failed():
    model = regressor(batch_size=3)
    for y in (float("nan"), float("nan")):
        model.learn_one({"a": 1.0}, y)
    with pytest.raises(ValueError, match="no observed target"):
        model.learn_one({"a": 2.0}, float("nan"))
    assert model.n_waiting == 3
    model.learn_one({"a": 3.0}, 1.0)
    model.flush()
    assert model.n_waiting == 0


def test_pipelines_and_metrics_of_river_take_it():
    model = preprocessing.StandardScaler() | regressor(batch_size=25)
    score = evaluate.progressive_val_score(stream(100), model, metrics.R2())
    assert score.get() > 0.5
    labels = [(x, y > 0) for x, y in stream(100)]
    accuracy = evaluate.progressive_val_score(labels, classifier(batch_size=25), metrics.Accuracy())
    assert accuracy.get() > 0.7
    counts = RiverRegressor(GPCountRegressor(RBF(1.0), optimizer=None), batch_size=10)
    for x, y in stream(10):
        counts.learn_one(x, round(np.exp(y)))
    assert counts.predict_one(x) > 0


def test_a_copy_of_a_model_predicts_the_same_and_a_clone_starts_afresh():
    model = regressor(batch_size=10)
    rows = stream(15)
    for x, y in rows:
        model.learn_one(x, y)
    copy = pickle.loads(pickle.dumps(model))
    assert copy.n_waiting == 5
    assert copy.predict_one(rows[0][0]) == model.predict_one(rows[0][0])
    assert model.clone().predict_one(rows[0][0]) == 0.0


def test_what_cannot_be_wrapped_is_refused():
    with pytest.raises(TypeError, match="partial_fit"):
        RiverRegressor(object())
    with pytest.raises(ValueError, match="batch_size"):
        regressor(batch_size=0)


def test_missing_river_says_how_to_get_it(monkeypatch):
    real_import = builtins.__import__

    def without_river(name, *args, **kwargs):
        if name == "river":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_river)
    monkeypatch.delitem(sys.modules, "mercer.interop.river")
    with pytest.raises(ImportError, match=r"pip install 'mercer\[streams\]'"):
        importlib.import_module("mercer.interop.river")
