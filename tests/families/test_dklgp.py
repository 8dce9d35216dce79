"""Free-form sparse inverse Cholesky posteriors against dense Gaussians written from their definitions."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mercer._typing import Sites
from mercer.families import Exact, Family, Posterior, Prior
from mercer.families.dklgp import DoubleKL, FreeParameters, FreePosterior, divergence_terms, prior_columns
from mercer.kernels import RBF, Linear, Matern32, gram
from mercer.kernels.means import constant_mean
from mercer.linalg.sic import Pattern
from mercer.policy import NumericalPolicy

DTYPE = torch.float64
POLICY = NumericalPolicy()
N = 40


def uniform(n=N, d=2, seed=0):
    return torch.rand(n, d, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def prior(mean=None):
    return Prior(Matern32([0.3, 0.6], outputscale=1.3), None if mean is None else constant_mean(mean))


NOISE = 0.05 + 0.1 * uniform(N, 1, seed=3).squeeze(-1)
SITES = Sites(normal(N, seed=4) / NOISE, 1 / NOISE)  # noisy data λ1/λ2


def problem(m=6, variant="dkl", **options):
    P = prior()
    family = DoubleKL(variant, n_neighbors=m, **options)
    plan = family.plan(P, uniform(), POLICY)
    return P, family, plan


def dense(pattern, val):
    """The upper triangular matrix."""
    out = torch.zeros(pattern.n, pattern.n, dtype=val.dtype)
    for i, (rows, entries) in enumerate(zip(pattern.columns, val, strict=True)):
        out[rows[rows >= 0], i] = entries[rows >= 0].detach()
    return out


def sparse(pattern, matrix):
    columns = pattern.columns
    own = torch.arange(pattern.n).unsqueeze(-1)
    return matrix[columns.clamp_min(0), own].masked_fill(columns < 0, 0.0)


def full_pattern(n=N):
    return Pattern(torch.where(torch.arange(n - 1) < torch.arange(n).unsqueeze(-1), torch.arange(n - 1), -1))


def with_full_posterior(plan):
    """The same prior, and V on all of the upper triangle."""
    return replace(plan, pattern=full_pattern(), sets=full_pattern().columns)


def upper_factor(precision):
    """V with V Vᵀ = precision, upper triangular."""
    return torch.linalg.cholesky(precision.flip(0, 1)).flip(0, 1)


def prior_precision(P, plan):
    U = dense(plan.columns.pattern, prior_columns(P, plan, torch.arange(plan.pattern.n)))
    return U @ U.mT


def gaussian_kl(m, S, precision):
    """KL[N(m, S) ‖ N(0, precision⁻¹)]."""
    logdet = torch.linalg.slogdet(precision)[1] + torch.linalg.slogdet(S)[1]
    return 0.5 * ((precision * S).sum() + m @ precision @ m - len(m) - logdet)


def perturbed(plan, V, scale=0.3, seed=5):
    """Parameters near V, with a mean of their own and junk at the padding."""
    noise = normal(*V.shape, seed=seed)
    off = V[:, :-1] * (1 + scale * noise[:, :-1]) + scale * noise[:, :-1]
    mean = normal(len(V), seed=seed + 1)
    return FreeParameters(mean, off, V[:, -1].log() + scale * noise[:, -1])


def start(P, family, plan):
    return family.condition(P, plan, SITES).parameters


def ancestors(pattern):
    """Rows that each row depends on through any chain of neighbours, as solving sets."""
    found = []
    for i, row in enumerate(pattern.columns):
        own = {i}
        for j in row[:-1][row[:-1] >= 0].tolist():
            own |= found[j]
        found.append(own)
    width = max(map(len, found))
    return torch.tensor([[-1] * (width - len(each)) + sorted(each) for each in found])


# ---- the divergence


@pytest.mark.parametrize("variant", ["dkl", "mean-field", "global"])
def test_the_terms_add_up_to_the_dense_divergence(variant):
    P, family, plan = problem(variant=variant)
    parameters = perturbed(plan, start(P, family, plan).factor)
    V = dense(plan.pattern, parameters.factor)
    S = torch.linalg.inv(V @ V.mT)
    exact = divergence_terms(P, plan, parameters, exact=True)
    torch.testing.assert_close(exact.variance, S.diagonal(), rtol=1e-10, atol=0)
    torch.testing.assert_close(exact.mean, parameters.mean)
    expected = gaussian_kl(parameters.mean, S, prior_precision(P, plan))
    torch.testing.assert_close(exact.kl.sum(), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(FreePosterior(P, plan, parameters).kl(), expected, rtol=1e-9, atol=1e-9)
    if variant != "dkl":  # reduced ancestors are all of them
        for found, wanted in zip(divergence_terms(P, plan, parameters), exact, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_the_site_form_is_the_same_divergence():
    """½ [−Σ λ v + mᵀ P m + log |P + λ| − log |P|] for q with precision P + λ."""
    P, family, plan = problem(m=N - 1)
    q = family.condition(P, plan, SITES)
    precision, rate = prior_precision(P, plan), SITES.precision[plan.order]
    posterior = precision + rate.diag()
    m, S = q.parameters.mean, torch.linalg.inv(posterior)
    logs = torch.linalg.slogdet(posterior)[1] - torch.linalg.slogdet(precision)[1]
    expected = 0.5 * (-(rate * S.diagonal()).sum() + m @ precision @ m + logs)
    torch.testing.assert_close(q.kl(), expected, rtol=1e-9, atol=1e-9)


def test_a_diagonal_factor_is_mean_field_vnngp():
    """Wu, Pleiss and Cunningham (2022): Σ ½ [log F − log s − 1 + (s + bᵀ diag(s) b)/F + (m − bᵀ m)²/F]."""
    P, family, plan = problem(variant="mean-field")
    parameters = perturbed(plan, start(P, family, plan).factor)
    K, s, m = gram(P.kernel, plan.columns.X).detach(), (-2 * parameters.log_diagonal).exp(), parameters.mean
    total = 0.0
    for i, row in enumerate(plan.columns.pattern.columns):
        near = row[:-1][row[:-1] >= 0]
        b = torch.linalg.solve(K[near][:, near], K[near, i])
        F = K[i, i] - b @ K[near, i]
        total += 0.5 * (F.log() - s[i].log() - 1 + (s[i] + b.square() @ s[near]) / F + (m[i] - b @ m[near]) ** 2 / F)
    torch.testing.assert_close(divergence_terms(P, plan, parameters).kl.sum(), total, rtol=1e-8, atol=0)


def test_full_ancestors_give_the_dense_diagonal():
    P, family, plan = problem(m=3)
    parameters = perturbed(plan, start(P, family, plan).factor)
    sets = ancestors(plan.pattern)
    assert sets.shape[1] < N or int((sets < 0).sum()) > N
    full = divergence_terms(P, replace(plan, sets=sets), parameters)
    for found, wanted in zip(full, divergence_terms(P, plan, parameters, exact=True), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("n", "largest", "typical"), [(60, 1e-2, 1e-6), (250, 0.5, 1e-3)])
def test_reduced_ancestors_are_near_for_an_incomplete_factor(n, largest, typical):
    """At ρ = 2 and noise 0.1; a few of many rows are off by much, the divergence by little."""
    P, X = prior(), uniform(n)
    family = DoubleKL("dkl", n_neighbors=n - 1, rho=2.0)
    plan = family.plan(P, X, POLICY)
    assert plan.sets.shape[1] < 40
    with torch.no_grad():
        q = family.condition(P, plan, Sites(torch.zeros(n, dtype=DTYPE), torch.full((n,), 10.0, dtype=DTYPE)))
        reduced, exact = (divergence_terms(P, plan, q.parameters, exact=how) for how in (False, True))
    error = (reduced.variance / exact.variance - 1).abs()
    assert 0 < float(error.max()) < largest and float(error.median()) < typical
    assert float((reduced.kl - exact.kl).sum().abs()) < 1e-2


def test_the_prior_itself_needs_no_ancestors():
    """V = U: each solve returns a unit vector exactly, and only the mean diverges."""
    P, _, plan = problem()
    U = prior_columns(P, plan, torch.arange(N)).detach()
    terms = divergence_terms(P, plan, FreeParameters.of(torch.zeros(N, dtype=DTYPE), U))
    torch.testing.assert_close(terms.kl, torch.zeros(N, dtype=DTYPE), rtol=0, atol=1e-12)


def test_disjoint_batches_and_chunks_add_up():
    P, family, plan = problem()
    parameters = start(P, family, plan)
    whole = divergence_terms(P, plan, parameters)
    columns = replace(plan.columns, policy=NumericalPolicy(chunk_elements=3000))
    for other in (plan, replace(plan, columns=columns)):
        for exact in (False, True):
            rows = torch.randperm(N, generator=torch.Generator().manual_seed(0))
            parts = [divergence_terms(P, other, parameters, batch, exact) for batch in rows.split(7)]
            wanted = divergence_terms(P, plan, parameters, exact=True) if exact else whole
            for k in range(3):
                torch.testing.assert_close(torch.cat([p[k] for p in parts]), wanted[k][rows], rtol=1e-10, atol=1e-10)


def test_a_known_prior_factor_gives_the_same():
    P, family, plan = problem()
    q = family.condition(P, plan, SITES)
    found = divergence_terms(P, plan, q.parameters, prior_factor=q.prior_factor)
    assert torch.equal(found.kl, divergence_terms(P, plan, q.parameters).kl.detach()) and not found.kl.requires_grad


@pytest.mark.parametrize("exact", [False, True])
def test_gradients_equal_finite_differences(exact):
    P, family, plan = problem(m=4, ancestor_rho=1.0)
    parameters = perturbed(plan, start(P, family, plan).factor, scale=0.1).leaves()
    weights = normal(2, N, seed=8)

    def value():
        terms = divergence_terms(P, plan, parameters, exact=exact)
        return (weights[0] * terms.variance + weights[1] * terms.kl + terms.mean).sum()

    leaves = [*parameters.tensors(), P.kernel.raw_outputscale, P.kernel.base_kernel.raw_lengthscale]
    slopes = torch.autograd.grad(value(), leaves)
    for leaf, slope in zip(leaves, slopes, strict=True):
        direction = normal(*leaf.shape, seed=9)
        with torch.no_grad():
            values = []
            for step in (1e-5, -2e-5):
                leaf += step * direction
                values.append(float(value()))
            leaf += 1e-5 * direction
        wanted = (values[0] - values[1]) / 2e-5
        assert float((slope * direction).sum()) == pytest.approx(wanted, rel=1e-6, abs=1e-6)


def test_what_stands_at_the_padding_does_not_count():
    P, family, plan = problem()
    parameters = start(P, family, plan).leaves()
    junk = parameters.off_diagonal.detach().masked_fill(plan.pattern.padding[:, :-1], 7.0)
    assert bool((junk == 7.0).any())
    for exact in (False, True):
        terms = divergence_terms(P, plan, parameters, exact=exact)
        other = divergence_terms(P, plan, replace(parameters, off_diagonal=junk), exact=exact)
        assert torch.equal(terms.kl, other.kl)
        (slope,) = torch.autograd.grad(terms.kl.sum(), parameters.off_diagonal)
        assert bool((slope[plan.pattern.padding[:, :-1]] == 0).all())


# ---- the bound, for noisy Gaussian data


def bound(P, plan, parameters, exact=True):
    terms = divergence_terms(P, plan, parameters, exact=exact)
    y, noise = (SITES.linear / SITES.precision)[plan.order], NOISE[plan.order]
    data = -0.5 * ((2 * math.pi * noise).log() + ((y - terms.mean).square() + terms.variance) / noise)
    return float((data - terms.kl).sum().detach())


def log_evidence(K, order):
    y = (SITES.linear / SITES.precision)[order]
    covariance = K + NOISE[order].diag()
    return float(torch.distributions.MultivariateNormal(torch.zeros(N, dtype=DTYPE), covariance).log_prob(y))


def optimum(P, plan):
    """The exact posterior under the sparse prior."""
    precision = prior_precision(P, plan) + SITES.precision[plan.order].diag()
    mean = torch.linalg.solve(precision, SITES.linear[plan.order])
    return FreeParameters.of(mean, sparse(plan.pattern, upper_factor(precision)))


def test_a_complete_factor_reaches_the_evidence_of_the_sparse_prior():
    P, _, plan = problem(m=5)
    plan = with_full_posterior(plan)
    evidence = log_evidence(torch.linalg.inv(prior_precision(P, plan)), plan.order)
    assert bound(P, plan, optimum(P, plan)) == pytest.approx(evidence, abs=1e-9)
    exact = log_evidence(gram(P.kernel, plan.columns.X).detach(), plan.order)
    assert abs(evidence - exact) > 0.01  # which is another number than that of the prior itself


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-3, 0.03, 0.3, 1.0]), complete=st.booleans())
def test_nothing_exceeds_the_evidence_of_the_sparse_prior(seed, scale, complete):
    P, _, plan = problem(m=5)
    plan = with_full_posterior(plan) if complete else plan
    evidence = log_evidence(torch.linalg.inv(prior_precision(P, plan)), plan.order)
    best = optimum(P, plan)
    noise = [scale * normal(*each.shape, seed=seed + k) for k, each in enumerate(best.tensors())]
    moved = FreeParameters(*(each + step for each, step in zip(best.tensors(), noise, strict=True)))
    found = bound(P, plan, moved)
    assert found <= evidence + 1e-9
    assert not complete or found < evidence - 1e-9  # the optimum is one point


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([0.0, 0.03, 0.3]))
def test_with_all_neighbours_it_bounds_the_exact_evidence(seed, scale):
    P, family, plan = problem(m=N - 1)
    evidence = log_evidence(gram(P.kernel, plan.columns.X).detach(), plan.order)
    parameters = family.condition(P, plan, SITES).parameters
    if scale == 0.0:
        assert bound(P, plan, parameters) == pytest.approx(evidence, rel=1e-8)
    else:
        assert bound(P, plan, perturbed(plan, parameters.factor, scale, seed)) <= evidence + 1e-8


def test_sites_give_the_best_diagonal_factor():
    P, family, plan = problem(variant="mean-field")
    parameters = start(P, family, plan)
    best = bound(P, plan, parameters)
    for step in (1e-3, -1e-3):
        for i in range(0, N, 7):
            log_diagonal = parameters.log_diagonal.clone()
            log_diagonal[i] += step
            assert bound(P, plan, replace(parameters, log_diagonal=log_diagonal)) < best
    assert bound(P, *_of("dkl")) > best + 1.0


def _of(variant):
    P, family, plan = problem(variant=variant)
    return plan, start(P, family, plan)


# ---- predictions


def test_all_neighbours_and_the_exact_factor_predict_as_the_exact_process():
    P, X, X_new = prior(mean=0.7), uniform(), torch.cat([uniform(8, 2, seed=7), uniform()[3:5]])
    family = DoubleKL(n_neighbors=N - 1)
    plan = replace(family.plan(P, X, POLICY), n_neighbors_new=N + 10)
    q, twin = family.condition(P, plan, SITES), Exact()
    twin = twin.condition(P, twin.plan(P, X, POLICY), SITES)
    assert isinstance(q, Posterior) and isinstance(family, Family)
    with torch.no_grad():
        for found, wanted in (
            (q.mean(X_new), twin.mean(X_new)),
            *zip(q.marginals(X_new), twin.marginals(X_new), strict=True),
            *zip(q.joint(X_new), twin.joint(X_new), strict=True),
            *zip(q.at_data(), twin.at_data(), strict=True),
            (q.mean_at_data, twin.mean_at_data),
            (q.kl(), twin.kl()),
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-7 if found.dim() else 1e-8)
        rows = X_new[:8]  # none of the data
        for found, wanted in zip(q.joint(rows), twin.joint(rows), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)
        again = family.variational(P, plan, q.parameters).release()
        assert torch.equal(again.mean(X_new), q.mean(X_new)) and q.jitter == 0.0 and not q.pathwise


@pytest.mark.parametrize("variant", ["dkl", "mean-field"])
def test_marginals_hold_the_covariances_of_neighbours(variant):
    P, family, plan = problem(variant=variant)
    X_new = uniform(5, 2, seed=7)
    with torch.no_grad():
        q = family.condition(P, plan, SITES)
        V = dense(plan.pattern, q.parameters.factor)
        S = torch.linalg.inv(V @ V.mT)
        mean, variance = q.marginals(X_new)
        split = FreePosterior(
            P, replace(plan, columns=replace(plan.columns, policy=NumericalPolicy(chunk_elements=1))), q.parameters
        ).marginals(X_new)
    K, X = gram(P.kernel, plan.columns.X).detach(), plan.columns.X
    scale = torch.tensor([0.3, 0.6], dtype=DTYPE)
    for i, row in enumerate(X_new):
        near = ((X - row) / scale).square().sum(-1).argsort()[: 2 * 6]
        k = gram(P.kernel, X[near], row.unsqueeze(0)).detach().squeeze(-1)
        b = torch.linalg.solve(K[near][:, near], k)
        own = 1.3 - b @ k
        torch.testing.assert_close(mean[i], b @ q.parameters.mean[near], rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(variance[i], own + b @ S[near][:, near] @ b, rtol=1e-8, atol=1e-8)
        if variant == "dkl":
            assert abs(float(own + b.square() @ S.diagonal()[near] - variance[i])) > 1e-4
    for found, wanted in zip(split, (mean, variance), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_draws_have_the_moments_of_the_joint():
    """20 000 draws within six standard errors."""
    P, family, plan = problem()
    X_new, k = uniform(4, 2, seed=7), 20_000
    with torch.no_grad():
        q = family.condition(P, plan, SITES)
        mean, covariance = q.joint(X_new)
        draws = q.sample(X_new, k, torch.Generator().manual_seed(0))
        assert torch.equal(draws, q.sample(X_new, k, torch.Generator().manual_seed(0)))
    gap = draws - mean
    assert bool((gap.mean(0).abs() < 6 * (covariance.diagonal() / k).sqrt()).all())
    error = ((covariance.diagonal().unsqueeze(-1) * covariance.diagonal() + covariance.square()) / k).sqrt()
    assert bool(((gap.mT @ gap / k - covariance).abs() < 6 * error).all())


# ---- plans


def test_the_global_pattern_is_the_first_rows():
    _, _, plan = problem(m=5, variant="global")
    for i, row in enumerate(plan.columns.pattern.columns.tolist()):
        assert [j for j in row if j >= 0] == [*range(min(i, 5)), i]
    assert torch.equal(plan.sets, plan.columns.pattern.columns) and plan.pattern is plan.columns.pattern


def test_a_kernel_without_lengthscales_is_planned_by_correlation():
    P = Prior(Matern32(0.3, ard=False) + Linear(1.0, ard=False))
    plan = DoubleKL(n_neighbors=6, ancestor_rho=1.5, n_ancestors=N).plan(
        P, uniform() - 0.3, NumericalPolicy(chunk_elements=700)
    )
    K = gram(P.kernel, plan.columns.X).detach()
    away = (1 - (K / (K.diagonal() * K.diagonal().unsqueeze(-1)).sqrt()).abs()).clamp_min(0).sqrt()
    for i in range(N):
        within = (away[i, :i] <= 1.5 * plan.columns.distance[:i]).nonzero().squeeze(-1).tolist()
        own = plan.columns.pattern.columns[i]
        assert set(plan.sets[i][plan.sets[i] >= 0].tolist()) == set(within) | set(own[own >= 0].tolist())


def test_the_nugget_is_part_of_the_prior_everywhere():
    X, eta = uniform(), 0.2 * 1.3
    P, K = prior(), gram(prior().kernel, uniform()).detach()
    family = DoubleKL(n_neighbors=N - 1, nugget=0.2)
    plan = family.plan(P, X, POLICY)
    noisy = K[plan.order][:, plan.order] + eta * torch.eye(N, dtype=DTYPE)
    torch.testing.assert_close(prior_precision(P, plan), torch.linalg.inv(noisy), rtol=1e-8, atol=1e-8)
    q = family.condition(P, plan, Sites(torch.zeros(N, dtype=DTYPE), torch.zeros(N, dtype=DTYPE)))
    with torch.no_grad():
        _, covariance = replaced(q, N + 5).joint(uniform(5, 2, seed=7))
    wanted = gram(P.kernel, uniform(5, 2, seed=7)).detach() + eta * torch.eye(5, dtype=DTYPE)
    torch.testing.assert_close(covariance, wanted, rtol=1e-7, atol=1e-7)


def test_a_smooth_kernel_gets_the_nugget_that_it_needs_once_for_all():
    n = 200
    P, family = Prior(RBF([1.0, 1.0])), DoubleKL(n_neighbors=20)
    plan = family.plan(P, uniform(n), POLICY)
    q = family.condition(P, plan, Sites(torch.zeros(n, dtype=DTYPE), torch.full((n,), 10.0, dtype=DTYPE)))
    assert 0 < plan.columns.nugget.value < 1e-4
    with torch.no_grad():  # every batch of columns has the same one
        columns = prior_columns(P, plan, torch.arange(n))
        torch.testing.assert_close(columns, q.prior_factor, rtol=1e-6, atol=1e-6 * float(columns.max()))
        assert bool((q.marginals(uniform(5, 2, seed=7))[1] < 0.2).all())


def replaced(q, n_neighbors_new):
    return FreePosterior(q.prior, replace(q.plan, n_neighbors_new=n_neighbors_new), q.parameters)


def test_float32_stays_float32():
    policy = NumericalPolicy(dtype=torch.float32)
    P = Prior(prior().kernel.float())
    family = DoubleKL(n_neighbors=6)
    plan = family.plan(P, uniform().float(), policy)
    q = family.condition(P, plan, Sites(SITES.linear.float(), SITES.precision.float()))
    reference = problem()
    wanted = divergence_terms(reference[0], reference[2], start(*reference))
    with torch.no_grad():
        for found, value in zip(divergence_terms(P, plan, q.parameters), wanted, strict=True):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), value.detach(), rtol=1e-3, atol=1e-3)
        assert all(each.dtype == torch.float32 for each in q.joint(uniform(3, 2, seed=7).float()))


def test_one_row_is_a_posterior_too():
    P, family = prior(), DoubleKL(n_neighbors=3)
    plan = family.plan(P, uniform(1), POLICY)
    q = family.condition(P, plan, Sites(torch.tensor([3.0], dtype=DTYPE), torch.tensor([2.0], dtype=DTYPE)))
    np.testing.assert_allclose(float(q.variance_at_data), 1 / (1 / 1.3 + 2), rtol=1e-8)
    np.testing.assert_allclose(float(q.mean(uniform(1)).detach()), 3 / (1 / 1.3 + 2), rtol=1e-6)


def test_an_unknown_variant_is_named():
    with pytest.raises(ValueError, match="mean-field"):
        DoubleKL("diagonal")
