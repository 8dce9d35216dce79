"""Rows of several kinds, with outliers, weights and a missing target, and six inducing points between them."""

import numpy as np
import torch
from oracles import inducing as oracle
from toys import DTYPE

from mercer._typing import Data
from mercer.families import Inducing, Prior
from mercer.families.inducing_plan import InducingPlan
from mercer.inference import Dual
from mercer.kernels import Matern52
from mercer.kernels.means import constant_mean
from mercer.likelihoods import Bernoulli, Gaussian, Poisson, Softmax, StudentT
from mercer.model import Model
from mercer.policy import NumericalPolicy

M = 6
PLACES = torch.linspace(0, 4, M, dtype=DTYPE).unsqueeze(-1)
LIKELIHOODS = {
    "gaussian": lambda: Gaussian(0.3),
    "probit": lambda: Bernoulli(),
    "poisson": lambda: Poisson(),
    "student_t": lambda: StudentT(scale=0.2),
    "softmax": lambda: Softmax(3),
}


def problem(name, engine=None, n=60, seed=0, weighted=True, **policy):
    """A model with six inducing points, its plan, and rows with weights of which one has no target."""
    rng = np.random.default_rng(seed)
    X = np.sort(rng.uniform(0, 4, n))
    f = 2 * np.sin(2 * X)
    y = {
        "gaussian": lambda: f + 0.3 * rng.normal(size=n),
        "probit": lambda: (f + rng.normal(size=n) > 0).astype(float),
        "poisson": lambda: rng.poisson(np.exp(f)).astype(float),
        "student_t": lambda: f + 0.2 * rng.normal(size=n) + 8 * (rng.uniform(size=n) < 0.1) * rng.normal(size=n),
        "softmax": lambda: (np.stack([f, 0 * f, -f]) + rng.gumbel(size=(3, n))).argmax(0).astype(float),
    }[name]()
    weight = rng.uniform(0.5, 2.0, n) if weighted else np.ones(n)
    if weighted:
        y[3] = np.nan
    policy = NumericalPolicy(**{"tol": 1e-13, "max_inner": 1000, **policy})
    prior = Prior(Matern52(0.8, outputscale=2.0), constant_mean(0.1))
    model = Model(prior, LIKELIHOODS[name](), Inducing(M), Dual() if engine is None else engine, policy)
    tensors = (torch.as_tensor(each, dtype=DTYPE) for each in (X[:, None], y, weight))
    data = Data(*tensors)
    return model, InducingPlan(data.X, PLACES, policy), data


def covariances(model, plan, data):
    """K_uu, K_uf and K_ff as the oracle has them."""
    return oracle.covariances(lambda A, B: model.prior.kernel(A, B).to_dense().detach(), plan.Z, data.X)


def draws(data, size, n_batches, seed):
    """Random batches of rows."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n_batches):
        yield data.rows(torch.randperm(data.n_rows, generator=generator)[:size])
