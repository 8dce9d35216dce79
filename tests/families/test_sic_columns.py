"""Vecchia's likelihood of noisy data against its definition and the dense evidence."""

import math

import numpy as np
import pytest
import torch

from mercer._typing import Sites
from mercer.families import Prior, SparseInverseCholesky
from mercer.families.sic_plan import plan_columns
from mercer.families.vecchia import response_log_likelihood
from mercer.kernels import Linear, Matern32, gram
from mercer.kernels.evaluate import scaled_inputs
from mercer.policy import NumericalPolicy

DTYPE = torch.float64
POLICY = NumericalPolicy()
N = 50


def uniform(n=N, d=2, seed=0):
    return torch.rand(n, d, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def prior():
    return Prior(Matern32([0.3, 0.6], outputscale=1.3))


NOISE = 0.05 + 0.1 * uniform(N, 1, seed=3).squeeze(-1)


def dense(prior, X, y, noise):
    K = gram(prior.kernel, X) + noise.diag()
    return torch.distributions.MultivariateNormal(torch.zeros(len(X), dtype=DTYPE), K).log_prob(y)


def conditioned(P, plan, y, noise, n_neighbors):
    """Return the posterior in the response form."""
    family = SparseInverseCholesky(n_neighbors_predict=n_neighbors, form="response")
    return family.condition(P, plan, Sites(y / noise, 1 / noise))


def test_all_earlier_rows_give_the_exact_evidence():
    X, y = uniform(), normal(3, N)
    plan = plan_columns(prior(), X, POLICY, n_neighbors=N - 1)
    found = response_log_likelihood(prior(), plan, y, NOISE)
    torch.testing.assert_close(found, dense(prior(), X, y, NOISE), rtol=1e-8, atol=0)


def test_it_is_the_product_of_vecchias_conditionals():
    X, y, m = uniform(), normal(N), 5
    plan = plan_columns(prior(), X, POLICY, n_neighbors=m)
    K = (gram(prior().kernel, X) + NOISE.diag())[plan.order][:, plan.order]
    ordered, total = y[plan.order], 0.0
    Z = X[plan.order] / torch.tensor([0.3, 0.6], dtype=DTYPE)
    for i in range(N):
        near = (Z[:i] - Z[i]).square().sum(-1).argsort()[:m]
        b = torch.linalg.solve(K[near][:, near], K[near, i]) if i else K.new_empty(0)
        mean, variance = b @ ordered[near], K[i, i] - b @ K[near, i]
        total += -0.5 * math.log(2 * math.pi * variance) - 0.5 * float((ordered[i] - mean) ** 2 / variance)
    assert float(response_log_likelihood(prior(), plan, y, NOISE)) == pytest.approx(total, rel=1e-10)


@pytest.mark.parametrize("chunk", [4_000_000, 500])
def test_gradients_equal_central_differences(chunk):
    X, y, P = uniform(), normal(N), prior()
    policy = NumericalPolicy(chunk_elements=chunk)
    plan = plan_columns(P, X, policy, n_neighbors=8)
    noise = NOISE.clone().requires_grad_()
    response_log_likelihood(P, plan, y, noise).backward()
    leaves = [P.kernel.raw_outputscale, P.kernel.base_kernel.raw_lengthscale, noise]
    for leaf in leaves:
        for index in range(min(leaf.numel(), 5)):
            with torch.no_grad():
                values = []
                for step in (1e-5, -1e-5):
                    leaf.view(-1)[index] += step
                    values.append(float(response_log_likelihood(P, plan, y, noise)))
                    leaf.view(-1)[index] -= step
            slope = float(leaf.grad.view(-1)[index])
            assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6, abs=1e-6)


