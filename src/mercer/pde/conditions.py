"""Conditions on faces of the domain: rows of linear functionals with their targets.

Every condition says ``rows(domain, n)``: which functional of u is known at which points. Functions that users pass take
the coordinates that are left on the face, in the order of the axes, as tensors (n,); numbers stand for constants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mercer.kernels.functionals import Functional, Term
from mercer.pde.domain import Box

Value = float | Callable[..., Tensor]
_MOST = 100_000  # rows on one face, if a caller sets no limit


def field_number(field: str, fields: Sequence[str]) -> int:
    """Return the position of a field; ValueError for one that the equation does not have."""
    if field not in fields:
        raise ValueError(f"the equation has fields {', '.join(fields)}, not {field!r}.")
    return list(fields).index(field)


def evaluate(value: Value, columns: Sequence[Tensor], n: int, like: Tensor, name: str) -> Tensor:
    """Return a number or a function of coordinates as a tensor (n,) in float64, with errors that name its owner."""
    if not callable(value):
        return like.new_full((n,), float(value))
    found = torch.as_tensor(value(*columns), device=like.device)
    if found.dtype != torch.float64:
        if found.dtype == torch.float32 and found.dim() > 0:
            raise TypeError(f"{name} returned float32; equations are solved in float64 only.")
        found = found.double()
    if found.dim() > 1 or (found.dim() == 1 and len(found) not in (1, n)):
        raise ValueError(f"{name} must return one number per point, ({n},), got shape {tuple(found.shape)}.")
    if not bool(torch.isfinite(found).all()):
        raise ValueError(f"{name} is not finite at some points.")
    return found.expand(n)


@dataclass(frozen=True)
class Robin:
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
            slope = points.new_zeros(len(points), domain.d)
            slope[:, column] = 1.0 if upper else -1.0
            normal.append(slope)
            target.append(self.given(domain, column, points))
        points, slopes = torch.cat(X), torch.cat(normal)
        terms = []
        if self.a:
            terms.append(Term(points.new_full((len(points),), float(self.a)), points, (0,) * domain.d, field))
        if self.b:
            for j in range(domain.d):
                if bool(slopes[:, j].any()):
                    index = tuple(int(k == j) for k in range(domain.d))
                    terms.append(Term(self.b * slopes[:, j], points, index, field))
        if not terms:
            raise ValueError("a Robin condition needs a weight of u or of its derivative that is not zero.")
        return tuple(terms), torch.cat(target)

    def faces(self, domain: Box) -> list[tuple[int, bool]]:
        """Return the faces that the condition is for, as (column, whether it is the upper end)."""
        if self.where != "boundary":
            return [domain.face(self.where)]
        return domain.faces([j for j, name in enumerate(domain.names) if name != "t"])

    def per_axis(self, domain: Box) -> list[int]:
        """Return how many conditions this is along each axis."""
        return [sum(column == j for column, _ in self.faces(domain)) for j in range(domain.d)]

    def given(self, domain: Box, column: int, X: Tensor) -> Tensor:
        """Return g at points of a face across ``column``, (n,)."""
        whole = self.where == "boundary"
        known = [X[:, j] for j in range(domain.d) if whole or j != column]
        return evaluate(self.value, known, len(X), X, f"the value of {type(self).__name__}({self.where!r})")


class Dirichlet(Robin):
    """u = g on a face; see `Robin` for ``where`` and ``value``."""

    def __init__(self, where: str, value: Value = 0.0, field: str = "u"):
        super().__init__(where, 1.0, 0.0, value, field)


class Neumann(Robin):
    """∂u/∂n = g on a face, n the outward normal; see `Robin` for ``where`` and ``value``."""

    def __init__(self, where: str, value: Value = 0.0, field: str = "u"):
        super().__init__(where, 0.0, 1.0, value, field)


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
        return evaluate(self.value, known, len(X), X, "the value of Initial")


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


Condition = Robin | Initial | Periodic
