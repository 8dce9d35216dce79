"""The numerical policy: every choice that could change an answer, in one frozen value that is passed down.

There are no process-wide switches. Two calls with equal policies and data give equal numbers, whatever else
was imported.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class NumericalPolicy:
    """State how numbers are computed.

    Parameters
    ----------
    dtype : torch.dtype
        Working precision, ``torch.float64`` (default) or ``torch.float32``.
    device : torch.device
        Where the tensors live.
    jitter_ladder : tuple of float
        Relative jitters tried in turn when a Cholesky factorisation fails, as multiples of the mean
        diagonal. The first one is 0: no jitter unless it is needed.
    noise_floor : float or None
        Smallest Gaussian noise variance, relative to the variance of y. None picks 1e-8 in float64 and
        1e-4 in float32, where smooth kernels with a tiny nugget fail silently.
    chunk_elements : int
        Largest temporary, in elements, that a chunked loop may hold.
    tol : float
        Relative tolerance of inner (site) iterations.
    max_inner : int
        Most site updates for one setting of the hyperparameters.
    """

    dtype: torch.dtype = torch.float64
    device: torch.device = torch.device("cpu")
    jitter_ladder: tuple[float, ...] | None = None
    noise_floor: float | None = None
    chunk_elements: int = 4_000_000
    tol: float = 1e-9
    max_inner: int = 200

    def __post_init__(self) -> None:
        if self.dtype not in (torch.float64, torch.float32):
            raise ValueError(f"dtype must be torch.float64 or torch.float32, got {self.dtype}.")
        double = self.dtype == torch.float64
        if self.jitter_ladder is None:
            ladder = (0.0, 1e-12, 1e-10, 1e-8, 1e-6) if double else (0.0, 1e-6, 1e-5, 1e-4)
            object.__setattr__(self, "jitter_ladder", ladder)
        if self.noise_floor is None:
            object.__setattr__(self, "noise_floor", 1e-8 if double else 1e-4)

    def chunk_rows(self, row_elements: int) -> int:
        """Return how many rows of ``row_elements`` elements fit in one temporary (at least one)."""
        return max(1, self.chunk_elements // max(1, row_elements))
