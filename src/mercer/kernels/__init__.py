"""Kernels: gpytorch's, re-exported, and what the library knows about them.

A kernel is a gpytorch ``Kernel``. Everything else is a free function of it: ``gram`` and ``diag`` evaluate,
``hyperparameters`` lists what can be learned, ``prepare`` and ``to_model_units`` fit it to the data,
``kernel_params`` shows plain numbers.
"""

from gpytorch.kernels import (
    AdditiveKernel,
    ConstantKernel,
    CosineKernel,
    Kernel,
    LinearKernel,
    MaternKernel,
    PeriodicKernel,
    PiecewisePolynomialKernel,
    PolynomialKernel,
    ProductKernel,
    RBFKernel,
    RQKernel,
    ScaleKernel,
    SpectralMixtureKernel,
)

from mercer.kernels.adapt import prepare
from mercer.kernels.derivative_rows import DerivativeRows, derivative_rows
from mercer.kernels.derivatives import derivative_gram, derivative_leaf, has_derivatives
from mercer.kernels.evaluate import diag, gram
from mercer.kernels.factories import (
    RBF,
    Constant,
    Linear,
    Matern12,
    Matern32,
    Matern52,
    Periodic,
    RationalQuadratic,
    get_kernel,
)
from mercer.kernels.frequencies import find_frequencies, find_frequencies_grid
from mercer.kernels.functionals import Functional, Term, functional_diag, functional_gram
from mercer.kernels.hyperparameters import hyperparameters
from mercer.kernels.mixture import GaussianMixture, MixtureKernel, StudentMixture, prune
from mercer.kernels.params import describe, kernel_params, set_kernel_param
from mercer.kernels.paths import prior_paths
from mercer.kernels.spectral import has_spectral, sample_frequencies
from mercer.kernels.starting import start_from_data
from mercer.kernels.units import rescale, rescale_leaf, to_model_units

__all__ = [
    "AdditiveKernel",
    "Constant",
    "ConstantKernel",
    "CosineKernel",
    "DerivativeRows",
    "Functional",
    "GaussianMixture",
    "Kernel",
    "Linear",
    "LinearKernel",
    "Matern12",
    "Matern32",
    "Matern52",
    "MaternKernel",
    "MixtureKernel",
    "Periodic",
    "PeriodicKernel",
    "PiecewisePolynomialKernel",
    "PolynomialKernel",
    "ProductKernel",
    "RBF",
    "RBFKernel",
    "RQKernel",
    "RationalQuadratic",
    "ScaleKernel",
    "SpectralMixtureKernel",
    "StudentMixture",
    "Term",
    "derivative_gram",
    "derivative_leaf",
    "derivative_rows",
    "describe",
    "diag",
    "find_frequencies",
    "find_frequencies_grid",
    "functional_diag",
    "functional_gram",
    "get_kernel",
    "gram",
    "has_derivatives",
    "has_spectral",
    "hyperparameters",
    "kernel_params",
    "prepare",
    "prior_paths",
    "prune",
    "rescale",
    "rescale_leaf",
    "sample_frequencies",
    "set_kernel_param",
    "start_from_data",
    "to_model_units",
]
