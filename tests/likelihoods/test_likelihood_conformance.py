"""Every likelihood passes the shipped conformance suite: one row each."""

import gpytorch
import pytest
import torch

from mercer.likelihoods import (
    Bernoulli,
    Gaussian,
    NegativeBinomial,
    Ordinal,
    Poisson,
    Softmax,
    StudentT,
    adapt,
)
from mercer.testing.likelihood import check_likelihood

REAL = [-1.3, 0.2, 0.9, 2.5, -0.4]
UNIT = [0.1, 0.35, 0.62, 0.9, 0.5]
BINARY = [0, 1, 1, 0, 1]
CLASSES = [0, 1, 2, 2, 1]
COUNTS = [0, 1, 3, 2, 7]
PER_ROW = torch.tensor([0.5, 1.0, 2.0, 1.5, 0.8], dtype=torch.float64)

TABLE = {
    "gaussian": (Gaussian(0.3), REAL, {}),
    "gaussian, known noise": (Gaussian(), REAL, {"noise_variance": PER_ROW}),
    "student_t": (StudentT(scale=0.8), REAL, {}),
    "student_t, all learned": (StudentT(df=7.0, scale=1.3, learn_df=True), REAL, {}),
    "probit": (Bernoulli(), BINARY, {}),
    "logit": (Bernoulli("logit"), BINARY, {}),
    "softmax": (Softmax(3), CLASSES, {}),
    "softmax of two": (Softmax(2, n_draws=64), BINARY, {}),
    "ordinal": (Ordinal(3), CLASSES, {}),
    "ordinal of two": (Ordinal(2), BINARY, {}),
    "poisson": (Poisson(), COUNTS, {}),
    "poisson, exposure": (Poisson(), COUNTS, {"exposure": PER_ROW}),
    "negative_binomial": (NegativeBinomial(0.5), COUNTS, {}),
    "negative_binomial, exposure": (NegativeBinomial(0.2), COUNTS, {"exposure": PER_ROW}),
    "adapted student_t": (adapt(gpytorch.likelihoods.StudentTLikelihood()), REAL, {}),
    "adapted beta": (adapt(gpytorch.likelihoods.BetaLikelihood()), UNIT, {}),
    "adapted gaussian": (adapt(gpytorch.likelihoods.GaussianLikelihood()), REAL, {}),
}


@pytest.mark.parametrize("name", TABLE)
def test_likelihood_keeps_the_contract(name):
    likelihood, y, side = TABLE[name]
    check_likelihood(likelihood, torch.tensor(y, dtype=torch.float64), **side)


def test_the_suite_rejects_a_wrong_slope():
    class Wrong(Bernoulli):
        def _slopes(self, y, f, **side):
            d1, d2 = super()._slopes(y, f)
            return d1, 0.9 * d2

    with pytest.raises(AssertionError, match="d2 against autograd"):
        check_likelihood(Wrong(), torch.tensor(BINARY, dtype=torch.float64))
