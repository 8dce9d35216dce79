"""Every family passes the shipped conformance suite: one row each."""

import pytest
import torch

from mercer.families import Exact, Prior
from mercer.kernels import RBF, Linear, Matern12, Matern32, Periodic, PolynomialKernel
from mercer.kernels.means import constant_mean
from mercer.testing import check_family

LINE = torch.tensor([[0.0], [0.7], [1.1], [2.0], [2.6], [3.1], [4.0]], dtype=torch.float64)

# name: (family, prior, X, options)
TABLE = {
    "exact": (Exact(), None, None, {}),
    "exact, one column, no mean": (Exact(), Prior(Matern12(0.8, outputscale=2.0)), LINE, {}),
    "exact, kernel expression": (
        Exact(),
        Prior(Matern32(0.7, outputscale=0.5) + Linear(0.3) * RBF(2.0), constant_mean(-1.0)),
        LINE,
        {},
    ),
    "exact, kernel without a spectrum": (Exact(), Prior(Matern32(0.7) + PolynomialKernel(2).double()), LINE, {}),
    "exact, periodic": (Exact(), Prior(Matern32(2.0) * Periodic(1.9, 0.7)), LINE, {}),
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
