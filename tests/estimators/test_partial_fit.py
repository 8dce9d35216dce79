"""Learning from batches: what partial_fit, forget, merge and score_stream promise to users."""

import copy
import dataclasses
import pickle
import warnings
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from oracles import inducing as oracle
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import parametrize_with_checks

from mercer import GPClassifier, GPCountRegressor, GPRegressor, load
from mercer.estimators._rows import canonical_rows, make_data
from mercer.families import Inducing, SparseInverseCholesky
from mercer.families.inducing_plan import InducingPlan
from mercer.inference import run
from mercer.inference.evidence import Evidence
from mercer.kernels import Matern32, Matern52
from mercer.kernels.means import constant_mean
from mercer.likelihoods import Gaussian
from mercer.linalg.cholesky import NotPositiveDefiniteError
from mercer.sequential import ClassBalanced, LeverageTop, Stream
from mercer.sequential import stream as streams

FROZEN = {"inducing": "fixed", "hyperparameters": "frozen"}
NOISE, THETA = 0.04, (1.0, 1.5)  # of the curve; lengthscale and outputscale
NEW = np.linspace(-0.5, 6.5, 23)[:, None]


def curve(n=90, seed=0):
    """A sine with noise, rows in random order."""
    rng = np.random.default_rng(seed)
    X = rng.uniform(0, 6, (n, 1))
    return X, np.sin(X[:, 0]) + np.sqrt(NOISE) * rng.standard_normal(n)


def targets(name, n=90):
    """Estimator class, arguments, X, y and arguments of fit for a task."""
    X, noisy = curve(n)
    rng = np.random.default_rng(1)
    if name in ("gaussian", "student_t"):
        return GPRegressor, {"likelihood": name}, X, noisy, {}
    if name == "noise_variance":
        return GPRegressor, {}, X, noisy, {"noise_variance": rng.uniform(0.01, 0.1, n)}
    if name == "outputs":
        y = np.stack([noisy, 100.0 * np.cos(X[:, 0]) + rng.standard_normal(n)], 1)
        y[::5, 0], y[3::7, 1] = np.nan, np.nan
        return GPRegressor, {}, X, y, {}
    if name in ("probit", "logit"):
        return GPClassifier, {"likelihood": name}, X, np.where(noisy > 0, "yes", "no"), {}
    if name in ("softmax", "ordinal"):
        return GPClassifier, {"likelihood": name}, X, np.digitize(noisy, [-0.4, 0.4]), {}
    exposure = rng.uniform(0.5, 2.0, n)
    counts = rng.poisson(exposure * np.exp(1.0 + noisy))
    return GPCountRegressor, {"likelihood": name}, X, counts, {"exposure": exposure}


TASKS = ["gaussian", "noise_variance", "outputs", "student_t", "probit", "logit", "softmax", "ordinal", "poisson"]
TASKS += ["negative_binomial"]


def part(rows, X, y, side):
    """The arguments of partial_fit for some rows."""
    return {"X": X[rows], "y": y[rows], **{name: value[rows] for name, value in side.items()}}


def learn(model, X, y, side, sizes, **more):
    """Learn from consecutive parts."""
    start = 0
    for k, size in enumerate([*sizes, len(X) - sum(sizes)]):
        known = {"classes": np.unique(y)} if k == 0 and isinstance(model, GPClassifier) else {}
        model.partial_fit(**part(slice(start, start + size), X, y, side), **known, **more)
        start += size
    return model


def fixed(cls=GPRegressor, n_inducing=12, memory=10, family=True, **options):
    """An estimator whose stream moves nothing."""
    own = {"kernel": Matern52(THETA[0], outputscale=THETA[1]), "optimizer": None, "random_state": 0}
    own |= {"family": Inducing(n_inducing, locations="fixed")} if family else {}
    own |= {"likelihood": Gaussian(NOISE)} if cls is GPRegressor else {}
    return cls(**{**own, "stream": Stream(memory=memory, **FROZEN), **options})


def latents(model, X=NEW):
    """Mean and variance of the latent functions, in model units."""
    with torch.no_grad():
        moved = model._units.inputs(torch.as_tensor(X))
        return [each.numpy() for each in model.posterior_.marginals(moved)]


def all_at_once(model, X, y, side):
    """The posterior of all rows at the hyperparameters, units and inducing points that a stream has."""
    with torch.no_grad():
        encoded = model._encode_known(y, X, np.ones(len(X)))
        rows = canonical(X, encoded, side)
        data = make_data(rows, model._units, model._model.policy)
        own = model._streaming(model._model, model._stream_options())
        found = run(own, InducingPlan(data.X, model.stream_.Z, own.policy), data)
        assert found.converged
        return [each.numpy() for each in found.state.posterior.marginals(model._units.inputs(torch.as_tensor(NEW)))]


def canonical(X, y, side):
    """Rows as estimators hold them."""
    return canonical_rows(np.asarray(X, float), np.asarray(y, float), np.ones(len(X)), dict(side))


def state_of(model):
    """Everything that an estimator holds, bit for bit."""
    return {name: pickle.dumps(value) for name, value in vars(model).items()}


# ---- one batch after the other is all at once


@pytest.mark.parametrize(
    ("sizes", "standardize"), [([40], False), ([30, 1, 20], True), ([60] + [1] * 5, True)], ids=str
)
def test_gaussian_batches_are_titsias_of_all_rows(sizes, standardize):
    """Predictions and the log evidence, in the units of the data: y is far from zero and on a scale of its own."""
    X, y = curve()
    X, y = 10.0 * X + 5.0, 30.0 * y - 200.0
    kernel = Matern52(10.0 * THETA[0], outputscale=900.0 * THETA[1])
    model = fixed(kernel=kernel, likelihood=Gaussian(900.0 * NOISE), standardize=standardize)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "standardize=False")
        learn(model, X, y, {}, sizes)
    assert model.stream_.n_batches == len(sizes) + 1 and len(model.memory_.X) == 10
    Z, center = torch.as_tensor(_user_places(model)), float(np.ravel(model._units.y_center)[0])
    assert len(Z) == 12
    covariance = lambda A, B: oracle.matern52(A, B, 10.0 * THETA[0], 900.0 * THETA[1])  # noqa: E731
    rows, new, R = (
        torch.as_tensor(X),
        torch.as_tensor(10.0 * NEW + 5.0),
        900.0 * NOISE * torch.eye(90, dtype=torch.float64),
    )
    parts = oracle.covariances(covariance, Z, rows)
    q = oracle.optimal_q(*parts[:2], torch.as_tensor(y - center), R)
    mean, cov = oracle.predict(parts[0], covariance(Z, new), covariance(new, new), *q)
    found, std = model.predict(new.numpy(), return_std=True, latent=True)
    np.testing.assert_allclose(found, mean.numpy() + center, rtol=1e-9)
    np.testing.assert_allclose(std, cov.diagonal().sqrt().numpy(), rtol=1e-7)
    bound = float(oracle.collapsed_bound(*parts, torch.as_tensor(y - center), R))
    assert model.log_marginal_likelihood_value_ == pytest.approx(bound, rel=1e-9)
    assert model.log_marginal_likelihood(model.theta_) == pytest.approx(bound, rel=1e-9)
    assert model.fit_report_.log_marginal_likelihood == model.log_marginal_likelihood_value_


def _user_places(model):
    return model.stream_.Z.numpy() * model._units.x_scale + model._units.x_center


