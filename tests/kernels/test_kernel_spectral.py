"""Random features reproduce the covariance, within their own standard error."""

import pytest
import torch

from mercer.kernels import (
    RBF,
    Constant,
    CosineKernel,
    GaussianMixture,
    Linear,
    Matern12,
    Matern32,
    Matern52,
    Periodic,
    PolynomialKernel,
    RationalQuadratic,
    SpectralMixtureKernel,
    StudentMixture,
    gram,
    has_spectral,
    prior_paths,
)
from mercer.policy import NumericalPolicy


def spectral_mixture():
    kernel = SpectralMixtureKernel(num_mixtures=2, ard_num_dims=2).double()
    kernel.mixture_means = torch.tensor([[[0.05, 0.2]], [[0.3, 0.1]]])
    kernel.mixture_scales = torch.tensor([[[0.1, 0.2]], [[0.05, 0.1]]])
    return kernel


EXACT = {
    "linear": Linear([0.5, 2.0]),
    "constant": Constant(2.0),
    "slope of one column": Linear(1.0, active_dims=[1]),
}
RANDOM = {
    "rbf": RBF([1.0, 2.0], outputscale=2.0),
    "matern12": Matern12(2.0, ard=False),
    "matern32": Matern32(1.0, ard=False),
    "matern52": Matern52(1.0, active_dims=[1]),
    "rq": RationalQuadratic(1.0, 0.7, ard=False),
    "periodic": Periodic([2.0, 3.0], 0.7, ard=False),
    "sum of products": RBF(1.0, outputscale=2.0) * Linear(0.5, active_dims=[1]) + Constant(0.5) * Periodic(2.0, 1.0),
    "product with sum": (RBF(1.0) + Linear(0.5)) * Matern52(2.0),
    "cosines": CosineKernel(active_dims=[0]).double() * CosineKernel(active_dims=[0]).double(),
    "gaussian lines": GaussianMixture(weight=[1.0, 0.5], lengthscale=2.0, frequency=[[0, 0], [0.3, 0.2]]),
    "student lines": StudentMixture(weight=[1.0, 0.5], lengthscale=2.0, frequency=[[0, 0], [0.3, 0.2]]),
    "product of lines": StudentMixture(frequency=[0.0, 0.3], active_dims=[0]) * RBF(1.0, outputscale=2.0),
    "spectral mixture": spectral_mixture(),
}
X = torch.tensor([[0.0, 0.0], [0.4, -0.3], [1.5, 0.2], [-0.7, 1.1]], dtype=torch.float64)


def samples(kernel, n_paths, n_features, seed=0):
    return prior_paths(kernel, n_paths, n_features, torch.Generator().manual_seed(seed), d=2)(X)


@pytest.mark.parametrize("name", RANDOM | EXACT)
def test_paths_have_the_covariance_of_the_prior(name):
    kernel = (RANDOM | EXACT)[name]
    assert has_spectral(kernel)
    # Independent draws of features and weights: batches of paths estimate the mean and its standard error.
    products = []
    for seed in range(40):
        f = samples(kernel, 200, 400, seed)
        products.append(f.mT @ f / 200)
    estimate = torch.stack(products)
    error = estimate.std(0) / 40**0.5 + 1e-12
    assert ((estimate.mean(0) - gram(kernel, X).detach()).abs() < 4.5 * error).all()


@pytest.mark.parametrize("name", EXACT)
def test_linear_and_constant_parts_are_not_approximated(name):
    paths = prior_paths(EXACT[name], 5, 10, torch.Generator().manual_seed(0), d=2)
    (feature,) = paths.features
    feature.weights = torch.eye(feature.weights.shape[1], dtype=torch.float64)
    f = paths(X)
    torch.testing.assert_close(f.mT @ f, gram(EXACT[name], X).detach(), rtol=1e-12, atol=1e-14)


def test_paths_are_fixed_functions_of_the_generator():
    kernel = RANDOM["sum of products"]
    assert torch.equal(samples(kernel, 3, 50), samples(kernel, 3, 50))
    paths = prior_paths(kernel, 3, 50, torch.Generator().manual_seed(0), d=2)
    chunked = paths(X, NumericalPolicy(chunk_elements=50))
    torch.testing.assert_close(chunked, paths(X), rtol=1e-12, atol=1e-12)
    assert paths(X).shape == (3, 4)


def test_kernel_without_rule_is_refused():
    kernel = RBF(1.0) + PolynomialKernel(2).double()
    assert not has_spectral(kernel)
    with pytest.raises(TypeError, match="PolynomialKernel has no spectral rule"):
        prior_paths(kernel, 1, 10, torch.Generator(), d=2)
