"""Hyperparameter learning: θ is a faithful coordinate, the best point survives whatever happens."""

from dataclasses import replace
from itertools import pairwise

import gpytorch
import numpy as np
import pytest
import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
from toys import DTYPE, normal, problem

from mercer._typing import Data
from mercer.families import Exact, Prior
from mercer.inference import Conjugate, Dual, Laplace, PowerEP
from mercer.inference.evidence import Evidence
from mercer.inference.hyper import learn
from mercer.inference.theta import ThetaVector, at_bounds
from mercer.kernels import Matern32, Matern52, Periodic
from mercer.kernels.means import constant_mean
from mercer.likelihoods import Gaussian, NegativeBinomial, StudentT
from mercer.linalg.cholesky import NotPositiveDefiniteError
from mercer.model import Model
from mercer.policy import NumericalPolicy

NATS = 0.05  # the search ends when an iteration gains little; several such gains may be left


def wave(n=40, seed=0):
    """Noisy rows of a smooth function of two columns, the second irrelevant."""
    rng = np.random.default_rng(seed)
    X = rng.uniform(-2, 2, size=(n, 2))
    y = np.sin(2 * X[:, 0]) + 0.1 * rng.normal(size=n)
    return Data(torch.as_tensor(X), torch.as_tensor(y), torch.ones(n, dtype=DTYPE))


def regression(kernel=None, likelihood=None, engine=None, mean=None):
    kernel = Matern52([1.0, 1.0], outputscale=1.0) if kernel is None else kernel
    likelihood = Gaussian(0.1) if likelihood is None else likelihood
    return Model(Prior(kernel, mean), likelihood, Exact(), engine or Conjugate(), NumericalPolicy())


def fit(model, data, seed=0, **options):
    return learn(model, data, generator=torch.Generator().manual_seed(seed), **options)


def evidence_of(model, data):
    return Evidence(model, model.family.plan(model.prior, data.X, model.policy), data)


# ---- the vector θ


def rich():
    kernel = Matern32([0.5, 2.0], outputscale=1.7) + Periodic(1.3, 0.8, active_dims=[1])
    return regression(kernel, StudentT(df=5.0, scale=0.3, learn_df=True), Dual(), constant_mean(-0.4))


def test_names_count_every_entry_once():
    vector = ThetaVector(rich())
    assert len(vector) == len(vector.names) == len(set(vector.names)) == len(vector.bounds) == len(vector.log_scale)
    assert [name for name in vector.names if name.endswith(("lengthscale[0]", "lengthscale[1]"))]
    assert {name.split(".")[0] for name in vector.names} == {"kernel", "mean", "likelihood"}


def test_theta_is_the_logarithm_of_positive_values_and_the_value_of_others():
    vector = ThetaVector(rich())
    theta = dict(zip(vector.names, vector.read(), strict=True))
    flags = dict(zip(vector.names, vector.log_scale, strict=True))
    assert theta["likelihood.scale"] == pytest.approx(np.log(0.3)) and flags["likelihood.scale"]
    assert theta["likelihood.df"] == pytest.approx(np.log(5.0))
    assert theta["mean.constant"] == pytest.approx(-0.4) and not flags["mean.constant"]
    (scale,) = (value for name, value in theta.items() if name.endswith("outputscale"))
    assert scale == pytest.approx(np.log(1.7))


@pytest.mark.parametrize("seed", range(4))
def test_reading_returns_what_was_written(seed):
    vector = ThetaVector(rich())
    theta = vector.read() + np.random.default_rng(seed).normal(size=len(vector))
    vector.write(theta)
    np.testing.assert_allclose(vector.read(), theta, rtol=1e-12, atol=1e-12)


def test_both_bounds_can_be_written_and_are_recognised():
    vector = ThetaVector(rich())
    for side, expected in ((0, -1), (1, 1)):
        vector.write(vector.bounds[:, side])
        np.testing.assert_allclose(vector.read(), vector.bounds[:, side], rtol=1e-9, atol=1e-9)
        assert (at_bounds(vector.bounds[:, side], vector.bounds) == expected).all()
    assert (at_bounds(vector.bounds.mean(1), vector.bounds) == 0).all()


def test_fixed_parameters_are_left_out():
    model = rich()
    n_all = len(ThetaVector(model))
    model.likelihood.get_parameter("log_df").requires_grad_(False)
    assert len(ThetaVector(model)) == n_all - 1
    for module in (model.prior.kernel, model.prior.mean, model.likelihood):
        module.requires_grad_(False)
    vector = ThetaVector(model)
    assert len(vector) == 0 and vector.read().shape == (0,) and vector.bounds.shape == (0, 2)


