"""``check_operator``: a ``LinearOperator`` does what its dense matrix does, as plain assertions for one's own tests."""

from __future__ import annotations

from collections.abc import Callable

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from mercer.testing._twin import draw
from mercer.testing.kernel import _close

SINGLE = 1e-3  # agreement in float32, for matrices that are not ill-conditioned


def check_operator(operator: LinearOperator, *, positive_definite: bool = True, rtol: float = 1e-8) -> None:
    """Assert that an operator agrees with ``to_dense()`` in all that gpytorch asks of it.

    Parameters
    ----------
    operator : LinearOperator (*b, n, m)
        In float64, of a few hundred rows at most. It is not changed.
    positive_definite : bool, default=True
        Whether solves, log-determinants and the Cholesky factor are checked; the matrix must then be symmetric and
        positive definite.
    rtol : float, default=1e-8
        Agreement relative to the size of each result.

    Raises
    ------
    AssertionError
        Naming the property that fails.

    Notes
    -----
    Checked: shape and dtype; products with vectors, matrices and batches, from both sides; transpose; diagonal;
    batch members; copies and float32; solve, logdet and inverse quadratic form; gradients in everything the operator
    is made of.

    Examples
    --------
    >>> from linear_operator.operators import DiagLinearOperator
    >>> check_operator(DiagLinearOperator(torch.arange(1.0, 5.0, dtype=torch.float64)))
    """
    dense = operator.to_dense().detach()
    assert dense.shape == operator.shape, f"to_dense has shape {tuple(dense.shape)}, not {tuple(operator.shape)}"
    assert dense.dtype == operator.dtype, f"to_dense has dtype {dense.dtype}, not {operator.dtype}"
    actions = _products(operator.shape)
    if positive_definite:
        _near(dense, dense.mT, rtol, "the matrix is not symmetric")
        actions |= _solves(operator.shape)
    for name, action in actions.items():
        _near(action(operator), action(dense), rtol, f"{name} differs from the dense matrix")
    for index in range(min(3, operator.shape[0])) if operator.dim() > 2 else ():
        _near(operator[index].to_dense(), dense[index], rtol, f"batch element {index} differs")
    single = operator.float()
    for name, action in actions.items():
        found = action(single)
        assert found.dtype == torch.float32, f"{name} does not keep float32"
        _near(found.double(), action(dense), max(rtol, SINGLE), f"{name} differs in float32")
    _check_gradients(operator, actions, rtol)


Action = Callable[[LinearOperator | Tensor], Tensor]


def _products(shape: torch.Size) -> dict[str, Action]:
    """Return what any operator can do, as functions that take it or its dense matrix."""
    *batch, n, m = shape
    right, left, vector = draw(m, 3, seed=1), draw(2, n, seed=2), draw(m, seed=3)
    batched = draw(2, *batch, m, 2, seed=4)
    actions: dict[str, Action] = {
        "matmul with a matrix": lambda A: A @ right.to(A.dtype),
        "matmul with a batch": lambda A: A @ batched.to(A.dtype),
        "matmul from the left": lambda A: left.to(A.dtype) @ A,
        "transpose": lambda A: A.mT @ left.mT.to(A.dtype),
    }
    if not batch:  # upstream does not broadcast a vector over batches
        actions["matmul with a vector"] = lambda A: A @ vector.to(A.dtype)
    if n == m:
        actions["diagonal"] = lambda A: A.diagonal(dim1=-2, dim2=-1)
    return actions


def _solves(shape: torch.Size) -> dict[str, Action]:
    """Return what a positive definite operator can do besides."""
    rhs = draw(*shape[:-1], 2, seed=5)

    def quadratic(A: LinearOperator | Tensor) -> Tensor:
        b = rhs.to(A.dtype)
        if isinstance(A, LinearOperator):
            return A.inv_quad(b)
        return (b * _solve(A, b)).sum((-2, -1))

    return {
        "solve": lambda A: A.solve(rhs.to(A.dtype)) if isinstance(A, LinearOperator) else _solve(A, rhs.to(A.dtype)),
        "logdet": lambda A: A.logdet() if isinstance(A, LinearOperator) else _logdet(A),
        "inv_quad": quadratic,
    }


def _solve(A: Tensor, b: Tensor) -> Tensor:
    return torch.cholesky_solve(b, torch.linalg.cholesky(A))


def _logdet(A: Tensor) -> Tensor:
    return 2.0 * torch.linalg.cholesky(A).diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _check_gradients(operator: LinearOperator, actions: dict[str, Action], rtol: float) -> None:
    """Gradients of every action in the tensors behind the operator, against those through ``to_dense()``."""
    tree = operator.representation_tree()
    leaves = [item.detach().clone().requires_grad_(item.is_floating_point()) for item in operator.representation()]
    slots = [leaf for leaf in leaves if leaf.requires_grad]
    if not slots:
        return
    for name, action in actions.items():
        slopes = []
        for rebuild in (lambda: tree(*leaves), lambda: tree(*leaves).to_dense()):
            value = action(rebuild())
            assert value.requires_grad, f"{name} carries no gradient"
            weighted = (value * draw(*value.shape, seed=6)).sum()
            slopes.append(torch.autograd.grad(weighted, slots, materialize_grads=True))
        for one, other in zip(*slopes, strict=True):
            _near(one, other, rtol, f"the gradient of {name} differs from that of the dense matrix")


def _near(value: Tensor, reference: Tensor, rtol: float, message: str) -> None:
    """Assert closeness relative to the largest entry of ``reference``, or to 1 where all are smaller."""
    _close(value.detach(), reference.detach(), max(1.0, reference.detach().abs().max().item()), rtol, message)
