"""Kernels as text."""

import torch
from gpytorch.kernels import MaternKernel, PeriodicKernel, RBFKernel, ScaleKernel

from mercer.display._text import kernel_text


def test_values_are_labelled_by_column():
    kernel = ScaleKernel(RBFKernel(ard_num_dims=2)).double()
    kernel.outputscale = 2.5
    kernel.base_kernel.lengthscale = torch.tensor([0.5, 30.0])
    assert kernel_text(kernel, ["a", "b"]).split() == [
        "Scale",
        "outputscale",
        "2.5",
        "RBF",
        "lengthscale",
        "[a=0.5,",
        "b=30]",
    ]


def test_sums_and_products_open_a_level():
    kernel = ScaleKernel(MaternKernel(nu=1.5)) + PeriodicKernel() * RBFKernel()
    lines = kernel_text(kernel).splitlines()
    assert [line.split()[0] for line in lines] == ["sum", "Scale", "Matern32", "product", "Periodic", "RBF"]
    depths = [len(line) - len(line.lstrip()) for line in lines]
    assert depths == [2, 4, 6, 4, 6, 6]


def test_batches_are_summed_up_as_ranges():
    kernel = RBFKernel(batch_shape=torch.Size([3]))
    kernel.lengthscale = torch.tensor([[[1.0]], [[2.0]], [[4.0]]])
    assert "1 to 4 over 3 latents" in kernel_text(kernel)


def test_one_kernel_per_latent_is_numbered():
    assert kernel_text([RBFKernel(), RBFKernel()]).splitlines()[::2] == ["latent 0", "latent 1"]


def test_many_columns_are_cut_short():
    text = kernel_text(RBFKernel(ard_num_dims=12), [f"c{j}" for j in range(12)])
    assert "… 4 more" in text
    assert "c7=" in text
    assert "c8=" not in text
