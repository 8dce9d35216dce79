"""A model is a sentence of four words: prior × likelihood × family × engine (and the numerical policy)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mercer.families.base import Prior
from mercer.likelihoods.base import Likelihood
from mercer.policy import NumericalPolicy

if TYPE_CHECKING:
    from mercer.inference.base import Engine


@dataclass(frozen=True)
class Model:
    """What is to be inferred and how; frozen, holds no data.

    Parameters
    ----------
    prior : Prior
        Kernel and mean: gpytorch modules that carry their hyperparameters.
    likelihood : Likelihood
    family : Family
    engine : Engine
    policy : NumericalPolicy
    """

    prior: Prior
    likelihood: Likelihood
    family: Any
    engine: Engine
    policy: NumericalPolicy
