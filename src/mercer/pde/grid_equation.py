"""An equation at the nodes of a grid: values of its terms, residuals and linearisations, one tensor per term."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mercer.pde.axes import Axis, Interpolant, InterpolantSum
from mercer.pde.equation import PDE, LinearisationError
from mercer.pde.sylvester import differentiate

Index = tuple[int, ...]


class GridEquation:
    """N[u] = f at the product of nodes of each axis.

    Parameters
    ----------
    pde : PDE
        Of one field and one equation, without unknown coefficients.
    nodes : sequence of D tensors (N_j,)

    Attributes
    ----------
    shape : tuple of D integers
    X : (N, D)
        The nodes, the last axis running fastest.
    rhs : (N_1, …, N_D)
        f.
    indices : tuple of multi-indices
        The derivatives that N asks for.

    Raises
    ------
    ValueError
        A system, or unknown coefficients: those are for other methods.
    """

    def __init__(self, pde: PDE, nodes: Sequence[Tensor]):
        if len(pde.fields) > 1 or pde.n_equations > 1:
            raise ValueError("a grid solves one equation of one field; use method='features' or 'dense' for systems.")
        if pde.unknowns:
            raise ValueError(
                f"a grid does not learn coefficients ({', '.join(pde.unknowns)}); use method='features' or 'dense'."
            )
        self.pde, self.nodes = pde, tuple(nodes)
        self.shape = tuple(len(x) for x in nodes)
        self.X = torch.cartesian_prod(*nodes).reshape(-1, len(self.shape))
        self.rhs = pde.target(self.X)[0].reshape(self.shape)
        self.indices: tuple[Index, ...] = tuple(index for _, index in pde.requests)

    @property
    def size(self) -> int:
        """Number of nodes."""
        return len(self.X)

    def evaluate(self, values: Sequence[Tensor]) -> Tensor:
        """Return N[u] from the values of each derivative, all (N_1, …, N_D); differentiable."""
        return self.pde.evaluate(self.X, [value.reshape(-1) for value in values])[0].reshape(self.shape)

    def linearise(self, values: Sequence[Tensor]) -> tuple[dict[Index, Tensor], Tensor]:
        """Return the coefficients of N's linearisation and what it must equal, f − N[u₀] + J u₀.

        Raises
        ------
        LinearisationError
            N or a slope is not finite there; a ValueError too.
        """
        J, base = self.pde.jacobian(self.X, [value.reshape(-1) for value in values])
        if not all(bool(torch.isfinite(part).all()) for part in (base, *J)):
            where = "the values that were reached" if any(bool(value.any()) for value in values) else "u = 0"
            raise LinearisationError(
                f"the residual or its slope is not finite at {where}, where the equation has to be linearised; the "
                "search begins at u = 0. Write the equation in a form that is finite there, or for another unknown: "
                "with u = exp(w), log u is w."
            )
        slopes = [slope[0].reshape(self.shape) for slope in J]
        moved = sum(slope * value for slope, value in zip(slopes, values, strict=True))
        return dict(zip(self.indices, slopes, strict=True)), self.rhs - base[0].reshape(self.shape) + moved

    def derivatives(self, axes: Sequence[Axis], U: Tensor) -> list[Tensor]:
        """Return the derivatives that N asks for from grid values."""
        return [differentiate(axes, U, index) for index in self.indices]

    def shifted_residual(self, interpolant: Interpolant | InterpolantSum) -> float:
        """Return the rms residual at the centres of all cells, where the equation was not asked for.

        Relative to the rms of the largest of its terms there; dimensionless, and infinite where N is not finite.
        """
        middle = [0.5 * (x[1:] + x[:-1]) for x in self.nodes]
        centres = GridEquation(self.pde, middle)
        values = [interpolant.on(middle, index) for index in self.indices]
        try:
            coefficients, _ = centres.linearise(values)
        except LinearisationError:
            return math.inf
        residual = centres.rhs - centres.evaluate(values)
        terms = [centres.rhs, *(c * value for c, value in zip(coefficients.values(), values, strict=True))]
        scale = torch.stack([term.square().mean().sqrt() for term in terms]).max()
        return float(residual.square().mean().sqrt() / scale.clamp_min(torch.finfo(scale.dtype).tiny))
