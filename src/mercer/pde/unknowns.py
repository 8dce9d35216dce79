"""What is to be learned: coefficients, each with a range and a coordinate on the real line, and the sensors' noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

_SPREAD = 1e-3  # of readings, relative to their size, below which they say nothing of their noise
_BEGUN = math.exp(-2)  # of the spread of readings, where the search for their noise starts


@dataclass(frozen=True)
class Positive:
    """A positive coefficient; the search moves its logarithm.

    Parameters
    ----------
    init : float
        Where the search starts, > 0.
    lower, upper : float, optional
        The range in which it is looked for, and over which identifiability is judged; default init/100 and 100 init.
    """

    init: float
    lower: float | None = None
    upper: float | None = None

    def __post_init__(self) -> None:
        low, high = self.bounds
        if not 0 < low < self.init < high < math.inf:
            raise ValueError(f"a positive coefficient needs 0 < lower < init < upper, got {low}, {self.init}, {high}.")

    @property
    def bounds(self) -> tuple[float, float]:
        """Lower and upper end of the range."""
        low = self.init / 100 if self.lower is None else self.lower
        return low, 100 * self.init if self.upper is None else self.upper

    def to_line(self, value: float) -> float:
        """Return the coordinate of a value."""
        return math.log(value)

    def from_line(self, coordinate):
        """Return the value at a coordinate, a tensor; differentiable."""
        return coordinate.exp()


@dataclass(frozen=True)
class Real:
    """A coefficient of either sign.

    Parameters
    ----------
    init : float
        Where the search starts.
    lower, upper : float, optional
        The range in which it is looked for; default init ∓ 10 (1 + |init|).
    """

    init: float = 0.0
    lower: float | None = None
    upper: float | None = None

    def __post_init__(self) -> None:
        low, high = self.bounds
        if not -math.inf < low < self.init < high < math.inf:
            raise ValueError(f"a coefficient needs lower < init < upper, got {low}, {self.init}, {high}.")

    @property
    def bounds(self) -> tuple[float, float]:
        """Lower and upper end of the range."""
        reach = 10 * (1 + abs(self.init))
        low = self.init - reach if self.lower is None else self.lower
        return low, self.init + reach if self.upper is None else self.upper

    def to_line(self, value: float) -> float:
        """Return the coordinate of a value, in units of the range's half width."""
        low, high = self.bounds
        return value / (0.5 * (high - low))

    def from_line(self, coordinate):
        """Return the value at a coordinate, a tensor; differentiable."""
        low, high = self.bounds
        return coordinate * (0.5 * (high - low))


Unknown = Positive | Real


@dataclass(frozen=True)
class Coefficient:
    """What was learned of an unknown coefficient.

    ``value`` and ``std`` are in its own units; ``drop`` is by how many nats the evidence, maximised over all else,
    falls towards the lower and the upper end of the range; ``identified`` says that both fall by at least one, and
    ``note`` why it is not, where that is known.
    """

    value: float
    std: float
    identified: bool
    drop: tuple[float, float]
    note: str = ""

    def __str__(self) -> str:
        if self.identified:
            return f"{self.value:.6g} ± {self.std:.2g}"
        lower, upper = self.drop
        return self.note or f"not identified (evidence falls by {lower:.2g} and {upper:.2g} nats over the range)"


def first_noise(y: Tensor) -> float:
    """Return the standard deviation from which that of the readings ``y`` is learned; one number has one too."""
    spread = float((y - y.mean()).square().mean().sqrt())
    return _BEGUN * (max(spread, _SPREAD * float(y.square().mean().sqrt())) or 1.0)
