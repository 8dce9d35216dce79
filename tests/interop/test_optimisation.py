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


def test_the_priors_are_those_of_botorch():
    """Theirs is of lengthscales on inputs from 0 to 1, ours of the same in standard deviations, 1/√12 of that."""
    ours = regressor_for_optimisation(6)
    theirs = SingleTaskGP(*(each.double() for each in (torch.rand(4, 6), torch.rand(4, 1))))
    found, expected = ours.kernel.base_kernel.lengthscale_prior, theirs.covar_module.lengthscale_prior
    assert float(found.loc) == pytest.approx(float(expected.loc) + 0.5 * math.log(12.0), abs=1e-6)
    assert float(found.scale) == pytest.approx(float(expected.scale), abs=1e-6)
    found, expected = ours.likelihood.noise_covar.noise_prior, theirs.likelihood.noise_covar.noise_prior
    assert (float(found.loc), float(found.scale)) == (float(expected.loc), float(expected.scale))


def test_it_learns_what_botorch_learns():
    X, y = data()
    # the corners make ranges known, so that both sides normalise alike but for the sample's standard deviation
    bounds = torch.tensor([[-2.0] * 6, [3.0] * 6]).double()
    theirs = SingleTaskGP(X, y[:, None], input_transform=Normalize(6, bounds=bounds), outcome_transform=Standardize(1))
    fit_gpytorch_mll(ExactMarginalLogLikelihood(theirs.likelihood, theirs))
    model = regressor_for_optimisation(6, random_state=0)
    model.kernel.outputscale = 1.0 * float(y.var())  # theirs has none
    model.kernel.raw_outputscale.requires_grad_(False)
    ours = model.fit(X.numpy(), y.numpy())
    expected = 5.0 * theirs.covar_module.lengthscale.detach().numpy().ravel()
    found = ours.kernel_.base_kernel.lengthscale.detach().numpy().ravel()
    spread = (X.std(0, correction=0) / 5.0 * math.sqrt(12.0)).log().abs().max()
    assert np.abs(np.log(found / expected)).max() < 3 * float(spread) + 0.02  # a search ends where 1e-2 nats are left


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
    for wrong in (0, 2.5, "two"):
        with pytest.raises(ValueError, match="n_columns"):
            regressor_for_optimisation(wrong)
