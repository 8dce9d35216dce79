"""Conditions on faces of the domain: rows of linear functionals with their targets.

Every condition says ``rows(domain, n)``: which functional of u is known at which points. Functions that users pass take
the coordinates that are left on the face, in the order of the axes, as tensors (n,); numbers stand for constants.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from mercer.kernels.functionals import Functional, Term
from mercer.pde.domain import Box
from mercer.pde.values import Value, evaluate

_MOST = 100_000  # rows on one face, if a caller sets no limit


def field_number(field: str, fields: Sequence[str]) -> int:
    """Return the position of a field; ValueError for one that the equation does not have."""
    if field not in fields:
        raise ValueError(f"the equation has fields {', '.join(fields)}, not {field!r}.")
    return list(fields).index(field)


class _OnFace(ABC):
    """Σ_k w_k ∂ᵏu/∂nᵏ = g on faces, n the outward normal."""

    where: str
    value: Value
    field: str

    @abstractmethod
    def weights(self) -> dict[int, float]:
        """Return w_k for each order k."""

    def rows(
        self,
        domain: Box,
        n: int | Sequence[int],
        fields: Sequence[str] = ("u",),
        most: int = _MOST,
        device: torch.device | None = None,
    ) -> tuple[Functional, Tensor]:
        """Return the functional at the points of the face, and g there.

        Parameters
        ----------
        domain : Box
        n : int or one per axis of the domain
            Nodes along each axis of the face.
        fields : sequence of str
        most : int
            Most rows on one face; scattered points take the place of a grid that has more.

        Returns
        -------
        Functional of k rows, (k,)
        """
        field = field_number(self.field, fields)
        X, normal, target = [], [], []
        for column, upper in self.faces(domain):
            points = domain.on_face(column, upper, n, most, device)
            X.append(points)
            outward = points.new_zeros(len(points), domain.d)
            outward[:, column] = 1.0 if upper else -1.0
            normal.append(outward)
            target.append(self.given(domain, column, points))
        points, normals, terms = torch.cat(X), torch.cat(normal), []
        for order, weight in self.weights().items():
            if not weight:
                continue
            if order == 0:
                terms.append(Term(points.new_full((len(points),), float(weight)), points, (0,) * domain.d, field))
                continue
            for j in range(domain.d):
                if bool(normals[:, j].any()):
                    index = tuple(order * int(k == j) for k in range(domain.d))
                    terms.append(Term(weight * normals[:, j] ** order, points, index, field))
        if not terms:
            raise ValueError("a Robin condition needs a weight of u or of its derivative that is not zero.")
        return tuple(terms), torch.cat(target)

    def faces(self, domain: Box) -> list[tuple[int, bool]]:
        """Return the faces that the condition is for, as (column, whether it is the upper end)."""
        if self.where != "boundary":
            return [domain.face(self.where)]
        columns = [j for j, name in enumerate(domain.names) if name != "t"]
        if not columns:
            raise ValueError(f"{domain} has no boundary but the ends of its time axis: use Initial, or name an end.")
        return domain.faces(columns)

    def per_axis(self, domain: Box) -> list[int]:
        """Return how many conditions this is along each axis."""
        return [sum(column == j for column, _ in self.faces(domain)) for j in range(domain.d)]

    def given(self, domain: Box, column: int, X: Tensor) -> Tensor:
        """Return g at points of a face across ``column``, (n,)."""
        whole = self.where == "boundary"
        along = [j for j in range(domain.d) if whole or j != column]
        name = f"the value of {type(self).__name__}({self.where!r})"
        return evaluate(self.value, [X[:, j] for j in along], len(X), X, name, [domain.names[j] for j in along])


@dataclass(frozen=True)
class Robin(_OnFace):
    """a u + b ∂u/∂n = g on a face, n the outward normal.

    Parameters
    ----------
    where : str
        A face such as "x=0", or "boundary" for all faces but those of an axis named t; ``value`` then takes all
        coordinates.
    a, b : float
        Weights of u and of its outward derivative.
    value : float or callable
        g of the coordinates along the face.
    field : str
        Which unknown function.
    """

    where: str
    a: float
    b: float
    value: Value = 0.0
    field: str = "u"

    def weights(self) -> dict[int, float]:
        """Return a and b by the order of the derivative."""
        return {0: self.a, 1: self.b}


class Dirichlet(Robin):
    """u = g on a face; see `Robin` for ``where`` and ``value``."""

    def __init__(self, where: str, value: Value = 0.0, field: str = "u"):
        super().__init__(where, 1.0, 0.0, value, field)


class Neumann(Robin):
    """∂u/∂n = g on a face, n the outward normal; see `Robin` for ``where`` and ``value``."""

    def __init__(self, where: str, value: Value = 0.0, field: str = "u"):
        super().__init__(where, 0.0, 1.0, value, field)


@dataclass(frozen=True)
class NormalDerivative(_OnFace):
    """∂ᵏu/∂nᵏ = g on a face with k > 1, n the outward normal: the moment at the end of a beam, or its shear force.

    Parameters
    ----------
    where : str
        See `Robin`.
    order : int
        k, from 2; `Neumann` is the first.
    value : float or callable
        g of the coordinates along the face. At a lower end an odd derivative has the sign of −∂ᵏu/∂xᵏ.
    field : str
        Which unknown function.
    """

    where: str
    order: int
    value: Value = 0.0
    field: str = "u"

    def __post_init__(self) -> None:
        _check_order(self.order, 2, "NormalDerivative")

    def weights(self) -> dict[int, float]:
        """Return 1 for the order."""
        return {self.order: 1.0}


@dataclass(frozen=True)
class Initial:
    """∂ᵏu/∂tᵏ = g at the lower end of the time axis.

    Parameters
    ----------
    value : float or callable
        g of the other coordinates.
    order : int
        k: 0 for u, 1 for its velocity.
    time : str
        Name of the time axis.
    field : str
        Which unknown function.
    """

    value: Value
    order: int = 0
    time: str = "t"
    field: str = "u"

    def __post_init__(self) -> None:
        _check_order(self.order, 0, "Initial")

    def rows(
        self,
        domain: Box,
        n: int | Sequence[int],
        fields: Sequence[str] = ("u",),
        most: int = _MOST,
        device: torch.device | None = None,
    ) -> tuple[Functional, Tensor]:
        """Return the functional at the points of the initial face, and g there; see `Robin.rows`."""
        ((column, upper),) = self.faces(domain)
        X = domain.on_face(column, upper, n, most, device)
        index = tuple(self.order * int(j == column) for j in range(domain.d))
        target = self.given(domain, column, X)
        return (Term(torch.ones_like(target), X, index, field_number(self.field, fields)),), target

    def faces(self, domain: Box) -> list[tuple[int, bool]]:
        """Return the initial face; see `Robin.faces`."""
        return [(domain.column(self.time), False)]

    def per_axis(self, domain: Box) -> list[int]:
        """Return how many conditions this is along each axis."""
        return [int(j == domain.column(self.time)) for j in range(domain.d)]

    def given(self, domain: Box, column: int, X: Tensor) -> Tensor:
        """Return g at points of the initial face, (n,)."""
        known = [X[:, j] for j in range(domain.d) if j != column]
        names = [name for j, name in enumerate(domain.names) if j != column]
        return evaluate(self.value, known, len(X), X, "the value of Initial", names)


@dataclass(frozen=True)
class Periodic:
    """u and its first derivatives agree at both ends of an axis.

    Parameters
    ----------
    axis : str
    order : int
        How many derivatives agree, counting u itself; as many as the equation's order along the axis.
    field : str
        Which unknown function.
    """

    axis: str
    order: int = 2
    field: str = "u"

    def __post_init__(self) -> None:
        _check_order(self.order, 1, "Periodic")

    def rows(
        self,
        domain: Box,
        n: int | Sequence[int],
        fields: Sequence[str] = ("u",),
        most: int = _MOST,
        device: torch.device | None = None,
    ) -> tuple[Functional, Tensor]:
        """Return the differences between both ends, and zeros; see `Robin.rows`.

        Rows of one order follow those of the order before, so that all terms have the same rows.
        """
        column, field = domain.column(self.axis), field_number(self.field, fields)
        low, high = (domain.on_face(column, upper, n, most, device) for upper in (False, True))
        terms, k = [], len(low)
        X = [end.repeat(self.order, 1) for end in (low, high)]
        for order in range(self.order):
            index = tuple(order * int(j == column) for j in range(domain.d))
            here = low.new_zeros(self.order * k)
            here[order * k : (order + 1) * k] = 1.0
            terms += [Term(here, X[1], index, field), Term(-here, X[0], index, field)]
        return tuple(terms), low.new_zeros(self.order * k)

    def per_axis(self, domain: Box) -> list[int]:
        """Return how many conditions this is along each axis."""
        return [self.order * int(j == domain.column(self.axis)) for j in range(domain.d)]


Condition = Robin | NormalDerivative | Initial | Periodic


def _check_order(order: Any, least: int, name: str) -> None:
    if not isinstance(order, Integral) or order < least:
        raise ValueError(f"order of {name} must be an integer of at least {least}, got {order!r}.")
