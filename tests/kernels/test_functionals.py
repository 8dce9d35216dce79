"""Covariances of linear functionals: sums of blocks with coefficients, several fields, variances in O(n)."""

import pytest
import torch
from oracles import derivatives as oracle

from mercer.kernels import RBF, GaussianMixture, Matern52, StudentMixture, Term, functional_diag, functional_gram

D = torch.float64
X = torch.linspace(0, 1, 7, dtype=D)[:, None]
Y = torch.tensor([[0.03], [0.52], [0.98]], dtype=D)
KERNEL = GaussianMixture(weight=[1.0, 0.5], lengthscale=[0.4, 0.3], frequency=[0.0, 2.0])
FUNCTION = oracle.mixture(
    "gaussian",
    torch.tensor([1.0, 0.5], dtype=D),
    torch.tensor([[0.4], [0.3]], dtype=D),
    torch.tensor([[0.0], [2.0]], dtype=D),
)


def operator(X, field=0):
    """u″ + x u′ − 3u."""
    one = torch.ones(len(X), dtype=D)
    return (Term(one, X, (2,), field), Term(X[:, 0], X, (1,), field), Term(-3 * one, X, (0,), field))


def by_hand(X1, X2):
    total = torch.zeros(len(X1), len(X2), dtype=D)
    for left in operator(X1):
        for right in operator(X2):
            block = oracle.nested(FUNCTION, X1, X2, left.index, right.index)
            total += left.coefficient[:, None] * block * right.coefficient
    return total


def test_operator_on_both_sides_is_the_sum_of_nested_derivatives():
    value = functional_gram([KERNEL], operator(X), operator(Y)).detach()
    expected = by_hand(X, Y)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


@pytest.mark.parametrize("kernel", [KERNEL, StudentMixture(frequency=[0.0, 3.0]), Matern52(0.3), RBF(0.2)])
def test_symmetric_gram_is_the_general_one_and_positive(kernel):
    L = operator(X)
    K = functional_gram([kernel], L).detach()
    size = K.abs().max().item()
    assert torch.equal(K, K.mT)
    torch.testing.assert_close(K, functional_gram([kernel], L, L).detach(), rtol=0, atol=1e-13 * size)
    torch.testing.assert_close(functional_diag([kernel], L), K.diagonal(), rtol=0, atol=1e-13 * size)
    assert torch.linalg.eigvalsh(K)[0] > -1e-10 * size


def test_fields_are_independent():
    one = torch.ones(len(X), dtype=D)
    L = (*operator(X, 0), Term(2 * one, X, (1,), 1))
    kernels = [KERNEL, RBF(0.3)]
    expected = functional_gram([KERNEL], operator(X)) + 4 * functional_gram([RBF(0.3)], (Term(one, X, (1,)),))
    torch.testing.assert_close(functional_gram(kernels, L), expected)
    torch.testing.assert_close(functional_diag(kernels, L), expected.diagonal())
    other = (Term(one, X, (0,), 1),)
    assert (functional_gram(kernels, operator(X), other) == 0).all()


def test_a_term_may_look_elsewhere():
    """A periodic condition, u(x) − u(x + 1), has no variance under a kernel of that period."""
    kernel = GaussianMixture(weight=[1.0], lengthscale=[1e6], frequency=[1.0])
    one = torch.ones(len(X), dtype=D)
    L = (Term(one, X, (0,)), Term(-one, X + 1, (0,)))
    assert functional_diag([kernel], L).abs().max() < 1e-11
    assert functional_gram([kernel], L).abs().max() < 1e-11


def test_gradients_reach_hyperparameters_and_coefficients():
    def value(weight, ell, mu, coefficient):
        kernel = GaussianMixture(weight=[1.0], lengthscale=[1.0], frequency=[1.0])
        for name, new in (("weight", weight), ("lengthscale", ell), ("frequency", mu)):
            raw = new + torch.log(-torch.expm1(-new))
            del kernel._parameters[f"raw_{name}"]
            setattr(kernel, f"raw_{name}", raw)
        return functional_gram([kernel], (Term(coefficient, X[:3], (2,)), Term(torch.ones(3, dtype=D), X[:3], (0,))))

    leaves = [torch.tensor([0.7]), torch.tensor([[0.4]]), torch.tensor([1.5]), torch.tensor([1.0, 2.0, 3.0])]
    assert torch.autograd.gradcheck(value, [leaf.to(D).requires_grad_() for leaf in leaves])


def test_what_makes_no_functional_is_refused():
    one = torch.ones(len(X), dtype=D)
    with pytest.raises(TypeError, match="float64"):
        functional_gram([KERNEL], (Term(one.float(), X.float(), (0,)),))
    with pytest.raises(ValueError, match="same rows"):
        functional_diag([KERNEL], (Term(one, X, (0,)), Term(one[:3], Y, (0,))))
    with pytest.raises(ValueError, match="field 1 has no kernel"):
        functional_gram([KERNEL], operator(X, 1))
    with pytest.raises(ValueError, match="at least one term"):
        functional_gram([KERNEL], ())
    with pytest.raises(ValueError, match="smoother kernel: GaussianMixture or RBF"):
        functional_gram([StudentMixture(frequency=[0.0, 3.0])], (Term(one, X, (3,)),))
