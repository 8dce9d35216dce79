"""The sparse inverse Cholesky posterior with few neighbours: its parts belong to one function of the sites."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import DTYPE, normal

from mercer._typing import Data, Sites
from mercer.families import Exact, Prior, SparseInverseCholesky
from mercer.inference import Conjugate, Dual, run
from mercer.inference.objective import evidence_lower_bound
from mercer.kernels import Matern32, hyperparameters
from mercer.likelihoods import Bernoulli, Gaussian
from mercer.model import Model
from mercer.policy import NumericalPolicy

POLICY = NumericalPolicy()
N = 60


def uniform(n=N, d=2, seed=0):
    return torch.rand(n, d, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def sites_of(n=N, batch=(), seed=1, scale=4.0):
    return Sites(normal(*batch, n, seed=seed), scale * (0.2 + normal(*batch, n, seed=seed + 1).square()))


def posterior(sites, m=5, form="latent", X=None, prior=None):
    family = SparseInverseCholesky(n_neighbors=m, n_neighbors_predict=9, form=form)
    prior = Prior(Matern32([0.3, 0.6], outputscale=1.3)) if prior is None else prior
    X = uniform(len(sites.linear.T)) if X is None else X
    return family.condition(prior, family.plan(prior, X, POLICY), sites)


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(2, 25),
    d=st.integers(1, 4),
    form=st.sampled_from(["auto", "response", "latent"]),
    lengthscale=st.floats(0.05, 2.0),
    noise=st.floats(1e-3, 10.0),
    seed=st.integers(0, 10**6),
)
def test_all_neighbours_are_the_exact_family(n, d, form, lengthscale, noise, seed):
    X, X_new = uniform(n, d, seed), uniform(3, d, seed + 1)
    prior = Prior(Matern32([lengthscale] * d, outputscale=1.0))
    sites = Sites(normal(n, seed=seed) / noise, torch.full((n,), 1 / noise, dtype=DTYPE))
    family = SparseInverseCholesky(n_neighbors=n, n_neighbors_predict=n, form=form)
    found = family.condition(prior, family.plan(prior, X, POLICY), sites)
    exact = Exact().condition(prior, Exact().plan(prior, X, POLICY), sites)
    with torch.no_grad():
        # rounding grows with the condition of K + noise, and of K itself where latent
        tolerance = {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(found.log_evidence(), exact.log_evidence(), **tolerance)
        for one, other in zip(found.marginals(X_new), exact.marginals(X_new), strict=True):
            torch.testing.assert_close(one, other, **tolerance)
        for one, other in zip(found.site_terms(), exact.site_terms(), strict=True):
            torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_mean_and_variance_are_slopes_of_log_z(batch):
    """∂ log Z/∂λ1 = m and ∂ log Z/∂λ2 = −½ (v + m²), to rounding, though V is incomplete."""
    sites = sites_of(batch=batch)
    sites.linear.requires_grad_()
    sites.precision.requires_grad_()
    found = posterior(sites)
    log_z, m, v = found.site_terms()
    by_linear, by_precision = torch.autograd.grad(log_z.sum(), (sites.linear, sites.precision))
    torch.testing.assert_close(by_linear, m.detach(), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(by_precision, -0.5 * (v + m.square()).detach(), rtol=1e-8, atol=1e-10)
    dense = torch.linalg.inv(dense_precision(found))
    error = (v.detach() / dense.diagonal(dim1=-2, dim2=-1) - 1).abs()
    assert 1e-8 < float(error.max()) < 0.1  # incomplete indeed, and close


def dense_precision(found):
    """Return Λ in the order of the data, (*b, N, N)."""
    columns, U = found.plan.pattern.columns, torch.zeros(N, N, dtype=DTYPE)
    for k in range(columns.shape[-1]):
        used = columns[:, k] >= 0
        U[columns[used, k], torch.arange(N)[used]] = found.U.detach()[used, k]
    order = torch.argsort(found.plan.order)
    return (U @ U.mT)[order][:, order] + torch.diag_embed(found.sites.precision.detach())


@pytest.mark.parametrize("form", ["latent", "response"])
def test_gradients_in_hyperparameters_with_few_neighbours(form):
    sites, prior = sites_of(), Prior(Matern32([0.3, 0.6], outputscale=1.3))
    weights = normal(N, seed=7)

    def values():
        found = posterior(sites, form=form, prior=prior)
        log_z, m, v = found.site_terms()
        return torch.stack([found.log_evidence(), log_z, (m * weights).sum(), (v * weights).sum(), found.kl()])

    leaves = [item.parameter for item in hyperparameters(prior.kernel)]
    outputs = values()
    for leaf in leaves:
        direction = torch.ones_like(leaf)
        found = [torch.autograd.grad(each, leaf, retain_graph=True)[0].sum() for each in outputs]
        with torch.no_grad():
            step = 1e-4
            leaf += step * direction
            ahead = values()
            leaf -= 2 * step * direction
            behind = values()
            leaf += step * direction
        torch.testing.assert_close(torch.stack(found), (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-6)


def test_the_mean_is_solved_for_exactly_and_evidences_agree_with_the_dense_prior():
    sites = sites_of(batch=(2,))
    found = posterior(sites)
    A = dense_precision(found)
    mean = torch.linalg.solve(A, sites.linear.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(found.mean_at_data, mean, rtol=1e-6, atol=1e-8)
    vectors = normal(2, N, seed=9)
    product = torch.linalg.solve(A, vectors.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(found.covariance_product(vectors), product, rtol=1e-6, atol=1e-8)
    # log Z − Σ ½ λ1²/λ2 is the evidence of pseudo-data
    with torch.no_grad():
        constant = 0.5 * (sites.linear.square() / sites.precision).sum(-1)
        torch.testing.assert_close(found.log_evidence(), found.log_normaliser()[0] - constant, rtol=1e-9, atol=1e-9)


def test_predictions_and_draws_use_all_correlations():
    """Marginals, joint and draws at rows whose neighbours are correlated under q, against V by dense algebra."""
    sites = sites_of()
    found = posterior(sites, m=5)
    X_new = uniform(6, 2, seed=5)
    with torch.no_grad():
        m, v = found.marginals(X_new)
        mean, covariance = found.joint(X_new)
        draws = found.sample(X_new, 20_000, torch.Generator().manual_seed(3))
        diagonal_only = found.variance_at_data
    new, _ = found._append(X_new, joint=False)
    B = torch.zeros(6, N, dtype=DTYPE).scatter_add(-1, new.near.clamp_min(0), new.weights.detach())
    B = B / new.factor.detach()[:, -1:]
    eye = torch.eye(N, dtype=DTYPE)
    root = torch.stack([found.precision.whiten(e) for e in eye], -1)  # V⁻¹
    S = root.mT @ root
    own = new.factor.detach()[:, -1] ** -2
    torch.testing.assert_close(m, (B @ found._mean_in_order), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(v, own + ((B @ S) * B).sum(-1), rtol=1e-6, atol=1e-8)
    dropped = own + (B.square() * diagonal_only[found.plan.order]).sum(-1)
    assert float((dropped / v - 1).abs().max()) > 0.2  # what a mean-field posterior would say
    gap = draws - mean
    products = gap.unsqueeze(-1) * gap.unsqueeze(-2)
    error = products.std(0) / 20_000**0.5
    assert bool(((products.mean(0) - covariance).abs() < 5 * error).all())
    assert bool((gap.mean(0).abs() < 5 * draws.std(0) / 20_000**0.5).all())


def test_the_form_follows_noise_and_sites():
    def form_of(precision, form="auto", linear=1.0):
        sites = Sites(torch.full((N,), linear, dtype=DTYPE), torch.full((N,), precision, dtype=DTYPE))
        return posterior(sites, form=form).latent

    assert form_of(10.0) and not form_of(1e4)
    assert not form_of(10.0, "response") and form_of(1e4, "latent")
    assert form_of(0.0, "response")  # a pull without curvature is no datum
    assert not form_of(0.0, "response", linear=0.0)
    assert form_of(-0.01, "response")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "grid"}, "pattern"),
        ({"form": "both"}, "form"),
        ({"variational": "sometimes"}, "variational"),
        ({"n_neighbors_predict": 0}, "n_neighbors_predict"),
        ({"n_neighbors": 2.5}, "n_neighbors must be at least 1 and an integer"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SparseInverseCholesky(**options)


# ---- the engines at work (identity 12 of the method)


def classes(family, likelihood, n=40):
    """Converge the dual engine under a family; return the state, the model and the data."""
    X = uniform(n)
    y = (torch.sin(6 * X[:, 0]) + 0.3 * normal(n, seed=3) > 0).to(DTYPE)
    model = Model(Prior(Matern32([0.3, 0.6], outputscale=2.0)), likelihood, family, Dual(), NumericalPolicy(tol=1e-14))
    data = Data(X, y, torch.ones(n, dtype=DTYPE))
    found = run(model, family.plan(model.prior, X, model.policy), data)
    assert found.converged
    return found, model, data


def test_the_fixed_point_with_all_neighbours_is_that_of_the_dense_family():
    found, model, data = classes(SparseInverseCholesky(n_neighbors=39), Bernoulli())
    dense, _, _ = classes(Exact(), Bernoulli())
    assert found.state.value == pytest.approx(dense.state.value, abs=1e-8)
    torch.testing.assert_close(found.state.sites.precision, dense.state.sites.precision, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.state.posterior.mean_at_data, dense.state.posterior.mean_at_data)
    assert largest_slope(found, model, data) < 1e-6


@pytest.mark.parametrize("m", [4, 10])
def test_the_fixed_point_with_few_neighbours_is_stationary_all_the_same(m):
    found, model, data = classes(SparseInverseCholesky(n_neighbors=m), Bernoulli())
    assert largest_slope(found, model, data) < 1e-6


def largest_slope(found, model, data):
    """Return the largest derivative of the bound in the sites at a fixed point."""
    sites = Sites(*(each.clone().requires_grad_() for each in (found.state.sites.linear, found.state.sites.precision)))
    bound = evidence_lower_bound(model, found.state.posterior.with_sites(sites), data)
    return max(float(each.abs().max()) for each in torch.autograd.grad(bound, (sites.linear, sites.precision)))


def test_gaussian_noise_takes_one_step_to_the_exact_posterior():
    found, model, data = classes(SparseInverseCholesky(n_neighbors=39), Gaussian(0.2))
    family = Exact()
    exact = Conjugate().init(replace(model, family=family), family.plan(model.prior, data.X, POLICY), data).posterior
    assert found.n_steps <= 2  # one that moves, one that sees that it has arrived
    torch.testing.assert_close(found.state.posterior.mean_at_data, exact.mean_at_data, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.state.posterior.variance_at_data, exact.variance_at_data, rtol=1e-8, atol=1e-8)
