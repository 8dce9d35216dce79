"""The exact family: regression as the textbook and scikit-learn have it, and what the contract does not cover."""

import pickle

import numpy as np
import pytest
import torch
from gpytorch.kernels import MaternKernel, ScaleKernel
from oracles import kernels as kernel_oracle
from oracles import regression as oracle
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF as SklearnRBF
from sklearn.gaussian_process.kernels import ConstantKernel, Matern

from mercer._typing import Data, Sites
from mercer.families import Exact, Prior
from mercer.inference import Conjugate, run
from mercer.kernels import RBF, Matern12, Matern32, Matern52, PolynomialKernel, gram
from mercer.kernels.means import constant_mean
from mercer.likelihoods import Gaussian
from mercer.linalg.conditioning import SiteFactor
from mercer.model import Model
from mercer.policy import NumericalPolicy

DTYPE = torch.float64
POLICY = NumericalPolicy()
RNG = np.random.default_rng(0)
X, X_NEW = RNG.uniform(-2, 2, size=(25, 2)), RNG.uniform(-2.5, 2.5, size=(9, 2))
Y = np.sin(2 * X[:, 0]) + X[:, 1] + 0.2 * RNG.normal(size=25)
ELL = [0.7, 1.3]


def fitted(kernel, noise=0.05, mean=None, y=Y):
    """Posterior and evidence of conjugate inference at fixed hyperparameters."""
    model = Model(Prior(kernel, mean), Gaussian(noise), Exact(), Conjugate(), POLICY)
    data = Data(torch.as_tensor(X), torch.as_tensor(y), torch.ones(len(X), dtype=DTYPE))
    plan = model.family.plan(model.prior, data.X, POLICY)
    state = run(model, plan, data).state
    return state.posterior, model.engine.objective(model, plan, state, data)


def conditioned(kernel, sites, mean=None, policy=POLICY):
    prior = Prior(kernel, mean)
    family = Exact()
    return family.condition(prior, family.plan(prior, torch.as_tensor(X), policy), sites)


def random_sites(*batch):
    generator = torch.Generator().manual_seed(1)
    linear = torch.randn(*batch, len(X), generator=generator, dtype=DTYPE)
    return Sites(linear, torch.rand(*batch, len(X), generator=generator, dtype=DTYPE) + 0.1)


