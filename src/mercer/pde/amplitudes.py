"""How large a prior is at the start: its amplitude is that of what sensors and conditions say of a field."""

from __future__ import annotations

from collections.abc import Sequence

from mercer.kernels import Kernel, ScaleKernel, functional_diag
from mercer.pde.problem import Problem
from mercer.pde.rows import Rows

PER_FACE = 80  # rows of a condition on one face


def with_amplitudes(problem: Problem, kernels: Sequence[Kernel]) -> list[Kernel]:
    """Return kernels with amplitudes that are to be learned started at what is known of their fields."""
    scaled = []
    for kernel in kernels:
        own = {name.rpartition(".")[2] for name, _ in kernel.named_parameters()} & {"raw_weight", "raw_outputscale"}
        if not own:
            kernel = ScaleKernel(kernel).double()
            kernel.outputscale = 1.0
        scaled.append(kernel)
    for kernel, size in zip(scaled, data_sizes(problem, scaled), strict=True):
        if isinstance(kernel, ScaleKernel) and kernel.raw_outputscale.requires_grad:
            kernel.outputscale = kernel.outputscale.detach() * size
    return scaled


def data_sizes(problem: Problem, kernels: Sequence[Kernel]) -> list[float]:
    """Return by what prior variances are to be multiplied to be those of the data, as others are where none are."""
    found = [data_size(problem, field, kernels) for field in range(len(kernels))]
    seen = [size for size in found if size is not None]
    usual = sum(seen) / len(seen) if seen else 1.0
    return [usual if size is None else size for size in found]


def data_size(problem: Problem, field: int, kernels: Sequence[Kernel] | None = None) -> float | None:
    """Return the mean square of what sensors of a field read, or its conditions say, over its prior variance."""
    pde = problem.pde
    known = [sensor.rows(pde) for sensor in problem.sensors if sensor.field == pde.fields[field]]
    if not known:
        for condition in problem.conditions:
            if condition.field == pde.fields[field]:
                L, target = condition.rows(pde.domain, problem.counts, pde.fields, PER_FACE, problem.device)
                known.append(Rows(L, target, "condition"))
    sizes = []
    for part in known:
        # readings that are all zero are as large as their noise
        read = max(float(part.target.square().mean()), float(part.noise().mean()))
        prior = float(functional_diag(kernels, part.functional).detach().mean()) if kernels else 1.0
        if read > 0 and prior > 0:
            sizes.append(read / prior)
    return sum(sizes) / len(sizes) if sizes else None
