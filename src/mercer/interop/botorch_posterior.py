"""What a model returns to BoTorch: Gaussian posteriors whose covariance waits until it is asked for, and functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from botorch.posteriors.gpytorch import GPyTorchPosterior
from botorch.sampling.pathwise.paths import SamplePath
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from linear_operator.operators import DenseLinearOperator
from torch import Tensor

from mercer.families.pathwise import Paths
from mercer.interop.known import Known


def gaussian(mean: Tensor, covariance: Tensor) -> MultivariateNormal:
    """Return the distribution of independent outputs.

    Parameters
    ----------
    mean : (m, *t, q)
    covariance : (m, *t, q, q)
        No factorisation is made of it here.
    """
    parts = [MultivariateNormal(*pair) for pair in zip(mean, map(DenseLinearOperator, covariance), strict=True)]
    return parts[0] if len(parts) == 1 else MultitaskMultivariateNormal.from_independent_mvns(parts)


class LazyPosterior(GPyTorchPosterior):
    """A Gaussian posterior that has its mean; its distribution is computed when somebody looks at it.

    Acquisition functions of the mean alone, such as the values inside the knowledge gradient, then never pay for
    covariances.

    Parameters
    ----------
    mean : (*t, q, m)
    compute : callable
        Returns the distribution.
    """

    def __init__(self, mean: Tensor, compute: Callable[[], MultivariateNormal]):
        self._mean, self._compute = mean, compute
        self._is_mt = mean.shape[-1] > 1
        self._device, self._dtype = mean.device, mean.dtype

    @cached_property
    def distribution(self) -> MultivariateNormal:  # type: ignore[override]
        return self._compute()

    @property
    def mean(self) -> Tensor:
        """The posterior mean, (*t, q, m)."""
        return self._mean


class FunctionPaths(SamplePath):
    """Functions drawn from a posterior, as BoTorch evaluates sample paths.

    Parameters
    ----------
    paths : Paths
        In model units.
    known : Known
        What they were drawn from; it has the units and the outputs.
    sample_shape : torch.Size
        Of the draws.
    input_transform, output_transform : optional
        Applied before and after.
    """

    def __init__(
        self,
        paths: Paths,
        known: Known,
        sample_shape: torch.Size,
        input_transform: torch.nn.Module | None = None,
        output_transform: torch.nn.Module | None = None,
    ):
        super().__init__()
        self.paths, self.known, self.sample_shape = paths, known, sample_shape
        self.input_transform, self.output_transform = input_transform, output_transform

    def _values(self, x: Tensor) -> Tensor:
        """Return all draws at x (*t, q, d), (n_samples, m, *t, q), in the user's units."""
        drawn = self.paths(self.known.in_model_units(x))
        return torch.stack([self.known.in_user_units(each) for each in drawn]).to(x)

    def set_ensemble_as_batch(self, ensemble_as_batch: bool) -> None:
        """Do nothing: which draw meets which X follows from shapes alone."""

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate at x (*t, q, d), whose last batch dimensions broadcast with the samples.

        Returns
        -------
        (*t', q)
            *t' is *t broadcast with the samples: x without batch dimensions meets all draws, x (n, s, q, d) meets
            draw i with x[:, i]. For several outputs x is (*t, 1, q, d) and the result (*t', m, q).
        """
        several, k = len(self.known.outputs) > 1, len(self.sample_shape)
        x = x.squeeze(-3) if several else x
        x = x.reshape(*[1] * max(0, k - (x.dim() - 2)), *x.shape)
        if x.shape[-2 - k : -2].numel() == 1:  # every draw at every x
            every = x.reshape(*x.shape[: -2 - k], *x.shape[-2:])
            values = self._values(every).movedim(0, -2)  # (m, *t, n_samples, q)
        else:
            matched = x.expand(*x.shape[: -2 - k], *self.sample_shape, *x.shape[-2:]).flatten(-2 - k, -3)
            values = self._values(matched).diagonal(dim1=0, dim2=-2).movedim(-1, -2)
        values = values.reshape(*values.shape[:-2], *self.sample_shape, values.shape[-1])
        return values.movedim(0, -2) if several else values[0]
