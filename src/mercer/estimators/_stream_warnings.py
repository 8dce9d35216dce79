"""What a batch of a stream has to be warned of."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from mercer._typing import Data

_LOST = 1.0  # nats
_FAR, _FARTHER = 30.0, 10.0  # in units of the first rows, and times what memory's rows have


def doublings(nats: float) -> int:
    """Return how often a loss has doubled since it became worth mentioning."""
    return 0 if nats < _LOST else 1 + int(math.log2(nats / _LOST))


def misfits(batch: Data, memory: Data, names: Any, with_y: bool) -> list[str]:
    """Return warnings of rows that the units of the first rows do not fit, unless memory has such rows already."""
    found = []

    def stands_out(size: Tensor, known: Tensor) -> Tensor:
        return size > _FARTHER * known.clamp_min(_FAR / _FARTHER)

    sizes = [data.y.square().nanmean(-1).sqrt().nan_to_num(0.0) for data in (batch, memory)]
    if with_y and bool((far := stands_out(*sizes)).any()):
        size = float(sizes[0][far].max())
        found.append(
            f"y of the batch is {size:.3g} standard deviations of the first rows away from their mean; hyperparameters "
            "are learned in units of those and may not get there: begin anew with rows that are typical"
        )
    spreads = [
        data.X.std(0, correction=0) if data.n_rows else data.X.new_zeros(data.X.shape[1]) for data in (batch, memory)
    ]
    for j in stands_out(*spreads).nonzero().squeeze(-1).tolist():
        name = j if names is None else repr(names[j])
        found.append(
            f"column {name} of the batch varies by {float(spreads[0][j]):.3g} standard deviations of the first rows; "
            "lengthscales are learned in units of those and may not get there: begin anew with rows that are typical"
        )
    return found
