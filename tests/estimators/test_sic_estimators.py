"""Estimators with families for many rows: against the exact one, in many dimensions, through engines and tensors."""

import numpy as np
import pytest
import torch

from mercer import GPClassifier, GPRegressor
from mercer.families import Exact, InducingVecchia, SparseInverseCholesky
from mercer.kernels import Matern52

HYBRID = InducingVecchia(n_inducing=100, n_neighbors=10, n_neighbors_predict=20)
PLAIN = SparseInverseCholesky(n_neighbors=10, n_neighbors_predict=20)


def friedman(n, seed, noise=1.0):
    """Ten inputs, of which five matter: Friedman (1991), first problem."""
    rng = np.random.default_rng(seed)
    X = rng.random((n, 10))
    f = 10 * np.sin(np.pi * X[:, 0] * X[:, 1]) + 20 * (X[:, 2] - 0.5) ** 2 + 10 * X[:, 3] + 5 * X[:, 4]
    return X, f + noise * rng.standard_normal(n)


def nlpd(model, X, y):
    return -float(np.mean(model.log_predictive_density(X, y)))


def test_in_ten_dimensions_inducing_points_help_neighbours():
    X, y = friedman(600, 0)
    X_new, y_new = friedman(300, 1)
    kernel = Matern52(2.0, outputscale=30.0, ard=False)
    found = {}
    for family in (Exact(), PLAIN, HYBRID):
        model = GPRegressor(kernel, family=family, optimizer=None).fit(X, y)
        found[family.name] = model.log_marginal_likelihood_value_, nlpd(model, X_new, y_new)
    evidence, density = found["exact"]
    off = {name: (abs(value - evidence), other - density) for name, (value, other) in found.items()}
    assert off["inducing_vecchia"][0] < 0.5 * off["sic"][0]
    assert abs(off["inducing_vecchia"][1]) < 0.5 * off["sic"][1]


def test_learned_hyperparameters_predict_better_with_inducing_points():
    X, y = friedman(600, 0)
    X_new, y_new = friedman(300, 1)
    kernel = Matern52(2.0, outputscale=30.0, ard=False)
    scores = {}
    for family in (PLAIN, HYBRID):
        model = GPRegressor(kernel, family=family, random_state=0).fit(X, y)
        assert model.converged_ and model.fit_report_.family == family.name
        scores[family.name] = nlpd(model, X_new, y_new)
    assert "100 inducing points" in " ".join(model.fit_report_.notes)
    assert scores["inducing_vecchia"] < scores["sic"]
    loo = model.loo_predict(return_std=True)
    assert float(np.mean((loo[0] - y) ** 2 / loo[1] ** 2)) == pytest.approx(1.0, abs=0.5)


@pytest.mark.parametrize("engine", ["dual", "laplace"])
def test_classifiers_agree_with_the_exact_family(engine):
    X, y = friedman(150, 0, noise=0.0)
    X_new, _ = friedman(50, 1)
    label, kernel = y > np.median(y), Matern52(2.0, outputscale=4.0, ard=False)
    found = {}
    for family in (Exact(), InducingVecchia(n_inducing=40)):
        model = GPClassifier(kernel, family=family, engine=engine, optimizer=None).fit(X, label)
        found[family.name] = model.predict_proba(X_new)[:, 1], model.log_marginal_likelihood_value_
    (p, evidence), (q, approximation) = found["exact"], found["inducing_vecchia"]
    assert np.abs(p - q).max() < 0.02 < p.std()
    assert approximation == pytest.approx(evidence, abs=0.5)


@pytest.mark.parametrize("engine", ["dual", "laplace"])
def test_classifiers_learn_hyperparameters(engine):
    X, y = friedman(120, 0, noise=0.0)
    label = y > np.median(y)
    family = InducingVecchia(n_inducing=20, n_neighbors=8, n_neighbors_predict=16)
    model = GPClassifier(Matern52(ard=False), family=family, engine=engine, max_iter=10, random_state=0).fit(X, label)
    assert model.fit_report_.family == "inducing_vecchia" and model.fit_report_.engine == engine
    trace = model.fit_report_.evidence_trace
    assert trace[-1] > trace[0] and model.score(X, label) > 0.9


@pytest.mark.parametrize("family", [PLAIN, HYBRID], ids=["sic", "inducing_vecchia"])
@pytest.mark.parametrize("form", ["response", "latent"])
def test_predictions_are_differentiable_in_tensors(family, form):
    X, y = friedman(200, 0)
    family = type(family)(n_neighbors=10, n_neighbors_predict=20, form=form)
    model = GPRegressor(Matern52(2.0, outputscale=30.0, ard=False), family=family, optimizer=None)
    model.fit(torch.as_tensor(X), torch.as_tensor(y))
    rows = torch.as_tensor(friedman(3, 1)[0]).requires_grad_()

    def value(rows):
        mean, std = model.predict(rows, return_std=True)
        return (mean * torch.tensor([1.0, -0.5, 2.0], dtype=mean.dtype)).sum() + std.square().sum()

    (slope,) = torch.autograd.grad(value(rows), rows)
    direction = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0), dtype=rows.dtype)
    step = 1e-6 * direction
    with torch.no_grad():
        expected = float(value(rows + step) - value(rows - step)) / 2e-6
    assert float((slope * direction).sum()) == pytest.approx(expected, rel=1e-5)
