"""Densities, expectations and predictive densities against SciPy, row by row."""

from functools import partial

import numpy as np
import pytest
import torch
from oracles import likelihoods as oracle

from mercer.likelihoods import Bernoulli, Gaussian, NegativeBinomial, Ordinal, Poisson, Softmax, StudentT

DTYPE = torch.float64
COUNTS = np.array([0.0, 1.0, 4.0, 12.0])
REAL = np.array([-2.0, 0.1, 1.0, 6.0])
EXPOSURE = np.array([0.5, 1.0, 2.0, 3.0])
CUTS = Ordinal(4).cutpoints.detach().numpy()

TABLE = {
    "gaussian": (Gaussian(0.4), REAL, {}, lambda y, f, i: oracle.gaussian(y, f, 0.4)),
    "known noise": (
        Gaussian(),
        REAL,
        {"noise_variance": EXPOSURE},
        lambda y, f, i: oracle.gaussian(y, f, EXPOSURE[i]),
    ),
    "student_t": (StudentT(3.0, 0.7), REAL, {}, lambda y, f, i: oracle.student_t(y, f, 3.0, 0.7)),
    "probit": (Bernoulli(), np.array([0.0, 1, 1, 0]), {}, lambda y, f, i: oracle.probit(y, f)),
    "logit": (Bernoulli("logit"), np.array([0.0, 1, 1, 0]), {}, lambda y, f, i: oracle.logit(y, f)),
    "ordinal": (Ordinal(4), np.array([0.0, 1, 2, 3]), {}, lambda y, f, i: oracle.ordinal(y, f, CUTS)),
    "poisson": (
        Poisson(),
        COUNTS,
        {"exposure": EXPOSURE},
        lambda y, f, i: oracle.poisson(y, f, EXPOSURE[i]),
    ),
    "negative_binomial": (
        NegativeBinomial(0.6),
        COUNTS,
        {"exposure": EXPOSURE},
        lambda y, f, i: oracle.negative_binomial(y, f, 0.6, EXPOSURE[i]),
    ),
}
M = np.array([-0.5, 0.3, 1.1, -1.4])
V = np.array([0.3, 0.05, 0.6, 0.2])


def as_tensors(*arrays):
    return [torch.as_tensor(array, dtype=DTYPE) for array in arrays]


@pytest.mark.parametrize("name", TABLE)
def test_log_prob_matches_scipy(name):
    likelihood, y, side, log_density = TABLE[name]
    side = {key: torch.as_tensor(value) for key, value in side.items()}
    found = likelihood.log_prob(*as_tensors(y, M), **side).detach()
    expected = [log_density(y[i], M[i], i) for i in range(4)]
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("name", TABLE)
def test_expectations_match_fine_integration(name):
    likelihood, y, side, log_density = TABLE[name]
    side = {key: torch.as_tensor(value) for key, value in side.items()}
    found = likelihood.expected_log_prob(*as_tensors(y, M, V), **side).value.detach()
    density = likelihood.log_predictive_density(*as_tensors(y, M, V), **side).detach()
    for i in range(4):
        row = partial(lambda i, f: log_density(y[i], f, i), i)
        assert float(found[i]) == pytest.approx(oracle.expectation(row, M[i], V[i]), rel=1e-7)
        assert float(density[i]) == pytest.approx(oracle.log_evidence(row, M[i], V[i]), rel=1e-7)


@pytest.mark.parametrize("power", [0.5, 0.1])
@pytest.mark.parametrize("name", TABLE)
def test_tilted_normalisers_match_fine_integration(name, power):
    likelihood, y, side, log_density = TABLE[name]
    side = {key: torch.as_tensor(value) for key, value in side.items()}
    found = likelihood.log_tilted(*as_tensors(y, M, V), power, **side).detach()
    for i in range(4):
        row = partial(lambda i, f: power * log_density(y[i], f, i), i)
        assert found[i].item() == pytest.approx(oracle.log_evidence(row, M[i], V[i]), rel=1e-7)


def test_softmax_draws_match_a_tensor_grid_within_their_error():
    rng = np.random.default_rng(0)
    m, v, y = rng.normal(size=(3, 4)), 0.5 * rng.uniform(size=(3, 4)), np.array([0.0, 1, 2, 1])
    errors = {}
    for n_draws in (128, 4096):
        likelihood = Softmax(3, n_draws)
        found = likelihood.expected_log_prob(*as_tensors(y, m, v))
        probs = likelihood.predictive(*as_tensors(m, v)).probs
        gap = 0.0
        for i in range(4):
            value, alpha, beta, exact = oracle.softmax_expectations(y[i], m[:, i], v[:, i])
            pieces = [found.value[i] - value, found.alpha[:, i] - torch.as_tensor(alpha)]
            pieces += [found.beta[:, i] - torch.as_tensor(beta), probs[i] - torch.as_tensor(exact)]
            gap = max(gap, *(float(piece.abs().max()) for piece in pieces))
        errors[n_draws] = gap
    assert errors[128] < 5e-3
    # 32 times the draws: at least the 32^½ of independent ones
    assert errors[4096] < errors[128] / 32**0.5


def test_narrow_likelihoods_keep_their_predictive_density():
    """Counts of a thousand under a wide latent: a fixed rule would miss the peak between its nodes."""
    y, m, v = np.array([1000.0]), np.array([2.0]), np.array([4.0])
    expected = oracle.log_evidence(lambda f: oracle.poisson(y[0], f), m[0], v[0])
    found = Poisson().log_predictive_density(*as_tensors(y, m, v))
    assert float(found) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("df", [1.5, 4.0, 80.0])
@pytest.mark.parametrize("scale", [0.01, 1.0])
@pytest.mark.parametrize("v", [1e-10, 0.04, 9.0])
def test_student_t_predictive_density_holds_for_every_ratio_of_scales(df, scale, v):
    likelihood = StudentT(df, scale)
    for y in (0.0, 0.3, 8.0):
        expected = oracle.log_evidence(lambda f, y=y: oracle.student_t(y, f, df, scale), 0.1, v)
        found = likelihood.log_predictive_density(*as_tensors([y], [0.1], [v])).detach()
        assert float(found) == pytest.approx(expected, rel=2e-6, abs=1e-6)


def test_weighted_gaussian_evidence_is_the_evidence_of_repeated_rows():
    rng = np.random.default_rng(1)
    n = 5
    root = rng.normal(size=(n, n))
    K, y, weight = root @ root.T + 0.1 * np.eye(n), rng.normal(size=n), np.array([1, 2, 3, 1, 2])
    variance = rng.uniform(0.2, 0.9, size=n)
    likelihood, side = Gaussian(), {"noise_variance": torch.as_tensor(variance)}
    sites = likelihood.sites(*as_tensors(y, weight), **side)
    R = np.diag(1 / sites.precision.numpy())
    np.testing.assert_allclose(R @ sites.linear.numpy(), y, rtol=1e-12)
    root_precision = np.diag(np.sqrt(sites.precision.numpy()))
    energy = -0.5 * y @ np.linalg.solve(K + R, y)
    energy -= 0.5 * np.linalg.slogdet(np.eye(n) + root_precision @ K @ root_precision)[1]
    found = energy + float(likelihood.log_scale(*as_tensors(y, weight), **side))
    assert found == pytest.approx(oracle.weighted_gaussian_log_evidence(K, y, variance, weight), rel=1e-10)
