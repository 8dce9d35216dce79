"""Small problems that the tests of inference share: nine rows, one prior, a target for each likelihood."""

import torch

from mercer._typing import Data
from mercer.families import Exact, Prior
from mercer.inference import Dual
from mercer.kernels import Matern52, gram
from mercer.kernels.means import constant_mean
from mercer.likelihoods import Bernoulli, Gaussian, NegativeBinomial, Ordinal, Poisson, Softmax, StudentT
from mercer.model import Model
from mercer.policy import NumericalPolicy

DTYPE = torch.float64
X = torch.tensor([0.0, 0.35, 0.9, 1.2, 1.7, 2.3, 2.6, 3.2, 3.7], dtype=DTYPE).unsqueeze(-1)
X_NEW = torch.tensor([[-0.4], [0.5], [2.0], [4.5]], dtype=DTYPE)

_REAL = [-1.3, 0.2, 0.9, 2.5, -0.4, 0.3, 1.1, 0.7, -0.2]
_CLASSES = [0, 1, 2, 2, 1, 0, 1, 2, 0]

# name: (how to make the likelihood, targets)
PROBLEMS = {
    "gaussian": (lambda: Gaussian(0.3), _REAL),
    "student_t": (lambda: StudentT(scale=0.4), [-1.3, 0.2, 0.9, 5.5, -0.4, 0.3, 1.1, 0.7, -0.2]),
    "probit": (lambda: Bernoulli(), [0, 1, 1, 0, 1, 1, 0, 1, 1]),
    "logit": (lambda: Bernoulli("logit"), [0, 1, 1, 0, 1, 1, 0, 1, 1]),
    "poisson": (lambda: Poisson(), [0, 1, 3, 2, 7, 1, 0, 2, 4]),
    "negative_binomial": (lambda: NegativeBinomial(0.5), [0, 1, 3, 2, 7, 1, 0, 2, 4]),
    "ordinal": (lambda: Ordinal(3), _CLASSES),
    "softmax": (lambda: Softmax(3), _CLASSES),
}


def problem(name, engine=None, mean=0.2, rows=None, **policy):
    """Return the model, its plan and the data of one row of ``PROBLEMS``, cut to the first ``rows`` rows."""
    make, y = PROBLEMS[name]
    kernel = Matern52(0.8, outputscale=1.2)
    prior = Prior(kernel, None if mean is None else constant_mean(mean))
    policy = NumericalPolicy(**{"tol": 1e-13, "max_inner": 1000, **policy})
    model = Model(prior, make(), Exact(), Dual() if engine is None else engine, policy)
    y = torch.tensor(y, dtype=DTYPE)[:rows]
    data = Data(X[:rows], y, torch.ones(len(y), dtype=DTYPE))
    return model, model.family.plan(prior, data.X, policy), data


@torch.no_grad()
def gram_matrix(model, data):
    """Return K of the prior at the data."""
    return gram(model.prior.kernel, data.X)


def normal(*shape, seed=0):
    """Return standard normal numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)
