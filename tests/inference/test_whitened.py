"""What a batch sees of q(u), and what it can raise."""

import pytest
import torch
from minibatch_toys import problem
from toys import normal

from mercer._typing import Sites
from mercer.inference.minibatch import sites_by_batches
from mercer.inference.objective import evidence_lower_bound, expected_log_prob
from mercer.inference.whitened import Seen, WhitenedSum, whitened


@torch.no_grad()
@pytest.mark.parametrize("name", ["student_t", "softmax"])
def test_the_bound_of_a_batch_is_that_of_a_posterior_which_has_the_rest(name):
    """But for a constant: Σ_b w ℓ + E_q[log t of all others] − KL."""
    model, plan, data = problem(name)
    some, rest = torch.arange(0, 9), torch.arange(9, 60)
    shape = (3, 60) if name == "softmax" else (60,)
    batch = data.rows(some)
    differences = []
    for seed in (1, 2):
        sites = Sites(normal(*shape, seed=5), 0.5 + normal(*shape, seed=6).square())
        own = normal(*shape[:-1], 9, seed=seed)
        sites.linear[..., :9], sites.precision[..., :9] = own, own.square()
        posterior = model.family.condition(model.prior, plan, sites)
        given = plan.over(batch.X, model.policy).given(posterior.tied(rest))
        own_sites = Sites(sites.linear[..., :9], sites.precision[..., :9])
        expected = evidence_lower_bound(model, model.family.condition(model.prior, given, own_sites), batch)
        q = WhitenedSum.of_tied(posterior.L, shape[:-1], posterior.tied())
        seen = Seen.of(model, q, batch.X, whitened(model, posterior.L, plan.Z, batch.X), own_sites)
        value = expected_log_prob(model, batch, seen.mean_at_data, seen.variance_at_data).value
        differences.append((float(seen.bound((batch.weight * value).sum())), float(expected)))
    (one, first), (two, second) = differences
    assert one - two == pytest.approx(first - second, rel=1e-8) and abs(first - second) > 1.0


def test_kept_and_new_kernel_values_give_the_same_sites():
    model, plan, data = problem("probit")
    expected = sites_by_batches(model, plan, data, 7).sites
    model, plan, data = problem("probit", chunk_elements=50)
    found = sites_by_batches(model, plan, data, 7).sites
    torch.testing.assert_close(found.linear, expected.linear, rtol=1e-10, atol=1e-10)
