"""The learnable hyperparameters of a model as one flat vector θ, logarithms of positive quantities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mercer._typing import Hyperparameter
from mercer.kernels.hyperparameters import hyperparameters

if TYPE_CHECKING:
    from mercer.model import Model

_AT_BOUND = 1e-6


class ThetaVector:
    """The learnable hyperparameters of a model as one flat vector.

    Parameters
    ----------
    model : Model
    plan : Plan, optional
        Its own coordinates, such as those of inducing points, come last.

    Attributes
    ----------
    names : list of str
        One per entry, such as ``kernel.base_kernel.lengthscale[2]``.
    bounds : (k, 2) ndarray
    scale : (k,) ndarray
        How far an entry may move where a logarithm may move by one.
    """

    def __init__(self, model: Model, plan: Any = None):
        mean = [] if model.prior.mean is None else hyperparameters(model.prior.mean)
        parts = [
            ("kernel", hyperparameters(model.prior.kernel)),
            ("mean", mean),
            ("likelihood", model.likelihood.hyperparameters()),
            ("plan", plan.learnable() if hasattr(plan, "learnable") else []),
        ]
        self.parts: list[tuple[str, Hyperparameter]] = [
            (f"{owner}.{h.name}", h) for owner, found in parts for h in found
        ]
        self.names: list[str] = []
        lower: list[np.ndarray] = []
        upper: list[np.ndarray] = []
        for name, h in self.parts:
            size = h.parameter.numel()
            self.names += [name] if size == 1 else [f"{name}[{i}]" for i in range(size)]
            for bound, into in ((h.lower, lower), (h.upper, upper)):
                value = torch.as_tensor(bound, dtype=torch.float64)
                into.append(value.expand(h.parameter.shape).reshape(-1).numpy())
        empty = np.empty(0)
        scales = (torch.as_tensor(h.scale, dtype=torch.float64).expand(h.parameter.shape) for _, h in self.parts)
        self.scale = np.concatenate([empty, *(scale.reshape(-1).numpy() for scale in scales)])
        self.bounds = np.stack([np.concatenate([empty, *lower]), np.concatenate([empty, *upper])], axis=1)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def log_scale(self) -> np.ndarray:
        """Boolean mask: which entries are logarithms."""
        flags = [np.full(h.parameter.numel(), h.log_scale) for _, h in self.parts]
        return np.concatenate([np.empty(0, bool), *flags])

    def read(self) -> np.ndarray:
        """Return θ."""
        with torch.no_grad():
            values = [h.to_theta(h.parameter).reshape(-1).double().cpu().numpy() for _, h in self.parts]
        return np.concatenate([np.empty(0), *values])

    def write(self, theta: np.ndarray) -> None:
        """Set the hyperparameters to θ, in place."""
        start = 0
        with torch.no_grad():
            for _, h in self.parts:
                stop = start + h.parameter.numel()
                block = torch.as_tensor(theta[start:stop], dtype=torch.float64).reshape(h.parameter.shape)
                h.parameter.copy_(h.to_storage(block))
                start = stop

    def gradient(self) -> np.ndarray:
        """Return d/dθ from the ``.grad`` that a backward pass left on the parameters."""
        grads = [np.empty(0)]
        for _, h in self.parts:
            if h.parameter.grad is None:
                grads.append(np.zeros(h.parameter.numel()))
                continue
            with torch.enable_grad():
                theta = h.to_theta(h.parameter.detach().double()).requires_grad_()
                storage = h.to_storage(theta)
            (chained,) = torch.autograd.grad(storage, theta, h.parameter.grad.to(storage))
            grads.append(chained.reshape(-1).cpu().numpy())
        return np.concatenate(grads)

    def zero_grad(self) -> None:
        """Forget gradients."""
        for _, h in self.parts:
            h.parameter.grad = None

    def log_prior(self) -> Tensor | float:
        """Return the log density of the registered hyperparameter priors, in nats."""
        return sum((h.log_prior() for _, h in self.parts if h.log_prior is not None), 0.0)


def at_bounds(theta: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Return −1, 0 or 1 per entry: at the lower bound, inside, at the upper bound."""
    low, high = theta <= bounds[:, 0] + _AT_BOUND, theta >= bounds[:, 1] - _AT_BOUND
    return high.astype(int) - low.astype(int)
