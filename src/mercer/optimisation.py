"""A regressor for Bayesian optimisation: few rows, perhaps many columns; priors say what the rows cannot."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

import gpytorch
import torch

from mercer.estimators.regressor import GPRegressor

# of the logarithm of a lengthscale, where inputs run from 0 to 1
_LOCATION, _SPREAD = math.sqrt(2.0), math.sqrt(3.0)
_UNIT_STD = 12.0**-0.5  # standard deviation of inputs that are spread evenly from 0 to 1
_NOISE_LOCATION, _NOISE_SPREAD = -4.0, 1.0  # of the logarithm of the noise variance over the variance of y


def regressor_for_optimisation(n_columns: int, **options: Any) -> GPRegressor:
    """Return a regressor whose priors suit few rows in ``n_columns`` columns, such as those of Bayesian optimisation.

    The kernel is an RBF with a lengthscale for each column. Their prior grows with √n_columns, as distances between
    rows do, so that no column is taken to be irrelevant because few rows say so; the noise is expected to be small and
    the prior mean is learned. Maximum likelihood alone overfits lengthscales where rows are fewer than about ten to a
    column.

    Parameters
    ----------
    n_columns : int
        Columns of X, all numeric, spread about evenly over their ranges.
    **options
        Of `GPRegressor`, other than ``kernel``, ``likelihood`` and ``mean``.

    Returns
    -------
    GPRegressor
        Not fitted.

    References
    ----------
    Hvarfner, Hellsten and Nardi (2024), "Vanilla Bayesian optimization performs great in high dimensions", whose prior
    of lengthscales it is.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.random.default_rng(0).uniform(size=(20, 6))
    >>> model = regressor_for_optimisation(6).fit(X, X.sum(1)).to_botorch()
    """
    if not isinstance(n_columns, Integral) or n_columns < 1:
        raise ValueError(f"n_columns must be an integer of at least 1, the number of columns of X; got {n_columns!r}.")
    n_columns = int(n_columns)
    location = _LOCATION + 0.5 * math.log(n_columns)
    prior = gpytorch.priors.LogNormalPrior(location - math.log(_UNIT_STD), _SPREAD)
    base = gpytorch.kernels.RBFKernel(ard_num_dims=n_columns, lengthscale_prior=prior).double()
    # the mode of the prior
    base.lengthscale = torch.full((1, n_columns), math.exp(float(prior.loc) - _SPREAD**2), dtype=torch.float64)
    noise = gpytorch.priors.LogNormalPrior(_NOISE_LOCATION, _NOISE_SPREAD)
    likelihood = gpytorch.likelihoods.GaussianLikelihood(noise_prior=noise).double()
    likelihood.noise = torch.tensor(math.exp(_NOISE_LOCATION - _NOISE_SPREAD**2), dtype=torch.float64)
    kernel = gpytorch.kernels.ScaleKernel(base)
    return GPRegressor(kernel, likelihood=likelihood, mean=gpytorch.means.ConstantMean(), **options)