def test_disjoint_batches_of_rows_add_up():
    X, y = uniform(), normal(N)
    plan = plan_columns(prior(), X, POLICY, n_neighbors=8)
    whole = response_log_likelihood(prior(), plan, y, NOISE)
    family, total = SparseInverseCholesky(n_neighbors=8), 0.0
    for rows in torch.randperm(N).split(7):
        some = family.plan_some(prior(), X, POLICY, rows)
        assert set(some.order[some.rows].tolist()) == set(rows.tolist())
        assert torch.equal(some.pattern.columns[some.rows], plan.pattern.columns[some.rows])
        total = total + response_log_likelihood(prior(), some, y, NOISE) * len(rows) / N
    torch.testing.assert_close(total, whole, rtol=1e-10, atol=0)


def test_the_order_of_the_rows_does_not_matter():
    X, y, shuffle = uniform(), normal(N), torch.randperm(N, generator=torch.Generator().manual_seed(2))
    found = [
        response_log_likelihood(prior(), plan_columns(prior(), X[rows], POLICY, 10), y[rows], NOISE[rows])
        for rows in (torch.arange(N), shuffle)
    ]
    torch.testing.assert_close(*found, rtol=1e-10, atol=0)


def test_neighbours_are_near_in_lengthscales():
    X = uniform(200, 2)
    kernel = Matern32([10.0, 0.1])
    torch.testing.assert_close(scaled_inputs(kernel, X), X / torch.tensor([10.0, 0.1], dtype=DTYPE), rtol=1e-12, atol=0)
    plan = plan_columns(Prior(kernel), X, POLICY, n_neighbors=3)
    away = (plan.X.unsqueeze(1) - plan.X[plan.pattern.columns[:, :-1].clamp_min(0)]).abs()[100:]
    assert float(away[..., 1].mean()) < 0.2 * float(away[..., 0].mean())


def unscaled():
    return Prior(Matern32(0.3, ard=False) + Linear(1.0, ard=False))


