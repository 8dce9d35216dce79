"""Conditions at the sides of a grid: values at a few nodes of an axis that follow from those at the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import singledispatch
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mercer.linalg.kronecker import mode_product
from mercer.pde.axes import Axis
from mercer.pde.conditions import Initial, Periodic, Robin
from mercer.pde.domain import Box


class Side(NamedTuple):
    """One condition for every line of nodes along an axis: Σ_i row_i U[…, i, …] = target.

    Parameters
    ----------
    axis : int
    node : int
        Which node's value the condition gives, from those of the others.
    row : (N_axis,)
    target : (N_1, …, 1, …, N_D)
        1 at ``axis``.
    level : float
        What the condition makes of the function that is 1 everywhere; 0 for slopes and periods.
    """

    axis: int
    node: int
    row: Tensor
    target: Tensor
    level: float = 1.0


class Elimination:
    """Grid values as a function of those at the nodes that no condition gives.

    Parameters
    ----------
    shape : sequence of D integers
    sides : sequence of Side
        Several on one axis are solved together: two sides of a box, a period, or a value and a slope at the start.

    Attributes
    ----------
    inner : list of D index tensors
        Nodes of each axis that are left.
    free : bool
        No condition notices a constant that is added.

    Raises
    ------
    ValueError
        No conditions, or those of one axis give the same node or do not determine their nodes.
    """

    def __init__(self, shape: Sequence[int], sides: Sequence[Side]):
        if not sides:
            raise ValueError("a grid needs at least one condition; add Dirichlet(…), or use method='features'.")
        self.shape = tuple(shape)
        self.free = not any(side.level for side in sides)
        self.sides = [[side for side in sides if side.axis == j] for j in range(len(self.shape))]
        self.inner: list[Tensor] = []
        self._nodes: list[list[int]] = []
        self._inverse: list[Tensor] = []  # of the rows at their own nodes
        self._others: list[Tensor] = []  # values at those nodes from the others' values
        for j, (n, of_axis) in enumerate(zip(self.shape, self.sides, strict=True)):
            nodes = [side.node % n for side in of_axis]
            if len(set(nodes)) < len(nodes):
                raise ValueError(f"two conditions give the same node of axis {j}; drop one of them.")
            device = of_axis[0].row.device if of_axis else sides[0].row.device
            inner = torch.tensor([i for i in range(n) if i not in nodes], device=device)
            rows = torch.stack([side.row for side in of_axis]) if of_axis else sides[0].row.new_zeros(0, n)
            inverse = _small_inverse(rows[:, nodes], j)
            self.inner.append(inner)
            self._nodes.append(nodes)
            self._inverse.append(inverse)
            self._others.append(-inverse @ rows[:, inner])

    def restrict(self, U: Tensor) -> Tensor:
        """Return the values at the inner nodes."""
        for j, inner in enumerate(self.inner):
            U = U.index_select(j, inner)
        return U

    def extend(self, inside: Tensor, *, homogeneous: bool = False) -> Tensor:
        """Return all values from those at the inner nodes; ``homogeneous`` takes all targets for zero.

        Corners follow from the conditions of the last of their axes.
        """
        n_axes, U = len(self.shape), inside
        for j, of_axis in enumerate(self.sides):
            if not of_axis:
                continue
            given = mode_product(self._others[j], U, j, n_axes)
            if not homogeneous:
                target = torch.cat([side.target for side in of_axis], j)
                for k in range(j + 1, n_axes):
                    target = target.index_select(k, self.inner[k])
                given = given + mode_product(self._inverse[j], target, j, n_axes)
            whole = U.new_empty(*U.shape[:j], self.shape[j], *U.shape[j + 1 :])
            whole.index_copy_(j, self.inner[j], U)
            U = whole.index_copy_(j, torch.tensor(self._nodes[j], device=U.device), given)
        return U

    def reduce(self, T: Tensor, j: int) -> Tensor:
        """Return an operator along axis j (N_j, N_j) as it acts on inner nodes, the others following."""
        rows = T[self.inner[j]]
        return rows[:, self.inner[j]] + rows[:, self._nodes[j]] @ self._others[j]


@singledispatch
def condition_sides(condition: Any, domain: Box, axes: Sequence[Axis]) -> list[Side]:
    """Return the sides that a condition gives on a grid.

    Raises
    ------
    TypeError
        There is no rule for such a condition.
    """
    raise TypeError(
        f"a grid cannot use the condition {type(condition).__name__}; use method='features' or 'dense', or register a "
        "rule with condition_sides."
    )


@condition_sides.register
def _(condition: Robin, domain: Box, axes: Sequence[Axis]) -> list[Side]:
    target = _targets(condition, domain, axes)
    found, start = [], 0
    for j, upper in condition.faces(domain):
        shape = _across(axes, j)
        node = len(axes[j]) - 1 if upper else 0
        row = (condition.b if upper else -condition.b) * axes[j].derivative(1)[node]
        row = row + condition.a * axes[j].derivative(0)[node]
        stop = start + math.prod(shape)
        found.append(Side(j, node, row, target[start:stop].reshape(shape), condition.a))
        start = stop
    return found


@condition_sides.register
def _(condition: Initial, domain: Box, axes: Sequence[Axis]) -> list[Side]:
    j = domain.column(condition.time)
    target = _targets(condition, domain, axes).reshape(_across(axes, j))
    # a value gives the first node, a velocity the second
    return [Side(j, condition.order, axes[j].derivative(condition.order)[0], target, float(not condition.order))]


@condition_sides.register
def _(condition: Periodic, domain: Box, axes: Sequence[Axis]) -> list[Side]:
    j, found = domain.column(condition.axis), []
    for order in range(condition.order):
        D = axes[j].derivative(order)
        node = order // 2 if order % 2 == 0 else len(axes[j]) - 1 - order // 2
        found.append(Side(j, node, D[0] - D[-1], D.new_zeros(_across(axes, j)), 0.0))
    return found


def _targets(condition: Any, domain: Box, axes: Sequence[Axis]) -> Tensor:
    """Return a condition's targets at the nodes of its faces, corners included, face after face."""
    shape = [len(axis) for axis in axes]
    return condition.rows(domain, shape, most=math.prod(shape), device=axes[0].nodes.device)[1]


def _across(axes: Sequence[Axis], j: int) -> list[int]:
    return [1 if k == j else len(axis) for k, axis in enumerate(axes)]


def _small_inverse(A: Tensor, axis: int) -> Tensor:
    """Return the inverse of one matrix of as many rows as an axis has conditions, by QR."""
    if len(A) == 0:
        return A
    Q, R = torch.linalg.qr(A)
    if bool(R.diagonal().abs().min() <= 1e-12 * R.diagonal().abs().max()):
        raise ValueError(
            f"conditions along axis {axis} do not determine the values at its ends: they say one thing twice or none."
        )
    return torch.linalg.solve_triangular(R, Q.mT, upper=True)
