"""Three expressions of KL[q(u) ‖ p(u)] and three coordinates of dual parameters agree, for all kinds of sites."""

import pytest
import torch
from inducing_toys import Z, kernel_of, problem
from oracles import inducing as oracle
from toys import X_NEW, X, normal

from mercer._typing import Sites

POSITIVE = Sites(normal(9, seed=1), 0.1 + normal(9, seed=2).square())
SITES = {
    "positive": POSITIVE,
    "some negative": Sites(POSITIVE.linear, POSITIVE.precision - 0.3),
    "some missing": Sites(POSITIVE.linear * (torch.arange(9) % 2), POSITIVE.precision * (torch.arange(9) % 2)),
    "fewer than places": Sites(POSITIVE.linear * (torch.arange(9) < 2), POSITIVE.precision * (torch.arange(9) < 2)),
    "huge": Sites(1e6 * POSITIVE.linear, 1e6 * POSITIVE.precision),
}
Kuu, Kuf, Kff = oracle.covariances(kernel_of(), Z, X)


def conditioned(sites):
    model, plan, _ = problem("gaussian", mean=None)
    return model.family.condition(model.prior, plan, sites)


@pytest.mark.parametrize("name", SITES)
@torch.no_grad()
def test_kl_of_the_posterior_equals_the_forms_in_B_and_in_dense_matrices(name):
    sites = SITES[name]
    posterior = conditioned(sites)
    m, S = oracle.q_of_sites(Kuu, Kuf, sites.linear, sites.precision)
    # ½ [log|B| + tr B⁻¹ − m + ‖B⁻¹ ν_w‖²]
    W = torch.linalg.solve(torch.linalg.cholesky(Kuu), Kuf)
    B = torch.eye(4, dtype=X.dtype) + W @ sites.precision.diag() @ W.T
    mean = torch.linalg.solve(B, W @ sites.linear)
    in_B = 0.5 * (torch.linalg.slogdet(B)[1] + torch.linalg.inv(B).trace() - 4 + mean.square().sum())
    terms = max(1.0, float(sites.precision.abs().sum()))  # that cancel
    assert abs(float(posterior.kl() - in_B)) < 1e-14 * terms
    assert abs(float(oracle.kl(Kuu, m, S) - in_B)) < 1e-13 * terms
    # E_q[log t(u)] − log ∫ p(u) t(u) du with the tied t
    tied = posterior.tied()
    log_t = tied.linear @ m - 0.5 * (tied.precision * (S + m.outer(m))).sum()
    log_z = 0.5 * (tied.linear @ m + torch.linalg.slogdet(S)[1] - torch.linalg.slogdet(Kuu)[1])
    assert abs(float(log_t - log_z - in_B)) < 1e-13 * terms


@pytest.mark.parametrize("form", ["U", "K", "W"])
@pytest.mark.parametrize("name", SITES)
@torch.no_grad()
def test_every_form_of_the_dual_parameters_gives_the_same_process(name, form):
    sites, kernel = SITES[name], kernel_of()
    posterior = conditioned(sites)
    tied = posterior.tied()
    q = oracle.q_of_form("U", Kuu, tied.linear, tied.precision)
    first, second = oracle.dual_form(form, Kuu, *q)
    q = oracle.q_of_form(form, Kuu, first, second)
    mean, covariance = oracle.predict(Kuu, kernel(Z, X_NEW), kernel(X_NEW, X_NEW), *q)
    found = posterior.joint(X_NEW)
    torch.testing.assert_close(found[0], mean, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found[1], covariance, rtol=1e-11, atol=1e-11)
    if form == "W":
        root = posterior.state.root
        torch.testing.assert_close(root @ root.mT, torch.eye(4, dtype=X.dtype) + second, rtol=1e-11, atol=1e-11)
