"""Kernels: gpytorch's, re-exported, and what the library knows about them.

A kernel is a gpytorch ``Kernel``. Everything else is a free function of it: ``gram`` and ``diag`` evaluate,
``hyperparameters`` lists what can be learned.
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

from mercer.kernels.evaluate import diag, gram
from mercer.kernels.hyperparameters import hyperparameters

__all__ = [
    "AdditiveKernel",
    "ConstantKernel",
    "CosineKernel",
    "Kernel",
    "LinearKernel",
    "MaternKernel",
    "PeriodicKernel",
    "PiecewisePolynomialKernel",
    "PolynomialKernel",
    "ProductKernel",
    "RBFKernel",
    "RQKernel",
    "ScaleKernel",
    "SpectralMixtureKernel",
    "diag",
    "gram",
    "hyperparameters",
]
