"""Every engine passes the shipped conformance suite with every kind of likelihood: one row each."""

import pytest
import torch

from mercer.inference import Conjugate, Dual, Laplace, PowerEP
from mercer.likelihoods import Bernoulli, Gaussian, NegativeBinomial, Ordinal, Poisson, Softmax, StudentT
from mercer.testing import check_engine

REAL = [-1.3, 0.2, 0.9, 2.5, -0.4, 0.3, 1.1]
OUTLIER = [-1.3, 0.2, 0.9, 4.5, -0.4, 0.3, 1.1]
BINARY = [0, 1, 1, 0, 1, 1, 0]
CLASSES = [0, 1, 2, 2, 1, 0, 1]
COUNTS = [0, 1, 3, 2, 7, 1, 0]
PER_ROW = torch.tensor([0.5, 1.0, 2.0, 1.5, 0.8, 1.0, 0.7], dtype=torch.float64)

# name: (engine, likelihood, y, options and side information)
TABLE = {
    "conjugate": (Conjugate(), Gaussian(0.3), REAL, {}),
    "conjugate, known noise": (Conjugate(), Gaussian(), REAL, {"noise_variance": PER_ROW}),
    "dual, gaussian": (Dual(), Gaussian(0.3), REAL, {}),
    "dual, probit": (Dual(), Bernoulli(), BINARY, {}),
    "dual, logit, without acceleration": (Dual(memory=0), Bernoulli("logit"), BINARY, {}),
    "dual, poisson with exposure": (Dual(), Poisson(), COUNTS, {"exposure": PER_ROW}),
    "dual, student_t": (Dual(), StudentT(scale=0.5), OUTLIER, {}),
    "dual, ordinal": (Dual(), Ordinal(3), CLASSES, {}),
    "dual, softmax": (Dual(), Softmax(3), CLASSES, {"rtol": 1e-3}),
    "laplace, gaussian": (Laplace(), Gaussian(0.3), REAL, {}),
    "laplace, probit": (Laplace(), Bernoulli(), BINARY, {}),
    "laplace, negative_binomial": (Laplace(), NegativeBinomial(0.5), COUNTS, {}),
    "laplace, student_t": (Laplace(), StudentT(scale=0.5), OUTLIER, {}),
    "power_ep, gaussian": (PowerEP(), Gaussian(0.3), REAL, {}),
    "power_ep, probit": (PowerEP(), Bernoulli(), BINARY, {}),
    "power_ep of one half, poisson": (PowerEP(power=0.5), Poisson(), COUNTS, {}),
    "power_ep, student_t": (PowerEP(), StudentT(scale=0.5), OUTLIER, {}),
}


@pytest.mark.parametrize("name", TABLE)
def test_engine_keeps_its_contract(name):
    engine, likelihood, y, options = TABLE[name]
    check_engine(engine, likelihood, torch.tensor(y, dtype=torch.float64), **options)
