"""``check_botorch_model`` rejects models with one planted fault each, and names the property that fails."""

import numpy as np
import pytest
import torch

from mercer import GPClassifier, GPRegressor

pytest.importorskip("botorch")

from botorch.posteriors import GPyTorchPosterior

from mercer._typing import Sites
from mercer.families.conditioned import ConditionedPosterior
from mercer.interop import botorch as module
from mercer.interop.botorch import MercerModel
from mercer.interop.botorch_posterior import gaussian
from mercer.interop.known import Known
from mercer.testing import check_botorch_model

RNG = np.random.default_rng(1)
X = RNG.uniform(0, 3, size=(14, 2))
Y = 10.0 + 4.0 * np.sin(2 * X[:, 0]) + 0.3 * RNG.normal(size=14)
NEAR = torch.as_tensor(X[:7]) + 0.02


def model_of(kind, y=Y, estimator=GPRegressor):
    """The model of a small fit, in another class that shares its code."""
    model = estimator(optimizer=None).fit(X, y).to_botorch()
    model.__class__ = kind
    return model


class StaysDouble(MercerModel):
    def posterior(self, X, *arguments, **options):
        return super().posterior(X.double(), *arguments, **options)


class NoSets(MercerModel):
    """The rows of all sets are taken for one set."""

    def posterior(self, X, *arguments, **options):
        found = super().posterior(X, *arguments, **options)
        if X.dim() == 2 or X.shape[-2] == 0 or self.batch_shape:
            return found
        mean = found.mean + 1e-3 * X.sum()
        return GPyTorchPosterior(gaussian(mean.movedim(-1, 0), found.distribution.covariance_matrix.unsqueeze(0)))


class NoiselessNoise(MercerModel):
    def posterior(self, X, output_indices=None, observation_noise=False, posterior_transform=None):
        noise = False if observation_noise is True else observation_noise
        return super().posterior(X, output_indices, noise, posterior_transform)


class NoGradient(MercerModel):
    def posterior(self, X, *arguments, **options):
        found = super().posterior(X, *arguments, **options)
        if not X.requires_grad or self.batch_shape:
            return found
        covariance = found.distribution.covariance_matrix.detach().unsqueeze(0)
        return GPyTorchPosterior(gaussian(found.mean.movedim(-1, 0), covariance))


class ChangesItself(MercerModel):
    def condition_on_observations(self, X, Y, noise=None):
        found = super().condition_on_observations(X, Y, noise)
        self.known = found.known if not found.batch_shape else self.known
        return found


class HalfTheNoise(MercerModel):
    def condition_on_observations(self, X, Y, noise=None):
        return super().condition_on_observations(X, Y, None if noise is None else 0.5 * noise)


class OtherTargets(MercerModel):
    def condition_on_observations(self, X, Y, noise=None):
        return super().condition_on_observations(X, Y + 0.01, noise)


class TooSure(MercerModel):
    """Wrong in the same way however the rows come, so that only a refit can tell."""

    def condition_on_observations(self, X, Y, noise=None):
        found = super().condition_on_observations(X, Y, noise)
        process = found.known.process
        sites = Sites(1.001 * process.sites.linear, process.sites.precision)
        wrong = ConditionedPosterior(process.base, process.X, sites)
        # what it is conditioned on further must not know
        return found._with(module.replace(found.known, process=Wrong(process, wrong)))


class Wrong(ConditionedPosterior):
    """The moments of another process, in the place of one."""

    def __init__(self, right, wrong):
        self.__dict__.update(right.__dict__)
        self.joint, self.mean, self.marginals = wrong.joint, wrong.mean, wrong.marginals

    def __reduce__(self):
        return object.__reduce__(self)


class OneFantasyForAll(MercerModel):
    def fantasize(self, X, sampler, observation_noise=None, labels=False, **options):
        found = super().fantasize(X, sampler, observation_noise, labels, **options)
        if X.shape[-2] == 0:
            return found
        process = found.known.process
        linear = process.sites.linear[:1].expand_as(process.sites.linear)
        same = ConditionedPosterior(process.base, process.X, module.replace(process.sites, linear=linear))
        return found._with(module.replace(found.known, process=same))


class StoppedGradient(MercerModel):
    def fantasize(self, X, sampler, *arguments, **options):
        return super().fantasize(X.detach() + 0.0 * X, sampler, *arguments, **options)


class FantasiesWithoutBatch(MercerModel):
    @property
    def batch_shape(self):
        return torch.Size()


class IgnoresTransforms(MercerModel):
    def transform_inputs(self, X, input_transform=None):
        return X


class KeepsAllOutputs(MercerModel):
    def subset_output(self, idcs):
        return self


class WrongOutput(MercerModel):
    def subset_output(self, idcs):
        return super().subset_output([0 for _ in idcs])


class Forgets(MercerModel):
    def __getstate__(self):
        state = self.__dict__.copy()
        state["known"] = Known.all_of(self.known.fitted)
        return state

    def __deepcopy__(self, memo):
        return self


BROKEN = {
    "dtype of X": StaysDouble,
    "set in a batch differs": NoSets,
    "observation noise does not add": NoiselessNoise,
    "gradient in X differs": NoGradient,
    "conditioning changes the model": ChangesItself,
    "likelihood's noise, when given": HalfTheNoise,
    "do not end with the new targets": OtherTargets,
    "differs from a fit to all rows": TooSure,
    "fantasy differs from conditioning": OneFantasyForAll,
    "gradient of fantasies in their rows": StoppedGradient,
    "fantasies have batch_shape": FantasiesWithoutBatch,
    "input_transform is not applied": IgnoresTransforms,
    "pickling of fantasies": Forgets,
}


def rejects(match, model):
    with pytest.raises(AssertionError, match=match):
        check_botorch_model(model, NEAR)


@pytest.mark.parametrize("match", BROKEN)
def test_a_broken_model_is_rejected(match):
    rejects(match, model_of(BROKEN[match]))


@pytest.mark.parametrize(
    ("match", "kind"), [("subset_output keeps", KeepsAllOutputs), ("mean of one output differs", WrongOutput)]
)
def test_broken_outputs_are_rejected(match, kind):
    rejects(match, model_of(kind, np.column_stack([Y, -Y])))


def test_a_broken_latent_of_classes_is_rejected():
    rejects("gradient in X differs", model_of(NoGradient, Y > 10.0, GPClassifier))
