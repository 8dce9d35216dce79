"""What a solution has to confess: which solver ran and why, on how many nodes, and how far it is from the equation."""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Report:
    """What ran, why, and how well it did.

    ``residual`` is the root mean square of N[u] − f at shifted nodes and ``boundary_error`` that of the conditions,
    both relative to the size of their terms; ``scale`` is ŝ² (far above 1: the prior does not fit), ``nugget`` the
    relative η, ``surprise`` by what variances were raised because residuals at shifted nodes are larger than the
    posterior had them, ``left_open`` the share of the prior variance of u that equation and conditions leave somewhere,
    ``points_per_wavelength`` the nodes per shortest wavelength along the axis that has fewest,
    ``noise`` the standard deviation of observations that was learned, ``log_evidence`` in nats.
    """

    method: str = ""
    reason: str = ""
    nugget: float = math.nan
    scale: float = math.nan
    surprise: float = 1.0
    left_open: float = math.nan
    residual: float = math.nan
    boundary_error: float = math.nan
    points_per_wavelength: float = math.inf
    n_steps: int = 0
    status: str = ""
    n_nodes: tuple[int, ...] = ()
    n_rows: int = 0
    n_features: int = 0
    n_lines: int = 0
    n_evaluations: int = 0
    noise: float = math.nan
    log_evidence: float = math.nan
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def warn(self, message: str) -> None:
        """Keep a warning, and raise it as one."""
        self.warnings.append(message)
        warnings.warn(message, UserWarning, stacklevel=2)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain Python values, ready for JSON: None where a number is not finite."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }

    def __str__(self) -> str:
        nodes = " × ".join(map(str, self.n_nodes))
        waves = "no wave among the data"
        if math.isfinite(self.points_per_wavelength):
            waves = f"{self.points_per_wavelength:.3g} per shortest wavelength"
        lines = [
            f"method      {self.method}: {self.reason}",
            f"nodes       {nodes}, {waves}",
            f"size        {self.n_rows} rows, {self.n_features or 'no'} features, {self.n_lines} lines of the spectrum",
            f"fit         {self.n_steps} step(s), {self.status}",
            f"residual    {self.residual:.2g} at shifted nodes, conditions {self.boundary_error:.2g} (relative)",
        ]
        if math.isfinite(self.scale):  # a point on a grid has none
            scale = f"scale ŝ² = {self.scale:.3g}, raised by {self.surprise:.3g}"
            lines.append(f"numerics    relative nugget {self.nugget:g}, {scale}")
            lines.append(f"evidence    {self.log_evidence:.6g} nats")
        if math.isfinite(self.noise):
            lines.append(f"noise       {self.noise:.3g}, learned")
        lines.append(f"cost        {self.seconds:.2f} s")
        lines += [f"note        {note}" for note in self.notes]
        lines += [f"WARNING     {warning}" for warning in self.warnings]
        return "\n".join(lines)
