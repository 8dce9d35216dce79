"""Learning from a stream: rows come once, in batches, and only some of them can be kept."""

from mercer.sequential.memory import (
    Candidates,
    ClassBalanced,
    LeverageSample,
    LeverageTop,
    MemoryPolicy,
    Selection,
    Uniform,
    get_policy,
)
from mercer.sequential.options import Stream

__all__ = [
    "Candidates",
    "ClassBalanced",
    "LeverageSample",
    "LeverageTop",
    "MemoryPolicy",
    "Selection",
    "Stream",
    "Uniform",
    "get_policy",
]