def test_the_gradient_is_chained_to_theta():
    model = rich()
    vector = ThetaVector(model)
    theta = vector.read()
    weights = [normal(*h.parameter.shape, seed=i) for i, (_, h) in enumerate(vector.parts)]

    def total():
        return sum((w * h.parameter.double().sin()).sum() for w, (_, h) in zip(weights, vector.parts, strict=True))

    vector.zero_grad()
    total().backward()
    found = vector.gradient()
    for i in range(len(vector)):
        step = np.zeros(len(vector))
        step[i] = 1e-6
        ends = []
        for sign in (1, -1):
            vector.write(theta + sign * step)
            ends.append(float(total().detach()))
        assert found[i] == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-7, abs=1e-8)
    vector.zero_grad()
    assert (vector.gradient() == 0).all()


@pytest.mark.parametrize("engine", [Dual(), Laplace(), PowerEP()], ids=lambda e: e.name)
def test_the_objective_has_the_gradient_of_its_differences(engine):
    """Along one direction through kernel, mean and likelihood; the contract suite does it one by one."""
    model, plan, data = problem("student_t", engine)
    evidence = Evidence(model, plan, replace(data, weight=1.0 + normal(9, seed=4).square()))
    theta = evidence.vector.read()
    direction = np.random.default_rng(0).normal(size=len(theta))
    _, gradient = evidence(theta)
    ends = {k: evidence(theta + k * 2e-3 * direction, gradient=False)[0] for k in (-2, -1, 1, 2)}
    slope = (8 * (ends[1] - ends[-1]) - (ends[2] - ends[-2])) / (12 * 2e-3)
    assert gradient @ direction == pytest.approx(slope, rel=1e-6)


# ---- learning


def test_learning_finds_the_evidence_that_scikit_learn_finds():
    data = wave()
    learned = fit(regression(), data)
    kernel = ConstantKernel(1.0) * Matern([1.0, 1.0], length_scale_bounds=(1e-3, 1e4), nu=2.5) + WhiteKernel(0.1)
    peer = GaussianProcessRegressor(kernel, n_restarts_optimizer=2, random_state=0).fit(data.X.numpy(), data.y.numpy())
    assert learned.converged
    assert learned.value >= peer.log_marginal_likelihood_value_ - NATS
    assert learned.value <= peer.log_marginal_likelihood_value_ + NATS


def test_the_scale_of_the_first_steps_does_not_change_where_they_lead():
    data = wave()
    expected = fit(regression(), data).value
    for scale in (np.array([1.0, 0.1, 0.01, 0.3]), np.array([0.1, 0.3, 0.1, 0.3]), np.full(4, 0.01)):
        evidence = evidence_of(regression(), data)
        learned = evidence.maximise(evidence.vector.read(), max_iter=200, steps=np.diag(scale))
        assert learned.value == pytest.approx(expected, abs=NATS)
        assert learned.n_evaluations < 200


def test_measured_curvature_is_the_inverse_hessian_and_leads_to_the_same_optimum():
    data = wave()
    best = fit(regression(), data)
    evidence = evidence_of(regression(), data)
    steps = evidence.curvature_steps(best.theta)
    h, k = 1e-3, len(best.theta)
    hessian = np.empty((k, k))
    for i, j in np.ndindex(k, k):  # second differences of the value, which share nothing with the gradient
        signs = [(1, 1), (1, -1), (-1, 1), (-1, -1)]
        corners = [
            evidence(best.theta + h * (a * np.eye(k)[i] + b * np.eye(k)[j]), gradient=False)[0] for a, b in signs
        ]
        hessian[i, j] = -(corners[0] - corners[1] - corners[2] + corners[3]) / (4 * h * h)
    values, vectors = np.linalg.eigh(hessian)
    expected = vectors / np.maximum(np.abs(values), 1.0) @ vectors.T
    np.testing.assert_allclose(steps @ steps.T, expected, atol=2e-3)
    learned = evidence.maximise(best.theta + 0.3, max_iter=50, steps=steps)
    assert learned.converged and learned.value == pytest.approx(best.value, abs=NATS)


def test_an_entry_on_its_bound_keeps_its_curvature_to_itself():
    evidence = evidence_of(regression(), wave())
    theta = evidence.vector.read()
    theta[1] = evidence.vector.bounds[1, 1]
    inverse = (lambda steps: steps @ steps.T)(evidence.curvature_steps(theta))
    assert np.abs(np.delete(inverse[1], 1)).max() < 1e-12
    assert np.isfinite(inverse).all()


