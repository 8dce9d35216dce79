"""Sites of new observations: closed forms, fixed points, step control, batches, and derivatives in the rows."""

import copy
import warnings

import pytest
import torch
from toys import DTYPE, PROBLEMS, X_NEW, X, normal, problem

from mercer._typing import Data, Sites
from mercer.families import Exact, Prior, SparseInverseCholesky
from mercer.families.conditioned import ConditionedPosterior
from mercer.inference import Conjugate, run
from mercer.inference.fantasy import expected_precision, sites_of
from mercer.kernels import Matern52
from mercer.likelihoods import Bernoulli, Gaussian, NegativeBinomial, Poisson, StudentT
from mercer.policy import NumericalPolicy

OTHERS = [name for name in PROBLEMS if name != "gaussian"]
# what the engine's own tolerance leaves of its sites, and what 128 draws leave of a softmax's
CLOSE = {"poisson": 1e-6, "softmax": 1e-5}
ROWS = X[[1, 4, 7]] + 0.05


def fitted(name, family=None):
    """A frozen model and its posterior given the data of a toy problem."""
    model, plan, data = problem(name, Conjugate() if name == "gaussian" else None)
    for module in (model.prior.kernel, model.prior.mean, model.likelihood):
        module.requires_grad_(False)
    if family is not None:
        model = copy.copy(model)
        object.__setattr__(model, "family", family)
        plan = family.plan(model.prior, data.X, model.policy)
    return model, run(model, plan, data).state.posterior, data


def nothing_known(model, data):
    """The prior, as a posterior given nothing."""
    shape = (model.likelihood.n_latents, data.n_rows) if model.likelihood.n_latents > 1 else data.y.shape
    zero = torch.zeros(shape, dtype=DTYPE)
    return Exact().condition(model.prior, Exact().plan(model.prior, data.X, model.policy), Sites(zero, zero))


@pytest.mark.parametrize("name", PROBLEMS)
def test_without_data_they_are_the_sites_of_a_fit(name):
    model, _, data = fitted(name)
    y = data.y[[1, 4, 7]]
    found = sites_of(model.likelihood, nothing_known(model, data), ROWS, y)
    fit = run(model, Exact().plan(model.prior, ROWS, model.policy), Data(ROWS, y, torch.ones(3, dtype=DTYPE)))
    for one, other in ((found.linear, fit.state.sites.linear), (found.precision, fit.state.sites.precision)):
        torch.testing.assert_close(one.expand_as(other), other, rtol=0, atol=CLOSE.get(name, 1e-7))


