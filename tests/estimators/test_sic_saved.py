"""Fitted neighbour families survive being saved, and their predictions with them, bit for bit."""

import numpy as np
import pytest

from mercer import GPClassifier, GPRegressor, load
from mercer.families import InducingVecchia, SparseInverseCholesky
from mercer.families.dklgp import DoubleKL
from mercer.inference import Freeform

RNG = np.random.default_rng(0)
X = RNG.uniform(size=(90, 3))
Y = np.sin(4 * X[:, 0]) + X[:, 1] + 0.1 * RNG.normal(size=90)
FAMILIES = {
    "response": SparseInverseCholesky(n_neighbors=8, form="response"),
    "latent": SparseInverseCholesky(n_neighbors=8, form="latent"),
    "ball": SparseInverseCholesky(n_neighbors=8, pattern="ball", rho=2.5),
    "hybrid": InducingVecchia(n_inducing=10, n_neighbors=8),
    "hybrid, latent": InducingVecchia(n_inducing=10, n_neighbors=8, form="latent"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_regressions_are_read_back(name, tmp_path):
    model = GPRegressor(family=FAMILIES[name], max_iter=3, random_state=0).fit(X, Y)
    model.save(tmp_path / "model")
    again = load(tmp_path / "model")
    found, expected = (each.predict(X[:9] + 0.01, return_std=True) for each in (again, model))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert again.family == model.family and str(again.fit_report_) == str(model.fit_report_)
    np.testing.assert_array_equal(again.sample_y(X[:4]), model.sample_y(X[:4]))


@pytest.mark.parametrize("family", ["sic", "inducing_vecchia"])
def test_classes_are_read_back(family, tmp_path):
    model = GPClassifier(family=family, max_iter=2, random_state=0).fit(X, Y > 0.8)
    model.save(tmp_path / "model")
    np.testing.assert_array_equal(load(tmp_path / "model").predict_proba(X), model.predict_proba(X))


def test_free_parameters_are_read_back(tmp_path):
    engine = Freeform(n_epochs=2, batch_size=64)
    model = GPRegressor(family=DoubleKL(n_neighbors=8), engine=engine, random_state=0).fit(X, Y)
    model.save(tmp_path / "model")
    np.testing.assert_array_equal(load(tmp_path / "model").predict(X), model.predict(X))
