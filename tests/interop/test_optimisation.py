"""Priors for few rows in many columns: they are BoTorch's, and what they are for."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("botorch")

from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.transforms import Normalize, Standardize
from gpytorch.mlls import ExactMarginalLogLikelihood

from mercer import GPRegressor
from mercer.optimisation import regressor_for_optimisation


def data(n=60, d=6):
    """Rows spread evenly in [−2, 3]^d, of which two columns matter, next to no noise."""
    X = torch.quasirandom.SobolEngine(d, scramble=True, seed=0).draw(n).double() * 5.0 - 2.0
    y = torch.sin(X[:, 0]) + 0.3 * X[:, 1] + 1e-3 * torch.randn(n, generator=torch.Generator().manual_seed(0)).double()
    return X, y


def test_it_learns_what_botorch_learns_under_the_same_priors():
    X, y = data()
    bounds = torch.tensor([[-2.0] * 6, [3.0] * 6]).double()
    theirs = SingleTaskGP(X, y[:, None], input_transform=Normalize(6, bounds=bounds), outcome_transform=Standardize(1))
    fit_gpytorch_mll(ExactMarginalLogLikelihood(theirs.likelihood, theirs))
    ours = regressor_for_optimisation(6, random_state=0).fit(X.numpy(), y.numpy())
    expected = 5.0 * theirs.covar_module.lengthscale.detach().numpy().ravel()
    # the variance of f is learned by one and 1 for the other, which lengthscales of columns that matter feel
    found = ours.kernel_.base_kernel.lengthscale.detach().numpy().ravel()
    assert np.abs(np.log(found / expected)).max() < math.log(2.5)
    X_new = X.roll(1, 0) * 0.9
    mean = theirs.posterior(X_new).mean.detach().numpy().ravel()
    np.testing.assert_allclose(ours.predict(X_new.numpy()), mean, atol=0.05 * float(y.std()))


def test_columns_that_do_not_seem_to_matter_are_not_written_off():
    """Maximum likelihood of 14 rows in 10 columns sends lengthscales anywhere; the prior holds them together."""
    rng = np.random.default_rng(1)
    X, y = rng.uniform(size=(14, 10)), rng.standard_normal(14)

    def spread(model):
        return float(np.ptp(np.log(model.fit(X, y).kernel_.base_kernel.lengthscale.detach().numpy())))

    free = spread(GPRegressor("rbf", random_state=0))
    assert spread(regressor_for_optimisation(10, random_state=0)) < 0.5 * free


def test_options_are_those_of_the_regressor_and_columns_are_checked():
    model = regressor_for_optimisation(2, family="exact", max_iter=3)
    assert model.family == "exact" and model.max_iter == 3
    with pytest.raises(ValueError, match="n_columns"):
        regressor_for_optimisation(0)
