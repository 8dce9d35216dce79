"""What each likelihood decides by itself: starting values, tails, caps, limits."""

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mercer.likelihoods import (
    Bernoulli,
    Gaussian,
    NegativeBinomial,
    Ordinal,
    Poisson,
    Softmax,
    StudentT,
)
from mercer.likelihoods.categorical import log_ndtr, probit_slopes
from mercer.likelihoods.robust import weighted_median

DTYPE = torch.float64
NAN = math.nan


def tensor(*values):
    return torch.tensor(values, dtype=DTYPE)


STARTS = {
    "gaussian": (Gaussian, lambda draw: draw),
    "student_t": (StudentT, lambda draw: draw),
    "poisson": (Poisson, lambda draw: draw.abs().round()),
    "negative_binomial": (NegativeBinomial, lambda draw: draw.abs().round()),
    "ordinal": (lambda: Ordinal(3), lambda draw: draw.abs().round().clamp_max(2)),
}


@pytest.mark.parametrize("name", STARTS)
@given(
    rows=st.lists(st.tuples(st.floats(-5, 5), st.integers(1, 4)), min_size=2, max_size=12),
    missing=st.booleans(),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_weight_two_is_the_row_twice_in_starting_values(name, rows, missing):
    build, encode = STARTS[name]
    y, weight = encode(tensor(*(row[0] for row in rows))), tensor(*(row[1] for row in rows))
    if missing:
        y = torch.cat([y, tensor(NAN)])
        weight = torch.cat([weight, tensor(3.0)])
    written_out = y.repeat_interleave(weight.long())
    starts = []
    for targets, weights in [(y, weight), (written_out, torch.ones_like(written_out))]:
        likelihood = build()
        latent = likelihood.initialise(targets, weights)
        starts.append([torch.as_tensor(latent, dtype=DTYPE), *likelihood.parameters()])
    for one, other in zip(*starts, strict=True):
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_starting_values_follow_the_data():
    y, weight = tensor(1.0, 3.0, NAN, 8.0), tensor(1.0, 1.0, 5.0, 1.0)
    gaussian = Gaussian()
    gaussian.initialise(y, weight)
    assert gaussian.value_of("noise_variance", y).item() == pytest.approx(0.1 * np.var([1, 3, 8]))
    kept = Gaussian(0.7)
    kept.initialise(y, weight)
    assert kept.value_of("noise_variance", y).item() == pytest.approx(0.7)
    exposure = tensor(1.0, 2.0, 1.0, 3.0)
    assert float(Poisson().initialise(y, weight, exposure=exposure)) == pytest.approx(math.log(12 / 6))
    assert math.isfinite(float(Poisson().initialise(tensor(0.0, 0.0), tensor(1.0, 1.0))))
    student = StudentT()
    student.initialise(tensor(0.0, 1.0, 2.0, 3.0, 1e6), torch.ones(5))
    assert student.value_of("scale", y).item() == pytest.approx(math.sqrt(0.1) * 1.4826)
    ordinal = Ordinal(3)
    ordinal.initialise(tensor(*([0.0] * 10 + [1.0] * 20 + [2.0] * 10)), torch.ones(40))
    prior = ordinal.predictive(tensor(0.0), tensor(1.0)).probs
    expected = tensor(10.5, 20.5, 10.5) / 41.5
    torch.testing.assert_close(prior.detach()[0], expected)


def test_outputs_may_start_from_noise_of_their_own():
    likelihood = Gaussian(torch.ones(2, 1))
    likelihood._given = False
    likelihood.initialise(torch.tensor([[0.0, 2.0], [0.0, 20.0]]), torch.ones(2))
    found = likelihood.value_of("noise_variance", tensor(0.0))
    torch.testing.assert_close(found.detach(), tensor(0.1, 10.0).unsqueeze(-1))


def test_known_noise_replaces_the_learned_one():
    likelihood = Gaussian()
    known = tensor(0.2, 0.5)
    likelihood.initialise(tensor(0.0, 1.0), torch.ones(2), noise_variance=known)
    assert likelihood.hyperparameters() == []
    torch.testing.assert_close(likelihood.variance(tensor(0.0, 0.0), noise_variance=known), known)
    sites = likelihood.sites(tensor(3.0, NAN), tensor(2.0, 1.0), noise_variance=known)
    torch.testing.assert_close(sites.linear, tensor(30.0, 0.0))
    torch.testing.assert_close(sites.precision, tensor(10.0, 0.0))


def test_outputs_that_agree_share_one_row_of_precisions():
    y, weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=DTYPE), tensor(1.0, 2.0)
    shared = Gaussian(0.5).sites(y, weight)
    own = Gaussian(tensor(0.5, 0.25).unsqueeze(-1)).sites(y, weight)
    gaps = Gaussian(0.5).sites(torch.where(y == 4, NAN, y), weight)
    torch.testing.assert_close(shared.precision.detach(), tensor(2.0, 4.0))
    torch.testing.assert_close(shared.linear.detach(), tensor(2.0, 4.0) * y)
    torch.testing.assert_close(own.precision.detach(), torch.tensor([[2.0, 4.0], [4.0, 8.0]], dtype=DTYPE))
    torch.testing.assert_close(gaps.precision.detach(), torch.tensor([[2.0, 4.0], [2.0, 0.0]], dtype=DTYPE))