@pytest.mark.parametrize("name", OTHERS)
def test_they_are_a_fixed_point_given_data(name):
    """At the marginals that the sites give, the likelihood asks for these sites."""
    model, posterior, data = fitted(name)
    sites = sites_of(model.likelihood, posterior, ROWS, data.y[[1, 4, 7]])
    m, v = ConditionedPosterior(posterior, ROWS, sites).marginals(ROWS)
    _, alpha, beta = model.likelihood.expected_log_prob(data.y[[1, 4, 7]], m, v)
    scale = 1.0 + float(sites.linear.abs().max())
    tolerance = 1e-6 if name == "softmax" else 1e-9
    torch.testing.assert_close(sites.precision, beta, rtol=0, atol=tolerance * scale)
    torch.testing.assert_close(sites.linear, alpha + beta * (m - 0.2), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("name", OTHERS)
def test_alternatives_and_sets_are_problems_of_their_own(name):
    model, posterior, data = fitted(name)
    rows = torch.stack([ROWS, ROWS + 0.4])
    y = torch.stack([data.y[[0, 4, 7]], data.y[[3, 1, 2]], data.y[[1, 5, 8]]]).unsqueeze(1).expand(3, 2, 3)
    together = sites_of(model.likelihood, posterior, rows, y)
    tolerance = 1e-6 if name == "softmax" else 1e-8
    for s in range(3):
        for t in range(2):
            alone = sites_of(model.likelihood, posterior, rows[t], y[s, t])
            for one, other in ((together.linear, alone.linear), (together.precision, alone.precision)):
                torch.testing.assert_close(one[..., s, t, :], other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", PROBLEMS)
def test_derivatives_in_the_rows(name):
    model, posterior, data = fitted(name)
    real = model.likelihood.support == "real"
    y = torch.stack([data.y[[1, 4, 7]], data.y[[3, 1, 2]]]).unsqueeze(1).expand(2, 2, 3).clone()
    y[1, 1, 1] = torch.nan
    rows = torch.stack([ROWS, ROWS + 0.21])

    def functional(rows, y):
        process = ConditionedPosterior(posterior, rows, sites_of(model.likelihood, posterior, rows, y))
        mean, covariance = process.joint(X_NEW)
        return mean.square().sum() + covariance.square().sum()

    leaves = (rows.clone().requires_grad_(), y.clone().requires_grad_(real))
    slopes = torch.autograd.grad(functional(*leaves), leaves[: 1 + real])
    directions = normal(*rows.shape, seed=1), normal(*y.shape, seed=2)
    for i, slope in enumerate(slopes):
        h = 1e-5
        with torch.no_grad():
            moved = [(rows + k * h * directions[0] * (i == 0), y + k * h * directions[1] * (i == 1)) for k in (1, -1)]
            expected = float(functional(*moved[0]) - functional(*moved[1])) / (2 * h)
        # the derivative of a softmax's sites is that of the exact expectations, of which the sites are averages
        tolerance = 0.03 if name == "softmax" else 2e-6
        assert float((slope.nan_to_num(0.0) * directions[i]).sum()) == pytest.approx(expected, rel=tolerance, abs=1e-6)


# ---- Gaussian noise in closed form


def two_outputs(noise):
    prior = Prior(Matern52(0.8).requires_grad_(False))
    sites = Sites(normal(2, 9), torch.ones(9, dtype=DTYPE))
    posterior = Exact().condition(prior, Exact().plan(prior, X, NumericalPolicy()), sites)
    return Gaussian(noise).requires_grad_(False), posterior


def test_gaussian_noise_of_several_outputs():
    likelihood, posterior = two_outputs(torch.tensor([[0.5], [2.0]], dtype=DTYPE))
    y = normal(2, 4, 3)
    y[0, 1, 2] = torch.nan
    sites = sites_of(likelihood, posterior, ROWS, y)
    expected = torch.tensor([2.0, 0.5], dtype=DTYPE).reshape(2, 1, 1).expand(2, 4, 3).clone()
    expected[0, 1, 2] = 0.0
    torch.testing.assert_close(sites.precision, expected)
    torch.testing.assert_close(sites.linear, expected * y.nan_to_num(0.0))


def test_alternatives_share_the_precision_of_gaussian_noise():
    likelihood, posterior = two_outputs(torch.tensor([[0.5], [2.0]], dtype=DTYPE))
    assert sites_of(likelihood, posterior, ROWS, normal(2, 4, 5, 3)).precision.shape == (2, 1, 1, 3)
    likelihood, posterior = two_outputs(0.25)
    assert sites_of(likelihood, posterior, ROWS, normal(2, 4, 5, 3)).precision.shape == (3,)
    known = torch.tensor([1.0, 2.0, 4.0], dtype=DTYPE)
    found = sites_of(likelihood, posterior, ROWS, normal(2, 4, 3), noise_variance=known).precision
    torch.testing.assert_close(found, 1 / known)


# ---- step control


def test_an_outlier_has_negative_precision():
    model, posterior, _ = fitted("student_t")
    sites = sites_of(model.likelihood, posterior, ROWS, torch.tensor([0.2, 4.0, 0.7], dtype=DTYPE))
    assert sites.precision[1] < 0 < sites.precision[0]
    process = ConditionedPosterior(posterior, ROWS, sites)
    held, without = process.mean(ROWS)[1], posterior.mean(ROWS)[1]
    assert abs(float(held - without)) < 0.5  # what is far off says little


CROWDED = torch.tensor([[0.0], [0.02], [0.04]], dtype=DTYPE)


def wide_prior():
    prior = Prior(Matern52(0.3, outputscale=30.0).requires_grad_(False))
    none = Sites(torch.zeros(9, dtype=DTYPE), torch.zeros(9, dtype=DTYPE))
    return Exact().condition(prior, Exact().plan(prior, X, NumericalPolicy()), none)


@pytest.mark.parametrize(
    ("likelihood", "y"),
    [
        (Poisson(), [0.0, 5000.0, 0.0]),
        (NegativeBinomial(0.01), [3000.0, 0.0, 1000.0]),
        (Bernoulli("logit"), [0.0, 1.0, 0.0]),
        (StudentT(scale=0.1), [30.0, -30.0, 10.0]),
    ],
)
def test_extreme_targets_converge(likelihood, y):
    posterior, y = wide_prior(), torch.tensor(y, dtype=DTYPE)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        sites = sites_of(likelihood.requires_grad_(False), posterior, CROWDED, y)
    m, v = ConditionedPosterior(posterior, CROWDED, sites).marginals(CROWDED)
    beta = likelihood.expected_log_prob(y, m, v).beta
    torch.testing.assert_close(sites.precision, beta, rtol=1e-6, atol=1e-6)


def test_what_does_not_converge_is_said():
    likelihood = StudentT(scale=0.01).requires_grad_(False)  # peaks that no quadrature of such a prior resolves
    with pytest.warns(UserWarning, match="did not converge"):
        sites_of(likelihood, wide_prior(), CROWDED, torch.tensor([30.0, 3.0, 1.0], dtype=DTYPE))


def test_missing_targets_say_nothing():
    for name in OTHERS:
        model, posterior, data = fitted(name)
        y = data.y[[1, 4, 7]].clone()
        y[1] = torch.nan
        sites = sites_of(model.likelihood, posterior, ROWS, y)
        assert (sites.linear[..., 1] == 0).all() and (sites.precision[..., 1] == 0).all(), name


def test_other_families_and_processes_serve_as_well():
    model, posterior, data = fitted("logit")
    y = data.y[[1, 4, 7]]
    _, sparse, _ = fitted("logit", SparseInverseCholesky())
    exact, found = (sites_of(model.likelihood, each, ROWS, y) for each in (posterior, sparse))
    torch.testing.assert_close(found.precision, exact.precision, rtol=1e-3, atol=1e-3)
    # one after the other, as in a stream: the first stays as it was when it came
    first = sites_of(model.likelihood, posterior, ROWS[:1], y[:1].expand(2, 1))
    process = ConditionedPosterior(posterior, ROWS[:1], first)
    then = sites_of(model.likelihood, process, ROWS[1:], y[1:])
    assert then.linear.shape == (2, 2)
    alone = ConditionedPosterior(posterior, ROWS[:1], Sites(first.linear[0], first.precision[0]))
    torch.testing.assert_close(then.linear[0], sites_of(model.likelihood, alone, ROWS[1:], y[1:]).linear)


# ---- what an observation is expected to be worth


@pytest.mark.parametrize("name", OTHERS)
def test_expected_precision_averages_over_the_predictive(name):
    model, _, _ = fitted(name)
    likelihood = model.likelihood
    shape = (likelihood.n_latents, 4) if likelihood.n_latents > 1 else (4,)
    m, v = 0.5 * normal(*shape, seed=3), 0.1 + 0.3 * normal(*shape, seed=4).square()
    found = expected_precision(likelihood, m.requires_grad_(), v)
    assert (found > 0).all()
    if likelihood.support == "classes":
        probs = likelihood.predictive(m, v).probs
        n_classes = probs.shape[-1]
        betas = [
            likelihood.expected_log_prob(torch.full((4,), float(c), dtype=DTYPE), m, v).beta for c in range(n_classes)
        ]
        expected = sum(probs[:, c] * beta for c, beta in enumerate(betas))
        # 128 draws of a softmax give slopes and curvatures that agree to a hundredth
        torch.testing.assert_close(found, expected, rtol=0.1 if name == "softmax" else 1e-12, atol=1e-12)
    (slope,) = torch.autograd.grad(found.sum(), m)
    h = 1e-6
    with torch.no_grad():
        ends = [expected_precision(likelihood, m + k * h * torch.ones_like(m), v).sum() for k in (1, -1)]
    assert float(slope.sum()) == pytest.approx(float(ends[0] - ends[1]) / (2 * h), rel=1e-5, abs=1e-7)
