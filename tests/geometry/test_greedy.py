"""Greedy points against a slow twin that conditions explicitly, and what a factorisation with pivots promises."""

import numpy as np
import pytest
import torch
from gpytorch.kernels import MaternKernel
from hypothesis import given, settings
from hypothesis import strategies as st

from mercer.geometry.greedy import greedy_variance
from mercer.kernels.evaluate import diag, gram

GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
EPS = np.finfo(np.float64).eps


def covariance(n, seed=0, b=(), lengthscale=0.5):
    """Exponential kernels of points in the square with amplitudes that differ: no ties, condition below about 1e3."""
    random = np.random.default_rng(seed)
    X, scale = random.uniform(size=(*b, n, 2)), random.uniform(0.5, 2.0, size=(*b, n))
    K = np.exp(-np.linalg.norm(X[..., :, None, :] - X[..., None, :, :], axis=-1) / lengthscale)
    return torch.as_tensor(scale[..., :, None] * scale[..., None, :] * K)


def rows(K):
    return lambda j: K[..., j, :]


def conditional(K, chosen, noise):
    """Variance of every candidate given the chosen ones, by a dense solve."""
    cross = K[..., chosen, :]
    inner = cross[..., chosen] + torch.diag_embed(noise[..., chosen])
    return K.diagonal(dim1=-2, dim2=-1) - (cross * torch.cholesky_solve(cross, torch.linalg.cholesky(inner))).sum(-2)


def slow(K, n_points, start=(), weight=None, noise=None):
    one = torch.ones(K.shape[:-1], dtype=K.dtype)
    weight, noise = one if weight is None else weight * one, 0 * one if noise is None else noise * one
    chosen = [int(j) for j in start]
    while len(chosen) < n_points:
        total = (weight * conditional(K, chosen, noise)).reshape(-1, K.shape[-1]).sum(0)
        total[chosen] = -1.0
        chosen.append(int(total.argmax()))
    return chosen, conditional(K, chosen, noise)


@pytest.mark.parametrize("b", [(), (3,), (2, 2)])
@pytest.mark.parametrize("given", ["nothing", "start", "weight", "noise", "all"])
def test_equals_the_slow_twin(b, given):
    K, random = covariance(60, b=b), np.random.default_rng(1)
    options = {
        "start": torch.tensor([7, 3, 41]),
        "weight": torch.as_tensor(random.uniform(0.1, 3.0, size=60)),
        "noise": torch.as_tensor(random.uniform(0.0, 1.0, size=(*b, 60))),
    }
    options = options if given == "all" else {given: options[given]} if given in options else {}
    found = greedy_variance(rows(K), K.diagonal(dim1=-2, dim2=-1), 20, **options)
    index, residual = slow(K, 20, **options)
    assert found.index.tolist() == index
    # variances up to 4, condition number of the chosen block below 1e3
    torch.testing.assert_close(found.residual, residual, rtol=0, atol=4e3 * EPS)


def test_options_change_the_choice():
    """Else the comparison with the twin would say little."""
    K = covariance(60)
    weight = torch.linspace(0.1, 3.0, 60)
    plain, weighted, noisy = (
        set(greedy_variance(rows(K), K.diagonal(), 20, **options).index.tolist())
        for options in ({}, {"weight": weight}, {"noise": weight})
    )
    assert plain != weighted != noisy != plain


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    m=st.integers(0, 45),
    more=st.integers(0, 10),
    s=st.integers(0, 5),
    noisy=st.booleans(),
    seed=st.integers(0, 99),
)
def test_more_points_extend_and_never_explain_less(n, m, more, s, noisy, seed):
    K, random = covariance(n, seed), np.random.default_rng(seed)
    options = {"start": torch.as_tensor(random.permutation(n)[: min(s, m)])}
    if noisy:
        options["noise"] = torch.as_tensor(random.uniform(size=n))
    few = greedy_variance(rows(K), K.diagonal(), m, **options)
    many = greedy_variance(rows(K), K.diagonal(), m + more, **options)
    assert len(few.index) == min(m, n) and len(many.index) == min(m + more, n)
    assert torch.equal(many.index[: len(few.index)], few.index)
    assert torch.equal(few.index[: len(options["start"])], options["start"])
    assert len(many.index.unique()) == len(many.index)
    assert (many.residual >= 0).all() and (many.residual <= few.residual).all() and (few.residual <= K.diagonal()).all()
    if not noisy:
        assert (many.residual[many.index] <= 100 * EPS * K.diagonal()[many.index]).all()


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 40), m=st.integers(1, 15), seed=st.integers(0, 99))
def test_order_of_candidates_does_not_matter(n, m, seed):
    K, order = covariance(n, seed), torch.as_tensor(np.random.default_rng(seed).permutation(n))
    plain = greedy_variance(rows(K), K.diagonal(), m)
    moved = greedy_variance(rows(K[order][:, order]), K.diagonal()[order], m)
    assert torch.equal(order[moved.index], plain.index)
    torch.testing.assert_close(moved.residual, plain.residual[order], rtol=0, atol=4e3 * EPS)


