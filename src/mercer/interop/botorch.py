"""A fitted model in BoTorch's terms: joint posteriors, conditioning, fantasies and sample paths, for any likelihood.

Everything comes in and goes out in the user's units; inside, inputs and targets are standardised as they were in fit.
The model holds values, not the estimator, and shares nothing with it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from botorch.models.gpytorch import GPyTorchModel
from botorch.models.model import FantasizeMixin
from botorch.models.utils.assorted import fantasize as fantasizing
from botorch.posteriors.gpytorch import GPyTorchPosterior
from botorch.posteriors.posterior import Posterior
from botorch.sampling.pathwise.posterior_samplers import DrawMatheronPaths
from botorch.sampling.pathwise.utils import get_input_transform, get_output_transform
from gpytorch.constraints import Positive
from gpytorch.distributions import MultivariateNormal
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.models import GP
from torch import Tensor

from mercer.families.conditioned import has_cross_covariances
from mercer.interop.botorch_posterior import FunctionPaths, LazyPosterior, gaussian
from mercer.interop.fitted import Fitted
from mercer.interop.known import Known


class MercerModel(GPyTorchModel, GP, FantasizeMixin):
    """A Gaussian-process model for BoTorch; made by ``estimator.to_botorch()``, or from data as BoTorch's own are.

    Its posterior is that of the latent f: in units of y for real targets, of the link for others (a log rate for
    counts, the logit or probit of class 1, one latent per class of a softmax). All of it is differentiable in X.

    Parameters
    ----------
    train_X : (n, d)
    train_Y : (n, m)
        NaN where missing; class indices from 0, or counts, for likelihoods of these.
    train_Yvar : (n, m), optional
        Known noise variances.
    kernel, mean, likelihood, family, engine
        As in `mercer.GPRegressor`.
    input_transform, outcome_transform : optional
        BoTorch's transforms; inputs and real targets are transformed first and standardised inside after that.

    Notes
    -----
    A model made from data is at starting values until ``fit_gpytorch_mll`` or `custom_fit` learns from them.

    ``observation_noise=True`` adds the noise of y where y is a noisy f, matched in variance. A class or a count is no
    noisy f; what is added then is the variance 1/E β of the Gaussian observation of f that is worth what an observation
    of y is expected to be. `fantasize` draws just these, which keeps acquisition functions smooth; with ``labels=True``
    it draws classes or counts and conditions on them as on data.

    ``train_inputs`` and ``train_targets`` are in the user's units, distinct rows once.
    """

    def __init__(
        self,
        train_X: Tensor,
        train_Y: Tensor,
        train_Yvar: Tensor | None = None,
        *,
        kernel: Any = "matern52",
        mean: Any = None,
        likelihood: Any = "gaussian",
        family: Any = "auto",
        engine: Any = "auto",
        input_transform: Any = None,
        outcome_transform: Any = None,
    ):
        if input_transform is not None:
            train_X = input_transform.to(train_X).train()(train_X)
        if outcome_transform is not None:
            train_Y, train_Yvar = outcome_transform.to(train_Y).train()(train_Y, train_Yvar)
        fitted = Fitted.start(train_X, train_Y, train_Yvar, kernel, mean, likelihood, family, engine)
        self._assemble(Known.all_of(fitted), input_transform, outcome_transform)

    @classmethod
    def of(cls, fitted: Fitted, input_transform: Any = None, outcome_transform: Any = None) -> MercerModel:
        """Return a model over a copy of what was fitted to inputs and targets that had gone through the transforms."""
        return cls.__new__(cls)._assemble(Known.all_of(fitted.frozen()), input_transform, outcome_transform)

    def _assemble(self, known: Known, input_transform: Any, outcome_transform: Any) -> MercerModel:
        GP.__init__(self)
        if outcome_transform is not None and not known.f_is_y:
            raise ValueError("outcome_transform is for real targets; leave it out for classes and counts.")
        self.known = known
        if input_transform is not None:
            self.input_transform = input_transform
        if outcome_transform is not None:
            self.outcome_transform = outcome_transform
        return self.eval()

    def _with(self, known: Known, outcome_transform: Any = None) -> MercerModel:
        """Return one that knows something else and shares the rest."""
        transform = self._outcome_transform if outcome_transform is None else outcome_transform
        return type(self).__new__(type(self))._assemble(known, get_input_transform(self), transform)

    # ---- what BoTorch asks of any model

    @property
    def num_outputs(self) -> int:
        """Number of outputs: those of y, or the latents of a softmax."""
        return len(self.known.outputs)

    @property
    def batch_shape(self) -> torch.Size:
        """Fantasies and sets of rows that the model is conditioned on; none for a fitted estimator."""
        return self.known.sets

    @property
    def likelihood(self) -> Any:
        """gpytorch's Gaussian likelihood with the present noise, in units of y²; or ours, for other likelihoods."""
        if not self.known.likelihood.conjugate:
            return self.known.likelihood
        somewhere = self.known.fitted.inputs.center.reshape(1, -1)
        noise = self.known.noise_variance(somewhere).reshape(self.num_outputs, -1)[:, 0]
        batch = torch.Size() if len(noise) == 1 else noise.shape
        found = GaussianLikelihood(noise_constraint=Positive(), batch_shape=batch).to(noise)
        found.noise = noise.reshape(*batch, 1)
        return found.requires_grad_(False)

    @property
    def train_inputs(self) -> tuple[Tensor]:
        """All rows that the model knows, (*batch_shape, n, d), in the user's units."""
        transform = get_input_transform(self)
        return (self.known.rows if transform is None else transform.untransform(self.known.rows),)

    @property
    def train_targets(self) -> Tensor:
        """Their targets, (*batch_shape, n) or (*batch_shape, m, n), in the user's units; fantasies of f have none."""
        y, transform = self.known.targets, self._outcome_transform
        y = y if transform is None else transform.untransform(y)[0]
        return y.squeeze(-1) if y.shape[-1] == 1 else y.mT

    def load_state_dict(  # type: ignore[override]
        self, state_dict: Any, strict: bool = True, keep_transforms: bool = True, assign: bool = False
    ) -> None:
        """Load the state of the transforms; hyperparameters and data travel by pickle, or with the estimator."""
        torch.nn.Module.load_state_dict(self, state_dict, strict=strict, assign=assign)

    def _set_transformed_inputs(self) -> None:
        """Do nothing: rows are kept as they were fitted, and given out as the user has them."""

    _revert_to_original_inputs = _set_transformed_inputs

    @property
    def _outcome_transform(self) -> Any:
        return getattr(self, "outcome_transform", None)

    # ---- posterior

    def posterior(  # type: ignore[override]
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: Any = None,
    ) -> Posterior:
        """Return the joint posterior of f at each set of q rows.

        Parameters
        ----------
        X : (*t, q, d)
            In the user's units; *t broadcasts with ``batch_shape``.
        output_indices : list of int, optional
        observation_noise : bool or (*t, q, m) Tensor, default=False
            Whether observations are to be described instead, or noise variances to add; see the class.
        posterior_transform : PosteriorTransform, optional

        Returns
        -------
        Posterior
            Gaussian, of shape (*t', q, m), with the dtype and on the device of X.
        """
        self.eval()
        inner, known = self.transform_inputs(X), self._showing(output_indices)

        def distribution() -> MultivariateNormal:
            return gaussian(*(each.to(X) for each in known.joint(inner, observation_noise)))

        posterior: Any
        if self._outcome_transform is not None:
            posterior = self.outcome_transform.untransform_posterior(GPyTorchPosterior(distribution()), X=inner)
        elif has_cross_covariances(known.process):
            posterior = LazyPosterior(known.mean(inner).movedim(0, -1).to(X), distribution)
        else:  # the mean of approximations depends on which rows come together
            posterior = GPyTorchPosterior(distribution())
        return posterior if posterior_transform is None else posterior_transform(posterior=posterior, X=X)

    def _showing(self, indices: list[int] | None) -> Known:
        """Return what is known of some of the outputs."""
        if indices is None:
            return self.known
        return replace(self.known, outputs=tuple(self.known.outputs[i] for i in indices))

    def subset_output(self, idcs: list[int]) -> MercerModel:
        """Return the model of some outputs; conditioning it on data says nothing of the others."""
        transform = self._outcome_transform
        return self._with(self._showing(idcs), None if transform is None else transform.subset_output(idcs))

    # ---- more data

    def condition_on_observations(  # type: ignore[override]
        self, X: Tensor, Y: Tensor, noise: Tensor | None = None
    ) -> MercerModel:
        """Condition on observations, hyperparameters held; the model itself stays as it is.

        Parameters
        ----------
        X : (*t, q, d)
        Y : (*s, *t, q, m)
            Targets as in fit, in the user's units, NaN where missing; one column of class indices for a softmax.
        noise : (*t, q, m), optional
            Known noise variances. For other likelihoods than the Gaussian, Y then measures f with that noise.

        Returns
        -------
        MercerModel
            Of batch shape (*s, *t): exact within the process for Gaussian noise; otherwise the sites of the new rows
            are optimal while all others are held.
        """
        self.eval()
        X = self.transform_inputs(X)
        if self._outcome_transform is not None:
            Y, noise = self.outcome_transform(Y, noise, X=X)
        of_f = noise is not None and not self.known.likelihood.conjugate
        return self._with(self.known.observing(X, Y, noise, of_f))

    def fantasize(
        self, X: Tensor, sampler: Any, observation_noise: Tensor | None = None, labels: bool = False, **kwargs: Any
    ) -> MercerModel:
        """Condition on observations at X that are drawn from the posterior.

        Parameters
        ----------
        X : (*t, q, d)
        sampler : MCSampler
            Draws *s observations of each set.
        observation_noise : (*t, q, m) Tensor, optional
            Noise variances instead of the likelihood's.
        labels : bool, default=False
            Draw y from the likelihood itself, given draws of f; see the class. Classes and counts jump as X moves.
        **kwargs
            ``propagate_grads`` is not needed.

        Returns
        -------
        MercerModel
            Of batch shape (*s, *t). Draws share one factorisation per set, except targets of a likelihood that is not
            Gaussian.
        """
        kwargs.pop("propagate_grads", None)
        if X.shape[-2] == 0 or observation_noise is not None or (self.known.f_is_y and not labels):
            return super().fantasize(X, sampler, observation_noise, **kwargs)
        self.eval()
        with fantasizing():
            inner = self.transform_inputs(X)
        if not labels:
            Y = sampler(self.posterior(X, observation_noise=True))
            return self._with(self.known.observing(inner, Y, self.known.noise_variance(inner), of_f=True))
        moments = replace(self.known, outputs=Known.all_of(self.known.fitted).outputs).joint(inner)
        f = sampler(GPyTorchPosterior(gaussian(*(each.to(X) for each in moments))))
        return self._with(self.known.observing(inner, self.known.draw(f)))

    def custom_fit(self, mll: Any = None, max_iter: int = 100, seed: int = 0, **kwargs: Any) -> Any:
        """Learn the hyperparameters from all of the data, in place; ``fit_gpytorch_mll`` calls it.

        Parameters
        ----------
        mll : MarginalLogLikelihood, optional
            Returned, in evaluation mode. The objective is the engine's own evidence, whatever ``mll`` is.
        max_iter, seed : int
        **kwargs
            Options of other fit routines, which mean nothing here.
        """
        fitted = self.known.merged().learned(max_iter, seed)
        self.known = Known(fitted, fitted.posterior, self.known.outputs)
        return None if mll is None else mll.eval()


@DrawMatheronPaths.register(MercerModel)
def _draw_paths(model: MercerModel, *, sample_shape: torch.Size, **strategies: Any) -> FunctionPaths:
    """Draw functions from the posterior, for ``draw_matheron_paths`` and what builds on it."""
    if not model.known.process.pathwise:
        raise NotImplementedError(
            "sample paths need family='exact', a kernel whose spectral density is known and a model without batch "
            "dimensions; draw joint samples with a sampler instead."
        )
    generator = torch.Generator().manual_seed(int(torch.randint(2**31 - 1, ())))
    paths = model.known.process.paths(sample_shape.numel(), generator)
    return FunctionPaths(paths, model.known, sample_shape, get_input_transform(model), get_output_transform(model))
