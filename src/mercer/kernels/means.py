"""Prior means: gpytorch's, and the one that estimators need."""

from __future__ import annotations

import torch
from gpytorch.means import ConstantMean


def constant_mean(value: float) -> ConstantMean:
    """Return a learnable constant mean in float64 that starts at ``value``, in units of f."""
    mean = ConstantMean().to(torch.float64)
    mean.initialize(constant=torch.tensor(value, dtype=torch.float64))
    return mean
