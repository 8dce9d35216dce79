"""``check_kernel``: what every kernel owes the library, as plain assertions for one's own tests."""

from __future__ import annotations

import pickle
from copy import deepcopy

import torch
from gpytorch.kernels import Kernel
from torch import Tensor

from mercer.kernels.evaluate import diag, gram
from mercer.policy import NumericalPolicy


def check_kernel(kernel: Kernel, d: int = 3, *, rtol: float = 1e-10) -> None:
    """Assert that ``gram`` and ``diag`` evaluate a kernel as gpytorch defines it.

    Parameters
    ----------
    kernel : gpytorch Kernel
        With an empty batch shape and one output, for inputs of ``d`` columns. Left untouched.
    d : int, default=3
        Number of columns of X.
    rtol : float, default=1e-10
        Agreement with gpytorch's own evaluation, relative to the largest prior variance. A kernel of the bare
        distance (Matérn-1/2) needs 1e-6, because gpytorch takes the root of a rounded d².

    Raises
    ------
    AssertionError
        Naming the property that fails.

    Examples
    --------
    >>> from mercer.kernels import Matern52
    >>> check_kernel(Matern52([0.5, 1.0, 2.0]))
    """
    kernel = deepcopy(kernel).to(torch.float64)
    generator = torch.Generator().manual_seed(20)
    X = torch.randn(9, d, generator=generator, dtype=torch.float64)
    X[4] = X[2]
    K = gram(kernel, X).detach()
    size = K.diagonal().max().item()

    _close(K, K.mT, size, 1e-13, "gram is not symmetric")
    _close(diag(kernel, X).detach(), K.diagonal(), size, 1e-12, "diag is not the diagonal of gram")
    lowest = torch.linalg.eigvalsh(K)[0].item()
    assert lowest > -1e-9 * size, f"gram is not positive semi-definite: eigenvalue {lowest:.2g}"
    _close(gram(kernel, X[2:6], X).detach(), K[2:6], size, 1e-11, "cross-covariance differs from rows of gram")
    _close(gram(kernel, X, X[2:6]).detach(), K[:, 2:6], size, 1e-11, "cross-covariance is not symmetric")
    _close(gram(kernel, X[:1]).detach(), K[:1, :1], size, 1e-12, "one row differs")
    tiles = gram(kernel, X.reshape(3, 3, d)).detach()
    _close(tiles[1], K[3:6, 3:6], size, 1e-11, "a batch of inputs differs from its members")

    for X2 in (None, X[3:8] + 0.1):
        _check_against_gpytorch(kernel, X, X2, size, rtol)
        whole, by_rows = gram(kernel, X, X2), gram(kernel, X, X2, NumericalPolicy(chunk_elements=5))
        _close(whole.detach(), by_rows.detach(), size, 1e-12, "the answer depends on the chunk size")

    single = gram(deepcopy(kernel).to(torch.float32), X.float()).detach()
    assert single.dtype == torch.float32, "gram does not keep float32"
    _close(single.double(), K, size, 1e-4, "float32 differs")
    for other in (deepcopy(kernel), pickle.loads(pickle.dumps(kernel))):
        _close(gram(other, X).detach(), K, size, 1e-14, "deepcopy or pickle changes the kernel")


def _check_against_gpytorch(kernel: Kernel, X: Tensor, X2: Tensor | None, size: float, rtol: float) -> None:
    """Compare value and first derivatives with gpytorch's evaluation and autograd."""
    value, gradients = _evaluated(kernel, X, X2, ours=True)
    reference, expected = _evaluated(kernel, X, X2, ours=False)
    _close(value, reference, size, rtol, "gram differs from gpytorch's evaluation")
    for mine, autograd in zip(gradients, expected, strict=True):
        scale = max(1.0, autograd.abs().max().item())
        _close(mine, autograd, scale, 100 * rtol, "the gradient differs from gpytorch's")


def _evaluated(kernel: Kernel, X: Tensor, X2: Tensor | None, *, ours: bool) -> tuple[Tensor, list[Tensor]]:
    """Return the matrix and the gradients of one linear functional of it."""
    inputs = [value.clone().requires_grad_() for value in (X, X2) if value is not None]
    other = inputs[1] if len(inputs) == 2 else None
    value = gram(kernel, inputs[0], other) if ours else kernel(inputs[0], other).to_dense()
    leaves = [p for p in kernel.parameters() if p.requires_grad] + inputs
    if not value.requires_grad:
        return value, [torch.zeros_like(leaf) for leaf in leaves]
    weight = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).reshape(value.shape)
    return value.detach(), list(torch.autograd.grad((value * weight).sum(), leaves, materialize_grads=True))


def _close(value: Tensor, reference: Tensor, size: float, rtol: float, message: str) -> None:
    error = (value - reference).abs().max().item() if value.shape == reference.shape else float("inf")
    assert error <= rtol * size, f"{message}: error {error:.2g} for values of size {size:.2g}"
