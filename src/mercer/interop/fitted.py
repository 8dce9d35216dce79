"""A model with its data, units and posterior: what an adapter holds of a fitted estimator, and how to make one anew."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mercer._typing import Data, Sites
from mercer.families.base import Prior
from mercer.inference.base import run
from mercer.inference.hyper import learn
from mercer.kernels import get_kernel, prepare, to_model_units
from mercer.likelihoods import get_likelihood
from mercer.model import Model
from mercer.policy import NumericalPolicy
from mercer.resolve import resolve


@dataclass(frozen=True)
class Affine:
    """The change of units v ↦ (v − center)/scale, last dimension by last dimension."""

    center: Tensor
    scale: Tensor

    @staticmethod
    def standardising(values: Tensor) -> Affine:
        """Return that which gives values (n, k) mean zero and unit variance, ignoring NaN."""
        center = values.nanmean(0)
        scale = (values - center).square().nanmean(0).sqrt()
        return Affine(center, torch.where(scale > 0, scale, 1.0))

    @staticmethod
    def identity(size: int) -> Affine:
        """Return that which changes nothing."""
        return Affine(torch.zeros(size, dtype=torch.float64), torch.ones(size, dtype=torch.float64))

    def of(self, columns: Sequence[int]) -> Affine:
        """Return that of some of the columns."""
        return Affine(self.center[list(columns)], self.scale[list(columns)])

    def to_model(self, values: Tensor) -> Tensor:
        """Return values (*b, k) in model units."""
        return (values - self.center.to(values)) / self.scale.to(values)

    def to_user(self, values: Tensor) -> Tensor:
        """Return values (*b, k) in the user's units."""
        return values * self.scale.to(values) + self.center.to(values)


@dataclass(frozen=True)
class Fitted:
    """Prior × likelihood × family × engine, conditioned on data.

    Parameters
    ----------
    model : Model
    posterior : Posterior
    data : Data
        In model units.
    inputs, outputs : Affine
        Units of the columns of X, and of each output (or latent).
    learnable : tuple of bool, optional
        Which of ``parameters`` are to be learned, once they are frozen.
    """

    model: Model
    posterior: Any
    data: Data
    inputs: Affine
    outputs: Affine
    learnable: tuple[bool, ...] | None = None

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Hyperparameters of kernel, mean and likelihood."""
        prior = self.model.prior
        modules = [each for each in (prior.kernel, prior.mean, self.model.likelihood) if each is not None]
        return [parameter for module in modules for parameter in module.parameters()]

    def frozen(self) -> Fitted:
        """Return a copy that shares nothing which can be changed, and asks for no gradients in hyperparameters."""
        return copy.deepcopy(self)._freeze()

    def _freeze(self) -> Fitted:
        learnable = tuple(parameter.requires_grad for parameter in self.parameters)
        for parameter in self.parameters:
            parameter.requires_grad_(False)
        return replace(self, learnable=learnable)

    @staticmethod
    def start(
        X: Tensor, Y: Tensor, Yvar: Tensor | None, kernel: Any, mean: Any, likelihood: Any, family: Any, engine: Any
    ) -> Fitted:
        """Condition on data at starting values of the hyperparameters.

        Parameters
        ----------
        X : (n, d)
        Y : (n, m)
            NaN where missing; class indices for a likelihood of classes.
        Yvar : (n, m), optional
            Known noise variance.
        kernel, mean, likelihood, family, engine
            As in an estimator.
        """
        policy = NumericalPolicy(device=X.device)
        X, Y = X.detach().double(), Y.detach().double()
        context = {"n_classes": int(Y.nan_to_num(0.0).max()) + 1} if Y.numel() else {}
        own = copy.deepcopy(get_likelihood(likelihood, **context)).to(X.device)
        inputs = Affine.standardising(X)
        latents = own.n_latents if own.n_latents > 1 else Y.shape[-1]
        outputs = Affine.standardising(Y) if own.support == "real" else Affine.identity(latents)
        in_units = outputs.to_model(Y) if own.support == "real" else Y
        side = {} if Yvar is None else {"noise_variance": _rows_last(Yvar.detach().double() / outputs.scale.square())}
        data = Data(inputs.to_model(X), _rows_last(in_units), X.new_ones(len(X)), side)
        own.initialise(data.y, data.weight, **data.side)
        prior_kernel = prepare(get_kernel(kernel), X.shape[-1])[0].to(X.device)
        to_model_units(prior_kernel, inputs.scale, float(outputs.scale) if outputs.scale.numel() == 1 else 1.0)
        prior = Prior(prior_kernel, None if mean is None else copy.deepcopy(mean).to(X))
        model, _ = resolve(prior, own, family, engine, len(X), policy, X.shape[-1])
        return Fitted(model, None, data, inputs, outputs).conditioned()._freeze()

    def learned(self, max_iter: int, seed: int) -> Fitted:
        """Learn the hyperparameters from the data and condition again; self stays as it is, and is frozen."""
        assert self.learnable is not None
        fresh = copy.deepcopy(replace(self, posterior=None))
        for parameter, learnable in zip(fresh.parameters, self.learnable, strict=True):
            parameter.requires_grad_(learnable)
        found = learn(fresh.model, fresh.data, max_iter=max_iter, generator=torch.Generator().manual_seed(seed))
        return fresh.conditioned(found.plan, found.sites)._freeze()

    def conditioned(self, plan: Any = None, sites: Sites | None = None) -> Fitted:
        """Return the same with the posterior of its data; where there are, by a plan and from sites."""
        model = self.model
        plan = model.family.plan(model.prior, self.data.X, model.policy) if plan is None else plan
        posterior = run(model, plan, self.data, sites).state.posterior.release()
        return replace(self, posterior=posterior)


def _rows_last(values: Tensor) -> Tensor:
    """Return (n, m) as (m, n), or (n,) where m is 1."""
    return values.squeeze(-1) if values.shape[-1] == 1 else values.mT
