"""Prior paths of one call: independent of each other, and functions of X."""

import torch

from mercer.kernels import RBF, Linear, Matern52, prior_paths

X = torch.randn(80, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def values(kernel, n_paths, n_features):
    return prior_paths(kernel, n_paths, n_features, torch.Generator().manual_seed(1), d=2)(X)


def test_paths_of_one_call_do_not_share_their_features():
    """Combinations of four shared features would have rank four."""
    for kernel in (Matern52(1.0), RBF(1.0) * Linear(0.5)):
        f = values(kernel, 64, 4)
        assert f.shape == (64, 80)
        assert torch.linalg.matrix_rank(f) > 40


def test_any_number_of_paths_can_be_drawn():
    for n_paths in (1, 5, 33, 70):
        assert values(RBF(1.0) + Linear(0.5), n_paths, 10).shape == (n_paths, 80)
