"""Any gpytorch likelihood of one latent function behind our contract.

The density comes from the distribution that the gpytorch module's ``forward`` returns; derivatives come from
elementwise autograd at the quadrature nodes. This is the only file of the likelihoods that imports gpytorch.
"""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import gpytorch
import torch
from gpytorch.constraints import Interval
from gpytorch.likelihoods.likelihood import _OneDimensionalLikelihood
from torch import Tensor

from mercer._typing import Hyperparameter
from mercer.likelihoods.base import Likelihood, Predictive, fill_missing
from mercer.likelihoods.categorical import Bernoulli
from mercer.likelihoods.gaussian import Gaussian
from mercer.likelihoods.quadrature import QuadratureLikelihood, expectation

THETA_RANGE = (1e-6, 1e4)  # for positive parameters whose constraint leaves an end open


class Adapted(QuadratureLikelihood):
    """A gpytorch one-dimensional likelihood, by quadrature over ``forward(f)``.

    Built by ``adapt``. Nothing is known about log-concavity, so ``log_concave`` is False.
    """

    log_concave = False

    def __init__(self, module: gpytorch.likelihoods.Likelihood) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).double()
        law = self._law(torch.zeros(1, dtype=torch.float64))
        self.support = "real" if law.support is torch.distributions.constraints.real else "other"

    def _law(self, f: Tensor) -> Any:
        return self.module.forward(f)

    def _fill(self, y: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        # The support is unknown, so the harmless value must be one of the data.
        seen = y[~torch.isnan(y)]
        return fill_missing(y, like, float(seen[0]) if seen.numel() else 0.5)

    def hyperparameters(self) -> list[Hyperparameter]:
        priors = {
            name.removesuffix("_prior"): partial(_log_prior, owner, prior, closure)
            for name, owner, prior, closure, _ in self.module.named_priors()
        }
        found = []
        for raw_name, parameter, constraint in self.module.named_parameters_and_constraints():
            if parameter.requires_grad:
                name = ".".join(part.removeprefix("raw_") for part in raw_name.split("."))
                found.append(_hyperparameter(name, parameter, constraint, priors.get(name)))
        return found

    def _density(self, y: Tensor, f: Tensor, **side: Tensor) -> Tensor:
        y, f = torch.broadcast_tensors(y, f)
        return self._law(f).log_prob(y).to(f)

    def predictive(self, m: Tensor, v: Tensor, **side: Tensor) -> Predictive:
        """Return the moments of y* by the laws of total expectation and variance."""
        m, v = torch.broadcast_tensors(m, v)
        centre = expectation(lambda f: self._law(f).mean.to(f), m, v, self.n_nodes).value

        def second_moment(f: Tensor) -> Tensor:
            law = self._law(f)
            return (law.variance + (law.mean - centre.detach().unsqueeze(-1)).square()).to(f)

        return Predictive(centre, expectation(second_moment, m, v, self.n_nodes).value)

    def sample(self, f: Tensor, generator: torch.Generator | None = None, **side: Tensor) -> Tensor:
        with torch.no_grad():
            if generator is None:
                return self._law(f).sample().to(f)
            # torch.distributions read only the global generator: seed a private copy of it.
            seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
            with torch.random.fork_rng(devices=[f.device] if f.is_cuda else []):
                torch.manual_seed(seed)
                return self._law(f).sample().to(f)


def adapt(likelihood: gpytorch.likelihoods.Likelihood) -> Likelihood:
    """Return a gpytorch likelihood as one of ours.

    Parameters
    ----------
    likelihood : gpytorch likelihood with one latent function
        It is copied, in float64. ``GaussianLikelihood`` becomes ``Gaussian`` (with its noise, bounds and
        prior) and ``BernoulliLikelihood`` becomes ``Bernoulli("probit")``, whose tails are exact.

    Raises
    ------
    TypeError
        The likelihood is no gpytorch one-dimensional likelihood (several latents need one of our own), or its
        log density is not twice differentiable (Laplace).
    """
    if isinstance(likelihood, gpytorch.likelihoods.GaussianLikelihood):
        return _gaussian(likelihood)
    if isinstance(likelihood, gpytorch.likelihoods.BernoulliLikelihood):
        return Bernoulli("probit")
    if isinstance(likelihood, gpytorch.likelihoods.LaplaceLikelihood):
        raise TypeError(
            "likelihood=LaplaceLikelihood has a kink, so −E[∂² log p] is not its curvature; use 'student_t'."
        )
    if not isinstance(likelihood, _OneDimensionalLikelihood):
        raise TypeError(
            f"likelihood={type(likelihood).__name__} has no single latent function per row; "
            "use likelihood='softmax' for classes, or 'gaussian' with side noise_variance for known noise."
        )
    return Adapted(likelihood)


def _gaussian(likelihood: gpytorch.likelihoods.GaussianLikelihood) -> Gaussian:
    noise = likelihood.noise_covar
    raw = noise.raw_noise
    value = likelihood.noise.detach().double()
    low, high = _finite_bounds(noise.raw_noise_constraint, default=(1e-8, 1e2))
    value = value.squeeze(-1) if value.dim() == 1 else value
    adapted = Gaussian(value, learn_noise=raw.requires_grad, bounds=(low, high))
    for name, _, prior, _, _ in likelihood.named_priors():
        if name.endswith("noise_prior"):
            adapted.log_priors["noise_variance"] = prior.log_prob
    return adapted


def _finite_bounds(constraint: Interval, default: tuple[float, float]) -> tuple[float, float]:
    low, high = float(constraint.lower_bound.max()), float(constraint.upper_bound.min())
    # The inverse transform is infinite on the bound itself.
    low = low * (1 + 1e-6) if low > 0 else default[0]
    high = high * (1 - 1e-6) if math.isfinite(high) else default[1]
    return low, max(high, 10 * low)


def _hyperparameter(
    name: str, parameter: torch.nn.Parameter, constraint: Interval | None, log_prior: Any
) -> Hyperparameter:
    if constraint is None or not constraint.enforced:
        return Hyperparameter(name, parameter, _same, _same, -math.inf, math.inf, False, log_prior)
    if float(constraint.lower_bound.min()) >= 0:
        low, high = (math.log(end) for end in _finite_bounds(constraint, THETA_RANGE))
        to_theta, to_storage = partial(_log_value, constraint), partial(_raw_of_log, constraint)
        return Hyperparameter(name, parameter, to_theta, to_storage, low, high, True, log_prior)
    low, high = float(constraint.lower_bound.max()), float(constraint.upper_bound.min())
    return Hyperparameter(
        name, parameter, constraint.transform, constraint.inverse_transform, low, high, False, log_prior
    )


def _same(raw: Tensor) -> Tensor:
    return raw


def _log_value(constraint: Interval, raw: Tensor) -> Tensor:
    return constraint.transform(raw).log()


def _raw_of_log(constraint: Interval, theta: Tensor) -> Tensor:
    return constraint.inverse_transform(theta.exp())


def _log_prior(owner: Any, prior: Any, closure: Any) -> Tensor:
    return prior.log_prob(closure(owner)).sum()
