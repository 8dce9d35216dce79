"""The hybrid prior under Gaussian sites against dense algebra."""

import pytest
import torch

from mercer._typing import Sites
from mercer.families import InducingVecchia, Prior
from mercer.families.hybrid_plan import Residual, plan_hybrid
from mercer.kernels import Matern32, gram, hyperparameters
from mercer.linalg.cholesky import NotPositiveDefiniteError
from mercer.policy import NumericalPolicy

DTYPE = torch.float64
POLICY = NumericalPolicy()
N = 40
FORMS = ("auto", "response", "latent")


def uniform(n=N, d=2, seed=0):
    return torch.rand(n, d, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def prior():
    return Prior(Matern32([0.3, 0.6], outputscale=1.3))


def sites(smallest=0.0):
    precision = 4.0 * uniform(2, N, seed=3)
    precision[:, 0] = smallest
    return Sites(3.0 * normal(2, N), precision)


def condition(P, plan, sites, n_neighbors=60):
    return InducingVecchia(n_neighbors_predict=n_neighbors, form="latent").condition(P, plan, sites)


def dense(K, sites, b):
    """log Z, and the mean and covariance of g at data and new rows, from the covariance K of both."""
    linear, D = sites.linear[b], sites.precision[b].diag()
    n = len(linear)
    inside = torch.eye(n, dtype=DTYPE) + K[:n, :n] @ D
    mean = K[:, :n] @ torch.linalg.solve(inside.mT, linear)
    covariance = K - K[:, :n] @ D @ torch.linalg.solve(inside, K[:n])
    return 0.5 * linear @ mean[:n] - 0.5 * torch.logdet(inside), mean, covariance


def hybrid_covariance(P, plan):
    """Covariance of g at the rows, in the order of the data: Φ Φᵀ + (U Uᵀ)⁻¹ from the posterior's U."""
    n = len(plan.X)
    zeros = torch.zeros(n, dtype=DTYPE)
    posterior = condition(P, plan, Sites(zeros, zeros))
    U = torch.zeros(n, n, dtype=DTYPE)
    for i, (rows, values) in enumerate(zip(plan.pattern.columns, posterior.U, strict=True)):
        U[rows[rows >= 0], i] = values[rows >= 0]
    residual = Residual(P.kernel, plan.Z, POLICY)
    phi = residual.points(plan.X).features
    back = plan.order.argsort()
    return (phi @ phi.mT + torch.linalg.inv(U @ U.mT))[back][:, back].detach()


def close(found, expected, rtol=1e-8, atol=1e-8):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("smallest", [0.0, -0.1])
@pytest.mark.parametrize("M", [0, 1, 10, N])
def test_all_earlier_rows_give_the_exact_posterior(M, smallest):
    X, X_new, P, t = uniform(), torch.cat([uniform(6, 2, seed=7), uniform()[:1]]), prior(), sites(smallest)
    plan = plan_hybrid(P, X, POLICY, n_inducing=M, n_neighbors=N - 1)
    posterior = condition(P, plan, t, N + 7)
    log_z, mean, variance = posterior.site_terms()
    K = gram(P.kernel, torch.cat([X, X_new])).detach()
    marginals, joint = posterior.marginals(X_new), posterior.joint(X_new)
    product = posterior.covariance_product(t.linear)
    for b in range(2):
        exact_log_z, m, C = dense(K, t, b)
        close(log_z[b], exact_log_z)
        close(mean[b], m[:N])
        close(variance[b], C.diagonal()[:N])
        close(product[b], C[:N, :N] @ t.linear[b])
        close(marginals[0][b], m[N:])
        close(marginals[1][b], C.diagonal()[N:])
        close(joint[0][b], m[N:])
        close(joint[1][b], C[N:, N:])


def test_few_neighbours_have_the_exact_mean_under_their_prior():
    X, P, t = uniform(), prior(), sites()
    plan = plan_hybrid(P, X, POLICY, n_neighbors=6, Z=X[:10])  # nothing is left at ten of the rows
    posterior = condition(P, plan, t)
    K = hybrid_covariance(P, plan)
    log_z, mean, variance = posterior.site_terms()
    product = posterior.covariance_product(t.linear)
    missing = posterior.precision.missing_logdet(torch.sign(normal(4000, 2, N, seed=5)), 20).mean(0)
    for b in range(2):
        exact_log_z, m, C = dense(K, t, b)
        close(mean[b], m, rtol=1e-7, atol=1e-7)
        close(product[b], C @ t.linear[b], rtol=1e-7, atol=1e-7)
        # V leaves something out of determinant and variances; what it is of the determinant, quadrature tells
        torch.testing.assert_close(variance[b], C.diagonal(), rtol=0.02, atol=0)
        assert abs(float(log_z[b].detach() - exact_log_z)) < 0.05
        close(log_z[b] - 0.5 * missing[b], exact_log_z, rtol=0, atol=1e-3)


def test_mean_and_variance_are_slopes_of_the_normaliser():
    X, P, t = uniform(), prior(), sites(0.3)
    plan = plan_hybrid(P, X, POLICY, n_inducing=8, n_neighbors=5)
    t.linear.requires_grad_(), t.precision.requires_grad_()
    log_z, mean, variance = condition(P, plan, t).site_terms()
    by_linear, by_precision = torch.autograd.grad(log_z.sum(), [t.linear, t.precision])
    close(by_linear, mean)
    close(-2.0 * by_precision - mean.square(), variance)


@pytest.mark.parametrize("chunk", [4_000_000, 500])
def test_gradients_equal_central_differences(chunk):
    X, P, t = uniform(), prior(), sites(0.3)
    plan = plan_hybrid(P, X, NumericalPolicy(chunk_elements=chunk), n_inducing=9, n_neighbors=5)
    weights = normal(3, 2, N, seed=9)

    def value():
        posterior = condition(P, plan, t, 5)
        with torch.no_grad():
            _ = posterior.marginals(X[:2])  # what it computed must not lose the gradients of others
        log_z, mean, variance = posterior.site_terms()
        return (log_z * weights[0, :, 0]).sum() + (mean * weights[1]).sum() + (variance * weights[2]).sum()

    t.linear.requires_grad_(), t.precision.requires_grad_()
    leaves = [item.parameter for item in hyperparameters(P.kernel)] + [t.linear, t.precision]
    for leaf, slope in zip(leaves, torch.autograd.grad(value(), leaves), strict=True):
        for index in range(min(leaf.numel(), 4)):
            with torch.no_grad():
                values = []
                for step in (1e-5, -1e-5):
                    leaf.view(-1)[index] += step
                    values.append(float(value()))
                    leaf.view(-1)[index] -= step
            expected = (values[0] - values[1]) / 2e-5
            assert float(slope.reshape(-1)[index]) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_chunks_and_batch_do_not_matter():
    X, X_new, P, t = uniform(), uniform(7, 2, seed=7), prior(), sites()
    found = []
    for chunk in (4_000_000, 700, 1):
        plan = plan_hybrid(P, X, NumericalPolicy(chunk_elements=chunk), n_inducing=9, n_neighbors=5)
        posterior = condition(P, plan, t, 7)
        found.append([*posterior.site_terms(), *posterior.marginals(X_new), *posterior.joint(X_new)])
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            close(other, one)
    other = condition(P, plan, Sites(t.linear + 1.0, t.precision + 1.0))
    _ = other.site_terms()
    other = other.with_sites(t)
    close(other.site_terms()[0], found[0][0])
    for b in range(2):
        alone = condition(P, plan, Sites(t.linear[b], t.precision[b]), 7)
        member = [*alone.site_terms(), *alone.marginals(X_new), *alone.joint(X_new)]
        for one, other in zip(found[0], member, strict=True):
            close(other, one[b])


def test_draws_have_the_moments_of_joint():
    X, X_new, P, t = uniform(), uniform(4, 2, seed=7), prior(), sites()
    plan = plan_hybrid(P, X, POLICY, n_inducing=9, n_neighbors=6)
    posterior = condition(P, plan, t, 8)
    n_draws = 4000
    draws = posterior.sample(X_new, n_draws, torch.Generator().manual_seed(7))
    assert torch.equal(draws, posterior.sample(X_new, n_draws, torch.Generator().manual_seed(7)))
    mean, covariance = posterior.joint(X_new)
    gap = draws - mean
    for values, expected in ((draws, mean), (gap.unsqueeze(-1) * gap.unsqueeze(-2), covariance)):
        error = values.std(0) / n_draws**0.5
        assert ((values.mean(0) - expected).abs() <= 5.0 * error).all()


def test_copies_of_rows_take_a_nugget():
    X = uniform()
    X[1] = X[0]
    P, t = prior(), sites()
    plan = plan_hybrid(P, X, POLICY, n_inducing=9, n_neighbors=N - 1)
    posterior = condition(P, plan, t, N + 3)
    _ = posterior.U
    assert posterior.jitter == 1e-8  # what the numbers may be off by, times those of a precision
    X_new = torch.cat([X[:1], plan.Z[:1], plan.Z[:1]])
    K = gram(P.kernel, torch.cat([X, X_new])).detach()
    log_z, mean, _ = posterior.site_terms()
    marginals, joint = posterior.marginals(X_new), posterior.joint(X_new)
    for b in range(2):
        exact_log_z, m, C = dense(K, t, b)
        close(log_z[b], exact_log_z, rtol=0, atol=1e-5)
        close(mean[b], m[:N], rtol=0, atol=1e-5)
        for found, variance in ((marginals, C.diagonal()[N:]), (joint, C[N:, N:])):
            close(found[0][b], m[N:], rtol=0, atol=1e-5)
            close(found[1][b], variance, rtol=0, atol=1e-5)


def test_sites_that_outweigh_the_prior_are_refused():
    plan = plan_hybrid(prior(), uniform(), POLICY, n_inducing=9, n_neighbors=6)
    with pytest.raises(NotPositiveDefiniteError):
        condition(prior(), plan, Sites(normal(N), torch.full((N,), -3.0, dtype=DTYPE))).site_terms()


def test_sites_decide_the_form():
    plan, y = plan_hybrid(prior(), uniform(), POLICY, n_inducing=9, n_neighbors=6), normal(N)
    some = (torch.arange(N) % 3 > 0).double()
    for linear, precision, latent in (
        (y, 1.0 + some, False),
        (y * some, some, False),
        (y, some, True),
        (y, some - 0.01, True),
    ):
        found = {form: InducingVecchia(form=form).condition(prior(), plan, Sites(linear, precision)) for form in FORMS}
        assert [found[form].latent for form in FORMS] == [latent, latent, True]
        found = found["auto"].confess().notes[-2 if latent else -1]
        assert "9 inducing points" in found and ("latent function" if latent else "noisy data") in found


def test_both_forms_agree_where_they_are_exact():
    X, t, X_new = uniform(), sites(0.2), uniform(4, 2, seed=7)
    plan = plan_hybrid(prior(), X, POLICY, n_inducing=9, n_neighbors=N - 1)
    response, latent = (InducingVecchia(form=form).condition(prior(), plan, t) for form in ("response", "latent"))
    close(response.log_evidence(), latent.log_evidence())
    for one, other in zip(response.joint(X_new), latent.joint(X_new), strict=True):
        close(one, other)


def test_a_released_posterior_is_the_same_and_holds_no_graph():
    X, X_new, t = uniform(), uniform(4, 2, seed=7), sites(0.2)
    plan = plan_hybrid(prior(), X, POLICY, n_inducing=9, n_neighbors=5)
    for form in FORMS:
        found = InducingVecchia(form=form).condition(prior(), plan, t)
        expected = [*found.at_data(), *found.marginals(X_new), *found.joint(X_new)]
        found.release()
        assert found._prior_factor is None and found._features is None
        assert not found._known.L.requires_grad and not found._rows[0].L.requires_grad
        for one, other in zip([*found.at_data(), *found.marginals(X_new), *found.joint(X_new)], expected, strict=True):
            assert torch.equal(one, other)
