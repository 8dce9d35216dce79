"""Stochastic training of free-form posteriors: what it climbs, where it starts and what it reaches."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import variational

from mercer._typing import Data, Sites
from mercer.families import Exact, Prior
from mercer.families.dklgp import DoubleKL, FreeParameters
from mercer.inference import Dual, run
from mercer.inference.freeform import Freeform, free_bound, site_start, train_free
from mercer.kernels import Matern32, gram
from mercer.kernels.means import constant_mean
from mercer.likelihoods import Bernoulli, Gaussian, Poisson, Softmax, StudentT
from mercer.model import Model
from mercer.policy import NumericalPolicy

DTYPE = torch.float64
N = 60
MAKE = {
    "gaussian": lambda: Gaussian(0.1),
    "logit": lambda: Bernoulli("logit"),
    "poisson": Poisson,
    "student": lambda: StudentT(df=2.0, scale=0.2),
}


def uniform(n=N, d=2, seed=0):
    return torch.rand(n, d, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def problem(name="logit", n=N, variant="dkl", m=8, mean=None, engine=None, **policy):
    """A model with data drawn from its own prior, and its plan."""
    generator = torch.Generator().manual_seed(3)
    prior = Prior(Matern32([0.3, 0.6], outputscale=1.5), None if mean is None else constant_mean(mean))
    X = uniform(n)
    with torch.no_grad():
        L = torch.linalg.cholesky(gram(prior.kernel, X))
        f = L @ torch.randn(n, generator=generator, dtype=DTYPE) + prior.mean_at(X)
        likelihood = MAKE[name]()
        y = likelihood.sample(f, generator)
    data = Data(X, y, torch.ones(n, dtype=DTYPE))
    family = DoubleKL(variant, n_neighbors=m)
    model = Model(prior, likelihood, family, Freeform() if engine is None else engine, NumericalPolicy(**policy))
    return model, family.plan(prior, X, model.policy), data


def bound(model, plan, parameters, data, **how):
    with torch.no_grad():
        return float(free_bound(model, plan, parameters, data.rows(plan.order), **{"exact": True, **how}))


def moved(parameters, scale=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    steps = (scale * torch.randn(each.shape, generator=generator, dtype=DTYPE) for each in parameters.tensors())
    return FreeParameters(*(each + step for each, step in zip(parameters.tensors(), steps, strict=True)))


# ---- the bound


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", MAKE)
def test_batches_average_to_the_whole_bound(name, exact):
    model, plan, data = problem(name, mean=0.3)
    parameters = moved(site_start(model, plan, data).parameters)
    batches = torch.randperm(N, generator=torch.Generator().manual_seed(0)).split(12)
    found = [bound(model, plan, parameters, data, rows=rows, exact=exact) for rows in batches]
    assert np.mean(found) == pytest.approx(bound(model, plan, parameters, data, exact=exact), rel=1e-10)
    assert np.std(found) > 1.0  # they are estimates, each of the whole


def test_weights_count_the_data_and_not_the_divergence():
    model, plan, data = problem("poisson", n=20, m=19)
    q = site_start(model, plan, data).parameters
    values = [bound(model, plan, q, replace(data, weight=w * data.weight)) for w in (1.0, 2.0, 3.0)]
    assert values[2] - values[1] == pytest.approx(values[1] - values[0], rel=1e-10)
    terms = values[0] - (values[1] - values[0])  # the bound without data is minus the divergence
    assert terms == pytest.approx(-float(model.family.variational(model.prior, plan, q).kl().detach()), rel=1e-9)


def test_noisy_gaussian_data_reach_the_exact_evidence_at_once():
    model, plan, data = problem("gaussian", m=N - 1, mean=0.4)
    K = gram(model.prior.kernel, data.X).detach() + 0.1 * torch.eye(N, dtype=DTYPE)
    evidence = torch.distributions.MultivariateNormal(torch.full((N,), 0.4, dtype=DTYPE), K).log_prob(data.y)
    q = site_start(model, plan, data).parameters
    assert bound(model, plan, q, data) == pytest.approx(float(evidence), rel=1e-8)
    assert bound(model, plan, moved(q), data) < float(evidence) - 1e-3


@pytest.mark.parametrize("exact", [False, True])
def test_gradients_equal_finite_differences(exact):
    model, plan, data = problem("student", n=30, mean=0.2)
    q = moved(site_start(model, plan, data).parameters).leaves()
    ordered, rows = data.rows(plan.order), torch.arange(0, 30, 2)
    kernel = model.prior.kernel
    leaves = [
        *q.tensors(),
        kernel.raw_outputscale,
        kernel.base_kernel.raw_lengthscale,
        *model.prior.mean.parameters(),
        model.likelihood.log_scale,
    ]
    slopes = torch.autograd.grad(free_bound(model, plan, q, ordered, rows, exact), leaves)
    for leaf, slope in zip(leaves, slopes, strict=True):
        direction = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1), dtype=DTYPE)
        values = []
        with torch.no_grad():
            for step in (1e-5, -2e-5):
                leaf += step * direction
                values.append(float(free_bound(model, plan, q, ordered, rows, exact)))
            leaf += 1e-5 * direction
        wanted = (values[0] - values[1]) / 2e-5
        assert float((slope * direction).sum()) == pytest.approx(wanted, rel=1e-6, abs=1e-5)


# ---- the start


@pytest.mark.parametrize("name", MAKE)
def test_the_start_is_the_mode_of_the_posterior(name):
    """With V and U complete: P g = w ∂ log p at the mean."""
    model, plan, data = problem(name, n=25, m=24)
    q = site_start(model, plan, data, n_steps=100)
    K = gram(model.prior.kernel, data.X).detach()
    g = q.mean_at_data
    push = model.likelihood.log_prob_derivatives(data.y, g).d1.detach()
    # the objective settles to 1e-8 nats a row, and so the mode to the root of that
    torch.testing.assert_close(K @ push, g, rtol=1e-3, atol=3e-3)


@pytest.mark.parametrize("name", ["logit", "poisson"])
def test_with_variances_it_is_the_best_gaussian(name):
    """With V and U complete, against a dense search over mean and covariance."""
    model, plan, data = problem(name, n=10, m=9)
    q = site_start(model, plan, data, n_steps=200, laplace=False)
    K, y = gram(model.prior.kernel, data.X).detach().numpy(), data.y.numpy()[:, None]

    def log_density(f):
        f = np.atleast_2d(f)
        if name == "logit":
            return -np.logaddexp(0.0, -(2 * y.T - 1) * f)
        return y.T * f - np.exp(f) - np.array([[math.lgamma(k + 1) for k in y[:, 0]]])

    best, m, S = variational.optimum(K, log_density)
    assert bound(model, plan, q.parameters, data) == pytest.approx(best, abs=1e-4)
    np.testing.assert_allclose(q.mean_at_data.numpy(), m, atol=5e-3)
    np.testing.assert_allclose(q.variance_at_data.numpy(), np.diag(S), rtol=1e-2)
    rough = site_start(model, plan, data)
    assert bound(model, plan, rough.parameters, data) < best - 1e-4  # Laplace's is another


@pytest.mark.parametrize("name", ["logit", "student"])
def test_the_mean_field_start_with_variances_is_the_mean_field_optimum(name):
    model, plan, data = problem(name, variant="mean-field")
    best = site_start(model, plan, data, n_steps=300, laplace=False).parameters.leaves()
    value = free_bound(model, plan, best, data.rows(plan.order))
    by_mean, by_log_diagonal = torch.autograd.grad(value, [best.mean, best.log_diagonal])
    assert float(by_mean.abs().max()) < 1e-2
    # where curvature is negative V takes none, which is not the optimum
    expected = model.likelihood.expected_log_prob(data.y, *(each.detach() for each in _marginals(plan, best)))
    bent = (expected.beta < 0)[plan.order]
    assert bool(bent.any()) == (name == "student")
    assert float(by_log_diagonal[~bent].abs().max()) < 1e-2 and float(by_log_diagonal.abs().max()) < 0.1


def _marginals(plan, parameters):
    return parameters.mean[plan.inverse], (-2 * parameters.log_diagonal).exp()[plan.inverse]


# ---- training


def test_training_climbs_from_the_prior():
    model, plan, data = problem(engine=Freeform(n_epochs=8, batch_size=15))
    zeros = torch.zeros(N, dtype=DTYPE)
    start = model.family.condition(model.prior, plan, Sites(zeros, zeros))
    result = run(model, plan, data, Sites(zeros, zeros))
    before, after = (bound(model, plan, each.parameters, data) for each in (start, result.state.posterior))
    assert result.converged and result.n_steps == 8
    assert after > before + 0.5
    with torch.no_grad():
        found = float(model.engine.objective(model, plan, result.state, data))
    assert found == pytest.approx(after, rel=1e-10)


@pytest.mark.parametrize("name", ["logit", "student"])
def test_small_steps_improve_on_the_start_and_beat_mean_field(name):
    values = {}
    for variant in ("dkl", "mean-field"):
        model, plan, data = problem(name, variant=variant)
        start = bound(model, plan, site_start(model, plan, data).parameters, data)
        fit = train_free(
            model,
            model.family,
            data,
            epochs=(30,),
            batch_size=20,
            learning_rate=1e-3,
            learn_hyperparameters=False,
            generator=torch.Generator().manual_seed(0),
        )
        values[variant] = start, bound(model, fit.plan, fit.parameters, data)
    assert values["dkl"][1] > values["dkl"][0]
    best = site_start(model, plan, data, n_steps=300, laplace=False)
    assert values["dkl"][1] > bound(model, plan, best.parameters, data) + 1.0


def test_the_trained_posterior_is_below_the_best_gaussian_and_near_it():
    model, _, data = problem("logit", m=N - 1)
    fit = train_free(
        model,
        model.family,
        data,
        epochs=(40,),
        batch_size=20,
        learning_rate=1e-3,
        learn_hyperparameters=False,
        generator=torch.Generator().manual_seed(0),
    )
    exact = Model(model.prior, model.likelihood, Exact(), Dual(), model.policy)
    plan = exact.family.plan(exact.prior, data.X, exact.policy)
    best = run(exact, plan, data).state.value
    assert best - 0.1 < bound(model, fit.plan, fit.parameters, data) <= best + 1e-7


def test_hyperparameters_are_learned_from_wrong_ones():
    model, _, data = problem("gaussian", n=150)
    truth = data.X.new_tensor([0.3, 0.6])
    model.prior.kernel.base_kernel.lengthscale = 3 * truth
    model.likelihood._set("noise_variance", 0.5)

    def evidence():
        with torch.no_grad():
            K = gram(model.prior.kernel, data.X) + model.likelihood.variance(data.y) * torch.eye(150, dtype=DTYPE)
            return float(torch.distributions.MultivariateNormal(torch.zeros(150, dtype=DTYPE), K).log_prob(data.y))

    before, seen = evidence(), []
    fit = train_free(
        model,
        model.family,
        data,
        epochs=(2, 3, 10),
        batch_size=30,
        learning_rate=0.03,
        generator=torch.Generator().manual_seed(0),
        on_epoch=lambda *how: seen.append(how),
    )
    assert [k for k, _ in seen] == list(range(1, 16)) and [v for _, v in seen] == fit.trace
    assert evidence() > before + 5.0
    assert all(each.grad is None for each in model.prior.kernel.parameters())
    # order and neighbours are those of the lengthscales before the last ten epochs
    assert (
        float(
            (fit.plan.columns.distance - model.family.plan(model.prior, data.X, model.policy).columns.distance)
            .abs()
            .max()
        )
        > 0
    )


def test_fixed_hyperparameters_stay_as_they_are():
    model, _, data = problem("student", n=30)
    before = [each.detach().clone() for part in (model.prior.kernel, model.likelihood) for each in part.parameters()]
    train_free(
        model,
        model.family,
        data,
        epochs=(1, 1),
        learn_hyperparameters=False,
        generator=torch.Generator().manual_seed(0),
    )
    after = [each for part in (model.prior.kernel, model.likelihood) for each in part.parameters()]
    assert all(torch.equal(left, right) for left, right in zip(before, after, strict=True))


def test_bounds_of_hyperparameters_hold():
    model, _, data = problem("gaussian", n=30)
    model.likelihood._bounds["noise_variance"] = (0.0999, 0.1001)
    train_free(model, model.family, data, epochs=(2,), generator=torch.Generator().manual_seed(0), batch_size=10)
    assert 0.0998 < float(model.likelihood.value_of("noise_variance", data.y).detach()) < 0.1002


def test_equal_generators_give_equal_fits():
    fits = []
    for seed in (0, 0, 1):
        model, _, data = problem(n=40)
        generator = torch.Generator().manual_seed(seed)
        fits.append(train_free(model, model.family, data, epochs=(1, 2), batch_size=10, generator=generator))
    for left, right in zip(fits[0].parameters.tensors(), fits[1].parameters.tensors(), strict=True):
        assert torch.equal(left, right)
    assert fits[0].trace == fits[1].trace != fits[2].trace


def test_the_last_batch_may_be_smaller():
    model, _, data = problem(n=25)
    fit = train_free(
        model,
        model.family,
        data,
        epochs=(1,),
        batch_size=10,
        learning_rate=0.0,
        learn_hyperparameters=False,
        generator=torch.Generator().manual_seed(0),
    )
    whole = bound(model, fit.plan, fit.parameters, data, exact=False)
    assert fit.trace[0] == pytest.approx(whole, rel=1e-10)  # nothing moved, every row counts once


def test_the_objective_has_gradients_in_the_hyperparameters():
    model, plan, data = problem(n=30, engine=Freeform(n_epochs=1))
    state = model.engine.init(model, plan, data)
    state, info = model.engine.step(model, plan, state, data)
    assert info["converged"] and math.isfinite(state.value)
    (slope,) = torch.autograd.grad(
        model.engine.objective(model, plan, state, data), model.prior.kernel.base_kernel.raw_lengthscale
    )
    assert float(slope.abs().min()) > 0


def test_several_latents_are_refused():
    model, plan, data = problem(n=10)
    other = replace(model, likelihood=Softmax(2))
    with pytest.raises(ValueError, match="one latent"):
        site_start(other, plan, data)
