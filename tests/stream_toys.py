"""Small streams: 48 rows of one curve in random order, nine places, and what the tests do with them."""

import math

import torch
from inducing_toys import THETA, kernel_of
from oracles import inducing as oracle
from toys import DTYPE, normal

from mercer._typing import Data
from mercer.families import Inducing, Prior
from mercer.families.inducing_plan import InducingPlan
from mercer.inference import Conjugate, Dual, run
from mercer.kernels import Matern52
from mercer.kernels.means import constant_mean
from mercer.likelihoods import Bernoulli, Gaussian, NegativeBinomial, Ordinal, Poisson, Softmax, StudentT
from mercer.model import Model
from mercer.policy import NumericalPolicy
from mercer.sequential import Stream
from mercer.sequential import state as held
from mercer.sequential import stream as streams

N, NOISE, MEAN = 48, 0.09, 0.2
Z = torch.linspace(0.2, 3.8, 9, dtype=DTYPE)[:, None]
X_NEW = torch.linspace(-0.5, 4.5, 11, dtype=DTYPE)[:, None]
FIXED = {"inducing": "fixed", "hyperparameters": "frozen"}
POLICIES = ["bls_sample", "bls_top", "uniform"]


def rows(seed=0, n=N):
    """Return X (n, 1) on [0, 4] and the curve there (n,)."""
    X = 4.0 * torch.rand(n, 1, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)
    return X, torch.sin(2.0 * X[:, 0]) + 0.5


def toy(name="gaussian", mean=MEAN, places=Z, n_inducing=None, seed=0, n=N, **policy):
    """Return the model of a stream and its rows, as one batch."""
    X, f = rows(seed, n)
    noisy = f + math.sqrt(NOISE) * normal(n, seed=seed + 1)
    thirds = torch.bucketize(noisy, noisy.quantile(torch.tensor([1 / 3, 2 / 3], dtype=DTYPE))).to(DTYPE)
    counts = torch.poisson(f.exp(), generator=torch.Generator().manual_seed(seed))
    likelihood, y = {
        "gaussian": (Gaussian(NOISE), noisy),
        "student_t": (StudentT(scale=0.3), noisy + 4.0 * (torch.arange(n) % 11 == 3)),
        "probit": (Bernoulli(), (noisy > 0.5).to(DTYPE)),
        "logit": (Bernoulli("logit"), (noisy > 0.5).to(DTYPE)),
        "poisson": (Poisson(), counts),
        "negative_binomial": (NegativeBinomial(0.5), counts),
        "ordinal": (Ordinal(3), thirds),
        "softmax": (Softmax(3), thirds),
    }[name]
    prior = Prior(Matern52(THETA[0], outputscale=THETA[1]), None if mean is None else constant_mean(mean))
    engine = Conjugate() if likelihood.conjugate else Dual()
    family = Inducing(len(places) if n_inducing is None else n_inducing, locations="fixed")
    policy = NumericalPolicy(**{"tol": 1e-13, "max_inner": 1000, **policy})
    return Model(prior, likelihood, family, engine, policy), Data(X, y, torch.ones(n, dtype=DTYPE))


def go(model, data, parts, options, learn=False, state=None, places=Z, seed=0):
    """Take in batches of the rows ``parts``, and return the last update."""
    state = held.start(model, data, seed, places) if state is None else state
    for part in parts:
        outcome = streams.update(model, state, data.rows(torch.as_tensor(part)), options, learn)
        state = outcome.state
    return outcome


def parts_of(sizes, seed=0, n=N):
    """Return a random order of the rows, cut into parts of these sizes and what is left."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    sizes = list(sizes)
    return order.split([*sizes, n - sum(sizes)] if sum(sizes) < n else sizes)


@torch.no_grad()
def batch(model, data, places=Z):
    """Return what inference with all rows at once gives: its state, and the bound."""
    plan = InducingPlan(data.X, places, model.policy)
    found = run(model, plan, data)
    assert found.converged
    return found.state, float(model.engine.objective(model, plan, found.state, data))


@torch.no_grad()
def known(model, past):
    """Return what the statistics or sites of rows say of u."""
    return held.sites_of(model, past)


def rest_of(state):
    """Return what rows say that are not in memory."""
    return state.total - state.memory.share


def close(found, expected, rtol):
    """Compare tensors, or sites, relative to the largest entry of what is expected."""
    for one, other in zip(_tensors(found), _tensors(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=rtol * max([1.0, *other.abs().reshape(-1).tolist()]))


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value.detach()]
    parts = [value.linear, value.precision] if hasattr(value, "linear") else value
    return [each.detach() for each in parts]


def titsias(X, y, kernel=None, noise=NOISE, places=Z, weight=None):
    """The collapsed bound of 2009 for centred targets, rows of weight w counting as w rows; dense, differentiable."""
    kernel = kernel_of() if kernel is None else kernel
    weight = torch.ones_like(y) if weight is None else weight
    noise = torch.as_tensor(noise, dtype=DTYPE)
    more = -0.5 * ((weight - 1) * (2 * math.pi * noise).log() + weight.log()).sum()
    return oracle.collapsed_bound(*oracle.covariances(kernel, places, X), y, torch.diag(noise / weight)) + more


__all__ = [
    "DTYPE",
    "FIXED",
    "MEAN",
    "N",
    "NOISE",
    "POLICIES",
    "Stream",
    "X_NEW",
    "Z",
    "batch",
    "close",
    "go",
    "known",
    "parts_of",
    "rest_of",
    "rows",
    "streams",
    "titsias",
    "toy",
]
