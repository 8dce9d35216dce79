"""Conditioning N(0, K) on Gaussian sites against dense inverses, with its adjoint."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mercer.linalg.cholesky import NotPositiveDefiniteError
from mercer.linalg.conditioning import ConditionOnSites, factor_sites
from mercer.policy import NumericalPolicy

DTYPE = torch.float64
POLICY = NumericalPolicy()
N = 6


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def covariance(*shape, seed=0):
    root = normal(*shape, shape[-1], seed=seed)
    return root @ root.mT / shape[-1] + 0.5 * torch.eye(shape[-1], dtype=DTYPE)


def dense(K, linear, precision):
    """Mean, covariance and log|I + K Λ2| of one latent, by inverting twice."""
    V = torch.linalg.inv(torch.linalg.inv(K) + precision.diag())
    eye = torch.eye(len(K), dtype=K.dtype)
    return V @ linear, V, torch.linalg.slogdet(eye + K * precision)[1]


def close(found, expected, rtol=1e-8):
    expected = torch.as_tensor(expected)
    size = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found, expected, rtol=0, atol=rtol * size)


SOME = torch.arange(N) % 3 == 0
# name: (K, λ1, λ2)
CASES = {
    "one latent": (covariance(N), normal(N, seed=1), normal(N, seed=2).square()),
    "one row": (covariance(1), normal(1, seed=1), normal(1, seed=2).square()),
    "some zero precisions": (covariance(N), normal(N, seed=1) * ~SOME, normal(N, seed=2).square() * ~SOME),
    "slopes without precision": (covariance(N), normal(N, seed=1), normal(N, seed=2).square() * ~SOME),
    "no precision at all": (covariance(N), normal(N, seed=1), torch.zeros(N, dtype=DTYPE)),
    "some negative": (covariance(N), normal(N, seed=1), normal(N, seed=2).square() - 0.25 * SOME),
    "all negative": (covariance(N), normal(N, seed=1), torch.full((N,), -0.1, dtype=DTYPE)),
    "shared K": (covariance(N), normal(3, N, seed=1), normal(3, N, seed=2).square()),
    "shared K and precision": (covariance(N), normal(3, N, seed=1), normal(N, seed=2).square()),
    "shared K, negative in one member": (
        covariance(N),
        normal(2, N, seed=1),
        torch.stack([normal(N, seed=2).square(), normal(N, seed=3).square() - 0.2]),
    ),
    "a K for each": (covariance(3, N), normal(3, N, seed=1), normal(3, N, seed=2).square()),
    "a K for each, shared sites": (covariance(3, N), normal(N, seed=1), normal(N, seed=2).square()),
    "two batch dimensions": (covariance(2, 1, N), normal(2, 3, N, seed=1), normal(3, N, seed=2).square()),
}


def members(K, linear, precision):
    """Every latent of the broadcast batch, with its index."""
    batch = torch.broadcast_shapes(K.shape[:-2], linear.shape[:-1], precision.shape[:-1])
    n = K.shape[-1]
    for where in itertools.product(*map(range, batch)):
        yield where, K.expand(*batch, n, n)[where], linear.expand(*batch, n)[where], precision.expand(*batch, n)[where]


@pytest.mark.parametrize("name", CASES)
def test_the_factor_describes_the_dense_posterior(name):
    K, linear, precision = CASES[name]
    kept = [item.clone() for item in CASES[name]]
    factor = factor_sites(K, linear, precision, POLICY)
    assert factor.jitter == 0.0
    batch = torch.broadcast_shapes(K.shape[:-2], linear.shape[:-1], precision.shape[:-1])
    T, D = factor.reduce(K)
    taken = T.mT @ T - (0.0 if D is None else D.mT @ D)
    for where, Ki, li, pi in members(K, linear, precision):
        mean, V, logdet = dense(Ki, li, pi)
        close((K @ factor.residual.unsqueeze(-1)).squeeze(-1).expand(*batch, -1)[where], mean)
        close((K - taken).expand(*batch, -1, -1)[where], V)
        close(factor.reduction(K).expand(*batch, -1)[where], (Ki - V).diagonal())
        close(factor.logdet.expand(batch)[where], logdet)
    for item, before in zip(CASES[name], kept, strict=True):
        assert torch.equal(item, before)


@pytest.mark.parametrize("variance", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_differentiable_outputs_equal_the_dense_posterior(name, variance):
    K, linear, precision = CASES[name]
    residual, logdet, v = ConditionOnSites.apply(K, linear, precision, POLICY, variance)
    batch = torch.broadcast_shapes(K.shape[:-2], linear.shape[:-1], precision.shape[:-1])
    for where, Ki, li, pi in members(K, linear, precision):
        mean, V, expected = dense(Ki, li, pi)
        close((K @ residual.unsqueeze(-1)).squeeze(-1).expand(*batch, -1)[where], mean)
        close(logdet.expand(batch)[where], expected)
        close(v.expand(*batch, -1)[where], V.diagonal())


@pytest.mark.parametrize("variance", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_adjoint_passes_gradcheck(name, variance):
    K, linear, precision = CASES[name]
    # a finite difference may not carry a site across zero: there λ2 = 0 is moved by its own test
    precision = torch.where(precision == 0, 1e-3, precision)

    def outputs(root, linear, precision):
        symmetric = root @ root.mT
        residual, logdet, v = ConditionOnSites.apply(symmetric, linear, precision, POLICY, variance)
        return (residual, logdet, v) if variance else (residual, logdet)

    inputs = (torch.linalg.cholesky(K), linear, precision)
    leaves = [item.clone().requires_grad_() for item in inputs]
    assert torch.autograd.gradcheck(outputs, leaves, eps=1e-5, rtol=1e-6, atol=1e-7)


def test_gradients_at_zero_precision_are_the_limit_from_both_sides():
    K, linear, precision = CASES["slopes without precision"]

    def gradients(shift):
        inputs = [K.clone(), linear.clone(), precision + shift * SOME]
        for item in inputs:
            item.requires_grad_()
        residual, logdet, v = ConditionOnSites.apply(*inputs, POLICY, True)
        total = (residual * normal(N, seed=4)).sum() + logdet + (v * normal(N, seed=5)).sum()
        return torch.autograd.grad(total, inputs)

    for at, above, below in zip(gradients(0.0), gradients(1e-4), gradients(-1e-4), strict=True):
        close(at, 0.5 * (above + below), rtol=1e-6)  # what is left is of second order in the shift


def test_variance_is_not_differentiable_unless_asked_for():
    K, linear, precision = CASES["one latent"]
    _, logdet, v = ConditionOnSites.apply(K.clone().requires_grad_(), linear, precision, POLICY, False)
    assert logdet.requires_grad and not v.requires_grad


def test_negative_sites_are_accepted_exactly_as_long_as_the_posterior_exists():
    K, linear = torch.tensor([[2.0]], dtype=DTYPE), torch.tensor([1.0], dtype=DTYPE)
    factor = factor_sites(K, linear, torch.tensor([-0.5 + 1e-6], dtype=DTYPE), POLICY)
    close(factor.logdet, torch.tensor(2e-6, dtype=DTYPE).log(), rtol=1e-8)
    with pytest.raises(NotPositiveDefiniteError, match="outweigh the prior"):
        factor_sites(K, linear, torch.tensor([-0.5 - 1e-6], dtype=DTYPE), POLICY)


def test_a_negative_site_may_exceed_its_prior_where_others_hold_the_posterior():
    K = torch.tensor([[1.0, 0.99], [0.99, 1.0]], dtype=DTYPE)
    linear, precision = normal(2, seed=1), torch.tensor([100.0, -1.5], dtype=DTYPE)
    factor = factor_sites(K, linear, precision, POLICY)
    mean, V, logdet = dense(K, linear, precision)
    close(K @ factor.residual, mean)
    close(K.diagonal() - factor.reduction(K), V.diagonal())
    close(factor.logdet, logdet)


@pytest.mark.parametrize("size", [1e-300, 1e-14, 1e-8])
def test_tiny_precisions_give_the_prior_and_their_slopes_in_full(size):
    K, linear = covariance(N), normal(N, seed=1)
    precision = size * normal(N, seed=2).square()
    factor = factor_sites(K, linear, precision, POLICY)
    # to first order in the precision
    close(K @ factor.residual, K @ linear, rtol=1e2 * max(size, 1e-15))
    close(factor.logdet, (precision * K.diagonal()).sum(), rtol=1e-14)
    residual, _, v = ConditionOnSites.apply(K, linear, precision, POLICY, False)
    close(K @ residual, K @ linear, rtol=1e2 * max(size, 1e-15))
    close(v, K.diagonal(), rtol=1e2 * max(size, 1e-15))


@pytest.mark.parametrize("size", [1e6, 1e12, 1e15])
def test_huge_precisions_interpolate(size):
    K, y = covariance(N), normal(N, seed=1)
    precision = torch.full((N,), size, dtype=DTYPE)
    residual, logdet, v = ConditionOnSites.apply(K, precision * y, precision, POLICY, False)
    close(K @ residual, y, rtol=10 / size + 1e-13)
    close(logdet, torch.linalg.slogdet(K)[1] + N * precision[0].log(), rtol=1e2 / size + 1e-13)
    close(size * v, torch.ones(N, dtype=DTYPE), rtol=10 / size + 1e-13)


def test_mixed_magnitudes_keep_every_site():
    """A site of 1e-10 beside one of 1e10: neither disturbs the other."""
    K = torch.eye(2, dtype=DTYPE)
    linear, precision = torch.tensor([1e10, 3.0], dtype=DTYPE), torch.tensor([1e10, 1e-10], dtype=DTYPE)
    residual, logdet, v = ConditionOnSites.apply(K, linear, precision, POLICY, False)
    torch.testing.assert_close(residual, linear / (1 + precision), rtol=1e-12, atol=0)
    torch.testing.assert_close(v, 1 / (1 + precision), rtol=1e-9, atol=0)
    torch.testing.assert_close(logdet, precision.log1p().sum(), rtol=1e-12, atol=0)


def test_each_latent_solves_for_the_rows_that_it_hardly_sees_itself():
    """Seen, hardly seen and unseen rows differ between latents; every variance keeps its digits."""
    K, linear = covariance(N), normal(3, N, seed=1)
    precision = normal(3, N, seed=2).square() + 0.1
    precision[0, 1], precision[1, 2:4], precision[2, 0] = 1e-9, 1e-20, 0.0
    expected = torch.stack([dense(K, *site)[1].diagonal() for site in zip(linear, precision, strict=True)])
    close(factor_sites(K, linear, precision, POLICY).variance_at_sites(K, precision), expected, rtol=1e-9)
    close(ConditionOnSites.apply(K, linear, precision, POLICY, False)[2], expected, rtol=1e-9)
    stacked = torch.stack([K, 2.0 * K, 3.0 * K])  # and a kernel for each
    expected = torch.stack([dense(*each)[1].diagonal() for each in zip(stacked, linear, precision, strict=True)])
    found = factor_sites(stacked, linear, precision, POLICY).variance_at_sites(stacked, precision)
    close(found, expected, rtol=1e-9)


def test_a_factor_found_before_is_used_and_left_alone():
    K, linear, precision = CASES["one latent"]
    factor = factor_sites(K, linear, precision, POLICY)
    kept = [factor.chol.clone(), factor.residual.clone(), factor.logdet.clone()]
    inputs = K.clone().requires_grad_(), linear, precision, POLICY, False
    fresh, reused = ConditionOnSites.apply(*inputs), ConditionOnSites.apply(*inputs, factor)
    for one, other in zip(fresh, reused, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(kept, (factor.chol, factor.residual, factor.logdet), strict=True):
        assert torch.equal(one, other) and not other.requires_grad


def test_duplicate_rows_need_no_jitter():
    K = covariance(N)[:, [0, 0, 1, 1, 2, 2]][[0, 0, 1, 1, 2, 2]]
    linear, precision = normal(N, seed=1), normal(N, seed=2).square() + 0.1
    factor = factor_sites(K, linear, precision, POLICY)
    assert factor.jitter == 0.0
    twin = factor_sites(K[::2, ::2], linear[::2] + linear[1::2], precision[::2] + precision[1::2], POLICY)
    close((K @ factor.residual)[::2], K[::2, ::2] @ twin.residual)
    close(factor.logdet, twin.logdet)


@pytest.mark.parametrize("name", ["one latent", "some negative", "shared K and precision"])
def test_float32_agrees_with_float64(name):
    double = ConditionOnSites.apply(*CASES[name], POLICY, True)
    policy = NumericalPolicy(dtype=torch.float32)
    single = ConditionOnSites.apply(*(item.float() for item in CASES[name]), policy, True)
    for one, other in zip(single, double, strict=True):
        assert one.dtype == torch.float32
        close(one.double(), other, rtol=1e-4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 8),
    batch=st.sampled_from([(), (1,), (2,), (2, 3)]),
    shared=st.booleans(),
    log_low=st.floats(-6, 4),
    share_zero=st.floats(0, 1),
    variance=st.booleans(),
    seed=st.integers(0, 999),
)
def test_conditioning_equals_the_dense_inverse_and_lowers_variance(
    n, batch, shared, log_low, share_zero, variance, seed
):
    generator = torch.Generator().manual_seed(seed)
    K = covariance(n, seed=seed) if shared else covariance(*batch, n, seed=seed)
    linear = normal(*batch, n, seed=seed + 1)
    uniform = torch.rand(*batch, n, generator=generator, dtype=DTYPE)
    precision = 10.0 ** (log_low + uniform) * (torch.rand(n, generator=generator) >= share_zero)
    residual, logdet, v = ConditionOnSites.apply(K, linear, precision, POLICY, variance)
    prior = K.diagonal(dim1=-2, dim2=-1)
    assert (v <= prior * (1 + 1e-12)).all() and (v > -1e-12).all() and (logdet >= 0).all()
    for where, Ki, li, pi in members(K, linear, precision):
        mean, V, expected = dense(Ki, li, pi)
        close((K @ residual.unsqueeze(-1)).squeeze(-1)[where], mean)
        close(v[where], V.diagonal())
        close(logdet[where], expected)
