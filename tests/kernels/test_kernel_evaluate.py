"""``gram`` and ``diag``: every kernel keeps its contract and equals the pairwise definition."""

import math

import gpytorch
import linear_operator
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import kernels as oracle

from mercer.kernels import (
    RBF,
    Constant,
    CosineKernel,
    Linear,
    Matern12,
    Matern32,
    Matern52,
    MaternKernel,
    Periodic,
    PiecewisePolynomialKernel,
    PolynomialKernel,
    RationalQuadratic,
    RBFKernel,
    RQKernel,
    ScaleKernel,
    SpectralMixtureKernel,
    diag,
    gram,
)
from mercer.kernels.stationary import PROFILES, stationary_gram
from mercer.policy import NumericalPolicy
from mercer.testing.kernel import check_kernel

ELL = np.array([0.7, 1.3, 2.0])
DTYPE = torch.float64


def spectral_mixture():
    kernel = SpectralMixtureKernel(num_mixtures=2, ard_num_dims=3).double()
    kernel.mixture_means = torch.tensor([0.1, 0.4]).reshape(2, 1, 1).expand(2, 1, 3)
    return kernel


# name: (kernel, pairwise definition or None where only gpytorch defines it)
TABLE = {
    "rbf": (RBF(ELL), lambda x, y: oracle.rbf(x, y, ELL)),
    "matern12": (Matern12(ELL), lambda x, y: oracle.matern12(x, y, ELL)),
    "matern32": (Matern32(ELL), lambda x, y: oracle.matern32(x, y, ELL)),
    "matern52": (Matern52(ELL), lambda x, y: oracle.matern52(x, y, ELL)),
    "rq": (RationalQuadratic(ELL, 0.6), lambda x, y: oracle.rational_quadratic(x, y, ELL, 0.6)),
    "periodic": (Periodic(ELL, 1.7, ard=False), lambda x, y: oracle.periodic(x, y, ELL, [1.7] * 3)),
    "linear": (Linear(ELL), lambda x, y: oracle.linear(x, y, ELL)),
    "constant": (Constant(2.5), lambda x, y: 2.5),
    "scaled": (RBF(ELL, outputscale=3.0), lambda x, y: 3.0 * oracle.rbf(x, y, ELL)),
    "sum": (
        Matern52(ELL, outputscale=2.0) + Linear([0.4], active_dims=[1]),
        lambda x, y: 2.0 * oracle.matern52(x, y, ELL) + oracle.linear(x[1:2], y[1:2], [0.4]),
    ),
    "product": (
        ScaleKernel(RBF(ELL[:2], active_dims=[2, 0]) * RationalQuadratic(0.5, 2.0, active_dims=[1])).double(),
        lambda x, y: (
            math.log(2.0)
            * oracle.rbf(x[[2, 0]], y[[2, 0]], ELL[:2])
            * oracle.rational_quadratic(x[1:2], y[1:2], [0.5], 2.0)
        ),
    ),
    "sum of products": (
        (RBF(ELL) + Linear(ELL)) * Periodic(1.5, 0.8, active_dims=[2]) + Constant(0.3),
        lambda x, y: (
            (oracle.rbf(x, y, ELL) + oracle.linear(x, y, ELL)) * oracle.periodic(x[2:], y[2:], [1.5], [0.8]) + 0.3
        ),
    ),
    "polynomial": (PolynomialKernel(2).double(), None),
    "piecewise polynomial": (PiecewisePolynomialKernel(2).double(), None),
    "cosine": (CosineKernel(active_dims=[1]).double(), None),
    "spectral mixture": (spectral_mixture(), None),
}
FUSED = {
    "rbf": RBFKernel,
    "matern12": lambda **options: MaternKernel(0.5, **options),
    "matern32": lambda **options: MaternKernel(1.5, **options),
    "matern52": lambda **options: MaternKernel(2.5, **options),
    "rq": RQKernel,
}


@pytest.mark.parametrize("name", TABLE)
def test_kernel_keeps_its_contract(name):
    check_kernel(TABLE[name][0], rtol=1e-6 if name == "matern12" else 1e-10)


@pytest.mark.parametrize("name", [name for name, (_, pair) in TABLE.items() if pair])
def test_gram_equals_the_pairwise_definition(name):
    kernel, pair = TABLE[name]
    rng = np.random.default_rng(0)
    X1, X2 = rng.normal(size=(6, 3)), rng.normal(size=(4, 3))
    X2[0] = X1[3]
    ours = gram(kernel, torch.tensor(X1), torch.tensor(X2)).detach().numpy()
    np.testing.assert_allclose(ours, oracle.gram(pair, X1, X2), rtol=1e-12, atol=1e-14)


