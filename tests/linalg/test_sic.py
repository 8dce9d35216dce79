"""Sparse inverse Cholesky factors against dense matrices (the identities of Vecchia's approximation)."""

import itertools

import numpy as np
import pytest
import torch

from mercer.linalg.cholesky import NotPositiveDefiniteError
from mercer.linalg.sic import (
    Pattern,
    _adjoint_in_batch,
    _factor_in_batch,
    _factor_on_cpu,
    _map_by_levels,
    column_factors,
    logdet,
    precision_diagonal,
    solve,
    times,
)

DTYPE = torch.float64
N = 40


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def points(n=N, d=2, seed=0):
    """Points in maximin order, by the definition."""
    X = np.random.default_rng(seed).uniform(size=(n, d))
    order = [0]
    while len(order) < n:
        away = ((X[:, None] - X[order]) ** 2).sum(-1).min(1)
        away[order] = -1
        order.append(int(away.argmax()))
    return torch.as_tensor(X[order])


def covariance(X, lengthscale=0.4, nugget=1e-4):
    distance = 3**0.5 * torch.cdist(X, X, compute_mode="donot_use_mm_for_euclid_dist") / lengthscale
    return (1 + distance) * torch.exp(-distance) + nugget * torch.eye(len(X), dtype=DTYPE)


def nearest(X, m):
    D = torch.cdist(X, X, compute_mode="donot_use_mm_for_euclid_dist")
    rows = torch.full((len(X), m), -1)
    for i in range(1, len(X)):
        chosen = D[i, :i].argsort()[:m]
        rows[i, : len(chosen)] = chosen
    return rows


def factor(K, pattern):
    index = pattern.columns.clamp_min(0)
    return column_factors(K[index.unsqueeze(-1), index.unsqueeze(-2)], pattern.padding)


def dense(pattern, val):
    """U as a matrix, entry by entry."""
    U = torch.zeros(pattern.n, pattern.n, dtype=val.dtype)
    for i in range(pattern.n):
        for k, j in enumerate(pattern.columns[i].tolist()):
            if j >= 0:
                U[j, i] = val[i, k]
    return U


def model(m=6, n=N):
    X = points(n)
    K, pattern = covariance(X), Pattern(nearest(X, m))
    return K, pattern, factor(K, pattern)


def kl(K, U):
    return float(
        -U.diagonal().log().sum() - 0.5 * torch.linalg.slogdet(K)[1] + 0.5 * (U.mT @ K @ U).trace() - len(K) / 2
    )


# ---- columns


def test_a_column_is_vecchias_conditional():
    K, pattern, val = model()
    U = dense(pattern, val)
    for i in range(N):
        s = [j for j in pattern.columns[i, :-1].tolist() if j >= 0]
        b = torch.linalg.solve(K[s][:, s], K[s, i]) if s else K.new_empty(0)
        sd = (K[i, i] - K[i, s] @ b).sqrt()
        torch.testing.assert_close(U[i, i], 1 / sd, rtol=1e-10, atol=0)
        torch.testing.assert_close(U[s, i], -b / sd, rtol=1e-9, atol=1e-10)
        assert U[:, i].count_nonzero() == len(s) + 1


def test_the_factor_minimises_the_divergence_on_its_pattern():
    K, pattern, val = model()
    U = dense(pattern, val)
    assert abs(float((U.mT @ K @ U).trace()) - N) < 1e-9
    least = kl(K, U)
    # the slope K U − diag(1/U_ii) vanishes on the pattern
    slope = (K @ U - torch.diag(1 / U.diagonal())) * (U != 0)
    assert float(slope.abs().max()) < 1e-9
    for seed in range(5):
        assert kl(K, U + 1e-3 * normal(N, N, seed=seed) * (U != 0)) > least


def test_all_earlier_rows_give_the_inverse():
    K, pattern, val = model(m=N - 1)
    U = dense(pattern, val)
    torch.testing.assert_close(U @ U.mT @ K, torch.eye(N, dtype=DTYPE), rtol=0, atol=1e-8)
    torch.testing.assert_close(logdet(val), -torch.linalg.slogdet(K)[1], rtol=1e-10, atol=0)


def test_more_neighbours_never_hurt():
    divergences = []
    for m in (1, 2, 4, 8, 16, N - 1):
        K, pattern, val = model(m)
        divergences.append(kl(K, dense(pattern, val)))
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(divergences))
    assert abs(divergences[-1]) < 1e-9 < divergences[0]


def test_padding_changes_nothing():
    K, pattern, val = model()
    wide = Pattern(torch.cat([pattern.columns[:, :-1], torch.full((N, 4), -1)], 1))
    torch.testing.assert_close(factor(K, wide)[:, 4:], val, rtol=1e-12, atol=1e-12)
    assert (factor(K, wide)[:, :4] == 0).all()
    tiles = torch.full((1, 3, 3), torch.nan, dtype=DTYPE)
    tiles[0, -1, -1] = 4.0
    alone = column_factors(tiles, torch.tensor([[True, True, False]]))
    assert torch.equal(alone, torch.tensor([[0.0, 0.0, 0.5]], dtype=DTYPE))


