"""Vecchia of the residual of inducing points against its definition, dense GPs, and plain Vecchia."""

import pickle

import gpytorch
import pytest
import torch

from mercer._typing import Sites
from mercer.families import InducingVecchia, Prior
from mercer.families.hybrid import response_log_likelihood, response_sums
from mercer.families.hybrid_plan import Residual, plan_hybrid
from mercer.families.sic_plan import plan_columns
from mercer.families.vecchia import response_log_likelihood as vecchia_log_likelihood
from mercer.kernels import Linear, Matern32, Matern52, gram, hyperparameters
from mercer.linalg.cholesky import NotPositiveDefiniteError
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


def posterior(P, plan, y, noise, n_neighbors):
    """The posterior of noisy data, in the response form."""
    noise = noise.expand(*noise.shape[:-1], len(plan.X))
    family = InducingVecchia(n_neighbors_predict=n_neighbors, form="response")
    found = family.condition(P, plan, Sites(y / noise, 1 / noise))
    assert not found.latent
    return found


def marginals(P, plan, y, noise, X_new, n_neighbors):
    with torch.no_grad():
        return posterior(P, plan, y, noise, n_neighbors).marginals(X_new)


def joint(P, plan, y, noise, X_new, n_neighbors):
    with torch.no_grad():
        return posterior(P, plan, y, noise, n_neighbors).joint(X_new)


def gaussian(covariance, y):
    zero = torch.zeros(len(covariance), dtype=DTYPE)
    return torch.distributions.MultivariateNormal(zero, covariance).log_prob(y)


def exact(prior, X, y, noise, X_new):
    """Mean and covariance of f at X_new given noisy data, by dense algebra."""
    K, cross = gram(prior.kernel, X) + noise.diag(), gram(prior.kernel, X_new, X)
    weights = torch.linalg.solve(K, cross.mT).mT
    return (weights @ y.unsqueeze(-1)).squeeze(-1), gram(prior.kernel, X_new) - weights @ cross.mT


def low_rank(prior, Z, X):
    """Φ Φᵀ from its definition, with the jitter that `Residual` states."""
    KZ, cross = gram(prior.kernel, Z), gram(prior.kernel, X, Z)
    jitter = torch.finfo(DTYPE).eps ** 0.5 * KZ.diagonal().mean()
    return cross @ torch.linalg.solve(KZ + jitter * torch.eye(len(Z), dtype=DTYPE), cross.mT)


def conditionals(C, given):
    """Covariance of the process whose value i, given all earlier ones, depends on those of given[i] as under C."""
    n = len(C)
    A, v = torch.zeros(n, n, dtype=DTYPE), torch.empty(n, dtype=DTYPE)
    for i, s in enumerate(given):
        A[i, s] = torch.linalg.solve(C[s][:, s], C[s, i])
        v[i] = C[i, i] - A[i, s] @ C[s, i]
    root = torch.linalg.inv(torch.eye(n, dtype=DTYPE) - A)
    return root @ v.diag() @ root.mT


def neighbours(plan):
    return [row[row >= 0] for row in plan.pattern.columns[:, :-1]]


def hybrid_covariance(P, plan, noise):
    """Covariance of noisy data in their own order, from the definition."""
    fixed = low_rank(P, plan.Z, plan.X)
    C = gram(P.kernel, plan.X) - fixed + noise[plan.order].diag()
    back = plan.order.argsort()
    return (fixed + conditionals(C, neighbours(plan)))[back][:, back]


@pytest.mark.parametrize("M", [0, 1, 12, N])
def test_all_earlier_rows_give_the_exact_evidence(M):
    X, y, P = uniform(), normal(3, N), prior()
    plan = plan_hybrid(P, X, POLICY, n_inducing=M, n_neighbors=N - 1)
    assert plan.Z.shape == (M, 2)
    found = response_log_likelihood(P, plan, y, NOISE)
    torch.testing.assert_close(found, gaussian(gram(P.kernel, X) + NOISE.diag(), y), rtol=1e-8, atol=0)


@pytest.mark.parametrize("M", [1, 12, N])
def test_it_is_the_gaussian_of_the_definition(M):
    X, y, P = uniform(), normal(3, N), prior()
    plan = plan_hybrid(P, X, POLICY, n_inducing=M, n_neighbors=6)
    found = response_log_likelihood(P, plan, y, NOISE)
    torch.testing.assert_close(found, gaussian(hybrid_covariance(P, plan, NOISE), y), rtol=1e-9, atol=0)


