"""Sums over rows in whitened coordinates: their definition, their gradients, and what they hold in memory."""

import pytest
import torch
from inducing_toys import kernels_of_their_own
from oracles import inducing as oracle
from toys import DTYPE, normal

from mercer.families import Prior
from mercer.families.moments import moments_of, tied_from_white, whitened_moments
from mercer.families.tied import inducing_factor
from mercer.kernels import RBF, Matern32, Matern52, gram
from mercer.policy import NumericalPolicy

POLICY = NumericalPolicy()
N, M = 7, 3
X = torch.rand(N, 2, generator=torch.Generator().manual_seed(0), dtype=DTYPE)
# (batch of λ1, batch of λ2, batch of the kernel)
BATCHES = {
    "one latent": ((), (), ()),
    "a shared precision": ((2,), (), ()),
    "latents": ((2,), (2,), ()),
    "latents and outputs": ((3, 2), (2,), ()),
    "a kernel each": ((2,), (2,), (2,)),
    "a kernel each, a shared precision": ((2,), (), (2,)),
    "kernels alone": ((), (), (2,)),
}


def arguments(name):
    """Kernel, Z, L, λ1 and λ2, all leaves."""
    of_linear, of_precision, of_kernel = BATCHES[name]
    kernel = kernels_of_their_own() if of_kernel else Matern52([0.4, 0.9], outputscale=1.3)
    Z = X[:M] + 0.05
    with torch.no_grad():
        L = inducing_factor(Prior(kernel), Z, POLICY)[0]
    leaves = [Z, L, normal(*of_linear, N, seed=1), 0.1 + normal(*of_precision, N, seed=2).square()]
    return kernel, [each.requires_grad_() for each in leaves]


@pytest.mark.parametrize("elements", [1, 2 * M * 2, 4_000_000])
@pytest.mark.parametrize("name", BATCHES)
def test_sums_are_their_definition(name, elements):
    kernel, (Z, L, linear, precision) = arguments(name)
    policy = NumericalPolicy(chunk_elements=elements)
    with torch.no_grad():
        W = torch.linalg.inv(L) @ gram(kernel, Z, X)
        expected = (W @ linear.unsqueeze(-1)).squeeze(-1), W @ precision.diag_embed() @ W.mT
        found = whitened_moments(kernel, X, Z, L, linear, precision, policy)
        known = moments_of(torch.linalg.solve_triangular(L, gram(kernel, Z, X), upper=False), linear, precision, policy)
    for sums in (found, known):
        for one, other in zip(sums, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("elements", [1, 4_000_000], ids=["made again", "kept"])  # values of the kernel
@pytest.mark.parametrize("name", BATCHES)
def test_gradients_are_those_of_finite_differences(name, elements):
    kernel, leaves = arguments(name)
    policy, parameters = NumericalPolicy(chunk_elements=elements), list(kernel.parameters())

    def sums(Z, L, linear, precision, *_):
        return whitened_moments(kernel, X, Z, L, linear, precision, policy)

    # each entry by itself, or along random directions
    assert torch.autograd.gradcheck(sums, (*leaves, *parameters), atol=1e-7, rtol=1e-6, fast_mode=name != "latents")


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), ()], ids=["Z", "L", "λ1", "λ2", "kernel", "none"])
def test_only_what_is_asked_for_has_a_gradient(wanted):
    kernel, leaves = arguments("latents")
    everything = [*leaves, next(iter(kernel.parameters()))]
    whole = torch.autograd.grad(_functional(kernel, leaves), everything)
    for k, leaf in enumerate(everything):
        leaf.requires_grad_(k in wanted)
    for parameter in list(kernel.parameters())[1:]:
        parameter.requires_grad_(False)
    value = _functional(kernel, leaves)
    assert value.requires_grad == bool(wanted)
    for k in wanted:
        torch.testing.assert_close(torch.autograd.grad(value, everything[k])[0], whole[k], rtol=1e-13, atol=1e-13)


