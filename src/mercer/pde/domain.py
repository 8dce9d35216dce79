"""Boxes with named axes, and the points at which equations and conditions are asked for.

A box knows its axes and where points lie: tensor grids, scattered points of low discrepancy where a grid would be too
many, and faces. What holds at those points is said in `conditions` and `equation`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_MOST_AXES = 3
_ON_FACE = 1e-9  # of the axis, by which a face may be misstated


class Box:
    """A box Π_j [a_j, b_j] with one letter per axis, of which there are one to three.

    Parameters
    ----------
    **bounds : (float, float)
        Lower and upper end of each axis, in the order of the columns of X: ``Box(x=(0, 1), t=(0, 2))``.

    Attributes
    ----------
    names : tuple of str
        The letters, one per column.
    lower, upper, lengths : tuple of float
        In units of X.

    Raises
    ------
    ValueError
        No axis or more than three, a name that is not one letter, or an interval that is empty or not finite.

    Examples
    --------
    >>> box = Box(x=(0, 1), t=(0, 2))
    >>> box.nodes((3, 5)).shape
    torch.Size([15, 2])
    """

    def __init__(self, **bounds: tuple[float, float]):
        if not 1 <= len(bounds) <= _MOST_AXES:
            raise ValueError(f"a Box has one to three axes, such as Box(x=(0, 1)); got {len(bounds)}.")
        for name, interval in bounds.items():
            if len(name) != 1 or not name.isalpha():
                raise ValueError(f"an axis is one letter, so that d('xx') can be read; got {name!r}.")
            if len(interval) != 2 or not -math.inf < interval[0] < interval[1] < math.inf:
                raise ValueError(f"axis {name} must run from a lower to an upper end, got {interval}.")
        self.names = tuple(bounds)
        self.lower = tuple(float(interval[0]) for interval in bounds.values())
        self.upper = tuple(float(interval[1]) for interval in bounds.values())
        self.lengths = tuple(b - a for a, b in zip(self.lower, self.upper, strict=True))

    @property
    def d(self) -> int:
        """Number of axes."""
        return len(self.names)

    def __repr__(self) -> str:
        axes = (f"{n}=({_shown(a)}, {_shown(b)})" for n, a, b in zip(self.names, self.lower, self.upper, strict=True))
        return f"Box({', '.join(axes)})"

    def column(self, name: str) -> int:
        """Return the column of an axis; ValueError for one that is not there."""
        if name not in self.names:
            raise ValueError(f"the domain has axes {', '.join(self.names)}, not {name!r}.")
        return self.names.index(name)

    def order(self, letters: str) -> tuple[int, ...]:
        """Return how often a derivative such as "xxt" differentiates in each column."""
        found = [0] * self.d
        for letter in letters:
            found[self.column(letter)] += 1
        return tuple(found)

    def face(self, where: str) -> tuple[int, bool]:
        """Return the column of a face such as "x=0", and whether it is the upper one."""
        name, _, value = where.replace(" ", "").partition("=")
        column = self.column(name)
        ends = (self.lower[column], self.upper[column])
        try:
            place = float(value)
        except ValueError:
            hint = f"a face is an axis and one of its ends, such as '{name}={_shown(ends[0])}'"
            raise ValueError(f"{hint}; got {where!r}.") from None
        upper = abs(place - ends[1]) < abs(place - ends[0])
        rounding = 4 * math.ulp(abs(ends[upper]))  # far from the origin the axis may be shorter than this
        if not abs(place - ends[upper]) <= _ON_FACE * self.lengths[column] + rounding:
            raise ValueError(f"{where!r} is not a face: axis {name} ends at {_shown(ends[0])} and {_shown(ends[1])}.")
        return column, upper

    def faces(self, columns: Sequence[int] | None = None) -> list[tuple[int, bool]]:
        """Return all faces across the given columns (default all)."""
        return [
            (column, upper) for column in (range(self.d) if columns is None else columns) for upper in (False, True)
        ]

    def axes(self, n: int | Sequence[int], device: torch.device | None = None) -> list[Tensor]:
        """Return uniform nodes along each axis, both ends included: d tensors (n_j,)."""
        return [
            torch.linspace(a, b, k, dtype=torch.float64, device=device)
            for a, b, k in zip(self.lower, self.upper, self.counts(n), strict=True)
        ]

    def counts(self, n: int | Sequence[int]) -> tuple[int, ...]:
        """Return the number of nodes along each axis from one number for all, or one each."""
        try:
            counts = tuple(operator.index(k) for k in n) if isinstance(n, Iterable) else (operator.index(n),) * self.d
        except TypeError:
            raise ValueError(
                f"n_collocation must be an integer, or one for each of the {self.d} axes of {self}, got {n!r}."
            ) from None
        if len(counts) != self.d or min(counts) < 2:
            raise ValueError(f"the nodes are at least 2 along each of {self.d} axes, got {n}; see n_collocation.")
        return counts

    def nodes(self, n: int | Sequence[int], device: torch.device | None = None) -> Tensor:
        """Return the tensor grid of uniform nodes, (Π n_j, d), the last axis running fastest."""
        return torch.cartesian_prod(*self.axes(n, device)).reshape(-1, self.d)

    def midpoints(self, n: int | Sequence[int], device: torch.device | None = None) -> Tensor:
        """Return the centres of the cells of `nodes`, (Π (n_j − 1), d): where a grid cannot see."""
        middle = [0.5 * (axis[1:] + axis[:-1]) for axis in self.axes(n, device)]
        return torch.cartesian_prod(*middle).reshape(-1, self.d)

    def scattered(self, n: int, offset: float = 0.5, device: torch.device | None = None) -> Tensor:
        """Return n points of low discrepancy inside the box, (n, d); another offset gives other points.

        Notes
        -----
        The additive recurrence with powers of the root of xᵈ⁺¹ = x + 1, which for d = 1 is the golden ratio: gaps are
        even and their ratios irrational, so that no wave hides between the points as it can on a grid.
        """
        return self._scale(_recurrence(n, self.d, offset, device))

    def on_face(
        self, column: int, upper: bool, n: int | Sequence[int], most: int, device: torch.device | None = None
    ) -> Tensor:
        """Return points on a face: a grid of n per axis, or ``most`` scattered ones if it has more."""
        end = (self.upper if upper else self.lower)[column]
        counts = self.counts(n)
        others = [j for j in range(self.d) if j != column]
        size = math.prod(counts[j] for j in others)
        X = torch.empty(min(size, most), self.d, dtype=torch.float64, device=device)
        if others and size <= most:
            axes = self.axes(n, device)
            X[:, others] = torch.cartesian_prod(*(axes[j] for j in others)).reshape(-1, len(others))
        elif others:
            unit = _recurrence(most, len(others), 0.5, device)
            # the corners matter most: they are the ends of what must be interpolated
            corners = torch.cartesian_prod(*(torch.tensor([0.0, 1.0], dtype=torch.float64),) * len(others))
            corners = corners.reshape(-1, len(others)).to(unit)[:most]
            unit[: len(corners)] = corners
            lower = unit.new_tensor([self.lower[j] for j in others])
            X[:, others] = lower + unit * unit.new_tensor([self.lengths[j] for j in others])
        X[:, column] = end
        return X

    def outside(self, X: Tensor, tol: float = 1e-9) -> Tensor:
        """Say which rows of X (n, d) lie off the box by more than ``tol`` of its lengths, (n,)."""
        lower, upper, slack = (X.new_tensor(v) for v in (self.lower, self.upper, self.lengths))
        beyond = torch.maximum(lower - X, X - upper)
        return (beyond > tol * slack).any(-1)

    def place(self, point: Tensor) -> str:
        """Return a point (d,) in words."""
        return ", ".join(f"{name}={float(x):.6g}" for name, x in zip(self.names, point, strict=True))

    def _scale(self, unit: Tensor) -> Tensor:
        return unit.new_tensor(self.lower) + unit * unit.new_tensor(self.lengths)


def _recurrence(n: int, d: int, offset: float, device: torch.device | None) -> Tensor:
    """Return n points of the unit cube, frac(offset + i α), (n, d)."""
    root = 2.0
    for _ in range(60):
        root = (1.0 + root) ** (1.0 / (d + 1))
    alpha = torch.tensor([root ** -(j + 1) for j in range(d)], dtype=torch.float64, device=device)
    count = torch.arange(1, n + 1, dtype=torch.float64, device=device)
    return (offset + count[:, None] * alpha) % 1.0


def _shown(end: float) -> str:
    """Return the shortest text that is read as this number."""
    short = f"{end:g}"
    return short if float(short) == end else repr(end)
