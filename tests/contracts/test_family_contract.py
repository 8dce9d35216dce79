"""Every family passes the shipped conformance suite: one row each."""

import pytest
import torch

from mercer.families import Exact, Inducing, InducingVecchia, Prior, SparseInverseCholesky
from mercer.kernels import RBF, Linear, Matern12, Matern32, Periodic, PolynomialKernel
from mercer.kernels.means import constant_mean
from mercer.testing import check_family

LINE = torch.tensor([[0.0], [0.7], [1.1], [2.0], [2.6], [3.1], [4.0]], dtype=torch.float64)

# rows without ties, which rounding would order: draws depend on the order of the rows, their distribution does not
UNTIED = torch.tensor([[0.0], [0.73], [1.17], [2.0], [2.61], [3.3], [4.0]], dtype=torch.float64)
SUM = Prior(Matern32(0.7, outputscale=0.5) + Linear(0.3) * RBF(2.0), constant_mean(-1.0))
ROUGH = Prior(Matern12(0.8, outputscale=2.0))

# name: (family, prior, X, options); neighbours are all others and inducing points all rows, so that all are exact
TABLE = {
    "exact": (Exact(), None, None, {}),
    "exact, one column, no mean": (Exact(), ROUGH, LINE, {}),
    "exact, kernel expression": (Exact(), SUM, LINE, {}),
    "exact, kernel without a spectrum": (Exact(), Prior(Matern32(0.7) + PolynomialKernel(2).double()), LINE, {}),
    "exact, periodic": (Exact(), Prior(Matern32(2.0) * Periodic(1.9, 0.7)), LINE, {}),
    # but for the variance that inducing values have of their own
    "inducing": (Inducing(), None, None, {"rtol": 1e-7}),
    "inducing, one column, no mean": (Inducing(), ROUGH, LINE, {"rtol": 1e-7}),
    "inducing, kernel expression": (Inducing(), SUM, LINE, {"rtol": 1e-7}),
    "inducing, kernel without a spectrum": (
        Inducing(),
        Prior(Matern32(0.7) + PolynomialKernel(2).double()),
        LINE,
        {"rtol": 1e-7},
    ),
    "sic": (SparseInverseCholesky(), None, None, {}),
    "sic, response": (SparseInverseCholesky(form="response"), None, None, {}),
    "sic, latent": (SparseInverseCholesky(form="latent"), None, None, {}),
    "sic, all in the ball": (SparseInverseCholesky(pattern="ball", rho=100.0), None, None, {}),
    "sic, kernel without lengthscales": (SparseInverseCholesky(), SUM, LINE, {}),
    "sic, one column, no mean": (SparseInverseCholesky(), ROUGH, UNTIED, {}),
    # Draws in float32 are those in float64 only where no inducing point is a row, whose residual is all jitter: what is
    # drawn with the inducing points and what with the residual depends on it, their sum's distribution does not.
    "inducing vecchia": (InducingVecchia(2), None, None, {}),
    "inducing vecchia, response": (InducingVecchia(2, form="response"), None, None, {}),
    "inducing vecchia, latent": (InducingVecchia(2, form="latent"), None, None, {}),
    "inducing vecchia, kernel without lengthscales": (InducingVecchia(2), SUM, UNTIED, {}),
    "inducing vecchia, one column, no mean": (InducingVecchia(3, form="latent"), ROUGH, UNTIED, {}),
    "inducing vecchia, none induced": (InducingVecchia(0, form="latent"), SUM, UNTIED, {}),
}


@pytest.mark.parametrize("name", TABLE)
def test_family_keeps_its_contract(name):
    family, prior, X, options = TABLE[name]
    check_family(family, prior, X, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", TABLE)
def test_family_keeps_its_contract_on_the_gpu(name):
    family, prior, X, options = TABLE[name]
    check_family(family, prior, X, device="cuda", **options)
