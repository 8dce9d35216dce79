"""Anderson's extrapolation for a fixed-point iteration of sites.

A map x ↦ g(x) is iterated; the last few pairs (x, g(x) − x) predict where the gap would vanish if the map were
linear. The caller decides whether to accept the prediction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mercer._typing import Sites

History = tuple[tuple[Tensor, Tensor], ...]


def remember(history: History, here: Sites, target: Sites, memory: int) -> History:
    """Return ``history`` with the pair (x, g(x) − x) at ``here`` added, at most ``memory`` pairs long."""
    if memory == 0:
        return ()
    x = _flat(here)
    return (*history, (x, _flat(target) - x))[-memory:]


def extrapolate(history: History, here: Sites, target: Sites) -> Sites | None:
    """Return the sites at which the linear model of the map has its fixed point; None without a usable history.

    Parameters
    ----------
    history : tuple of pairs of (2·n,) tensors
        Earlier points and their gaps, as `remember` keeps them.
    here, target : Sites
        x and g(x).

    References
    ----------
    Walker and Ni (2011), "Anderson acceleration for fixed-point iterations", eq. 2.3.
    """
    if not history:
        return None
    x, image = _flat(here), _flat(target)
    gap = image - x
    steps = torch.stack([x - past for past, _ in history], dim=-1)
    changes = torch.stack([gap - past_gap for _, past_gap in history], dim=-1)
    # normal equations in the few past steps, with a ridge at rounding level against nearly equal ones
    normal = changes.mT @ changes
    ridge = 1e-12 * normal.diagonal().mean().clamp_min(torch.finfo(normal.dtype).tiny)
    normal.diagonal().add_(ridge)
    L, info = torch.linalg.cholesky_ex(normal)
    if bool(info):
        return None
    weights = torch.cholesky_solve((changes.mT @ gap).unsqueeze(-1), L).squeeze(-1)
    linear, precision = (image - (steps + changes) @ weights).reshape(2, *target.linear.shape)
    return Sites(linear, precision)


def _flat(sites: Sites) -> Tensor:
    return torch.stack([sites.linear, sites.precision]).reshape(-1)