def test_without_inducing_points_it_is_vecchias():
    X, y, P = uniform(), normal(3, N), prior()
    plan = plan_hybrid(P, X, POLICY, n_inducing=0, n_neighbors=6)
    expected = vecchia_log_likelihood(P, plan_columns(P, X, POLICY, n_neighbors=6), y, NOISE)
    # the correlation falls with the scaled distance, so that both see the same neighbours
    torch.testing.assert_close(response_log_likelihood(P, plan, y, NOISE), expected, rtol=1e-10, atol=0)


def test_inducing_points_at_all_rows_leave_nothing_but_jitter():
    X, y, P = uniform(), normal(N), prior()
    plan = plan_hybrid(P, X, POLICY, n_neighbors=1, Z=X)
    residual = Residual(P.kernel, X, POLICY)
    assert float(residual.variance(residual.points(X)).detach().max()) < 1e-7
    found = response_log_likelihood(P, plan, y, NOISE)
    torch.testing.assert_close(found, gaussian(gram(P.kernel, X) + NOISE.diag(), y), rtol=1e-6, atol=0)


def test_copies_among_inducing_points_do_no_harm():
    X, y, P = uniform(), normal(N), prior()
    plan = plan_hybrid(P, X, POLICY, n_neighbors=N - 1, Z=X[:10].repeat(2, 1))
    found = response_log_likelihood(P, plan, y, NOISE)
    torch.testing.assert_close(found, gaussian(gram(P.kernel, X) + NOISE.diag(), y), rtol=1e-8, atol=0)


@pytest.mark.parametrize("chunk", [4_000_000, 500])
def test_gradients_equal_central_differences(chunk):
    X, y, P = uniform(), normal(2, N), prior()
    plan = plan_hybrid(P, X, NumericalPolicy(chunk_elements=chunk), n_inducing=9, n_neighbors=5)
    noise = NOISE.clone().requires_grad_()
    y.requires_grad_()
    weights = torch.tensor([1.0, -0.3], dtype=DTYPE)

    def value():
        return response_log_likelihood(P, plan, y, noise) @ weights

    leaves = [item.parameter for item in hyperparameters(P.kernel)] + [noise, y]
    assert sum(leaf.numel() for leaf in leaves) == 3 + 3 * N
    total = value()
    slopes = torch.autograd.grad(total, leaves, retain_graph=True)
    for first, again in zip(slopes, torch.autograd.grad(total, leaves), strict=True):
        torch.testing.assert_close(first, again, rtol=1e-12, atol=1e-12)
    for leaf, slope in zip(leaves, slopes, strict=True):
        for index in range(min(leaf.numel(), 5)):
            with torch.no_grad():
                values = []
                for step in (1e-5, -1e-5):
                    leaf.view(-1)[index] += step
                    values.append(float(value()))
                    leaf.view(-1)[index] -= step
            expected = (values[0] - values[1]) / 2e-5
            assert float(slope.reshape(-1)[index]) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_chunks_do_not_matter():
    X, y, P, X_new = uniform(), normal(2, N), prior(), uniform(9, 2, seed=7)
    found = []
    for chunk in (4_000_000, 700, 1):
        plan = plan_hybrid(P, X, NumericalPolicy(chunk_elements=chunk), n_inducing=9, n_neighbors=5)
        found.append(
            [
                response_log_likelihood(P, plan, y, NOISE),
                *marginals(P, plan, y, NOISE, X_new, 7),
                *joint(P, plan, y, NOISE, X_new, 7),
            ]
        )
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_batch_members_may_have_noise_of_their_own():
    X, y, P, X_new = uniform(), normal(2, N), prior(), uniform(9, 2, seed=7)
    plan = plan_hybrid(P, X, POLICY, n_inducing=9, n_neighbors=5)
    noise = torch.stack([NOISE, NOISE.flip(0) + 0.2])
    for function, more in (
        (response_log_likelihood, ()),
        (marginals, (X_new, 7)),
        (joint, (X_new, 7)),
    ):
        together = function(P, plan, y, noise, *more)
        for i in range(2):
            alone = function(P, plan, y[i], noise[i], *more)
            for both, one in zip(together, alone, strict=True) if more else [(together, alone)]:
                torch.testing.assert_close(both[i], one, rtol=1e-10, atol=1e-10)
    one_noise = response_log_likelihood(P, plan, y, torch.tensor([0.2], dtype=DTYPE))
    many = response_log_likelihood(P, plan, y, torch.full((N,), 0.2, dtype=DTYPE))
    torch.testing.assert_close(one_noise, many, rtol=1e-12, atol=0)


