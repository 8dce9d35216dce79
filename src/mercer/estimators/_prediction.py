"""From new rows to latent numbers: the paths that every task's predictions take, chunked, in model units."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from mercer.estimators._rows import Container, Rows, Units, make_data
from mercer.estimators._validation import check_inputs

if TYPE_CHECKING:
    from mercer.model import Model

_FARTHEST = 1e50  # from the training rows, in model units: squares and products of it still are numbers


class LatentPredictions:
    """Mixin: means, marginals, draws and leave-one-out marginals of the latent functions of a fitted estimator."""

    _rows: Rows
    _units: Units
    _model: Model
    posterior_: Any

    def _prepare_X(self, X: Any) -> tuple[Tensor, Container]:
        """Return checked rows as a tensor, and the container that results go back in."""
        check_is_fitted(self, "posterior_")
        container = Container.of(X)
        checked = check_inputs(self, X, reset=False)
        if not isinstance(checked, Tensor):
            checked = torch.as_tensor(np.require(checked, requirements="W"))
        extremes = torch.stack([checked.detach().amin(0), checked.detach().amax(0)])  # no temporary of the size of X
        if bool((self._units.inputs(extremes.double()).abs() > _FARTHEST).any()):
            raise ValueError(
                f"X holds values more than {_FARTHEST:g} times the spread of the training rows away from them; "
                "nothing can be computed there. Check their units."
            )
        return checked, container

    def _map_rows(self, X: Tensor, function: Callable[[Tensor], tuple[Tensor, ...]], axis: int = -1) -> list[Tensor]:
        """Apply ``function`` to model-unit chunks of X and join each of its results along ``axis``, that of the rows.

        Memory beside the results is that of one chunk. Without gradients the results are written where they stay:
        many small ones, kept between the large temporaries of their chunks, would leave the heap full of holes.
        """
        policy = self._model.policy
        size = policy.chunk_rows(self.posterior_.row_elements)

        def evaluate(chunk: Tensor) -> tuple[Tensor, ...]:
            return function(self._units.inputs(chunk.to(dtype=policy.dtype, device=policy.device)))

        if torch.is_grad_enabled() and X.requires_grad:
            return [torch.cat(parts, axis) for parts in zip(*(evaluate(chunk) for chunk in X.split(size)), strict=True)]
        whole: list[Tensor] = []
        start = 0
        with torch.no_grad():
            for chunk in X.split(size):
                parts = evaluate(chunk)
                if not whole:
                    for part in parts:
                        shape = list(part.shape)
                        shape[axis] = len(X)
                        whole.append(part.new_empty(shape))
                for out, part in zip(whole, parts, strict=True):
                    out.narrow(axis, start, len(chunk)).copy_(part)
                start += len(chunk)
        return whole

    def _latent_mean(self, X: Tensor) -> Tensor:
        return self._map_rows(X, lambda chunk: (self.posterior_.mean(chunk),))[0]

    def _latent_marginals(self, X: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance = self._map_rows(X, self.posterior_.marginals)
        return mean, variance

    def _loo_marginals(self) -> tuple[Tensor, Tensor]:
        """Return cavity means and variances of f per canonical row: one replicate of its site removed."""
        with torch.no_grad():
            m, v = self.posterior_.at_data()
            data = make_data(self._rows, self._units, self._model.policy)
            prior = self._model.prior.mean_at(data.X)
            weight = data.weight.clamp_min(1.0)
            linear = self.posterior_.sites.linear / weight
            precision = self.posterior_.sites.precision / weight
            # v/(1 − v λ2) and its mean; v λ2 < 1 always, by definition of the posterior. What inducing points leave of
            # a row is in no site and stays
            left = getattr(self.posterior_, "unexplained_at_data", torch.zeros_like(v))
            v = v - left
            keep = (1.0 - v * precision).clamp_min(torch.finfo(v.dtype).eps)
            return ((m - prior) - v * linear) / keep + prior, v / keep + left

    def _to_original_rows(self, value: Tensor) -> Tensor:
        """Return canonical-row results (*b, n_canonical) at the rows passed to fit; NaN where dropped."""
        index = torch.as_tensor(self._rows.index, device=value.device)
        return value[..., index.clamp_min(0)].masked_fill(index < 0, float("nan"))

    def _draw(self, X: Tensor, n_samples: int, random_state: Any) -> Tensor:
        """Return latent draws (n_samples, *b, n) at X, warning when they are joint draws at X only."""
        if not isinstance(n_samples, Integral) or n_samples < 1:
            raise ValueError(f"n_samples must be a positive integer, got {n_samples!r}.")
        policy = self._model.policy
        seed = int(check_random_state(random_state).randint(2**31 - 1))
        generator = torch.Generator().manual_seed(seed)
        if not self.posterior_.pathwise:
            warnings.warn(
                f"{type(self).__name__}.sample_y: samples are joint draws at these rows and differ between calls with "
                "other rows; paths need the exact family and a kernel whose spectral density is known.",
                UserWarning,
                stacklevel=3,
            )
        moved = self._units.inputs(X.to(dtype=policy.dtype, device=policy.device))
        with torch.no_grad():
            return self.posterior_.sample(moved, n_samples, generator)

    @staticmethod
    def _noise_generator(random_state: Any, device: torch.device) -> torch.Generator:
        """Return a generator for observation noise, apart from the one that draws functions."""
        seed = int(check_random_state(random_state).randint(2**31 - 1))
        return torch.Generator(device).manual_seed(seed ^ 0x5EED)
