"""Classification: labels of any type, their order, and what relabelling must not change."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import ndtr

from mercer import GPClassifier
from mercer.likelihoods import Bernoulli, Ordinal, Softmax

rng = np.random.default_rng(0)
N = 30
X = rng.normal(size=(N, 2))
SIGNAL = X[:, 0] + 0.3 * rng.normal(size=N)
TWO, THREE = np.digitize(SIGNAL, [0.0]), np.digitize(SIGNAL, [-0.5, 0.5])
X_NEW = rng.normal(size=(8, 2))
LABELS = {
    "integers": np.array([-7, 40]),
    "floats": np.array([0.0, 2.0]),
    "booleans": np.array([False, True]),
    "words": np.array(["ash", "elm"]),
    "objects": np.array(["ash", "elm"], dtype=object),
    "integers in objects": np.array([3, 9], dtype=object),
    "dates": np.array(["2020-01-01", "2021-01-01"], dtype="datetime64[D]"),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_any_type_come_back(kind):
    labels = LABELS[kind]
    model = GPClassifier(optimizer=None).fit(X, labels[TWO])
    plain = GPClassifier(optimizer=None).fit(X, TWO)
    np.testing.assert_array_equal(model.classes_, labels)
    np.testing.assert_array_equal(model.predict(X_NEW), labels[plain.predict(X_NEW)])
    np.testing.assert_array_equal(model.predict_proba(X_NEW), plain.predict_proba(X_NEW))
    assert model.score(X, labels[TWO]) == plain.score(X, TWO)
    np.testing.assert_array_equal(model.log_predictive_density(X, labels[TWO]), plain.log_predictive_density(X, TWO))
    assert set(model.sample_y(X_NEW, 9, latent=False).flat) <= set(labels.tolist()) | set(labels)


@pytest.mark.parametrize(
    "column",
    [
        lambda y: pd.Series(np.where(y, "elm", "ash")).astype("category"),
        lambda y: pd.Series(np.where(y, "elm", "ash"), dtype="string"),
        lambda y: np.where(y, "elm", "ash").tolist(),
    ],
)
def test_columns_of_words_are_labels(column):
    model = GPClassifier(optimizer=None).fit(X, column(TWO))
    assert model.classes_.tolist() == ["ash", "elm"]
    plain = GPClassifier(optimizer=None).fit(X, TWO)
    assert model.predict(X_NEW).tolist() == ["elm" if y else "ash" for y in plain.predict(X_NEW)]


@pytest.mark.parametrize("column", [lambda y: pd.Series(y, dtype="Int64"), torch.as_tensor, list])
def test_columns_of_numbers_are_labels(column):
    model = GPClassifier(optimizer=None).fit(X, column(THREE))
    np.testing.assert_array_equal(model.classes_, [0, 1, 2])
    np.testing.assert_array_equal(model.predict(X_NEW), GPClassifier(optimizer=None).fit(X, THREE).predict(X_NEW))


@pytest.mark.parametrize("likelihood", ["logit", "probit"])
def test_swapping_two_labels_swaps_their_probabilities(likelihood):
    """The prior is symmetric around one half."""
    model = GPClassifier(likelihood=likelihood, optimizer=None)
    proba = model.fit(X, TWO).predict_proba(X_NEW)
    np.testing.assert_allclose(model.fit(X, 1 - TWO).predict_proba(X_NEW), proba[:, ::-1], rtol=1e-9)


def test_reversing_an_order_reverses_its_probabilities():
    model = GPClassifier(likelihood="ordinal", optimizer=None)
    proba = model.fit(X, THREE).predict_proba(X_NEW)
    np.testing.assert_allclose(model.fit(X, 2 - THREE).predict_proba(X_NEW), proba[:, ::-1], rtol=1e-7)


def test_an_order_of_two_is_a_probit_with_a_threshold():
    """P(y ≤ 0) = Φ(c − f): with the cutpoint at zero this is the probit model."""
    balanced = np.argsort(np.argsort(SIGNAL)) >= N // 2  # as many of each, so that the cutpoint starts at zero
    ordinal = GPClassifier(likelihood="ordinal", optimizer=None).fit(X, balanced)
    probit = GPClassifier(likelihood="probit", optimizer=None).fit(X, balanced)
    assert ordinal.likelihood_.cutpoints.item() == pytest.approx(0.0, abs=1e-12)
    np.testing.assert_allclose(ordinal.predict_proba(X_NEW), probit.predict_proba(X_NEW), rtol=1e-6)


def test_far_from_the_data_the_prior_is_left():
    """Φ-probabilities of f ~ N(0, s) are one half; the softmax of equal priors is uniform."""
    far = np.full((1, 2), 1e5)
    assert GPClassifier(optimizer=None).fit(X, TWO).predict_proba(far)[0, 0] == pytest.approx(0.5, abs=1e-10)
    uniform = GPClassifier(optimizer=None).fit(X, THREE).predict_proba(far)[0]
    # quasi-Monte-Carlo over 128 draws of three latents
    np.testing.assert_allclose(uniform, 1 / 3, atol=0.02)
    ordinal = GPClassifier(likelihood="ordinal", optimizer=None).fit(X, THREE)
    cuts, variance = ordinal.likelihood_.cutpoints.detach().numpy(), 1 + ordinal.kernel_.outputscale.item()
    below = np.concatenate([[0], ndtr(cuts / np.sqrt(variance)), [1]])
    np.testing.assert_allclose(ordinal.predict_proba(far)[0], np.diff(below), rtol=1e-9)


def test_auto_is_the_logit_for_two_classes_and_the_softmax_for_more():
    assert isinstance(GPClassifier(optimizer=None).fit(X, TWO).likelihood_, Bernoulli)
    assert isinstance(GPClassifier(optimizer=None).fit(X, THREE).likelihood_, Softmax)


def test_classes_without_weight_are_unknown():
    weight = (THREE != 1).astype(float)
    model = GPClassifier(optimizer=None).fit(X, THREE, sample_weight=weight)
    assert model.classes_.tolist() == [0, 2]
    seen = THREE != 1
    unit = (X - X[seen].mean(0)) / X[seen].std(0)
    other = GPClassifier(optimizer=None).fit(unit[seen], THREE[seen])
    np.testing.assert_allclose(model.predict_proba(X), other.predict_proba(unit), rtol=1e-7)


def test_a_likelihood_for_another_number_of_classes_is_refused():
    for likelihood in (Softmax(4), Ordinal(2), "poisson"):
        with pytest.raises(ValueError, match="is not for"):
            GPClassifier(likelihood=likelihood).fit(X, THREE)
    model = GPClassifier(likelihood=Softmax(3, n_draws=64), optimizer=None).fit(X, THREE)
    assert model.likelihood_.n_draws == 64
    assert model.likelihood.n_draws == 64 and model.likelihood is not model.likelihood_


def test_leave_one_out_probabilities_sum_to_one_and_are_less_sure():
    for y in (TWO, THREE):
        model = GPClassifier(optimizer=None).fit(X, y)
        inside, loo = model.predict_proba(X), model.loo_predict_proba()
        assert loo.shape == inside.shape
        np.testing.assert_allclose(loo.sum(1), 1, rtol=1e-12)
        rows = np.arange(N)
        assert np.log(loo[rows, y]).mean() < np.log(inside[rows, y]).mean()
