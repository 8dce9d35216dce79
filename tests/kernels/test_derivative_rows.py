"""Rows of values and derivatives under one kernel: blocks in their places, sets apart, a diagonal in O(n)."""

import pytest
import torch
from gpytorch.means import ConstantMean, LinearMean

from mercer.kernels import RBF, DerivativeRows, GaussianMixture, Periodic, derivative_gram, derivative_rows, diag, gram
from mercer.kernels.derivative_rows import DerivativeRowsMean
from mercer.kernels.hyperparameters import hyperparameters

D = torch.float64
KERNEL = GaussianMixture(weight=[1.0, 0.5], lengthscale=[[1.0, 2.0], [0.5, 0.8]], frequency=[[0, 0], [0.7, 0.0]])
ORDERS = torch.tensor([[0, 0], [1, 0], [0, 2], [0, 0], [1, 1], [1, 0]])
X = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=D)
ROWS = derivative_rows(X, ORDERS)


def by_pairs(kernel, X1, O1, X2, O2):
    entries = [
        [derivative_gram(kernel, x[None], y[None], a.tolist(), b.tolist())[0, 0] for y, b in zip(X2, O2, strict=True)]
        for x, a in zip(X1, O1, strict=True)
    ]
    return torch.stack([torch.stack(row) for row in entries])


def test_every_entry_is_the_covariance_of_its_pair():
    kernel = DerivativeRows(KERNEL)
    expected = by_pairs(KERNEL, X, ORDERS, X, ORDERS)
    torch.testing.assert_close(gram(kernel, ROWS), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gram(kernel, ROWS, ROWS[[4, 0]]), expected[:, [4, 0]], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(diag(kernel, ROWS), expected.diagonal(), rtol=1e-12, atol=1e-12)
    assert torch.linalg.eigvalsh(gram(kernel, ROWS))[0] > -1e-10


def test_sets_of_rows_are_by_themselves():
    kernel = DerivativeRows(KERNEL)
    sets = ROWS.reshape(2, 3, 4)
    value = gram(kernel, sets)
    for i in range(2):
        torch.testing.assert_close(value[i], gram(kernel, sets[i]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(diag(kernel, sets), diag(kernel, ROWS).reshape(2, 3))
    torch.testing.assert_close(gram(kernel, sets, ROWS[:2]), torch.stack([gram(kernel, s, ROWS[:2]) for s in sets]))


def test_rows_of_values_are_rows_of_the_kernel_whatever_it_is():
    for kernel in (RBF([1.0, 2.0]), Periodic([1.0, 2.0], 0.7)):
        rows = derivative_rows(X, (0, 0))
        torch.testing.assert_close(gram(DerivativeRows(kernel), rows), gram(kernel, X))


def test_hyperparameters_have_the_names_of_the_kernel():
    assert [h.name for h in hyperparameters(DerivativeRows(KERNEL))] == [h.name for h in hyperparameters(KERNEL)]


@pytest.mark.parametrize("grad", [True, False])
def test_a_mean_has_its_derivatives(grad):
    line = LinearMean(2).double()
    line.weights.data = torch.tensor([[2.0], [-1.0]], dtype=D)
    rows = ROWS.clone().requires_grad_(grad)
    expected = line(X).detach()
    expected[[1, 2, 4, 5]] = torch.tensor([2.0, 0.0, 0.0, 2.0], dtype=D)
    with torch.set_grad_enabled(grad):
        value = DerivativeRowsMean(line)(rows)
    torch.testing.assert_close(value, expected)
    assert value.requires_grad == grad
    constant = DerivativeRowsMean(ConstantMean().double())
    constant.wrapped.constant.data.fill_(3.0)
    assert constant(ROWS).tolist() == [3, 0, 0, 3, 0, 0]