@pytest.mark.parametrize(
    ("kernel", "peer"),
    [
        (RBF(ELL, outputscale=1.7), SklearnRBF(ELL)),
        (Matern32(ELL, outputscale=1.7), Matern(ELL, nu=1.5)),
        (Matern52(ELL, outputscale=1.7), Matern(ELL, nu=2.5)),
    ],
    ids=["rbf", "matern32", "matern52"],
)
def test_regression_equals_scikit_learn(kernel, peer):
    posterior, evidence = fitted(kernel)
    sklearn = GaussianProcessRegressor(ConstantKernel(1.7) * peer, alpha=0.05, optimizer=None).fit(X, Y)
    mean, covariance = posterior.joint(torch.as_tensor(X_NEW))
    expected, expected_covariance = sklearn.predict(X_NEW, return_cov=True)
    np.testing.assert_allclose(mean.detach(), expected, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(covariance.detach(), expected_covariance, rtol=1e-8, atol=1e-8)
    assert evidence.item() == pytest.approx(sklearn.log_marginal_likelihood_value_, rel=1e-10)
    gradient = torch.autograd.grad(evidence, kernel.raw_outputscale)[0]
    slope = torch.autograd.grad(kernel.outputscale, kernel.raw_outputscale)[0] / 1.7
    _, theirs = sklearn.log_marginal_likelihood(sklearn.kernel_.theta, eval_gradient=True)
    assert (gradient / slope).item() == pytest.approx(theirs[0], rel=1e-8)


def test_regression_equals_the_loop_oracle():
    kernel = Matern12(ELL, outputscale=0.8)
    noise = np.full(25, 0.05)

    def pairwise(A, B):
        return 0.8 * kernel_oracle.gram(lambda x, y: kernel_oracle.matern12(x, y, ELL), A, B)

    posterior, evidence = fitted(kernel, mean=constant_mean(0.3), y=Y + 0.3)
    mean, covariance = posterior.joint(torch.as_tensor(X_NEW))
    expected = oracle.predict(pairwise(X, X), pairwise(X_NEW, X), pairwise(X_NEW, X_NEW), Y, noise)
    np.testing.assert_allclose(mean.detach() - 0.3, expected[0], rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(covariance.detach(), expected[1], rtol=1e-8, atol=1e-8)
    assert evidence.item() == pytest.approx(oracle.log_evidence(pairwise(X, X), Y, noise), rel=1e-10)
    # along log outputscale the covariance moves by itself
    (slope,) = torch.autograd.grad(evidence, kernel.raw_outputscale)
    (chain,) = torch.autograd.grad(kernel.outputscale.log(), kernel.raw_outputscale)
    traced = oracle.log_evidence_gradient(pairwise(X, X), Y, noise, pairwise(X, X))
    assert (slope / chain).item() == pytest.approx(traced, rel=1e-8)


def test_two_rounds_of_observations_equal_one():
    """Sites add: conditioning on some rows and then on the others is conditioning on all."""
    sites = random_sites()
    first = torch.arange(len(X)) < 12
    half = conditioned(RBF(ELL), Sites(sites.linear * first, sites.precision * first))
    whole = conditioned(RBF(ELL), sites)
    # the second round, written for the posterior of the first as a prior
    m, V = half.joint(torch.as_tensor(X))
    precision = torch.linalg.inv(V + 1e-9 * torch.eye(len(X), dtype=DTYPE)) + (sites.precision * ~first).diag()
    mean = m + torch.linalg.solve(precision, (sites.linear - sites.precision * m) * ~first)
    torch.testing.assert_close(whole.at_data()[0], mean, rtol=1e-6, atol=1e-6)


def test_duplicate_rows_equal_one_row_with_their_sum():
    sites, prior, family = random_sites(), Prior(RBF(ELL)), Exact()
    rows = torch.as_tensor(np.concatenate([X, X]))
    pieces = Sites(torch.cat([0.3 * sites.linear, 0.7 * sites.linear]), torch.cat([0.5 * sites.precision] * 2))
    twice = family.condition(prior, family.plan(prior, rows, POLICY), pieces)
    once = conditioned(RBF(ELL), sites)
    new = torch.as_tensor(X_NEW)
    for left, right in zip(twice.marginals(new), once.marginals(new), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(twice.log_normaliser()[0], once.log_normaliser()[0], rtol=1e-8, atol=1e-8)
    assert twice.jitter == 0.0


def test_jitter_that_was_needed_is_reported():
    """Duplicates observed without noise: 1 is lost beside 1e20, and B is singular to rounding."""
    prior, family = Prior(RBF(ELL)), Exact()
    rows = torch.as_tensor(np.concatenate([X, X]))
    precision = torch.full((len(rows),), 1e20, dtype=DTYPE)
    posterior = family.condition(prior, family.plan(prior, rows, POLICY), Sites(precision, precision))
    assert posterior.jitter in POLICY.jitter_ladder[1:]


def test_kernels_with_a_batch_shape_condition_each_latent_on_its_own_kernel():
    batch = torch.Size([2])
    kernel = ScaleKernel(MaternKernel(1.5, ard_num_dims=2, batch_shape=batch), batch_shape=batch).double()
    kernel.base_kernel.lengthscale = torch.tensor([[[0.7, 1.3]], [[0.4, 0.9]]], dtype=DTYPE)
    kernel.outputscale = torch.tensor([1.7, 0.6], dtype=DTYPE)
    sites = random_sites(2)
    both = conditioned(kernel, sites)
    rows = torch.as_tensor(X_NEW)
    for i in range(2):
        alone = conditioned(kernel[i], Sites(sites.linear[i], sites.precision[i]))
        for left, right in zip(both.joint(rows), alone.joint(rows), strict=True):
            torch.testing.assert_close(left[i], right, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(both.mean(rows)[i], alone.mean(rows), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(both.kl()[i], alone.kl(), rtol=1e-8, atol=1e-8)


def test_sample_paths_are_functions_that_pass_near_precise_observations():
    precision = torch.full((len(X),), 1e8, dtype=DTYPE)
    # a rough kernel: 2048 random features miss the faintest directions of a smooth one
    posterior = conditioned(Matern12(ELL, outputscale=1.7), Sites(precision * torch.as_tensor(Y), precision))
    assert posterior.pathwise
    paths = [
        posterior.sample(rows, 5, torch.Generator().manual_seed(3)) for rows in map(torch.as_tensor, (X, X_NEW, X[:4]))
    ]
    torch.testing.assert_close(paths[0], torch.as_tensor(Y).expand(5, -1), rtol=0, atol=6e-4)  # 6 deviations of 1e-4
    torch.testing.assert_close(paths[2], paths[0][:, :4], rtol=1e-8, atol=1e-8)
    assert paths[1].std(0).max() > 1e-2  # between the observations the paths differ


def test_samples_without_a_spectral_rule_are_joint_draws():
    posterior = conditioned(PolynomialKernel(2).double(), random_sites(3))
    assert not posterior.pathwise
    draws = posterior.sample(torch.as_tensor(X_NEW), 7, torch.Generator().manual_seed(0))
    assert draws.shape == (7, 3, len(X_NEW)) and torch.isfinite(draws).all()


def test_samples_do_not_depend_on_chunks():
    rows = torch.as_tensor(X_NEW)
    draws = [
        conditioned(RBF(ELL), random_sites(2), policy=policy).sample(rows, 4, torch.Generator().manual_seed(0))
        for policy in (POLICY, NumericalPolicy(chunk_elements=1))
    ]
    torch.testing.assert_close(*draws, rtol=1e-10, atol=1e-10)


def test_mean_only_prediction_never_forms_variances(monkeypatch):
    posterior = conditioned(RBF(ELL), random_sites())
    expected = posterior.marginals(torch.as_tensor(X_NEW))[0]

    def forbidden(*args):
        raise AssertionError("a variance was computed")

    monkeypatch.setattr(SiteFactor, "reduce", forbidden)
    monkeypatch.setattr(SiteFactor, "reduction", forbidden)
    torch.testing.assert_close(posterior.mean(torch.as_tensor(X_NEW)), expected, rtol=1e-10, atol=1e-12)


def test_chunks_bound_the_rows_of_each_cross_covariance(monkeypatch):
    seen = []

    def watched(kernel, X1, X2=None, policy=None):
        seen.append(X1.shape[-2] * (X1 if X2 is None else X2).shape[-2])
        return gram(kernel, X1, X2, policy)

    policy = NumericalPolicy(chunk_elements=2 * len(X) * 4)
    posterior = conditioned(RBF(ELL), random_sites(), policy=policy)
    _ = posterior.factor
    monkeypatch.setattr("mercer.families.exact.gram", watched)
    posterior.marginals(torch.as_tensor(X_NEW))
    posterior.mean(torch.as_tensor(X_NEW))
    assert max(seen) <= policy.chunk_elements and len(seen) > 2


def test_a_released_posterior_predicts_bit_for_bit_without_its_gram_matrix():
    posterior = conditioned(RBF(ELL), random_sites())
    rows = torch.as_tensor(X_NEW)
    before = posterior.marginals(rows)
    assert pickle.loads(pickle.dumps(posterior))._K is None
    posterior.release()
    assert posterior._K is None
    for left, right in zip(posterior.marginals(rows), before, strict=True):
        assert torch.equal(left, right)
    torch.testing.assert_close(posterior.with_sites(random_sites()).mean(rows), before[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "n", [800, 801, pytest.param(4096, marks=pytest.mark.slow), pytest.param(4097, marks=pytest.mark.slow)]
)
def test_the_answer_does_not_change_its_algorithm_with_size(n):
    """Sizes around gpytorch's switch from Cholesky to conjugate gradients, and a much larger one."""
    rng = np.random.default_rng(n)
    rows, new = torch.as_tensor(rng.uniform(-3, 3, size=(n, 2))), torch.as_tensor(rng.uniform(-3, 3, size=(5, 2)))
    precision = torch.full((n,), 1e4, dtype=DTYPE)
    prior, family = Prior(Matern52([0.5, 0.5])), Exact()
    posterior = family.condition(prior, family.plan(prior, rows, POLICY), Sites(precision, precision))
    with torch.no_grad():
        K, Ks = gram(prior.kernel, rows).numpy(), gram(prior.kernel, rows, new).numpy()
        expected = 1.0 - (Ks * np.linalg.solve(K + 1e-4 * np.eye(n), Ks)).sum(0)
        np.testing.assert_allclose(posterior.marginals(new)[1], expected, rtol=1e-6)
