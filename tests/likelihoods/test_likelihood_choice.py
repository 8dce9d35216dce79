"""Names, refusals and adapters: how a likelihood is chosen and what it says when it cannot be."""

import math

import gpytorch
import pytest
import torch

from mercer.likelihoods import (
    Bernoulli,
    Gaussian,
    NegativeBinomial,
    Ordinal,
    Poisson,
    Softmax,
    StudentT,
    adapt,
    get_likelihood,
)

DTYPE = torch.float64


def tensor(*values):
    return torch.tensor(values, dtype=DTYPE)


@pytest.mark.parametrize(
    ("build", "y", "side", "message"),
    [
        (Poisson, tensor(1.5), {}, "y must hold integers ≥ 0"),
        (Poisson, tensor(-1.0), {}, "y must hold"),
        (Bernoulli, tensor(-1.0), {}, "integers from 0 to 1"),
        (lambda: Ordinal(3), tensor(3.0), {}, "integers from 0 to 2"),
        (Gaussian, tensor(math.inf), {}, "infinite"),
        (Gaussian, tensor(0.0), {"noise_variance": tensor(0.0)}, "noise_variance must be positive"),
        (Gaussian, tensor(0.0), {"exposure": tensor(1.0)}, "does not read 'exposure'"),
    ],
)
def test_targets_outside_the_support_are_named(build, y, side, message):
    with pytest.raises(ValueError, match=message):
        build().initialise(y, torch.ones_like(y), **side)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Gaussian(0.0), "noise_variance must be positive"),
        (lambda: Gaussian(1.0, bounds=(1.0, 0.1)), "bounds of noise_variance"),
        (lambda: Bernoulli("cloglog"), "link must be"),
        (lambda: Softmax(1), "n_classes"),
        (lambda: Softmax(3, n_draws=7), "n_draws"),
        (lambda: Ordinal(1), "n_classes"),
        (lambda: get_likelihood("gausian"), "likelihood='gausian' is unknown; choose one of gaussian"),
        (lambda: get_likelihood("softmax"), "needs n_classes"),
    ],
)
def test_wrong_arguments_name_the_parameter(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gaussian", Gaussian),
        ("student_t", StudentT),
        ("bernoulli", Bernoulli),
        ("probit", Bernoulli),
        ("logit", Bernoulli),
        ("softmax", Softmax),
        ("poisson", Poisson),
        ("negative_binomial", NegativeBinomial),
        ("ordinal", Ordinal),
    ],
)
def test_names_resolve_and_take_only_the_context_they_need(name, kind):
    found = get_likelihood(name, n_classes=3)
    assert isinstance(found, kind)
    assert get_likelihood(found) is found


def test_other_objects_are_adapted_or_refused():
    assert isinstance(get_likelihood(gpytorch.likelihoods.GaussianLikelihood()), Gaussian)
    with pytest.raises(TypeError, match="name or a likelihood object"):
        get_likelihood(3)
    with pytest.raises(TypeError, match="LaplaceLikelihood has a kink"):
        adapt(gpytorch.likelihoods.LaplaceLikelihood())
    with pytest.raises(TypeError, match="no single latent function"):
        adapt(gpytorch.likelihoods.SoftmaxLikelihood(num_classes=3, mixing_weights=False))


def test_gpytorch_gaussian_keeps_noise_bounds_and_prior():
    prior = gpytorch.priors.GammaPrior(1.1, 0.05)
    theirs = gpytorch.likelihoods.GaussianLikelihood(noise_prior=prior)
    theirs.noise = 0.37
    ours = adapt(theirs)
    assert ours.value_of("noise_variance", tensor(0.0)).item() == pytest.approx(0.37, rel=1e-6)
    (item,) = ours.hyperparameters()
    assert item.lower == pytest.approx(math.log(1e-4), abs=1e-4)
    assert item.log_prior().item() == pytest.approx(float(prior.log_prob(torch.tensor(0.37))), rel=1e-5)


def test_adapted_student_t_is_ours():
    theirs = gpytorch.likelihoods.StudentTLikelihood()
    theirs.noise, theirs.deg_free = 0.49, 5.0
    one, other = adapt(theirs), StudentT(df=5.0, scale=0.7)
    y, m, v = tensor(0.0, 2.0, -1.0), tensor(0.1, 0.4, 1.0), tensor(0.01, 0.02, 0.05)
    for a, b in zip(one.expected_log_prob(y, m, v), other.expected_log_prob(y, m, v), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    names = [item.name for item in one.hyperparameters()]
    assert names == ["deg_free", "noise"]
    theta = {item.name: item.to_theta(item.parameter).item() for item in one.hyperparameters()}
    assert theta["noise"] == pytest.approx(math.log(0.49), rel=1e-5)


def test_adapted_samples_follow_the_given_generator_only():
    likelihood = adapt(gpytorch.likelihoods.StudentTLikelihood())
    before = torch.random.get_rng_state()
    draws = [likelihood.sample(tensor(0.0, 1.0), torch.Generator().manual_seed(2)) for _ in range(2)]
    assert torch.equal(*draws)
    assert torch.equal(before, torch.random.get_rng_state())