def test_the_model_is_left_at_the_best_theta_and_the_value_is_its_evidence():
    data, model = wave(), regression()
    learned = fit(model, data)
    np.testing.assert_allclose(ThetaVector(model).read(), learned.theta, rtol=1e-10, atol=1e-10)
    assert evidence_of(model, data)(learned.theta)[0] == pytest.approx(learned.value, rel=1e-9)
    assert learned.value == pytest.approx(max(learned.trace), rel=1e-12)
    assert learned.n_iter == len(learned.trace) <= learned.n_evaluations


def test_iterations_climb_and_are_reported():
    seen = []
    learned = fit(regression(), wave(), on_iteration=lambda i, value: seen.append((i, value)))
    assert [i for i, _ in seen] == list(range(1, learned.n_iter + 1))
    values = [value for _, value in seen]
    assert values == learned.trace and all(b >= a - 1e-9 for a, b in pairwise(values))


@pytest.mark.parametrize("name", ["probit", "poisson", "student_t", "softmax"])
def test_non_gaussian_models_climb_too(name):
    model, plan, data = problem(name)
    before = Evidence(model, plan, data)(ThetaVector(model).read())[0]
    learned = fit(model, data)
    assert learned.converged and learned.value > before
    assert (learned.theta >= ThetaVector(model).bounds[:, 0]).all()
    assert (learned.theta <= ThetaVector(model).bounds[:, 1]).all()


def test_bounds_hold_where_the_evidence_pushes_against_them():
    data = wave()
    data = replace(data, y=torch.zeros_like(data.y))  # nothing to explain: variances run to their lower bounds
    model = regression(likelihood=Gaussian(0.1, bounds=(1e-3, 1.0)))
    learned = fit(model, data)
    vector = ThetaVector(model)
    at = dict(zip(vector.names, at_bounds(learned.theta, vector.bounds), strict=True))
    assert at["likelihood.noise_variance"] == -1
    assert float(model.likelihood.value_of("noise_variance", data.y).detach()) == pytest.approx(1e-3, rel=1e-6)


def test_a_start_outside_the_bounds_is_moved_inside():
    model = regression(likelihood=Gaussian(5.0, bounds=(1e-3, 1.0)))
    learned = fit(model, wave())
    assert learned.value > -50 and float(model.likelihood.value_of("noise_variance", wave().y).detach()) <= 1.0


def test_priors_are_part_of_the_objective():
    data = wave()
    prior = gpytorch.priors.LogNormalPrior(torch.tensor(2.0, dtype=DTYPE), torch.tensor(0.1, dtype=DTYPE))
    plain, kernel = regression(), Matern52([1.0, 1.0], outputscale=1.0)
    kernel.base_kernel.register_prior("lengthscale_prior", prior, "lengthscale")
    informed = regression(kernel)
    theta = ThetaVector(plain).read()
    gap = evidence_of(informed, data)(theta)[0] - evidence_of(plain, data)(theta)[0]
    assert gap == pytest.approx(float(prior.log_prob(torch.ones(1, 2, dtype=DTYPE)).sum()), rel=1e-9)
    fit(plain, data), fit(informed, data)
    # the prior's median is e² ≈ 7.4 with a tenth of a unit of spread in the logarithm
    lengthscale = informed.prior.kernel.base_kernel.lengthscale.detach()[0, 0]
    assert abs(float(lengthscale.log()) - 2.0) < abs(
        float(plain.prior.kernel.base_kernel.lengthscale[0, 0].detach().log()) - 2.0
    )
    evidence = evidence_of(informed, data)
    _, gradient = evidence(ThetaVector(informed).read())
    assert np.abs(gradient).max() < 1.0  # stationary for evidence and prior together


def test_likelihood_priors_count_too():
    data, likelihood = wave(), Gaussian(0.1)
    likelihood.log_priors["noise_variance"] = lambda value: -3.0 * value
    theta = ThetaVector(regression()).read()
    gap = evidence_of(regression(likelihood=likelihood), data)(theta)[0] - evidence_of(regression(), data)(theta)[0]
    assert gap == pytest.approx(-0.3, rel=1e-9)


def test_equal_generators_give_equal_fits_and_restarts_never_hurt():
    data = wave(25, seed=3)
    fits = [fit(regression(), data, seed=5, n_restarts=3) for _ in range(2)]
    np.testing.assert_array_equal(fits[0].theta, fits[1].theta)
    assert len(fits[0].optima) == 4
    assert fits[0].value >= fit(regression(), data).value - 1e-9


