"""Three expressions of KL[q ‖ p], which agree for every kind of sites."""

import pytest
import torch
from toys import gram_matrix, normal, problem

from mercer._typing import Sites

POSITIVE = Sites(normal(9, seed=1), 0.1 + normal(9, seed=2).square())
SITES = {
    "positive": POSITIVE,
    "some negative": Sites(POSITIVE.linear, POSITIVE.precision - 0.3),
    "some missing": Sites(POSITIVE.linear * (torch.arange(9) % 2), POSITIVE.precision * (torch.arange(9) % 2)),
    "huge": Sites(1e6 * POSITIVE.linear, 1e6 * POSITIVE.precision),
}


@pytest.mark.parametrize("name", SITES)
@torch.no_grad()
def test_kl_of_the_posterior_equals_the_forms_in_B_and_in_dense_matrices(name):
    sites = SITES[name]
    model, plan, data = problem("gaussian", mean=None)
    K = gram_matrix(model, data)
    posterior = model.family.condition(model.prior, plan, sites)
    m, S = posterior.joint(data.X)
    # ½ [log|B| + tr B⁻¹ − n + λ1ᵀ S K⁻¹ S λ1] with B = I + Lᵀ Λ2 L, whitened by K = L Lᵀ
    L = torch.linalg.cholesky(K)
    B = torch.eye(9, dtype=K.dtype) + L.T @ sites.precision.diag() @ L
    whitened = torch.linalg.solve(B, L.T @ sites.linear)
    in_B = 0.5 * (torch.linalg.slogdet(B)[1] + torch.linalg.inv(B).trace() - 9 + whitened.square().sum())
    dense = torch.linalg.solve(K, S + m.outer(m)).trace() - 9 + torch.linalg.slogdet(K)[1] - torch.linalg.slogdet(S)[1]
    size = max(1.0, float(in_B))
    assert abs(float(posterior.kl() - in_B)) < 1e-9 * size
    assert abs(float(posterior.kl() - 0.5 * dense)) < 1e-8 * size


@torch.no_grad()
def test_kl_of_the_prior_is_zero_and_grows_with_information():
    model, plan, _ = problem("gaussian", mean=None)

    def kl(factor):
        sites = Sites(factor * POSITIVE.linear, factor * POSITIVE.precision)
        return float(model.family.condition(model.prior, plan, sites).kl())

    values = [kl(factor) for factor in (0.0, 0.1, 1.0, 10.0)]
    assert values[0] == 0.0 and values == sorted(values)
