"""Whether an equation is linear: probed, not declared."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mercer.pde.equation import PDE

_PROBES = 8
_AMPLITUDES = tuple(10.0**k for k in range(-8, 13, 4))  # of u, in whatever units it is
_LINEAR = 1e-10  # deviation from superposition, relative
_ROUNDED = 1e-13  # of what terms are at values of order 1: constants in them cost small values their digits


def is_linear(pde: PDE) -> bool:
    """Test superposition at random values: r(αu + βw) − r(0) = α (r(u) − r(0)) + β (r(w) − r(0)).

    Values are small and large, since nobody says in which units u is, and each point is judged by its own terms.

    Raises
    ------
    ValueError
        The residual is not finite at some point, whatever the values.
    """
    X = pde.domain.scattered(_PROBES).repeat(len(_AMPLITUDES), 1)
    size = torch.tensor(_AMPLITUDES, dtype=torch.float64).repeat_interleave(_PROBES)
    generator = torch.Generator().manual_seed(1)
    u, w = size * torch.randn(2, len(pde.requests), len(X), generator=generator, dtype=torch.float64)
    alpha, beta = 0.7, -1.3
    tried = (0.0 * u, u, w, alpha * u + beta * w)
    zero, of_u, of_w, of_both = found = [pde.evaluate(X, values.unbind(0)) for values in tried]
    _check_finite(pde, X, torch.stack(found))
    parts = torch.stack([of_both - zero, alpha * (of_u - zero), beta * (of_w - zero)])
    deviation, scale = (parts[0] - parts[1] - parts[2]).abs(), parts.abs().amax(0)
    of_order_one = scale[:, size == 1.0].repeat(1, len(_AMPLITUDES))  # at the same points
    allowed = _LINEAR * scale + _ROUNDED * (of_order_one + zero.abs())
    return bool((deviation.isfinite() & (deviation <= allowed)).all())


def _check_finite(pde: PDE, X: Tensor, found: Tensor) -> None:
    """Refuse a residual with points where none of the values that were tried gives a number, (tries, E, n)."""
    seen = found.isfinite().any(0).reshape(pde.n_equations, len(_AMPLITUDES), _PROBES).any(1)
    if not bool(seen.all()):
        e, i = (~seen).nonzero()[0].tolist()
        raise ValueError(
            f"{pde.called(e)} is not finite at {pde.domain.place(X[i])}, whatever u is there. Multiply it by what "
            "vanishes there, or take a domain without such points."
        )