def test_ties_go_to_the_lowest_index():
    K = torch.eye(6, dtype=torch.float64)
    assert greedy_variance(rows(K), K.diagonal(), 4).index.tolist() == [0, 1, 2, 3]
    assert greedy_variance(rows(K), K.diagonal(), 4, start=torch.tensor([2])).index.tolist() == [2, 0, 1, 3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_copies_are_taken_once_and_no_rows_are_asked_for_in_vain(dtype):
    K = covariance(30).to(dtype).repeat(40, 40)
    asked = []

    def row(j):
        asked.append(j)
        return K[j]

    found = greedy_variance(row, K.diagonal(), 600)
    assert sorted((found.index % 30).tolist()) == list(range(30))
    assert (found.residual <= 100 * torch.finfo(dtype).eps * K.diagonal()).all()
    assert len(asked) <= 30 + 16 and all(j.shape == (1,) for j in asked)
    exact = greedy_variance(row, K.diagonal(), 30)
    assert torch.equal(found.index, exact.index) and torch.equal(found.residual, exact.residual)


def test_smooth_kernels_end_at_rounding_and_not_in_noise():
    """400 near-copies span about 20 directions at working precision; pivots of rounding would blow residuals up."""
    x = torch.linspace(0, 1, 400, dtype=torch.float64)
    K = torch.exp(-0.5 * (x[:, None] - x).square() / 0.3**2)
    found = greedy_variance(rows(K), K.diagonal(), 400)
    assert 10 < len(found.index) < 40
    assert (found.residual <= 500 * EPS).all()
    from_neighbours = greedy_variance(rows(K), K.diagonal(), 100, start=torch.arange(50))
    assert from_neighbours.index[:50].tolist() == list(range(50))
    assert (from_neighbours.residual <= EPS**0.5).all()


def test_tolerance_is_met_and_not_by_more_points_than_needed():
    K = covariance(80, lengthscale=2.0)
    found = greedy_variance(rows(K), K.diagonal(), 80, tol=0.1)
    m = len(found.index)
    assert 1 < m < 79 and (found.residual <= 0.1 * K.diagonal()).all()
    fewer = greedy_variance(rows(K), K.diagonal(), m - 1)
    assert torch.equal(fewer.index, found.index[:-1]) and (fewer.residual > 0.1 * K.diagonal()).any()
    # steps after the end change nothing
    assert torch.equal(found.residual, greedy_variance(rows(K), K.diagonal(), m).residual)
    assert len(greedy_variance(rows(K), K.diagonal(), 80, tol=1.0).index) == 0


def test_a_latent_that_is_explained_does_not_end_the_choice_for_another():
    K = torch.stack([torch.ones(20, 20, dtype=torch.float64), covariance(20)])
    found = greedy_variance(rows(K), K.diagonal(dim1=-2, dim2=-1), 12)
    index, residual = slow(K[1], 12, start=found.index[:1])
    assert found.index.tolist() == index and (found.residual[0] == 0).all()
    torch.testing.assert_close(found.residual[1], residual, rtol=0, atol=4e3 * EPS)


def test_weight_nothing_is_never_chosen_and_a_kernel_may_be_scaled_instead():
    K = covariance(50)
    weight = torch.as_tensor(np.random.default_rng(3).uniform(size=50))
    weight[::2] = 0.0
    found = greedy_variance(rows(K), K.diagonal(), 40, weight=weight)
    assert sorted(found.index.tolist()) == list(range(1, 50, 2))
    root = weight.sqrt()
    scaled = greedy_variance(rows(root[:, None] * K * root), weight * K.diagonal(), 40)
    assert torch.equal(scaled.index, found.index)
    torch.testing.assert_close(scaled.residual, weight * found.residual, rtol=0, atol=4e3 * EPS)


def test_known_without_end_of_noise_tells_nothing():
    K = covariance(20)
    found = greedy_variance(rows(K), K.diagonal(), 5, noise=torch.full((20,), torch.inf))
    assert torch.equal(found.residual, K.diagonal()) and len(found.index) == 5


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_rows_of_a_kernel(device):
    X = torch.as_tensor(np.random.default_rng(0).uniform(size=(300, 2)), device=device)
    kernel = MaternKernel(nu=0.5).to(X)
    kernel.lengthscale = 0.5
    K = gram(kernel, X).detach()
    # the first point is a tie in floating point as well
    index, residual = slow(K.cpu(), 30)
    found = greedy_variance(lambda j: gram(kernel, X[j], X), diag(kernel, X), 30)
    assert found.index.tolist() == index and found.index[0] == 0 and found.index.device == X.device
    torch.testing.assert_close(found.residual.cpu(), residual, rtol=0, atol=4e3 * EPS)
    assert not found.residual.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_points": -1}, "n_points must not be negative"),
        ({"tol": -0.1}, "tol must not be negative"),
        ({"tol": float("nan")}, "tol must not be negative"),
        ({"start": torch.tensor([0.0])}, "start must hold positions"),
        ({"start": torch.tensor([1, 1])}, "different positions"),
        ({"start": torch.tensor([5])}, "between 0 and 4"),
        ({"start": torch.arange(4)}, "raise n_points"),
        ({"weight": torch.ones(4)}, "weight must have one entry per candidate"),
        ({"weight": -torch.ones(5)}, "weight must be ≥ 0 and finite"),
        ({"weight": torch.full((5,), torch.inf)}, "weight must be ≥ 0 and finite"),
        ({"noise": -torch.ones(5)}, "noise must be ≥ 0"),
        ({"diagonal": torch.full((5,), torch.nan)}, "diagonal must be ≥ 0"),
        ({"row": lambda j: torch.ones(3)}, "row must give the covariances"),
        ({"row": lambda j: torch.full((5,), torch.nan)}, "row gave NaN"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"row": rows(torch.eye(5)), "diagonal": torch.ones(5), "n_points": 3} | change
    with pytest.raises(ValueError, match=message):
        greedy_variance(**arguments)


def test_nothing_to_choose():
    assert len(greedy_variance(rows(torch.eye(5)), torch.ones(5), 0).index) == 0
    assert len(greedy_variance(rows(torch.zeros(0, 0)), torch.zeros(0), 3).index) == 0
    assert len(greedy_variance(rows(torch.zeros(5, 5)), torch.zeros(5), 3).index) == 0