def _functional(kernel, leaves, policy=POLICY):
    Z, L, linear, precision = leaves
    first, second = whitened_moments(kernel, X, Z, L, linear, precision, policy)
    return (first * normal(*first.shape, seed=5)).sum() + (second * normal(*second.shape, seed=6)).sum()


def test_gradients_keep_their_digits_where_places_are_crowded():
    """Seventy places in a few lengthscales of a smooth kernel, precise data: L⁻ᵀ(…)L⁻¹ applied to values would not."""
    rows = 3.0 * torch.rand(400, 2, generator=torch.Generator().manual_seed(3), dtype=DTYPE)
    kernel, precision = RBF([0.9, 0.9]), torch.full((400,), 1e4, dtype=DTYPE)
    gradients = []
    for dense in (False, True):
        Z = rows[:70].clone().requires_grad_()
        L = inducing_factor(Prior(kernel), Z, POLICY)[0]
        linear = precision * torch.sin(rows.sum(-1))
        if dense:
            W = torch.linalg.solve_triangular(L, kernel(Z, rows).to_dense(), upper=False)
            first, second = W @ linear, (W * precision) @ W.mT
        else:
            first, second = whitened_moments(kernel, rows, Z, L, linear, precision, POLICY)
        B = second + torch.eye(70, dtype=DTYPE)
        value = 0.5 * first @ torch.cholesky_solve(first[:, None], torch.linalg.cholesky(B)).squeeze(-1)
        value = value - 0.5 * torch.logdet(B) + 0.5 * second.trace()
        gradients.append(torch.autograd.grad(value, [Z, kernel.raw_lengthscale]))
    for found, expected in zip(*gradients, strict=True):
        assert float((found - expected).abs().max()) < 1e-6 * float(expected.abs().max())


def test_no_rows_are_sums_of_nothing():
    for name, (of_linear, of_precision, of_kernel) in BATCHES.items():
        kernel, (Z, L, linear, precision) = arguments(name)
        first, second = whitened_moments(kernel, X[:0], Z, L, linear[..., :0], precision[..., :0], POLICY)
        assert first.shape == (*(of_linear or of_kernel), M) and not first.any()
        assert second.shape == (*(of_precision or of_kernel), M, M) and not second.any()


def test_nothing_of_the_size_of_all_kernel_values_is_kept():
    """What autograd holds for the gradient, and the largest matrix of kernel values in either direction."""
    held, seen = [], []

    def watched(kernel, X1, X2=None, policy=None):
        seen.append(len(X1) * len(X2))
        return gram(kernel, X1, X2, policy)

    kernel, Z = Matern32(0.3), torch.linspace(0, 1, 16, dtype=DTYPE).unsqueeze(-1).requires_grad_()
    policy, rows = NumericalPolicy(chunk_elements=16 * 32), torch.rand(1000, 1, dtype=DTYPE)
    linear, precision = torch.ones(2, 1000, dtype=DTYPE, requires_grad=True), torch.ones(1000, dtype=DTYPE)
    L = inducing_factor(Prior(kernel), Z, policy)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mercer.families.moments.gram", watched)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.numel()) or t, lambda t: t):
            first, second = whitened_moments(kernel, rows, Z, L, linear, precision, policy)
        torch.autograd.grad(first.sum() + second.sum(), [Z, linear, *kernel.parameters()])
    assert max(seen) <= policy.chunk_elements and len(seen) > 60
    assert sum(held) <= 5 * 1000  # X, λ1 and λ2, and what is of the size of Z


@torch.no_grad()
def test_tied_sites_are_the_sums_in_the_coordinates_of_u():
    kernel, (Z, L, linear, precision) = arguments("latents and outputs")
    tied = tied_from_white(L, *whitened_moments(kernel, X, Z, L, linear, precision, POLICY))
    A = (torch.linalg.inv(oracle.between(lambda a, b: kernel(a, b).to_dense(), Z, Z)) @ gram(kernel, Z, X)).mT
    torch.testing.assert_close(tied.linear, linear @ A, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tied.precision, A.mT @ precision.diag_embed() @ A, rtol=1e-12, atol=1e-12)