def test_a_kernel_without_scaled_inputs_goes_by_correlation():
    P, X, y, X_new = unscaled(), uniform() - 0.3, normal(N), uniform(4, 2, seed=7)
    assert scaled_inputs(P.kernel, X) is None
    plan = plan_columns(P, X, NumericalPolicy(chunk_elements=700), n_neighbors=6)  # a few rows at a time
    assert sorted(plan.order.tolist()) == list(range(N)) and plan.notes == ()
    K = gram(P.kernel, plan.X)
    away = 1 - (K / (K.diagonal() * K.diagonal().unsqueeze(-1)).sqrt()).abs()
    for i in range(1, N):
        kept = plan.pattern.columns[i, :-1]
        assert set(kept[kept >= 0].tolist()) == set(away[i, :i].argsort()[:6].tolist())
        np.testing.assert_allclose(float(plan.distance[i]) ** 2, float(away[i, :i].min()), atol=1e-12)
    ball = plan_columns(P, X, POLICY, n_neighbors=N - 1, rho=1.5)
    for i in range(1, N):
        kept = ball.pattern.columns[i, :-1]
        inside = (away[i, :i] <= (1.5 * float(plan.distance[i])) ** 2 * (1 + 1e-11)).nonzero().squeeze(-1)
        assert set(kept[kept >= 0].tolist()) == set(inside.tolist())
    full = plan_columns(P, X, POLICY, n_neighbors=N - 1)
    torch.testing.assert_close(response_log_likelihood(P, full, y, NOISE), dense(P, X, y, NOISE), rtol=1e-8, atol=0)
    mean, covariance = exact(P, X, y, NOISE, X_new)
    m, V = conditioned(P, plan, y, NOISE, N + 4).joint(X_new)
    torch.testing.assert_close(m, mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(V, covariance.expand_as(V), rtol=1e-8, atol=1e-8)


def test_a_row_without_prior_variance_is_far_from_all():
    P, X = Prior(Linear(1.0, ard=False)), uniform() + 0.1
    X[7] = 0.0
    plan = plan_columns(P, X, POLICY, n_neighbors=4)
    assert bool(plan.distance.isfinite().all()) and sorted(plan.order.tolist()) == list(range(N))
    assert float(plan.distance[(plan.order == 7).nonzero().item()]) == 1.0


def test_too_many_rows_for_correlations_are_said(monkeypatch):
    monkeypatch.setattr("mercer.families.nearness._MOST_CORRELATIONS", N - 1)
    P, X = unscaled(), uniform()
    plan = plan_columns(P, X, POLICY, n_neighbors=4)
    assert "inputs as they are" in plan.notes[0] and "50 rows" in plan.notes[0]
    away = torch.cdist(plan.X, plan.X)
    assert set(plan.pattern.columns[-1, :-1].tolist()) == set(away[-1, :-1].argsort()[:4].tolist())


def test_the_ball_pattern_is_the_papers():
    X = uniform(120, 2)
    P = Prior(Matern32(0.3, ard=False))
    plan = plan_columns(P, X, POLICY, n_neighbors=119, rho=1.5)
    Z = (plan.X / 0.3).numpy()
    for i in range(120):
        inside = np.flatnonzero(((Z[:i] - Z[i]) ** 2).sum(1) <= (1.5 * float(plan.distance[i])) ** 2 * (1 + 1e-11))
        kept = plan.pattern.columns[i, :-1]
        assert np.array_equal(kept[kept >= 0].numpy(), inside)


def exact(prior, X, y, noise, X_new):
    """Mean and covariance of f at X_new given noisy data, by dense algebra."""
    K, cross = gram(prior.kernel, X) + noise.diag(), gram(prior.kernel, X_new, X)
    weights = torch.linalg.solve(K, cross.mT).mT
    return (weights @ y.unsqueeze(-1)).squeeze(-1), gram(prior.kernel, X_new) - weights @ cross.mT


def test_predictions_from_all_data_are_exact():
    P, X, y, X_new = prior(), uniform(), normal(2, N), uniform(9, 2, seed=7)
    plan = plan_columns(P, X, POLICY, n_neighbors=5)
    mean, covariance = exact(P, X, y, NOISE, X_new)
    m, v = conditioned(P, plan, y, NOISE, N).marginals(X_new)
    torch.testing.assert_close(m, mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(v, covariance.diagonal().expand_as(v), rtol=1e-8, atol=1e-8)
    m, V = conditioned(P, plan, y, NOISE, N + 9).joint(X_new)
    torch.testing.assert_close(m, mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(V, covariance.expand_as(V), rtol=1e-8, atol=1e-8)


def test_few_neighbours_condition_on_just_those():
    P, X, y, X_new = prior(), uniform(), normal(N), uniform(6, 2, seed=7)
    plan = plan_columns(P, X, NumericalPolicy(chunk_elements=100), n_neighbors=5)  # one row at a time
    m, v = conditioned(P, plan, y, NOISE, 7).marginals(X_new)
    scale = torch.tensor([0.3, 0.6], dtype=DTYPE)
    for i in range(6):
        near = ((X - X_new[i]) / scale).square().sum(-1).argsort()[:7]
        mean, covariance = exact(P, X[near], y[near], NOISE[near], X_new[i : i + 1])
        torch.testing.assert_close(m[i : i + 1], mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(v[i : i + 1], covariance.diagonal(), rtol=1e-9, atol=1e-9)


def test_joint_predictions_follow_neighbouring_new_rows():
    """Two new rows side by side, far from most data, are nearly one value; their marginals stay close to exact."""
    P, X, y = prior(), uniform(), normal(N)
    X_new = torch.tensor([[0.5, 1.5], [0.5, 1.501], [0.2, 0.3]], dtype=DTYPE)
    plan = plan_columns(P, X, POLICY, n_neighbors=5)
    _, covariance = exact(P, X, y, NOISE, X_new)
    _, V = conditioned(P, plan, y, NOISE, 25).joint(X_new)
    torch.testing.assert_close(V, covariance, rtol=0.05, atol=0.01)
    assert torch.equal(V, V.mT) and float(V[0, 1]) > 0.99 * float(V[0, 0])


@pytest.mark.parametrize(("arguments", "message"), [({"n_neighbors": 0}, "n_neighbors"), ({"rho": 0.5}, "rho")])
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_columns(prior(), uniform(), POLICY, **arguments)