def test_restarts_escape_a_poor_first_start():
    data = wave(25)

    def poor():
        # noise explains everything, and the lengthscales are too long to see the wave
        return regression(Matern52([20.0, 20.0], outputscale=0.01), Gaussian(0.5))

    alone, restarted = fit(poor(), data), fit(poor(), data, n_restarts=6)
    assert restarted.value > alone.value + 5.0


def test_a_given_start_is_used():
    data, model = wave(), regression()
    best = fit(model, data)
    again = fit(regression(), data, start=best.theta)
    assert again.n_iter <= 3 and again.value >= best.value - 1e-9


def test_larger_data_are_fitted_on_a_subset_first_and_the_report_says_so():
    learned = fit(regression(), wave(820), max_iter=4)
    assert any("warm start" in note and "820 rows" in note for note in learned.notes)
    assert learned.sites.linear.shape[-1] == 820


def test_max_iter_is_a_limit_and_not_convergence():
    learned = fit(regression(), wave(), max_iter=1)
    assert learned.n_iter == 1 and not learned.converged and learned.message


# ---- what goes wrong


class Fragile(Conjugate):
    """Fails where the noise is below a level, as a factorisation would."""

    def objective(self, model, plan, state, data):
        if float(model.likelihood.value_of("noise_variance", data.y).detach()) < 0.05:
            raise NotPositiveDefiniteError("the planted matrix is not positive definite")
        return super().objective(model, plan, state, data)


def test_failed_evaluations_are_stepped_back_from_and_noted():
    learned = fit(regression(engine=Fragile()), wave())
    assert np.isfinite(learned.value)
    assert any("stepped back" in note and "planted matrix" in note for note in learned.notes)
    free = fit(regression(), wave())
    assert learned.value < free.value  # the optimum, at a noise of 0.01, is behind the wall


class Infinite(Conjugate):
    def objective(self, model, plan, state, data):
        value = super().objective(model, plan, state, data)
        wall = float(model.likelihood.value_of("noise_variance", data.y).detach()) < 0.05
        return value * torch.nan if wall else value


def test_an_objective_that_is_not_finite_is_a_failure():
    learned = fit(regression(engine=Infinite()), wave())
    assert np.isfinite(learned.value) and np.isfinite(learned.theta).all()
    assert any("not finite" in note for note in learned.notes)


def test_a_first_evaluation_that_fails_is_an_error():
    with pytest.raises(NotPositiveDefiniteError, match="planted"):
        fit(regression(likelihood=Gaussian(0.01), engine=Fragile()), wave())


def test_one_good_start_among_bad_ones_is_enough():
    learned = fit(regression(likelihood=Gaussian(0.04), engine=Fragile()), wave(), n_restarts=6)
    assert np.isfinite(learned.value) and any("given up" in note for note in learned.notes)


def test_sites_that_do_not_converge_are_no_approximation():
    """A bound holds anywhere; Laplace and EP mean something at their fixed points only."""
    for engine in (Laplace(), PowerEP()):
        model, _, data = problem("poisson", engine, max_inner=1)
        with pytest.raises(FloatingPointError, match="did not converge"):
            fit(model, data)
    model, _, data = problem("poisson", Dual(), max_inner=1)
    assert np.isfinite(fit(model, data, max_iter=2).value)


def test_an_interrupt_keeps_the_best_point_so_far():
    model, data, seen = regression(), wave(), []

    def interrupt(i, value):
        seen.append(value)
        if i == 2:
            raise KeyboardInterrupt

    learned = fit(model, data, on_iteration=interrupt)
    assert learned.interrupted and not learned.converged and "interrupted" in learned.message
    assert learned.value >= max(seen)
    np.testing.assert_allclose(ThetaVector(model).read(), learned.theta, rtol=1e-10, atol=1e-10)
    assert evidence_of(model, data)(learned.theta)[0] == pytest.approx(learned.value, rel=1e-9)


def test_an_interrupt_before_the_first_value_is_not_swallowed():
    class Interrupted(Conjugate):
        def objective(self, model, plan, state, data):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(regression(engine=Interrupted()), wave())


def test_likelihood_parameters_are_learned_from_the_data():
    rng = np.random.default_rng(0)
    data = wave(60)
    counts = rng.negative_binomial(1 / 0.5, 1 / (1 + 0.5 * 8.0), size=60)
    data = replace(data, y=torch.as_tensor(counts, dtype=DTYPE))
    model = regression(likelihood=NegativeBinomial(5.0), engine=Dual(), mean=constant_mean(2.0))
    fit(model, data)
    dispersion = float(model.likelihood.value_of("dispersion", data.y).detach())
    assert 0.25 < dispersion < 1.0
