"""How far a sparse inverse Cholesky posterior can be wrong, in the words of a report."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mercer.families.base import Confession
from mercer.families.nearness import Nearness
from mercer.families.vecchia import columns_of

if TYPE_CHECKING:
    from mercer.families.sic import SicPosterior

_COLUMNS = 500  # random ones, whose neighbours are doubled
_PROBES = 8
_SEED = 20230131
_MANY_DIMENSIONS = 8.0  # effective ones, from which neighbours know little of a row
_RESIDUAL = 1e-6


@torch.no_grad()
def confess(posterior: SicPosterior) -> Confession:
    """Return what the report should say of the approximation of the prior, and of its posterior.

    Notes
    -----
    Σ log U_ii(2m) − log U_ii(m) is by how much KL[p ‖ p̂] falls when every row is given twice the neighbours: what is
    missing is at least that. A random part of the columns estimates it.
    """
    notes, warnings = list(posterior.plan.notes), []
    form = "latent function" if posterior.latent else "noisy data"
    nats, rows = doubling(posterior), len(posterior.plan.X)
    neighbours = posterior.plan.pattern.columns.shape[-1] - 1
    notes.append(
        f"Vecchia's approximation of the {form}, {neighbours} neighbours a row: twice as many would bring it "
        f"{nats:.3g} nats nearer to the exact one ({nats / rows:.2g} a row)"
    )
    if posterior.latent:
        precision = posterior.precision
        generator = torch.Generator().manual_seed(_SEED)
        shape = (_PROBES, *precision.factor.shape[:-1])
        probes = torch.randn(shape, generator=generator, dtype=torch.float64).sign().to(precision.factor)
        missing = 0.5 * precision.missing_logdet(probes).reshape(_PROBES, -1).sum(-1)
        error = float(missing.std() / _PROBES**0.5)
        notes.append(
            f"its incomplete factor is off by {abs(float(missing.mean())):.2g} ± {error:.1g} nats in the evidence"
        )
        if precision.residual > _RESIDUAL:
            warnings.append(
                f"conjugate gradients stopped at a relative residual of {precision.residual:.1g}: means may be off; "
                "look for near-duplicate rows"
            )
    dimensions = effective_dimensions(posterior.plan.scale)
    if dimensions >= _MANY_DIMENSIONS:
        warnings.append(
            f"the inputs vary in {dimensions:.0f} directions, counted in lengthscales, and neighbours know little of a "
            "row in so many; family=InducingVecchia() or fewer columns may predict better"
        )
    return Confession(tuple(notes), tuple(warnings))


def doubling(posterior: SicPosterior) -> float:
    """Return how many nats of KL[p ‖ p̂] twice the neighbours would save, estimated from some columns."""
    plan = posterior.plan
    n, m = len(plan.X), plan.pattern.columns.shape[-1] - 1
    if m >= n - 1:
        return 0.0
    generator = torch.Generator().manual_seed(_SEED)
    some = torch.randperm(n, generator=generator)[:_COLUMNS].sort().values.to(plan.X.device)
    nearness = Nearness(posterior.prior.kernel, plan.X, plan.policy)
    wide = torch.as_tensor(nearness.nearest_earlier(plan.X, min(2 * m, n - 1), some.cpu().numpy())).to(some.device)
    wide = torch.cat([wide.sort(-1).values, some.unsqueeze(-1)], -1)
    size = plan.policy.chunk_rows(4 * wide.shape[-1] ** 2)
    gains = [
        (_log_last(posterior, more) - _log_last(posterior, plan.pattern.columns[chunk])).sum()
        for chunk, more in zip(some.split(size), wide.split(size), strict=True)
    ]
    return max(0.0, float(torch.stack(gains).sum()) * n / len(some))


def _log_last(posterior: SicPosterior, columns: Tensor) -> Tensor:
    """Return log U_ii of columns (B, w) of the form that predicts, the mean over a batch."""
    noise = None if posterior.latent else posterior.noise_in_order
    u, _ = columns_of(posterior.prior, posterior.plan, noise, columns, posterior.jitter)
    return u[..., -1].log().reshape(-1, len(columns)).mean(0)


def effective_dimensions(scale: Tensor | None) -> float:
    """Return how many axes the inputs vary along, counted by their variance in lengthscales: (Σ a²)² / Σ a⁴."""
    if scale is None or not bool((scale > 0).any()):
        return 0.0
    square = scale.square()
    return float(square.sum().square() / square.square().sum())
