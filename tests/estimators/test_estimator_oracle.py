"""With fixed hyperparameters the regressor is the dense textbook formula, at every size and whatever is imported."""

import os
import subprocess
import sys

import numpy as np
import pytest
from oracles.estimator_gp import Regression, matern52, matern52_slopes

from mercer import GPRegressor
from mercer.kernels import Matern52
from mercer.likelihoods import Gaussian

ELL, AMPLITUDE, NOISE = np.array([2.0, 30.0, 0.01]), 25.0, 0.5
SIZES = [800, 801, pytest.param(4096, marks=pytest.mark.slow), pytest.param(4097, marks=pytest.mark.slow)]


def problem(n):
    """Rows whose columns have scales from 0.01 to 30 and a target far from zero, with the fitted model."""
    rng = np.random.default_rng(n)
    X = rng.normal([1.0, -40.0, 0.03], [2.0, 30.0, 0.01], size=(n, 3))
    y = 90.0 + 4.0 * np.sin(X[:, 0]) + 0.1 * X[:, 1] + np.sqrt(NOISE) * rng.normal(size=n)
    kernel = Matern52(list(ELL), outputscale=AMPLITUDE)
    model = GPRegressor(kernel, likelihood=Gaussian(NOISE), optimizer=None).fit(X, y)
    return model, X, y, X[:40] + rng.normal(scale=[1.0, 10.0, 0.005], size=(40, 3))


def close(found, expected, rtol=1e-8):
    """Agreement relative to the largest entry: a gradient or a covariance may pass through zero."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=rtol * np.abs(expected).max())


@pytest.mark.parametrize("n", SIZES)
def test_fixed_hyperparameters_give_the_dense_formula(n):
    model, X, y, X_new = problem(n)
    oracle = Regression(matern52(X, X, ELL, AMPLITUDE), y, NOISE, mean=y.mean())
    mean, covariance = oracle.predict(matern52(X_new, X, ELL, AMPLITUDE), matern52(X_new, X_new, ELL, AMPLITUDE))

    np.testing.assert_allclose(model.predict(X_new), mean, rtol=1e-8)
    for latent, extra in ((True, 0.0), (False, NOISE)):
        found, std = model.predict(X_new, return_std=True, latent=latent)
        np.testing.assert_allclose(found, mean, rtol=1e-8)
        np.testing.assert_allclose(std, np.sqrt(np.diag(covariance) + extra), rtol=1e-8)
        close(model.predict(X_new, return_cov=True, latent=latent)[1], covariance + extra * np.eye(40))

    value, gradient = model.log_marginal_likelihood(eval_gradient=True)
    assert value == pytest.approx(oracle.log_evidence(), rel=1e-8)
    assert model.log_marginal_likelihood_value_ == pytest.approx(oracle.log_evidence(), rel=1e-8)
    expected = {f"lengthscale[{j}]": oracle.slope(dK) for j, dK in enumerate(matern52_slopes(X, ELL, AMPLITUDE))}
    expected["outputscale"] = expected.pop("lengthscale[3]")
    expected["noise_variance"] = oracle.slope(NOISE * np.eye(n))
    close(gradient, [expected[name.rpartition(".")[2]] for name in model.theta_names_])


@pytest.mark.parametrize("n", [801, pytest.param(4097, marks=pytest.mark.slow)])
def test_numbers_do_not_depend_on_what_else_is_imported(n):
    """Another library may change global settings; ours must not read any."""
    program = """
import hashlib, sys
import numpy as np
{extra}
sys.path[:0] = {path!r}
from test_estimator_oracle import problem
model, X, y, X_new = problem({n})
value, gradient = model.log_marginal_likelihood(eval_gradient=True)
numbers = [*model.predict(X_new, return_std=True), *model.predict(X_new, return_cov=True), np.array(value), gradient]
print(hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in numbers)).hexdigest())
"""
    tests = os.path.dirname(os.path.dirname(__file__))
    digests = set()
    for extra in ("", "import botorch, botorch.models, gpytorch; gpytorch.settings.max_cholesky_size._set_value(1)"):
        text = program.format(extra=extra, path=[tests, os.path.dirname(__file__)], n=n)
        run = subprocess.run([sys.executable, "-W", "ignore", "-c", text], capture_output=True, text=True, check=True)
        digests.add(run.stdout)
    assert len(digests) == 1