@pytest.mark.parametrize("name", TASKS)
def test_with_all_rows_in_memory_batches_are_all_rows_at_once(name):
    cls, arguments, X, y, side = targets(name)
    arguments = {**arguments, "likelihood": Gaussian()} if name in ("noise_variance", "outputs") else arguments
    model = learn(fixed(cls, memory=1000, **arguments), X, y, side, [40, 3])
    n_rows = 87 if name == "outputs" else 90  # three rows have no target at all
    assert len(model.memory_.X) == n_rows and model.stream_.n_batches == 3
    for found, expected in zip(latents(model), all_at_once(model, X, y, side), strict=True):
        tol = 1e-3 if name == "softmax" else 1e-6  # softmax knows its sites to the error of its draws
        np.testing.assert_allclose(found, expected, rtol=tol, atol=tol)


@pytest.mark.parametrize("name", ["noise_variance", "outputs"])
def test_gaussian_noise_of_other_kinds_needs_no_memory(name):
    cls, arguments, X, y, side = targets(name)
    model = learn(fixed(cls, memory=3, **arguments), X, y, side, [40, 3])
    for found, expected in zip(latents(model), all_at_once(model, X, y, side), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", TASKS)
def test_batches_are_kept_and_the_posterior_exact_while_rows_are_few(name):
    """The dense phase is ``fit`` of all rows, at the hyperparameters of the first."""
    cls, arguments, X, y, side = targets(name, 60)
    model, whole = (fixed(cls, family=False, **arguments) for _ in range(2))
    learn(model, X, y, side, [30, 1])
    assert not hasattr(model, "stream_") and model.fit_report_.family == "exact"
    whole.fit(**part(slice(0, 30), X, y, side)).set_params(warm_start=True).fit(X, y, **side)
    for found, expected in zip(latents(model), latents(whole), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert model.log_marginal_likelihood_value_ == pytest.approx(whole.log_marginal_likelihood_value_, rel=1e-12)


@pytest.mark.parametrize("name", ["gaussian", "logit"])
def test_frozen_hyperparameters_are_those_of_the_first_batch(name):
    cls, arguments, X, y, _ = targets(name)
    arguments["stream"] = Stream(dense_rows=60, hyperparameters="frozen", memory=20)
    model = cls(**arguments)
    known = {"classes": ["no", "yes"]} if name == "logit" else {}
    theta = model.partial_fit(X[:30], y[:30], **known).theta_
    model.partial_fit(X[30:60], y[30:60])
    np.testing.assert_allclose(model.theta_, theta, rtol=1e-12)
    model.partial_fit(X[60:], y[60:])
    assert hasattr(model, "stream_")
    np.testing.assert_allclose(model.theta_, theta, rtol=1e-12)


def test_predictions_hardly_change_where_a_stream_begins():
    """From all rows to inducing points and a memory, at the same hyperparameters."""
    X, y = curve(100)
    model = GPRegressor(stream=Stream(dense_rows=80, hyperparameters="frozen", memory=20))
    model.partial_fit(X[:80], y[:80])
    before = model.predict(NEW, return_std=True)
    whole = clone(model).set_params(optimizer=None, kernel=model.kernel_, likelihood=Gaussian(model.noise_variance_))
    whole.set_params(stream=None).fit(X, y)
    model.partial_fit(X[80:], y[80:])
    assert hasattr(model, "stream_") and model.fit_report_.family == "inducing"
    mean, std = model.predict(NEW, return_std=True)
    expected = whole.predict(NEW, return_std=True)
    assert (np.abs(mean - expected[0]) / std).max() < 0.1
    np.testing.assert_allclose(std, expected[1], rtol=0.02)
    assert (np.abs(before[0] - mean) / std).max() > 0.2  # the last rows did say something


@pytest.mark.parametrize("family", ["exact", "inducing", "sic", "auto"])
def test_fit_is_a_first_batch(family):
    X, y = curve(100)
    options = {"kernel": Matern52(1.0, outputscale=1.5), "likelihood": Gaussian(NOISE), "optimizer": None}
    model = GPRegressor(family=family, stream=Stream(dense_rows=60, memory=20), **options).fit(X[:70], y[:70])
    model.partial_fit(X[70:], y[70:])
    assert hasattr(model, "stream_") == (family in ("inducing", "auto"))
    whole = GPRegressor(family="exact", **options).fit(X, y)
    mean, std = model.predict(NEW, return_std=True)
    expected = whole.predict(NEW, return_std=True)
    assert (np.abs(mean - expected[0]) / std).max() < (1e-8 if family == "exact" else 0.15)
    np.testing.assert_allclose(std, expected[1], rtol=0.02)
    n_rows = len(model.memory_.X)
    assert n_rows == (100 if family in ("exact", "sic") else 20)
    model.fit(X[:50], y[:50])  # begins anew
    assert not hasattr(model, "stream_") and len(model.memory_.X) == 50


def test_families_that_keep_all_rows_never_become_a_stream():
    X, y = curve(60)
    for family in (SparseInverseCholesky(n_neighbors=5), "exact"):
        model = fixed(family=False, stream=Stream(dense_rows=0)).set_params(family=family)
        learn(model, X, y, {}, [20, 20])
        assert len(model.memory_.X) == 60 and not hasattr(model, "stream_")


def test_a_stream_learns_what_a_batch_learns():
    """Eight batches of 40: hyperparameters and noise end near those of all rows, and so do predictions."""
    X, y = curve(320)
    model = learn(GPRegressor(stream=Stream(dense_rows=0, n_inducing=25, memory=30)), X, y, {}, [40] * 7)
    whole = GPRegressor().fit(X, y)
    assert model.noise_variance_ == pytest.approx(whole.noise_variance_, rel=2 * np.sqrt(2 / 320))
    mean, std = model.predict(NEW[2:-2], return_std=True, latent=True)
    expected = whole.predict(NEW[2:-2], return_std=True, latent=True)
    assert np.abs(mean - expected[0]).max() < 2 * expected[1].max()
    np.testing.assert_allclose(std, expected[1], rtol=0.4)


# ---- classes


def test_a_batch_may_lack_classes_that_were_announced():
    _, _, X, y, _ = targets("softmax")
    model = fixed(GPClassifier).partial_fit(X[y == 0], y[y == 0], classes=[2, 0, 1])
    assert model.classes_.tolist() == [0, 1, 2] and model.predict_proba(NEW).shape == (len(NEW), 3)
    model.partial_fit(X[y == 2], y[y == 2]).partial_fit(X[y == 1], y[y == 1])
    assert model.score(X, y) > 0.7


def test_a_first_batch_of_one_class_teaches_no_hyperparameters():
    """Of one class alone the best process is a constant, from which the next batches would hardly come back."""
    _, _, X, y, _ = targets("logit", 200)
    order = np.argsort(y, kind="stable")
    one = order[: (y == "no").sum() - 20]
    rest = np.setdiff1d(np.arange(200), one)
    model = GPClassifier(stream=Stream(dense_rows=0, n_inducing=20)).partial_fit(X[one], y[one], classes=["no", "yes"])
    assert not hasattr(model, "stream_") and "until it varies" in model.fit_report_.notes[-1]
    model.partial_fit(X[rest], y[rest])
    assert hasattr(model, "stream_") and model.stream_.n_seen == 200
    whole = GPClassifier().fit(X, y)
    assert np.abs(model.predict_proba(NEW)[:, 1] - whole.predict_proba(NEW)[:, 1]).max() < 0.1


def test_labels_that_were_not_announced_are_refused():
    _, _, X, y, _ = targets("softmax")
    model = fixed(GPClassifier).partial_fit(X[:50], y[:50], classes=[0, 1, 2])
    for wrong in ({"y": np.where(y == 2, 7, y)[50:]}, {"y": y[50:], "classes": [0, 1, 2, 3]}):
        before = state_of(model)
        with pytest.raises(ValueError, match=r"label 7|cannot add classes"):
            model.partial_fit(X[50:], **wrong)
        assert state_of(model) == before
    assert model.partial_fit(X[50:], y[50:], classes=[0, 1, 2]).stream_.n_seen == 90


def test_classes_may_be_left_out_if_the_first_batch_has_them_all():
    _, _, X, y, _ = targets("logit")
    model = fixed(GPClassifier).partial_fit(X[:50], y[:50])
    assert model.classes_.tolist() == ["no", "yes"] and set(model.memory_.y) == {"no", "yes"}
    with pytest.raises(ValueError, match="at least 2 classes"):
        fixed(GPClassifier).partial_fit(X[y == "no"], y[y == "no"])
    with pytest.raises(ValueError, match="at least 2 labels"):
        fixed(GPClassifier).partial_fit(X, y, classes=["no"])


def test_classes_after_fit_are_those_of_fit():
    _, _, X, y, _ = targets("logit")
    model = fixed(GPClassifier).fit(X[:50], y[:50]).partial_fit(X[50:], y[50:])
    assert model.stream_.n_seen == 90
    with pytest.raises(ValueError, match="'maybe'"):
        model.partial_fit(X[:1], ["maybe"])


# ---- weights and values per row


@pytest.mark.parametrize("name", ["gaussian", "logit", "poisson"])
def test_weight_two_is_the_row_twice(name):
    cls, arguments, X, y, side = targets(name)
    arguments.pop("likelihood") if name == "gaussian" else None
    weight = 1 + np.arange(90) % 3
    memory = 1000 if name != "gaussian" else 10
    weighted, repeated = (fixed(cls, memory=memory, **arguments) for _ in range(2))
    for rows in (slice(0, 50), slice(50, 90)):
        known = {"classes": np.unique(y)} if cls is GPClassifier else {}
        weighted.partial_fit(**part(rows, X, y, side), **known, sample_weight=weight[rows])
        again = np.repeat(np.arange(90)[rows], weight[rows])
        repeated.partial_fit(**part(again, X, y, side), **known)
    for found, expected in zip(latents(weighted), latents(repeated), strict=True):
        np.testing.assert_array_equal(found, expected)  # equal rows are merged
    np.testing.assert_array_equal(weighted.memory_.sample_weight, repeated.memory_.sample_weight)


def test_a_row_of_two_batches_is_a_row_of_weight_two():
    X, y = curve()
    twice = learn(fixed(), X, y, {}, [50]).partial_fit(X[:20], y[:20])
    once = learn(fixed(), X, y, {}, [50], sample_weight=None)
    weighted = fixed()
    weight = np.where(np.arange(90) < 20, 2.0, 1.0)
    weighted.partial_fit(X[:50], y[:50]).partial_fit(
        np.concatenate([X[50:], X[:20]]),
        np.concatenate([y[50:], y[:20]]),
        np.concatenate([weight[50:], weight[:20] - 1]),
    )
    np.testing.assert_allclose(latents(twice)[0], latents(weighted)[0], rtol=1e-9, atol=1e-11)
    assert np.abs(latents(twice)[0] - latents(once)[0]).max() > 1e-3


def test_a_batch_without_weight_is_refused():
    X, y = curve()
    model = fixed().partial_fit(X[:50], y[:50])
    before = state_of(model)
    with pytest.raises(ValueError, match="non-zero"):
        model.partial_fit(X[50:], y[50:], np.zeros(40))
    assert state_of(model) == before
    # rows of no weight among others are not there
    weight = np.r_[np.zeros(20), np.ones(20)]
    assert model.partial_fit(X[50:], y[50:], weight).stream_.n_seen == 70


def test_values_per_row_must_come_with_every_batch():
    _, _, X, y, side = targets("noise_variance")
    model = fixed().partial_fit(X[:50], y[:50], noise_variance=side["noise_variance"][:50])
    with pytest.raises(ValueError, match=r"\['noise_variance'\] before, \['none'\] now"):
        model.partial_fit(X[50:], y[50:])
    model = fixed().partial_fit(X[:50], y[:50])
    with pytest.raises(ValueError, match=r"\['none'\] before, \['noise_variance'\] now"):
        model.partial_fit(X[50:], y[50:], noise_variance=0.1)
    with pytest.raises(ValueError, match="had"):
        model.partial_fit(X[50:], np.stack([y[50:]] * 2, 1))


# ---- failures


def _interrupt_after(n):
    evaluate, calls = Evidence._evaluate, [0]

    def patched(self, *arguments):
        calls[0] += 1
        if calls[0] > n:
            raise KeyboardInterrupt
        return evaluate(self, *arguments)

    return patched


STAGES = {"new": 0, "dense": 1, "beginning": 2, "stream": 3}


def at_stage(stage, **arguments):
    """An estimator before its first batch, with few rows, before a stream begins, or on one."""
    X, y = curve(120)
    if not arguments:
        return pickle.loads(_at_stage(stage)), X[90:], y[90:]
    return _learned_until(stage, **arguments), X[90:], y[90:]


@cache
def _at_stage(stage):
    return pickle.dumps(_learned_until(stage))


def _learned_until(stage, cls=GPRegressor, **arguments):
    X, y = curve(120)
    model = cls(stream=Stream(dense_rows=60, n_inducing=12, memory=8), max_iter=5, random_state=0, **arguments)
    rows = [slice(0, 0), slice(0, 25), slice(0, 60), slice(0, 61)][STAGES[stage]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if stage != "new":
            model.partial_fit(X[rows], y[rows])
        if stage == "stream":
            model.partial_fit(X[61:90], y[61:90])
    assert hasattr(model, "stream_") == (stage == "stream")
    return model


BAD = {
    "columns": lambda X, y: ((np.c_[X, X], y), "features|expecting"),
    "nan": lambda X, y: ((np.where(np.arange(len(X))[:, None] == 3, np.nan, X), y), "NaN"),
    "length": lambda X, y: ((X, y[1:]), "inconsistent"),
    "no target": lambda X, y: ((X, np.full(len(y), np.nan)), "no observed target"),
    "infinite": lambda X, y: ((X, np.where(y == y[2], np.inf, y)), "infin"),
    "weight": lambda X, y: ((X, y, -np.ones(len(y))), "[Nn]egative"),
    "huge": lambda X, y: ((X, 1e200 * y), "out of range|range of float64|rescale"),
    "text": lambda X, y: ((X, ["a"] * len(y)), "cannot be used|could not convert"),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_batch_leaves_the_estimator_as_it_was(stage, bad):
    model, X, y = at_stage(stage)
    arguments, message = BAD[bad](X, y)
    if stage == "new" and bad == "columns":
        pytest.skip("the first batch says how many columns there are")
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        model.partial_fit(*arguments)
    assert state_of(model) == before
    model.partial_fit(X, y)


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupt_leaves_the_estimator_as_it_was(stage, after, monkeypatch):
    """Also where a search has found something: with the batch half learned nobody could tell whether to repeat it."""
    model, X, y = at_stage(stage)
    before = state_of(model)
    monkeypatch.setattr(Evidence, "_evaluate", _interrupt_after(after))
    with pytest.raises(KeyboardInterrupt, match="as it was before"):
        model.partial_fit(X, y)
    assert state_of(model) == before
    monkeypatch.undo()
    model.partial_fit(X, y)
    other, X, y = at_stage(stage)
    other.partial_fit(X, y)
    np.testing.assert_array_equal(model.predict(NEW), other.predict(NEW))


@pytest.mark.parametrize("stage", ["beginning", "stream"])
@pytest.mark.parametrize("error", [NotPositiveDefiniteError("singular"), MemoryError("no room"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_leaves_the_estimator_as_it_was(stage, error, monkeypatch):
    model, X, y = at_stage(stage)
    before = state_of(model)

    def fail(*arguments):
        raise error

    monkeypatch.setattr(streams, "remember", fail)
    expected = ValueError if isinstance(error, NotPositiveDefiniteError) else type(error)
    with pytest.raises(expected):
        model.partial_fit(X, y)
    assert state_of(model) == before


def test_engines_that_know_no_streams_are_refused_where_one_would_begin():
    model, X, y = at_stage("dense", likelihood="student_t", engine="laplace")
    before = state_of(model)
    with pytest.raises(ValueError, match="engine='laplace' knows no streams"):
        model.partial_fit(np.tile(X, (2, 1)) + np.arange(60)[:, None] / 1e3, np.tile(y, 2))
    assert state_of(model) == before


# ---- odd beginnings


@pytest.mark.slow
def test_a_stream_of_single_rows_ends_where_all_rows_at_once_do():
    X, y = curve(25)
    model = learn(GPRegressor(stream=Stream(dense_rows=0, n_inducing=25, memory=30)), X, y, {}, [1] * 24)
    assert model.stream_.n_seen == 25 and model.stream_.n_batches == 24  # two rows are the fewest that vary
    whole = GPRegressor().fit(X, y)
    mean, std = model.predict(NEW[2:-2], return_std=True)
    expected = whole.predict(NEW[2:-2], return_std=True)
    assert np.abs(mean - expected[0]).max() < 0.5 * expected[1].min()
    np.testing.assert_allclose(std, expected[1], rtol=0.25)


@pytest.mark.parametrize("family", ["auto", "inducing"])
@pytest.mark.parametrize(
    "first",
    [(np.ones((1, 1)), np.ones(1)), (np.ones((7, 1)), np.ones(7)), (np.linspace(0, 6, 30)[:, None], np.full(30, 5.0))],
    ids=["one row", "equal rows", "equal targets"],
)
def test_rows_are_kept_until_targets_vary(first, family):
    """Units and hyperparameters cannot be told from one value, and a stream would hold them for ever."""
    X, y = curve(60)
    model = GPRegressor(family=family, stream=Stream(dense_rows=0, n_inducing=20)).partial_fit(*first)
    assert not hasattr(model, "stream_") and "until it varies" in model.fit_report_.notes[-1]
    assert np.isfinite(model.predict(NEW, return_std=True)).all()
    model.partial_fit(1000.0 * X + 500.0, 1000.0 * y)
    assert hasattr(model, "stream_")
    together = np.concatenate([first[0], 1000.0 * X + 500.0]), np.concatenate([first[1], 1000.0 * y])
    whole = GPRegressor(family=family, stream=Stream(dense_rows=0, n_inducing=20)).partial_fit(*together)
    np.testing.assert_allclose(model.predict(X), whole.predict(X), rtol=1e-6)


@pytest.mark.slow
def test_targets_that_never_vary_begin_a_stream_in_the_end():
    """After a thousand rows; what comes then is learned all the same."""
    X, y = curve(200)
    model = GPRegressor(stream=Stream(dense_rows=0, n_inducing=20))
    model.partial_fit(np.linspace(-9, -1, 1001)[:, None], np.zeros(1001))
    assert hasattr(model, "stream_")
    learn(model, X, y, {}, [50] * 3)
    mean, std = model.predict(NEW[2:-2], return_std=True)
    assert np.abs(mean - np.sin(NEW[2:-2, 0])).max() < 0.25 and std.max() < 0.5


@pytest.mark.slow
def test_equal_inputs_with_other_targets_are_noise():
    X, y = curve(120)
    model = GPRegressor(stream=Stream(dense_rows=0, n_inducing=20)).partial_fit(
        np.full((9, 1), 3.0), np.sin(3.0) + y[:9]
    )
    learn(model, X, y, {}, [20] * 5)
    assert np.abs(model.predict(X) - np.sin(X[:, 0])).mean() < 0.15


@pytest.mark.parametrize("memory", [0, 1, 10_000])
def test_memory_of_any_size_serves(memory):
    X, y = curve(120)
    model = learn(GPRegressor(stream=Stream(dense_rows=0, n_inducing=20, memory=memory)), X, y, {}, [40, 40])
    assert len(model.memory_.X) == min(memory, 120)
    assert np.abs(model.predict(X) - np.sin(X[:, 0])).mean() < 0.15
    assert np.isfinite(model.log_predictive_density(X, y)).all() and np.isfinite(model.sample_y(NEW, 2)).all()
    assert model.loo_predict().shape == (min(memory, 120),)
    if memory:
        assert isinstance(model.diagnose(), list)


def test_a_stream_without_memory_can_be_diagnosed():
    X, y = curve(60)
    assert isinstance(learn(fixed(memory=0), X, y, {}, [40]).diagnose(), list)


def test_noise_known_row_by_row_has_to_be_given_where_no_row_is_kept():
    _, _, X, y, side = targets("noise_variance")
    model = learn(fixed(memory=0), X, y, side, [40])
    with pytest.raises(ValueError, match="noise_variance must be given"):
        model.predict(NEW, return_std=True)
    _, std = model.predict(NEW, return_std=True, noise_variance=0.3)
    assert (std**2 > 0.3).all()


def test_one_inducing_point_serves_and_is_warned_of():
    X, y = curve(120)
    with pytest.warns(UserWarning, match="1 inducing points carry only"):
        model = learn(fixed(n_inducing=1, stream=Stream(hyperparameters="frozen", memory=5)), X, y, {}, [40, 40])
    assert len(model.stream_.Z) == 1 and np.isfinite(model.predict(NEW)).all()


# ---- warnings


def caught(function):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        function()
    return [(str(each.message), each.filename) for each in found]


def test_targets_far_beyond_the_first_units_are_warned_of_once():
    X, y = curve(150)
    factor = 1000.0
    model = GPRegressor(stream=Stream(dense_rows=0, n_inducing=20)).partial_fit(X[:50], y[:50])
    said = caught(lambda: model.partial_fit(X[50:100], factor * y[50:100]))
    mine = [where for message, where in said if "standard deviations of the first rows away" in message]
    assert mine == [__file__]
    again = caught(lambda: model.partial_fit(X[100:], factor * y[100:]))
    assert not any("first rows away" in message for message, _ in again)


def test_columns_far_beyond_the_first_units_are_warned_of():
    X, y = curve(100)
    X = np.c_[X, np.r_[np.full(50, 1e-3), np.linspace(0, 1, 50)]]
    names = pd.DataFrame(X, columns=["time", "load"])
    model = GPRegressor(stream=Stream(dense_rows=0, n_inducing=20)).partial_fit(names[:50], y[:50])
    said = [message for message, _ in caught(lambda: model.partial_fit(names[50:], y[50:]))]
    assert any("column 'load' of the batch varies" in message for message in said)
    assert not any("'time'" in message for message in said)


def test_units_are_not_warned_of_where_there_are_none():
    """Counts and unstandardised data have none, and a drifting input is no misfit."""
    X, y = curve(100)
    counts = np.r_[np.ones(50), np.full(50, 900)].astype(int)
    counts[::2] += 1
    model = fixed(GPCountRegressor, n_inducing=20).partial_fit(X[:50], counts[:50])
    assert not any("first rows" in m for m, _ in caught(lambda: model.partial_fit(X[50:], counts[50:])))
    model = GPRegressor(standardize=False, stream=Stream(dense_rows=0, n_inducing=20)).partial_fit(X[:50], y[:50])
    assert not any("first rows" in m for m, _ in caught(lambda: model.partial_fit(X[50:], 1e3 * y[50:])))
    model = GPRegressor(stream=Stream(dense_rows=0, n_inducing=20)).partial_fit(X[:50], y[:50])
    assert not any("first rows" in m for m, _ in caught(lambda: model.partial_fit(X[50:] + 1e4, y[50:])))


def test_lost_nats_are_warned_of_each_time_they_have_doubled():
    X = np.linspace(0, 60, 600)[:, None]
    y = np.sin(X[:, 0]) + 0.1 * np.random.default_rng(0).standard_normal(600)
    options = Stream(hyperparameters="frozen", memory=0, loss_tol=50.0)
    model = fixed(n_inducing=8, stream=options, likelihood=Gaussian(0.01), standardize=False)
    losses, said = [], []
    for i in range(0, 600, 30):
        found = [
            m
            for m, where in caught(lambda i=i: model.partial_fit(X[i : i + 30], y[i : i + 30]))
            if "nats were lost" in m
        ]
        losses.append(model.stream_.loss)
        said.append(len(found))
    assert losses[-1] > 8.0
    levels = np.floor(np.log2(np.maximum(losses, 0.5)))
    assert said == [int(b > a) for a, b in zip([-1.0, *levels], levels, strict=False)]


def test_a_jump_of_the_process_is_warned_of():
    X, y = curve(400)
    model = learn(fixed(stream=Stream(**FROZEN, memory=5)), X[:320], y[:320], {}, [40] * 7)
    assert not caught(lambda: copy.deepcopy(model).partial_fit(X[320:], y[320:]))
    said = caught(lambda: model.partial_fit(X[320:], y[320:] + 2.0))
    assert len(said) == 1 and "the process may have changed" in said[0][0] and said[0][1] == __file__
    assert any("the process may have changed" in message for message in model.fit_report_.warnings)


# ---- the report


def test_the_report_tells_of_the_stream():
    X, y = curve(150)
    model = learn(GPRegressor(stream=Stream(dense_rows=0, n_inducing=10, memory=7)), X, y, {}, [50, 50])
    report = model.fit_report_
    assert report.n_rows == 150 and report.status == "batch 3" and report.family == "inducing"
    notes = " ".join(report.notes)
    assert "7 row(s) in memory" in notes and f"{len(model.stream_.Z)} inducing points" in notes and "nats" in notes
    assert report.engine == "conjugate" and "inducing points" in report.evidence
    assert "150" in str(report) and model.n_iter_ >= 1 and model.converged_


@pytest.mark.parametrize("name", ["gaussian", "logit", pytest.param("student_t", marks=pytest.mark.slow)])
def test_the_evidence_is_the_same_asked_for_or_kept(name):
    """``log_marginal_likelihood(theta_)`` is that of the rows that are left, and its gradient that of a difference."""
    cls, arguments, X, y, side = targets(name)
    y = y if name == "logit" else 30.0 * y + 7.0
    model = cls(stream=Stream(dense_rows=0, n_inducing=10, memory=15), **arguments)
    learn(model, X, y, side, [50, 20])
    value, slope = model.log_marginal_likelihood(model.theta_, eval_gradient=True)
    assert value == pytest.approx(model.log_marginal_likelihood_value_, rel=1e-8)
    assert model.log_marginal_likelihood() == model.log_marginal_likelihood_value_
    step = 1e-4 * np.cos(np.arange(len(slope)))
    ends = [model.log_marginal_likelihood(model.theta_ + sign * step) for sign in (1, -1)]
    assert (ends[0] - ends[1]) / 2 == pytest.approx(slope @ step, rel=1e-3, abs=1e-7)


def test_progress_is_shown_on_request(capsys):
    X, y = curve(60)
    learn(GPRegressor(verbose=1, max_iter=3, stream=Stream(dense_rows=0, n_inducing=10)), X, y, {}, [40])
    assert "GPRegressor" in capsys.readouterr().err


# ---- memory


def numbers(value, seen=None):
    """Count the bytes of arrays and tensors that an object holds, shared ones once."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, (str, type)):
        return 0
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        new = storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        return storage.nbytes() if new else 0
    if isinstance(value, np.ndarray):
        owner = value if value.base is None else value.base
        return 0 if id(owner) in seen and owner is not value else owner.nbytes
    if isinstance(value, dict):
        return sum(numbers(each, seen) for each in value.values())
    if isinstance(value, (list, tuple, set)):
        return sum(numbers(each, seen) for each in value)
    return numbers(vars(value), seen) if hasattr(value, "__dict__") else 0


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name", ["gaussian", "softmax", pytest.param("outputs", marks=SLOW), pytest.param("poisson", marks=SLOW)]
)
def test_an_estimator_on_a_stream_holds_as_much_after_many_rows(name):
    cls, arguments, X, y, side = targets(name, 400)
    options = Stream(dense_rows=0, n_inducing=8, memory=12, n_hyper_iter=1)
    model, sizes = cls(stream=options, max_iter=3, **arguments), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(0, 400, 40):
            known = {"classes": np.unique(y)} if cls is GPClassifier else {}
            model.partial_fit(**part(slice(i, i + 40), X, y, side), **known)
            sizes.append(numbers(model))
    assert model.stream_.n_seen > 380
    assert max(sizes[3:]) == min(sizes[3:]) and len(pickle.dumps(model)) < 200_000


@pytest.mark.parametrize("name", TASKS)
def test_memory_has_rows_and_targets_as_they_came(name):
    policy = LeverageTop(conditional=True) if name in ("outputs", "softmax") else "bls_sample"
    cls, arguments, X, y, side = targets(name)
    X = 7.0 * X - 3.0
    model = fixed(cls, stream=Stream(memory=6, policy=policy, **FROZEN), **arguments)
    for k, rows in enumerate((slice(0, 50), slice(50, 70), slice(70, 90))):
        known = {"classes": np.unique(y)} if cls is GPClassifier and k == 0 else {}
        model.partial_fit(**part(rows, X, y, side), **known)
        kept = model.memory_
        assert len(kept.X) == len(kept.y) == len(kept.sample_weight) == len(kept.inclusion) == 6
        at = [int(np.flatnonzero(X[:, 0] == x)[0]) for x in kept.X[:, 0]]
        np.testing.assert_array_equal(kept.y, y[at])
        assert max(at) < (50, 70, 90)[k] and len(set(at)) == 6
        assert ((kept.inclusion > 0) & (kept.inclusion <= 1)).all() and (kept.sample_weight == 1).all()


def test_memory_is_all_rows_until_a_stream_begins():
    X, y = curve(30)
    model = GPRegressor(optimizer=None).partial_fit(X, y)
    order, mine = np.argsort(X[:, 0]), np.argsort(model.memory_.X[:, 0])
    np.testing.assert_array_equal(model.memory_.y[mine], y[order])
    assert (model.memory_.inclusion == 1).all()


@pytest.mark.slow
def test_a_balanced_memory_keeps_classes_that_are_gone():
    _, _, X, y, _ = targets("softmax", 300)
    order = np.argsort(y, kind="stable")
    X, y = X[order], y[order]
    counts = {}
    for policy in ("bls_sample", ClassBalanced("uniform")):
        model = fixed(GPClassifier, stream=Stream(memory=12, policy=policy, **FROZEN))
        learn(model, X, y, {}, [60] * 4)
        counts[str(policy)] = [int((model.memory_.y == c).sum()) for c in range(3)]
    assert counts[str(ClassBalanced("uniform"))] == [4, 4, 4]
    with pytest.raises(ValueError, match="needs the labels"):
        fixed(stream=Stream(policy="class_balanced", **FROZEN)).partial_fit(*curve())


def test_forgetting_follows_a_process_that_drifts():
    """Rows of long ago say the opposite of those of today."""
    X, y = curve(400)
    sign = np.where(np.arange(400) < 200, 1.0, -1.0)
    models = [
        learn(fixed(stream=Stream(memory=5, forgetting=factor, **FROZEN)), X, sign * y, {}, [40] * 9)
        for factor in (1.0, 0.5)
    ]
    off = [np.abs(model.predict(NEW[2:-2]) + np.sin(NEW[2:-2, 0])).max() for model in models]
    assert off[1] < 0.4 < off[0]
    assert models[1].memory_.sample_weight.min() < 1.0


# ---- parameters


def test_stream_parameters_are_reached_by_name():
    X, y = curve()
    model = fixed(memory=10)
    assert model.get_params()["stream__memory"] == 10 and "stream__forgetting" in model.get_params()
    other = clone(model).set_params(stream__memory=4, stream__policy="uniform")
    assert other.stream == Stream(memory=4, policy="uniform", **FROZEN) and model.stream.memory == 10
    with pytest.raises(ValueError, match="memory must be"):
        other.set_params(stream__memory=-1)
    with pytest.raises(ValueError, match="stream__unknown"):
        other.set_params(stream__unknown=1)
    with pytest.raises(ValueError, match="Pass an object"):
        GPRegressor().set_params(stream__memory=4)
    with pytest.raises(ValueError, match="'stream' parameter"):
        GPRegressor(stream={"memory": 3}).fit(X, y)
    search = GridSearchCV(other, {"stream__memory": [2, 3]}, cv=2).fit(X, y)
    assert search.best_params_["stream__memory"] in (2, 3)


def test_parameters_set_on_the_way_count_from_the_next_batch():
    X, y = curve(120)
    model = learn(fixed(memory=20, stream=Stream(memory=20, hyperparameters="frozen")), X[:80], y[:80], {}, [40])
    model.set_params(stream__memory=5).partial_fit(X[80:100], y[80:100])
    assert len(model.memory_.X) == 5
    m = len(model.stream_.Z)
    model.set_params(family__n_inducing=m + 6, stream__residual_tol=1e-8).partial_fit(X[100:], y[100:])
    assert m < len(model.stream_.Z) <= m + 6


# ---- copies


@pytest.mark.parametrize(
    ("store", "name"),
    [("save", name) for name in ("gaussian", "outputs", "noise_variance", "logit", "softmax", "poisson")]
    + [("pickle", "logit"), ("copy", "gaussian")],
)
def test_an_estimator_resumed_is_the_estimator_uninterrupted(name, store, tmp_path):
    cls, arguments, X, y, side = targets(name)
    policy = LeverageTop(conditional=True) if name == "logit" else "bls_sample"
    options = Stream(dense_rows=0, n_inducing=10, memory=9, n_hyper_iter=2, policy=policy)
    model = cls(stream=options, random_state=0, max_iter=3, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learn(model, X[:70], y[:70], {k: v[:70] for k, v in side.items()}, [40])
        if store == "save":
            model.save(tmp_path / "model")
            other = load(tmp_path / "model")
        else:
            other = copy.deepcopy(model) if store == "copy" else pickle.loads(pickle.dumps(model))
        for each in (model, other):
            each.partial_fit(**part(slice(70, 90), X, y, side))
    for found, expected in zip(latents(other), latents(model), strict=True):
        np.testing.assert_array_equal(found, expected)
    for found, expected in zip(other.memory_, model.memory_, strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(other.theta_, model.theta_)
    assert torch.equal(other.stream_.random, model.stream_.random)


def test_tensors_and_frames_and_lists_are_the_same_rows():
    X, y = curve(60)
    expected = learn(fixed(), X, y, {}, [40]).predict(NEW)
    for turn in (torch.as_tensor, pd.DataFrame, np.ndarray.tolist):
        model = fixed().partial_fit(turn(X[:40]), y[:40]).partial_fit(turn(X[40:]), y[40:])
        np.testing.assert_array_equal(np.asarray(model.predict(turn(NEW))), expected)


def test_single_precision_streams_have_a_posterior_in_double():
    X, y = curve(90)
    models = [GPRegressor(dtype=dtype, stream=Stream(dense_rows=0, n_inducing=15)) for dtype in ("float32", "float64")]
    for model in models:
        learn(model, X, y, {}, [50])
        assert model.stream_.Z.dtype == torch.float64
    assert np.abs(models[0].predict(NEW) - models[1].predict(NEW)).max() < 0.05


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["gaussian", "logit", "softmax"])
def test_a_stream_on_a_gpu_is_that_on_the_cpu(name, tmp_path):
    cls, arguments, X, y, side = targets(name)
    arguments.pop("likelihood") if name == "gaussian" else None
    models = [
        fixed(cls, device=device, stream=Stream(memory=1000, **FROZEN), **arguments) for device in ("cpu", "cuda")
    ]
    for model in models:
        learn(model, X, y, side, [50])
    assert models[1].stream_.Z.device.type == "cuda"
    models[1].save(tmp_path / "model")
    moved = load(tmp_path / "model", device="cuda").partial_fit(X[:5], y[:5])
    assert moved.stream_.n_seen == 95
    with torch.no_grad():
        found = [[each.cpu().numpy() for each in model.posterior_.marginals(model.stream_.Z)] for model in models]
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


# ---- forget


@pytest.mark.parametrize("memory", [0, 12, 1000])
def test_gaussian_rows_are_forgotten_as_if_never_seen(memory):
    X, y = curve()
    y = 30.0 * y + 7.0
    own = {"kernel": Matern52(1.0, outputscale=900 * THETA[1]), "likelihood": Gaussian(900 * NOISE)}
    model, gone = learn(fixed(memory=memory, **own), X, y, {}, [50, 20]), np.arange(90) % 4 == 1
    assert model.forget(X[gone], y[gone]) is model
    for found, expected in zip(latents(model), all_at_once(model, X[~gone], y[~gone], {}), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)
    # the order of batches does not matter either
    other = fixed(memory=memory, **own).partial_fit(X[:50], y[:50])
    other.forget(X[:50][gone[:50]], y[:50][gone[:50]]).partial_fit(X[50:][~gone[50:]], y[50:][~gone[50:]])
    np.testing.assert_allclose(latents(model)[0], latents(other)[0], rtol=1e-8, atol=1e-10)
    assert model.log_marginal_likelihood_value_ == pytest.approx(other.log_marginal_likelihood_value_, rel=1e-8)
    assert model.stream_.n_seen == model.fit_report_.n_rows == int((~gone).sum())
    assert not np.isin(model.memory_.X, X[gone]).any()
    assert "unlearned 22 row(s)" in model.fit_report_.status or gone.sum() != 22


@pytest.mark.parametrize("name", ["probit", "poisson", "softmax"])
def test_rows_in_memory_are_forgotten_as_if_never_seen(name):
    """Where all rows are there; sites of others would remember those that have left."""
    cls, arguments, X, y, side = targets(name)
    model, gone = learn(fixed(cls, memory=1000, **arguments), X, y, side, [50, 20]), np.arange(90) % 4 == 1
    model.forget(X[gone], y[gone])
    rest = {name: value[~gone] for name, value in side.items()}
    for found, expected in zip(latents(model), all_at_once(model, X[~gone], y[~gone], rest), strict=True):
        tol = 1e-3 if name == "softmax" else 1e-6
        np.testing.assert_allclose(found, expected, rtol=tol, atol=tol)


@pytest.mark.parametrize("family", ["exact", "sic"])
@pytest.mark.parametrize("name", ["gaussian", "logit", "poisson", "outputs"])
def test_rows_that_are_all_kept_are_forgotten_as_if_never_seen(name, family):
    """Units and hyperparameters stay, and so it is not quite a fit of the others."""
    cls, arguments, X, y, side = targets(name, 60)
    gone = np.arange(60) % 4 == 1
    model = fixed(cls, **arguments).set_params(family=family).fit(X, y, **side)
    before = model._units, model.theta_, len(model.memory_.X)
    assert model.forget(X[gone], y[gone]) is model
    n_rows = before[2] - len(canonical(X[gone], model._encode_known(y[gone], X[gone], None), {}).X)
    assert len(model.memory_.X) == model.fit_report_.n_rows == n_rows
    assert model._units is before[0] and np.array_equal(model.theta_, before[1])
    rest = {key: value[~gone] for key, value in side.items()}
    rows = canonical(X[~gone], model._encode_known(y[~gone], X[~gone], None), rest)
    data = make_data(rows, model._units, model._model.policy)
    own = model._model
    with torch.no_grad():
        found = run(own, own.family.plan(own.prior, data.X, own.policy), data).state.posterior
        expected = found.marginals(model._units.inputs(torch.as_tensor(NEW)))
    for one, other in zip(latents(model), expected, strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-6, atol=1e-7)


def test_inducing_points_stay_where_rows_are_forgotten():
    X, y = curve()
    model = GPRegressor(family=Inducing(8), max_iter=10).fit(X, y)
    Z = model.posterior_.plan.Z.clone()
    assert torch.equal(model.forget(X[:20], y[:20]).posterior_.plan.Z, Z)


def test_one_mention_takes_one_row_of_several_away():
    X, y = curve(50)
    for model in (fixed(memory=1000), fixed(family=False)):
        thrice = copy.deepcopy(model).partial_fit(np.concatenate([X, X[:1], X[:1]]), np.concatenate([y, y[:1], y[:1]]))
        apart = copy.deepcopy(model).partial_fit(X, y).partial_fit(X[:1], y[:1]).partial_fit(X[:1], y[:1])
        for each in (thrice, apart):
            each.forget(X[:1], y[:1])
            assert each.memory_.sample_weight[each.memory_.X[:, 0] == X[0, 0]].sum() == 2
            each.forget(X[[0, 0]], y[[0, 0]])
            assert X[0, 0] not in each.memory_.X
            before = state_of(each)
            with pytest.raises(ValueError, match=r"row 0 of X was not seen|not in memory|cannot have been"):
                each.forget(np.concatenate([X[:1]] * 60), np.concatenate([y[:1]] * 60))
            assert state_of(each) == before


def test_a_row_mentioned_more_often_than_it_was_seen_is_refused():
    X, y = curve(50)
    model = fixed(family=False).partial_fit(X, y)
    before = state_of(model)
    with pytest.raises(ValueError, match="row 1 of X was not seen with this y, or not so often"):
        model.forget(X[[3, 7, 7]], y[[3, 7, 7]])
    assert state_of(model) == before
    with pytest.raises(ValueError, match="no row would be left"):
        model.forget(X, y)


def test_rows_that_cannot_be_told_apart_are_refused():
    """Those that have left memory: sites of other likelihoods, or after inducing points or hyperparameters moved."""
    X, y = curve(90)
    label = np.where(y > 0, 1, 0)
    moving = [
        Stream(memory=5),
        Stream(memory=5, forgetting=0.9, **FROZEN),
        Stream(memory=5, memory_weight=2.0, **FROZEN),
    ]
    models = [fixed(stream=options) for options in moving]
    models[0].set_params(optimizer="lbfgs")
    models.append(fixed(GPClassifier, memory=5))
    for model in models:
        target = label if isinstance(model, GPClassifier) else y
        learn(model, X, target, {}, [50, 20])
        before = state_of(model)
        with pytest.raises(ValueError, match=r"not in memory.*Use a larger memory"):
            model.forget(X, target)
        assert state_of(model) == before
        kept = model.memory_
        assert len(model.forget(kept.X[:2], kept.y[:2]).memory_.X) == 3


def test_rows_that_were_never_there_are_refused():
    X, y = curve(90)
    model = learn(fixed(memory=5), X, y, {}, [50])
    before = state_of(model)
    with pytest.raises(ValueError, match="cannot have been among those seen"):
        model.forget(np.tile(NEW, (10, 1)), np.zeros(230))
    assert state_of(model) == before
    model = fixed(GPClassifier).partial_fit(X, np.where(y > 0, "a", "b"))
    with pytest.raises(ValueError, match="label 'c'"):
        model.forget(X[:1], ["c"])


def test_a_stream_goes_on_after_forgetting():
    X, y = curve(90)
    model = learn(fixed(memory=20), X[:60], y[:60], {}, [40])
    kept = model.memory_
    model.forget(kept.X[:5], kept.y[:5]).partial_fit(X[60:], y[60:])
    left = ~np.isin(X[:, 0], kept.X[:5, 0])
    for found, expected in zip(latents(model), all_at_once(model, X[left], y[left], {}), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)


# ---- merge


@pytest.mark.parametrize("name", ["gaussian", "outputs", "noise_variance"])
@pytest.mark.parametrize("memory", [0, 12])
def test_two_gaussian_shards_are_one_estimator_on_all_rows(name, memory):
    cls, arguments, X, y, side = targets(name)
    arguments.pop("likelihood", None)
    y = 30.0 * y + 7.0
    own = {"kernel": Matern52(1.0, outputscale=THETA[1])} if name == "outputs" else {}
    start = fixed(cls, memory=memory, **own, **arguments).partial_fit(**part(slice(0, 40), X, y, side))
    one, two = (copy.deepcopy(start) for _ in range(2))
    one.partial_fit(**part(slice(40, 70), X, y, side))
    two.partial_fit(**part(slice(70, 90), X, y, side))
    whole = copy.deepcopy(start).partial_fit(**part(slice(40, 90), X, y, side))
    assert one.merge(two, common=start) is one
    for found, expected in zip(latents(one), latents(whole), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-10)
    if name != "noise_variance":
        assert one.log_marginal_likelihood_value_ == pytest.approx(whole.log_marginal_likelihood_value_, rel=1e-9)
    assert one.stream_.n_seen == one.fit_report_.n_rows == whole.stream_.n_seen and len(one.memory_.X) == memory
    assert "merged 2 streams" in one.fit_report_.status
    if memory:
        kept = one.memory_
        at = [int(np.flatnonzero(X[:, 0] == x)[0]) for x in kept.X[:, 0]]
        np.testing.assert_array_equal(kept.y, y[at])  # to the last bit, so that they can be forgotten
        one.forget(kept.X[:3], kept.y[:3]).partial_fit(**part(slice(0, 3), X, y, side))


@pytest.mark.parametrize("name", ["logit", "poisson"])
def test_shards_with_all_rows_in_memory_are_one_estimator(name):
    cls, arguments, X, y, side = targets(name)
    start = fixed(cls, memory=1000, **arguments).partial_fit(**part(slice(0, 40), X, y, side))
    one, two, three = (copy.deepcopy(start) for _ in range(3))
    for k, each in enumerate((one, two, three)):
        each.partial_fit(**part(slice(40 + 15 * k, 55 + 15 * k), X, y, side))
    one.merge(two, three, common=start)
    rest = {key: value[:85] for key, value in side.items()}
    for found, expected in zip(latents(one), all_at_once(one, X[:85], y[:85], rest), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert len(one.memory_.X) == 85


def test_what_does_not_belong_together_is_not_merged():
    X, y = curve()
    start = fixed().partial_fit(X[:40], y[:40])
    one = copy.deepcopy(start).partial_fit(X[40:60], y[40:60])
    wrong = {
        "merge needs streams": fixed(family=False).partial_fit(X[:40], y[:40]),
        "equal hyperparameters and units": fixed(kernel=Matern52(2.0, outputscale=1.5)).partial_fit(X[:40], y[:40]),
        "different inducing points": fixed(n_inducing=11).partial_fit(X[:40], y[:40]),
        "different estimators": one,
    }
    shifted = copy.deepcopy(start)  # the same in its own units
    shifted._units = dataclasses.replace(start._units, x_center=start._units.x_center + 5.0)
    other_y = fixed().partial_fit(X[:40], y[:40] + 5.0)
    other_noise = fixed(likelihood=Gaussian(0.1)).partial_fit(X[:40], y[:40])
    other_kernel = fixed(kernel=Matern32(THETA[0], outputscale=THETA[1])).partial_fit(X[:40], y[:40])
    before = state_of(one)
    for message, each in (
        *wrong.items(),
        *[("equal hyperparameters", e) for e in (shifted, other_y, other_noise, other_kernel)],
    ):
        with pytest.raises(ValueError, match=message):
            one.merge(each)
        assert state_of(one) == before
    label = np.where(y > 0, 1, 0)
    classes = fixed(GPClassifier).partial_fit(X[:40], label[:40])
    renamed = fixed(GPClassifier).partial_fit(X[:40], label[:40] + 1)
    with pytest.raises(ValueError, match="equal hyperparameters"):
        classes.merge(renamed)


# ---- score_stream


def test_batches_are_scored_before_they_are_learned_from():
    X, y = curve()
    model = fixed()
    found = model.score_stream(X, y, batch_size=25)
    other = fixed().partial_fit(X[:25], y[:25])
    assert found.n_rows == [25, 25, 25, 15] and np.isnan(found.log_score[0]) and np.isnan(found.score[0])
    for k, rows in enumerate((slice(25, 50), slice(50, 75), slice(75, 90)), start=1):
        assert found.log_score[k] == pytest.approx(other.log_predictive_density(X[rows], y[rows]).mean(), rel=1e-9)
        assert found.score[k] == pytest.approx(other.score(X[rows], y[rows]), rel=1e-9)
        other.partial_fit(X[rows], y[rows])
    np.testing.assert_array_equal(model.predict(NEW), other.predict(NEW))
    assert found.nlpd == pytest.approx(-np.average(found.log_score[1:], weights=[25, 25, 15]))
    assert len(found.seconds) == 4 and min(found.seconds) > 0


@pytest.mark.parametrize("turn", [np.ndarray.tolist, pd.DataFrame, torch.as_tensor], ids=["list", "frame", "tensor"])
def test_streams_of_any_container_are_scored(turn):
    X, y = curve(60)
    expected = fixed().score_stream(X, y, batch_size=20)
    found = fixed().score_stream(turn(X), pd.Series(y) if turn is pd.DataFrame else turn(y), batch_size=20)
    np.testing.assert_allclose(found.log_score[1:], expected.log_score[1:], rtol=1e-9)


def test_values_per_row_go_with_their_batches():
    """Exposure decides what a count means, also in the score."""
    cls, arguments, X, y, side = targets("poisson")
    weight = 1 + np.arange(90) % 3
    found = fixed(cls, **arguments).score_stream(X, y, 30, sample_weight=weight, **side)
    other = fixed(cls, **arguments).partial_fit(X[:30], y[:30], weight[:30], exposure=side["exposure"][:30])
    rows = slice(30, 60)
    density = other.log_predictive_density(X[rows], y[rows], exposure=side["exposure"][rows])
    assert found.log_score[1] == pytest.approx(np.average(density, weights=weight[rows]), rel=1e-9)
    score = other.score(X[rows], y[rows], weight[rows], exposure=side["exposure"][rows])
    assert found.score[1] == pytest.approx(score, rel=1e-9)
    _, _, X, y, side = targets("noise_variance")
    found = fixed().score_stream(X, y, 30, **side)
    assert np.isfinite(found.log_score[1:]).all()


def test_classes_and_missing_targets_are_scored():
    _, _, X, y, _ = targets("softmax")
    found = fixed(GPClassifier).score_stream(X, y, 30, classes=[0, 1, 2])
    assert np.isfinite(found.log_score[1:]).all() and min(found.score[1:]) > 0.5
    _, arguments, X, y, _ = targets("outputs")
    found = fixed(**arguments).score_stream(X, y, 30)
    assert np.isfinite(found.log_score[1:]).all() and np.isnan(found.score).all()
    single = fixed().score_stream(*curve(4), 1)
    assert np.isnan(single.score).all() and np.isfinite(single.log_score[1:]).all()


@pytest.mark.parametrize("size", [0, -3, 2.5])
def test_batch_sizes_are_positive_integers(size):
    with pytest.raises(ValueError, match="batch_size"):
        fixed().score_stream(*curve(), size)


# ---- scikit-learn


ON_A_STREAM = Stream(dense_rows=0, n_inducing=20)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@parametrize_with_checks(
    [
        GPRegressor(stream=ON_A_STREAM),
        GPClassifier(stream=ON_A_STREAM, max_iter=5),
        GPCountRegressor(stream=ON_A_STREAM, max_iter=5),
        GPRegressor(family="inducing", likelihood="student_t", stream=ON_A_STREAM, max_iter=5),
    ]
)
def test_estimators_on_a_stream_conform(estimator, check):
    check(estimator)


def test_a_prior_mean_of_the_user_is_held():
    """Learned from the first rows, and a part of the process from then on."""
    X, y = curve(90)
    model = GPRegressor(mean=constant_mean(0.5), stream=Stream(dense_rows=0, n_inducing=15, memory=5))
    model.partial_fit(X[:40], y[:40])
    before = [p.item() for p in model._model.prior.mean.parameters()]
    model.partial_fit(X[40:], y[40:])
    assert [p.item() for p in model._model.prior.mean.parameters()] == before
    assert np.abs(model.predict(X) - np.sin(X[:, 0])).mean() < 0.15