@pytest.mark.parametrize("M", [0, 12, N])
def test_predictions_from_all_data_are_exact(M):
    X, y, P = uniform(), normal(2, N), prior()
    X_new = torch.cat([uniform(7, 2, seed=7), X[:2]])
    plan = plan_hybrid(P, X, POLICY, n_inducing=M, n_neighbors=N - 1)
    mean, covariance = exact(P, X, y, NOISE, X_new)
    m, v = marginals(P, plan, y, NOISE, X_new, n_neighbors=N)
    torch.testing.assert_close(m, mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(v, covariance.diagonal().expand_as(v), rtol=1e-8, atol=1e-8)
    m, V = joint(P, plan, y, NOISE, X_new, n_neighbors=N + 9)
    torch.testing.assert_close(m, mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(V, covariance.expand_as(V), rtol=1e-8, atol=1e-8)


def conditioned(P, plan, X, y, noise, X_new, given_new):
    """Mean and covariance of f at X_new in the model of data, then new rows each given residuals of ``given_new``."""
    n, q = len(X), len(X_new)
    both = torch.cat([plan.X, X_new])
    fixed = low_rank(P, plan.Z, both)
    own = torch.cat([noise[plan.order], torch.zeros(q, dtype=DTYPE)])
    C = gram(P.kernel, both) - fixed + own.diag()
    joint = fixed + conditionals(C, neighbours(plan) + given_new)
    weights = torch.linalg.solve(joint[:n, :n], joint[:n, n:]).mT
    return weights @ y[plan.order], joint[n:, n:] - weights @ joint[:n, n:]


def most_correlated(P, plan, X_new, m, earlier):
    """Earlier rows of each new row that are most correlated in the residual."""
    n, both = len(plan.X), torch.cat([plan.X, X_new])
    R = gram(P.kernel, both) - low_rank(P, plan.Z, both)
    rho = (R / (R.diagonal().unsqueeze(-1) * R.diagonal()).sqrt()).abs()
    rows = range(n, len(both))
    return [rho[i, : i if earlier else n].argsort(descending=True)[:m] for i in rows]


def test_predictions_are_those_of_the_definition():
    X, y, P, X_new = uniform(), normal(N), prior(), uniform(8, 2, seed=7)
    X_new[4] = X_new[2] + 0.01  # near enough to be preferred to data
    plan = plan_hybrid(P, X, POLICY, n_inducing=9, n_neighbors=5)
    m, v = marginals(P, plan, y, NOISE, X_new, n_neighbors=6)
    for i in range(8):
        row = X_new[i : i + 1]
        given = most_correlated(P, plan, row, 6, earlier=False)
        mean, covariance = conditioned(P, plan, X, y, NOISE, row, given)
        torch.testing.assert_close(m[i : i + 1], mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(v[i : i + 1], covariance.diagonal(), rtol=1e-9, atol=1e-9)
    given = most_correlated(P, plan, X_new, 6, earlier=True)
    assert any(bool((s >= N).any()) for s in given)
    mean, covariance = conditioned(P, plan, X, y, NOISE, X_new, given)
    m, V = joint(P, plan, y, NOISE, X_new, n_neighbors=6)
    torch.testing.assert_close(m, mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(V, covariance, rtol=1e-9, atol=1e-9)


def test_copies_among_new_rows_are_one_value():
    X, y, P = uniform(), normal(N), prior()
    plan = plan_hybrid(P, X, POLICY, n_inducing=9, n_neighbors=5)
    X_new = torch.cat([plan.Z[:2], plan.Z[:2], X[:1], X[:1]])
    m, V = joint(P, plan, y, NOISE, X_new, n_neighbors=10)
    torch.testing.assert_close(m[:2], m[2:4], rtol=0, atol=1e-6)
    torch.testing.assert_close(V[:2, :2], V[2:4, :2], rtol=0, atol=1e-6)
    torch.testing.assert_close(V[4, 4], V[4, 5], rtol=0, atol=1e-6)


def test_neighbours_are_the_most_correlated_in_the_residual():
    X, P = uniform(), prior()
    for policy in (POLICY, NumericalPolicy(chunk_elements=700)):
        plan = plan_hybrid(P, X, policy, n_inducing=12, n_neighbors=4)
        R = gram(P.kernel, plan.X) - low_rank(P, plan.Z, plan.X)
        rho = (R / (R.diagonal().unsqueeze(-1) * R.diagonal()).sqrt()).abs()
        differs = 0
        for i in range(1, N):
            expected = set(rho[i, :i].argsort(descending=True)[:4].tolist())
            assert set(neighbours(plan)[i].tolist()) == expected
            nearest = (gram(P.kernel, plan.X)[i, :i]).argsort(descending=True)[:4]
            differs += set(nearest.tolist()) != expected
        assert differs > 5  # or the residual had no say
        assert plan.notes == ()


def test_candidates_of_many_rows_are_said(monkeypatch):
    X, y, P, X_new = uniform(), normal(N), prior(), uniform(5, 2, seed=7)
    few = plan_hybrid(P, X, POLICY, n_inducing=12, n_neighbors=4)
    few_marginals = marginals(P, few, y, NOISE, X_new, N // 4 + 1)
    monkeypatch.setattr("mercer.families.hybrid_plan._MOST_PAIRS", N - 1)
    plan = plan_hybrid(P, X, POLICY, n_inducing=12, n_neighbors=4)
    assert len(plan.notes) == 1 and "16 rows" in plan.notes[0]
    R = gram(P.kernel, plan.X) - low_rank(P, plan.Z, plan.X)
    rho = (R / (R.diagonal().unsqueeze(-1) * R.diagonal()).sqrt()).abs()
    Z = plan.X / torch.tensor([0.3, 0.6], dtype=DTYPE)
    for i in range(1, N):
        near = (Z[:i] - Z[i]).square().sum(-1).argsort()[:16]
        expected = near[rho[i, near].argsort(descending=True)[:4]]
        assert set(neighbours(plan)[i].tolist()) == set(expected.tolist())
    # with all rows among the candidates nothing is lost
    for one, other in zip(marginals(P, few, y, NOISE, X_new, N // 4 + 1), few_marginals, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_kernels_without_lengthscales_take_rows_as_inducing_points():
    X, y = uniform() - 0.3, normal(N)
    X[7] = 0.0
    P = Prior(Matern32(0.3, ard=False) + Linear(1.0, ard=False))
    plan = plan_hybrid(P, X, POLICY, n_inducing=6, n_neighbors=N - 1)
    assert all(bool((z == X).all(-1).any()) for z in plan.Z)
    found = response_log_likelihood(P, plan, y, NOISE)
    torch.testing.assert_close(found, gaussian(gram(P.kernel, X) + NOISE.diag(), y), rtol=1e-8, atol=0)


def divergence(log_likelihood, C):
    """KL[N(0, C) ‖ p̂] from log p̂ at the columns of a root of C."""
    C = C.detach()
    n, root = len(C), torch.linalg.cholesky(C)
    with torch.no_grad():
        at = log_likelihood(torch.cat([torch.zeros(1, n, dtype=DTYPE), root.mT]))
    expected = float(at[0] + (at[1:] - at[0]).sum())
    entropy = -float(gaussian(C, torch.zeros(n, dtype=DTYPE))) + n / 2
    return -entropy - expected


def test_in_ten_dimensions_it_is_nearer_to_the_prior_than_vecchia():
    X, P = uniform(400, 10), Prior(Matern52(2.0, ard=False))
    noise = torch.full((1,), 0.05, dtype=DTYPE)
    C = gram(P.kernel, X) + 0.05 * torch.eye(400, dtype=DTYPE)
    full = plan_hybrid(P, X[:60], POLICY, n_inducing=10, n_neighbors=59)
    assert abs(divergence(lambda y: response_log_likelihood(P, full, y, noise), C[:60, :60])) < 1e-8
    plain = plan_columns(P, X, POLICY, n_neighbors=10)
    of_vecchia = divergence(lambda y: vecchia_log_likelihood(P, plain, y, noise), C)
    found = []
    for M in (20, 60):
        plan = plan_hybrid(P, X, POLICY, n_inducing=M, n_neighbors=10)
        found.append(divergence(lambda y, plan=plan: response_log_likelihood(P, plan, y, noise), C))
    assert 0 < found[1] < 0.5 * found[0] and found[0] < 0.5 * of_vecchia


def test_float32_stays_and_agrees():
    """Given all others the numbers do not depend on the jitter, which is larger in float32."""
    X, y, P, X_new = uniform(), normal(N), prior(), uniform(5, 2, seed=7)
    found = []
    for dtype in (torch.float64, torch.float32):
        P.kernel.to(dtype)
        plan = plan_hybrid(P, X.to(dtype), NumericalPolicy(dtype=dtype), n_inducing=12, n_neighbors=N - 1)
        data, new = (plan, y.to(dtype), NOISE.to(dtype)), X_new.to(dtype)
        found.append(
            [
                response_log_likelihood(P, *data),
                *marginals(P, *data, new, N),
                *joint(P, *data, new, N + 5),
            ]
        )
    for double, single in zip(*found, strict=True):
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="n_neighbors"):
        plan_hybrid(prior(), uniform(), POLICY, n_neighbors=0)
    X = uniform()
    X[1] = X[0]
    plan = plan_hybrid(prior(), X, POLICY, n_inducing=3, n_neighbors=N - 1)
    with pytest.raises(NotPositiveDefiniteError, match="noise"):
        # whether none at all breaks down is up to rounding
        response_log_likelihood(prior(), plan, normal(N), torch.full((N,), -1e-12, dtype=DTYPE))
    for wrong in ({"form": "both"}, {"n_inducing": -1}, {"n_neighbors": 0}, {"n_neighbors_predict": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            InducingVecchia(**wrong)
    batch = Prior(gpytorch.kernels.RBFKernel(batch_shape=torch.Size([2])).double())
    with pytest.raises(ValueError, match="batch shape"):
        plan_hybrid(batch, uniform(), POLICY)


def test_a_plan_gets_stale_when_lengthscales_move_against_each_other():
    family = InducingVecchia(n_inducing=5, n_neighbors=4)
    P = Prior(Matern32([0.3, 0.6]))
    plan = family.plan(P, uniform(), POLICY)
    for lengthscale, stale in (([0.6, 1.2], False), ([0.3, 0.8], False), ([0.3, 1.0], True)):
        P.kernel.lengthscale = torch.tensor(lengthscale, dtype=DTYPE)
        assert family.stale(P, plan) is stale


@pytest.mark.parametrize("form", ["response", "latent"])
def test_predictions_are_differentiable_in_new_rows(form):
    """Also twice from one posterior, whose own graph they must not touch, and at a row of the data."""
    X, X_new, P = uniform(), torch.cat([uniform(5, 2, seed=7), uniform()[3:4]]), prior()
    family = InducingVecchia(n_inducing=9, n_neighbors=5, n_neighbors_predict=7, form=form)
    found = family.condition(P, family.plan(P, X, POLICY), Sites(normal(2, N), 0.5 + uniform(2, N, seed=3)))
    weights = normal(4, 2, 6, seed=9)

    def value(X_new):
        mean, variance = found.marginals(X_new)
        m, V = found.joint(X_new[:3])
        total = (mean * weights[0]).sum() + (variance * weights[1]).sum() + (found.mean(X_new) * weights[2]).sum()
        return total + (m * weights[3, :, :3]).sum() + V.square().sum()

    for _ in range(2):
        rows = X_new.clone().requires_grad_()
        (slope,) = torch.autograd.grad(value(rows), rows)
    with torch.no_grad():
        for i in range(5):  # at the last row the slope is there, but the function has a kink in its neighbours
            for j in range(2):
                step = torch.zeros_like(X_new)
                step[i, j] = 1e-6
                expected = float(value(X_new + step) - value(X_new - step)) / 2e-6
                assert float(slope[i, j]) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert bool(slope.isfinite().all())


def test_candidates_without_lengthscales_let_gradients_pass(monkeypatch):
    monkeypatch.setattr("mercer.families.hybrid_plan._MOST_PAIRS", N - 1)
    monkeypatch.setattr("mercer.families.nearness._MOST_CORRELATIONS", N - 1)
    P = Prior(Matern32(0.3, ard=False) + Linear(1.0, ard=False))
    plan = plan_hybrid(P, uniform(), POLICY, n_inducing=6, n_neighbors=4)
    assert any("inputs as they are" in note for note in plan.notes)
    rows = uniform(3, 2, seed=7).requires_grad_()
    (slope,) = torch.autograd.grad(posterior(P, plan, normal(N), NOISE, 6).marginals(rows)[1].sum(), rows)
    assert bool((slope != 0).all())


def test_what_the_data_say_of_inducing_points_is_computed_once(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "mercer.families.hybrid_posterior.response_sums", lambda *args: calls.append(1) or response_sums(*args)
    )
    plan = plan_hybrid(prior(), uniform(), POLICY, n_inducing=9, n_neighbors=5)
    found = posterior(prior(), plan, normal(N), NOISE, 7).release()
    for _ in range(2):
        found.marginals(uniform(4, 2, seed=7)), found.mean(uniform(4, 2, seed=8)), found.joint(uniform(4, 2, seed=9))
    assert calls == [1]
    assert pickle.loads(pickle.dumps(found)).mean(uniform(4, 2, seed=7)).shape == (4,) and calls == [1]