def test_columns_of_batches_and_their_gradient():
    K, pattern, _ = model(m=3, n=9)
    index = pattern.columns.clamp_min(0)
    tiles = torch.stack([K, 2 * K])[:, index.unsqueeze(-1), index.unsqueeze(-2)].requires_grad_()

    def symmetric(tiles):
        return column_factors(0.5 * (tiles + tiles.mT), pattern.padding)

    assert torch.autograd.gradcheck(symmetric, tiles, fast_mode=False)
    with pytest.raises(NotPositiveDefiniteError, match="same point"):
        column_factors(torch.ones(1, 2, 2, dtype=DTYPE), torch.zeros(1, 2, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_compiled_loops_and_batched_operations_agree(dtype):
    K, pattern, _ = model(m=6)
    index = pattern.columns.clamp_min(0)
    tiles = torch.stack([K, K + 0.1])[:, index.unsqueeze(-1), index.unsqueeze(-2)].to(dtype)
    (u, L, broken), (u_too, L_too, _) = (way(tiles, pattern.padding) for way in (_factor_on_cpu, _factor_in_batch))
    rtol = 1e-10 if dtype == torch.float64 else 1e-2
    assert not broken and u.dtype == dtype
    torch.testing.assert_close(u, u_too, rtol=rtol, atol=rtol * float(u.abs().max()))
    torch.testing.assert_close(L, L_too, rtol=rtol, atol=rtol)
    cotangent = normal(*u.shape, seed=4).to(dtype)
    leaf = tiles.requires_grad_()
    (found,) = torch.autograd.grad((column_factors(leaf, pattern.padding) * cotangent).sum(), leaf)
    expected = _adjoint_in_batch(L_too, u_too, pattern.padding, cotangent)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


def test_a_later_row_is_no_neighbour():
    with pytest.raises(ValueError, match="earlier"):
        Pattern(torch.tensor([[-1], [1]]))


# ---- products and sweeps

WAYS = [(operation, transposed) for operation in (times, solve) for transposed in (False, True)]


def matrix(U, operation, transposed):
    A = torch.linalg.inv(U) if operation is solve else U
    return A.mT if transposed else A


@pytest.mark.parametrize(("operation", "transposed"), WAYS)
def test_every_map_equals_its_dense_twin(operation, transposed):
    _, pattern, val = model()
    x = normal(3, 2, N, seed=1)
    A = matrix(dense(pattern, val), operation, transposed)
    expected = (A @ x.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(operation(pattern, val, x, transposed), expected, rtol=1e-10, atol=1e-10)
    by_levels = _map_by_levels(pattern, val, x, operation is solve, transposed)
    torch.testing.assert_close(by_levels, expected, rtol=1e-10, atol=1e-10)
    vals = torch.stack([val, 1.5 * val])  # a factor for each
    both = torch.stack([expected[:, 0], expected[:, 1] * (1 / 1.5 if operation is solve else 1.5)], 1)
    torch.testing.assert_close(operation(pattern, vals, x, transposed), both, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        _map_by_levels(pattern, vals, x, operation is solve, transposed), both, rtol=1e-10, atol=1e-10
    )
    single = operation(pattern, val.float(), x.float(), transposed)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


@pytest.mark.parametrize(("operation", "transposed"), WAYS)
@pytest.mark.parametrize("shape", [(), (2,)])
def test_the_adjoint_is_the_gradient_through_the_dense_matrix(operation, transposed, shape):
    _, pattern, val = model(m=4, n=15)
    val = (val if not shape else torch.stack([val, val + 0.1])).masked_fill(pattern.padding, 0.0)
    x, cotangent = normal(2, 15, seed=1), normal(2, 15, seed=2)
    inputs = val.clone().requires_grad_(), x.clone().requires_grad_()
    found = torch.autograd.grad((operation(pattern, *inputs, transposed) * cotangent).sum(), inputs)
    mask = torch.zeros(15, 15, dtype=DTYPE)
    mask[pattern.columns.clamp_min(0), torch.arange(15).unsqueeze(-1)] = 1.0
    U = torch.stack([dense(pattern, each) for each in val.reshape(-1, 15, val.shape[-1])]).requires_grad_()
    dense_x = x.clone().requires_grad_()
    out = (matrix(U * mask, operation, transposed) @ dense_x.unsqueeze(-1)).squeeze(-1)
    by_U, by_x = torch.autograd.grad((out * cotangent).sum(), (U, dense_x))
    torch.testing.assert_close(found[1], by_x, rtol=1e-9, atol=1e-9)
    for each, expected in zip(found[0].reshape(-1, 15, val.shape[-1]), by_U, strict=True):
        torch.testing.assert_close(dense(pattern, each), expected * mask, rtol=1e-9, atol=1e-9)
        assert (each[pattern.padding] == 0).all()


def test_draws_have_the_covariance():
    """Moments of 40 000 draws are within six standard errors."""
    _, pattern, val = model(n=12)
    U = dense(pattern, val)
    V = torch.linalg.inv(U @ U.mT)
    draws = solve(pattern, val, normal(40_000, 12, seed=3), transposed=True)
    spread = (V.diagonal().unsqueeze(-1) * V.diagonal() + V.square()).sqrt() / 200
    assert bool(((draws.mT @ draws / 40_000 - V).abs() < 6 * spread).all())


def test_the_diagonal_of_the_precision():
    _, pattern, val = model()
    U = dense(pattern, val)
    torch.testing.assert_close(precision_diagonal(pattern, val), (U @ U.mT).diagonal())


# ---- the posterior