def test_check_kernel_rejects_a_kernel_whose_diagonal_is_wrong():
    class Wrong(gpytorch.kernels.LinearKernel):
        def forward(self, x1, x2, diag=False, **params):
            value = super().forward(x1, x2, diag=diag, **params)
            return 2 * value if diag else value

    with pytest.raises(AssertionError, match="diag"):
        check_kernel(Wrong())


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("limit", [1 << 20, 9])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_fused_adjoint_passes_gradcheck(profile, limit, batch):
    generator = torch.Generator().manual_seed(3)
    x1 = torch.randn(*batch, 5, 2, generator=generator, dtype=DTYPE, requires_grad=True)
    x2 = torch.randn(4, 2, generator=generator, dtype=DTYPE, requires_grad=True)
    scale = torch.full((*batch, 1, 1), 1.7, dtype=DTYPE, requires_grad=True)
    shape = torch.full((1, 1), 0.8, dtype=DTYPE, requires_grad=True) if PROFILES[profile].has_shape else None

    def both(x1, x2, scale, shape=None):
        cross = stationary_gram(profile, x1, x2, scale, shape, limit)
        return cross, stationary_gram(profile, x1, None, scale, shape, limit)

    # gradcheck perturbs single entries of K's adjoint, so that its two triangles differ.
    assert torch.autograd.gradcheck(both, [t for t in (x1, x2, scale, shape) if t is not None])


@pytest.mark.parametrize("name", FUSED)
def test_batched_kernels_equal_their_members(name):
    batch = ScaleKernel(FUSED[name](batch_shape=torch.Size([3]), ard_num_dims=2), batch_shape=torch.Size([3]))
    batch = batch.double()
    generator = torch.Generator().manual_seed(0)
    for parameter in batch.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=DTYPE)
    X = torch.randn(5, 2, generator=generator, dtype=DTYPE)
    K = gram(batch, X)
    assert K.shape == (3, 5, 5) and diag(batch, X).shape == (3, 5)
    for i in range(3):
        torch.testing.assert_close(K[i], gram(batch[i], X), rtol=1e-12, atol=1e-14)
    assert gram(batch, X.expand(4, 1, 5, 2), X[:2]).shape == (4, 3, 5, 2)


def test_matern12_is_exact_for_near_duplicates_far_from_the_origin():
    X = torch.tensor([[1e4], [1e4 + 1e-9], [-1e4]], dtype=DTYPE)
    K = gram(Matern12(1.0), X).detach()
    assert abs(1 - K[0, 1].item() - (X[1] - X[0]).item()) < 1e-15


def test_result_ignores_gpytorch_and_linear_operator_settings():
    X = torch.randn(900, 2, generator=torch.Generator().manual_seed(0), dtype=DTYPE)
    kernel = RBF(0.5) * Periodic(1.0, 1.0) + PolynomialKernel(2).double()
    plain = gram(kernel, X)
    with (
        gpytorch.settings.lazily_evaluate_kernels(False),
        gpytorch.settings.trace_mode(True),
        gpytorch.settings.debug(False),
        linear_operator.settings.max_cholesky_size(10),
        linear_operator.settings.max_root_decomposition_size(5),
    ):
        assert torch.equal(gram(kernel, X), plain)


def test_too_few_columns_name_the_kernel():
    with pytest.raises(ValueError, match="column 4"):
        gram(RBF(active_dims=[4]), torch.zeros(2, 3, dtype=DTYPE))
    with pytest.raises(ValueError, match="RBFKernel has 2 lengthscales"):
        gram(RBF([1.0, 2.0]), torch.zeros(2, 3, dtype=DTYPE))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(FUSED)),
    n=st.integers(1, 12),
    d=st.integers(1, 4),
    batch=st.sampled_from([(), (1,), (2,), (2, 3)]),
    spread=st.floats(1e-3, 1e3),
    chunk=st.integers(1, 200),
    double=st.booleans(),
    seed=st.integers(0, 999),
)
def test_gram_is_a_covariance(name, n, d, batch, spread, chunk, double, seed):
    dtype = DTYPE if double else torch.float32
    X = spread * torch.randn(*batch, n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    X[..., n // 2, :] = X[..., 0, :]
    kernel = ScaleKernel(FUSED[name](ard_num_dims=d)).to(dtype)
    K = gram(kernel, X, policy=NumericalPolicy(chunk_elements=chunk)).detach()
    assert K.shape == (*batch, n, n) and torch.isfinite(K).all()
    assert torch.equal(K, K.mT) and torch.equal(K.diagonal(dim1=-2, dim2=-1), diag(kernel, X).detach())
    assert torch.linalg.eigvalsh(K.double()).min() > -(1e-12 if double else 1e-4) * n
    tolerance = 1e-9 if double else 2e-2
    torch.testing.assert_close(K, gram(kernel, X, X.clone()).detach(), rtol=tolerance, atol=tolerance)
