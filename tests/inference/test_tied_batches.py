"""Tied sites that follow random batches: unbiased, with noise that shrinks as the steps do."""

import math

import pytest
import torch
from minibatch_toys import M, draws, problem
from scipy import stats

from mercer.inference import Dual, run
from mercer.inference.minibatch import tied_bound, tied_by_batches

SLOW = ("student_t", "softmax")


def test_one_step_on_all_rows_is_titsias_for_gaussian_noise():
    model, plan, data = problem("gaussian")
    expected = run(model, plan, data).state
    found = tied_by_batches(model, plan.Z, [data], 60, step_size=1.0, positivity="allow")
    for one, other in zip(found.posterior.marginals(data.X), expected.posterior.at_data(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert tied_bound(model, found, [data.rows(torch.arange(i, 60, 4)) for i in range(4)]) == pytest.approx(
        expected.value, rel=1e-10
    )


@pytest.mark.parametrize("name", ["probit", "student_t"])
def test_steps_on_all_rows_are_those_of_sites(name):
    """What is tied is Σ a (λ1, λ2 aᵀ) of the sites that constant steps lead to."""
    model, plan, data = problem(name)
    found = tied_by_batches(model, plan.Z, [data] * 5, 60, step_size=0.1, decay=0.0, positivity="allow")
    with torch.no_grad():
        state = Dual().init(model, plan, data)
        for _ in range(5):
            state = Dual().init(model, plan, data, state.sites.blend(state.target, 0.1))
    expected = state.posterior.tied()
    torch.testing.assert_close(found.tied.linear, expected.linear, rtol=1e-9, atol=1e-8)
    torch.testing.assert_close(found.tied.precision, expected.precision, rtol=1e-9, atol=1e-8)


def test_what_a_batch_asks_for_is_unbiased():
    """Averaged over the batches of a partition it is what all rows ask for."""
    model, plan, data = problem("poisson")
    how = {"step_size": 1.0, "positivity": "allow"}
    whole = tied_by_batches(model, plan.Z, [data], 60, **how).tied
    parts = [tied_by_batches(model, plan.Z, [data.rows(torch.arange(i, 60, 5))], 60, **how).tied for i in range(5)]
    mean = sum(parts[1:], parts[0]).scale(0.2)
    torch.testing.assert_close(mean.linear, whole.linear, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mean.precision, whole.precision, rtol=1e-10, atol=1e-10)


def test_the_steps_shrink_as_scheduled():
    """With Gaussian noise and all rows what is left after steps ρ is ∏ (1 − ρ) of the way."""
    model, plan, data = problem("gaussian")
    whole = tied_by_batches(model, plan.Z, [data], 60, step_size=1.0, positivity="allow").tied.linear
    how = {"step_size": 0.5, "delay": 2.0, "decay": 0.7, "positivity": "allow"}
    found = tied_by_batches(model, plan.Z, [data] * 4, 60, **how).tied.linear
    left = math.prod(1.0 - 0.5 * (1.0 + t / 2.0) ** -0.7 for t in range(4))
    torch.testing.assert_close(found, (1.0 - left) * whole, rtol=1e-10, atol=1e-10)


def gaps(name, n_runs, n_batches, **how):
    """Nats that independent runs end below the fixed point, and their means at the inducing points less its own."""
    model, plan, data = problem(name, n=120)
    best = run(model, plan, data).state
    target = best.posterior.marginals(plan.Z)[0].detach()
    fits = [tied_by_batches(model, plan.Z, draws(data, 20, n_batches, seed), 120, **how) for seed in range(n_runs)]
    found = torch.tensor([best.value - tied_bound(model, fit, [data]) for fit in fits])
    return found.double(), torch.stack([fit.posterior.marginals(plan.Z)[0].detach() - target for fit in fits])


def test_noise_is_in_proportion_to_a_constant_step():
    """Identity 16: the floor of ρ/4 is a quarter of that of ρ, within what the runs themselves say of their means."""
    coarse, _ = gaps("probit", 8, 40, step_size=0.16, decay=0.0)
    fine, _ = gaps("probit", 8, 160, step_size=0.04, decay=0.0)
    error = math.sqrt(float(coarse.var() + 16.0 * fine.var()) / 8)
    assert float(fine.min()) > 0.0  # nothing is above the fixed point
    assert abs(float(coarse.mean() - 4.0 * fine.mean())) < 3.0 * error
    assert float(coarse.mean()) > 3.0 * float(coarse.std()) / math.sqrt(8)  # there is a floor to speak of


@pytest.mark.parametrize(
    "name", ["poisson", *(pytest.param(n, marks=pytest.mark.slow) for n in ("student_t", "softmax"))]
)
def test_shrinking_steps_lead_to_the_fixed_point_within_their_noise(name):
    """Identity 16: the mean over runs is the fixed point within its standard error."""
    n_runs = 8
    start, _ = gaps(name, n_runs, 20, step_size=0.1, decay=0.0)
    end, means = gaps(name, n_runs, 200, step_size=0.1, delay=10.0, decay=0.9)
    assert float(end.mean()) < 0.2 * float(start.mean())
    scores = (means.mean(0) / (means.std(0) / math.sqrt(n_runs))).abs()
    # Bonferroni over the places and latents: one in a thousand such tests would fail
    assert float(scores.max()) < stats.t.ppf(1 - 5e-4 / scores.numel(), n_runs - 1)


def test_the_same_batches_give_the_same_sites():
    model, plan, data = problem("softmax")
    first, again = (tied_by_batches(model, plan.Z, draws(data, 7, 10, 3), 60).tied for _ in range(2))
    assert torch.equal(first.linear, again.linear) and torch.equal(first.precision, again.precision)
    assert first.linear.shape == (3, M)


def test_a_fit_goes_on_from_another():
    model, plan, data = problem("probit")
    batches = list(draws(data, 7, 20, 1))
    how = {"step_size": 0.1, "decay": 0.0}
    whole = tied_by_batches(model, plan.Z, batches, 60, **how)
    first = tied_by_batches(model, plan.Z, batches[:10], 60, **how)
    second = tied_by_batches(model, plan.Z, batches[10:], 60, start=first.tied, **how)
    torch.testing.assert_close(second.tied.linear, whole.tied.linear, rtol=1e-8, atol=1e-8)
    assert (whole.n_steps, second.n_steps) == (20, 10)


def test_with_negative_curvature_steps_of_second_order_are_never_rejected():
    """Where steps that allow it mostly are."""
    model, plan, data = problem("student_t", n=300, weighted=False)
    found = {
        positivity: tied_by_batches(model, plan.Z, draws(data, 30, 60, 0), 300, decay=0.0, positivity=positivity)
        for positivity in ("allow", "clamp", "riemann")
    }
    assert found["allow"].n_rejected > 20 and found["clamp"].n_rejected == found["riemann"].n_rejected == 0
    bounds = {positivity: tied_bound(model, fit, [data]) for positivity, fit in found.items()}
    assert bounds["riemann"] > bounds["allow"] + 1.0


@pytest.mark.parametrize("how", [{"step_size": 0.0}, {"step_size": 1.1}, {"delay": 0.0}, {"decay": 1.5}])
def test_odd_schedules_are_refused(how):
    model, plan, data = problem("probit")
    with pytest.raises(ValueError, match="step_size, delay and decay must be"):
        tied_by_batches(model, plan.Z, [data], 60, **how)
    with pytest.raises(ValueError, match="batches are empty"):
        tied_by_batches(model, plan.Z, [], 60)