def test_gaussian_sites_and_scale_learn_the_noise():
    likelihood = Gaussian(0.5)
    y, weight = tensor(1.0, NAN, 2.0), tensor(1.0, 1.0, 3.0)
    sites, scale = likelihood.sites(y, weight), likelihood.log_scale(y, weight)
    assert scale.item() == pytest.approx(-2 * math.log(2 * math.pi * 0.5))
    (slope,) = torch.autograd.grad(sites.precision.sum() + scale, likelihood.log_noise_variance)
    assert float(slope) == pytest.approx(-4 / 0.5 - 2)


@given(
    z=st.one_of(st.floats(-60, 40), st.floats(-1e6, -40)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_probit_slopes_keep_their_sign_and_limits_in_every_tail(z, dtype):
    point = torch.tensor([z], dtype=dtype, requires_grad=True)
    r, h = probit_slopes(point)
    assert float(r.detach()) > 0 and 0 < float(h.detach()) < 1 + 1e-6
    if z < -20:
        assert float(r.detach()) == pytest.approx(-z - 1 / z, rel=1e-4)
        assert float(h.detach()) == pytest.approx(1 - 1 / z**2, rel=1e-3)
    (slope,) = torch.autograd.grad(log_ndtr(point).sum(), point)
    assert float(slope) == pytest.approx(float(r.detach()), rel=1e-4, abs=1e-30)


@given(f=st.floats(-300, 300), y=st.integers(0, 3), width=st.floats(-5, 3))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_ordinal_is_finite_and_concave_far_from_its_cutpoints(f, y, width):
    likelihood = Ordinal(4)
    with torch.no_grad():
        likelihood.log_increments.fill_(width)
    found = likelihood.log_prob_derivatives(tensor(float(y)), tensor(f))
    assert all(torch.isfinite(item).all() for item in found)
    assert float(found.d2.detach()) < 0 or abs(f) > 30
    slopes = torch.autograd.grad(found.value.sum(), list(likelihood.parameters()))
    assert all(torch.isfinite(slope).all() for slope in slopes)


def test_cutpoints_stay_ordered():
    likelihood = Ordinal(5)
    assert (likelihood.cutpoints.diff() > 0).all()
    torch.testing.assert_close(likelihood.cutpoints.detach(), tensor(-1.5, -0.5, 0.5, 1.5))
    names = [item.name for item in likelihood.hyperparameters()]
    assert names == ["first_cutpoint", "increments"]
    assert Ordinal(5, learn_cutpoints=False).hyperparameters() == []


def test_runaway_rates_are_capped_counted_and_still_consistent():
    likelihood = Poisson()
    m, v = tensor(50.0).requires_grad_(), tensor(2.0).requires_grad_()
    found = likelihood.expected_log_prob(tensor(3.0), m, v)
    assert int(likelihood.n_capped) == 1
    slopes = torch.autograd.grad(found.value.sum(), (m, v))
    torch.testing.assert_close(slopes[0], found.alpha)
    torch.testing.assert_close(slopes[1], -0.5 * found.beta)
    assert int(pickle.loads(pickle.dumps(likelihood)).n_capped) == 1
    assert torch.isfinite(likelihood.predictive(m, v).variance).all()


def test_small_dispersion_is_poisson():
    y, m, v = tensor(0.0, 3.0, 9.0), tensor(0.2, 1.0, 2.0), tensor(0.1, 0.2, 0.3)
    one = NegativeBinomial(1e-4, bounds=(1e-6, 1.0)).expected_log_prob(y, m, v)
    other = Poisson().expected_log_prob(y, m, v)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-3, atol=5e-3)


def test_outliers_have_negative_precision_and_infinite_variance_is_said():
    likelihood = StudentT(df=2.0, scale=0.5)
    assert float(likelihood.expected_log_prob(tensor(5.0), tensor(0.0), tensor(0.1)).beta) < 0
    assert torch.isinf(likelihood.predictive(tensor(0.0), tensor(0.1)).variance).all()
    float32 = likelihood.predictive(torch.zeros(1), torch.ones(1))
    assert torch.isinf(float32.variance).all() and float32.variance.dtype == torch.float32


def test_softmax_of_two_equal_latents_is_a_logit():
    m, v = tensor(0.4, -0.2), tensor(0.3, 0.5)
    halves = torch.stack([-0.5 * m, 0.5 * m]), torch.stack([v / 2, v / 2])
    probs = Softmax(2, 4096).predictive(*halves).probs
    expected = Bernoulli("logit").predictive(m, v).probs
    torch.testing.assert_close(probs, expected, rtol=2e-4, atol=2e-4)


def test_softmax_draws_leave_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    Softmax(7, 32).predictive(torch.zeros(7, 1), torch.ones(7, 1))
    assert torch.equal(before, torch.random.get_rng_state())


def test_softmax_blocks_change_nothing(monkeypatch):
    m, v, y = torch.randn(3, 5, dtype=DTYPE), torch.rand(3, 5, dtype=DTYPE), tensor(0.0, 1.0, 2.0, 0.0, NAN)
    whole = Softmax(3).expected_log_prob(y, m, v)
    monkeypatch.setattr("mercer.likelihoods.categorical.BLOCK_ELEMENTS", 40)
    for one, other in zip(Softmax(3).expected_log_prob(y, m, v), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_softmax_refuses_laplace_by_name():
    with pytest.raises(TypeError, match="engine='laplace'"):
        Softmax(3).log_prob_derivatives(tensor(0.0), torch.zeros(3, 1))


@given(
    values=st.lists(st.tuples(st.floats(-9, 9), st.integers(1, 5)), min_size=1, max_size=15),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_weighted_median_is_the_median_of_the_rows_written_out(values):
    x, w = tensor(*(row[0] for row in values)), tensor(*(row[1] for row in values))
    expected = np.median(np.repeat(x.numpy(), w.long().numpy()))
    assert float(weighted_median(x, w)) == pytest.approx(float(expected))


@given(m=st.floats(-6, 6), log_v=st.floats(math.log(1e-12), math.log(1e3)), y=st.integers(0, 2))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_log_concave_likelihoods_have_positive_precision(m, log_v, y):
    mean, variance = tensor(m), tensor(math.exp(log_v))
    for likelihood in (Bernoulli(), Bernoulli("logit"), Poisson(), NegativeBinomial(), Ordinal(3)):
        target = tensor(float(min(y, 1) if isinstance(likelihood, Bernoulli) else y))
        assert float(likelihood.expected_log_prob(target, mean, variance).beta.detach()) > 0
    classes = torch.stack([mean, -mean, 0 * mean])
    assert (Softmax(3).expected_log_prob(tensor(float(y)), classes, variance.expand(3, 1)).beta > 0).all()
