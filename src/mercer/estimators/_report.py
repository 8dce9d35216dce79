"""What a fit has to confess: which algorithm ran and why, how it ended, and what looks wrong."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class FitReport:
    """Everything that happened in ``fit``.

    ``seconds`` is wall time, ``memory_mb`` the peak resident memory of the process (on a GPU: of the allocator),
    ``jitter`` the relative jitter of the final factorisation, ``log_marginal_likelihood`` in nats and in the
    user's units of y, ``evidence_trace`` the same quantity per iteration, ``optima`` how far below the best each
    start ended, in nats (≤ 0; empty without restarts).
    """

    family: str
    family_reason: str
    engine: str
    engine_reason: str
    evidence: str
    likelihood: str
    n_rows: int
    n_iter: int = 0
    n_evaluations: int = 0
    n_inner: int = 0
    converged: bool = True
    status: str = ""
    jitter: float = 0.0
    dtype: str = "float64"
    device: str = "cpu"
    seconds: float = 0.0
    memory_mb: float = 0.0
    log_marginal_likelihood: float = float("nan")
    evidence_trace: list[float] = field(default_factory=list)
    optima: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain Python values, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        ended = "converged" if self.converged else "NOT converged"
        lines = [
            f"family      {self.family}: {self.family_reason}",
            f"engine      {self.engine}: {self.engine_reason} (evidence: {self.evidence})",
            f"likelihood  {self.likelihood}",
            f"rows        {self.n_rows}",
            f"fit         {ended} after {self.n_iter} iterations, {self.n_evaluations} evaluations ({self.status})",
            f"evidence    {self.log_marginal_likelihood:.6g} nats",
            f"numerics    {self.dtype} on {self.device}, relative jitter {self.jitter:g}",
            f"cost        {self.seconds:.2f} s, peak memory {self.memory_mb:.0f} MB",
        ]
        lines += [f"note        {note}" for note in self.notes]
        lines += [f"WARNING     {warning}" for warning in self.warnings]
        return "\n".join(lines)


@dataclass(frozen=True)
class Finding:
    """One thing that ``diagnose`` noticed: a short code, what it is, and what to do about it."""

    code: str
    message: str
    cure: str

    def __str__(self) -> str:
        return f"[{self.code}] {self.message} {self.cure}"


def evidence_name(engine: Any, family: Any) -> str:
    """Return what the evidence is: "exact", "lower bound", "approximation", and of what."""
    if not family.evidence_of.startswith("lower bound"):
        return f"{engine.evidence} {family.evidence_of}".strip()
    # the exact value of a bound, and a bound of that, are lower bounds
    return f"approximation of the {family.evidence_of}" if engine.evidence == "approximation" else family.evidence_of


def peak_memory_mb(device: Any) -> float:
    """Return the peak memory so far in MB: of the process, or of the CUDA allocator."""
    if getattr(device, "type", "cpu") == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3
