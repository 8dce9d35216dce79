"""Identity 10: Bayesian leverage is ridge leverage where every row is an inducing point."""

import pytest
import torch
from stream_toys import FIXED, NOISE, N, Stream, Z, batch, go, toy

from mercer.kernels import gram
from mercer.sequential import Selection


def scores(model, data, places):
    """Return what the policy is told of the rows of one batch."""
    seen = []

    def spy(candidates, capacity, generator):
        seen.append(candidates)
        index = torch.arange(capacity)
        return Selection(index, torch.ones(capacity, dtype=torch.float64))

    go(model, data, [range(N)], Stream(memory=5, policy=spy, **FIXED), places=places)
    return seen[0].score


def test_it_is_the_diagonal_of_the_smoother():
    model, data = toy()
    K = gram(model.prior.kernel, data.X).detach()
    expected = torch.linalg.solve(K + NOISE * torch.eye(N, dtype=K.dtype), K).diagonal()
    found = scores(model, data, data.X)
    # inducing values have 1e-10 of the prior variance of their own, seen through noise of NOISE
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * float(K[0, 0]) / NOISE + 1e-10)
    values = torch.linalg.eigvalsh(K)
    assert float(found.sum()) == pytest.approx(float((values / (values + NOISE)).sum()), abs=N * 2e-9)
    assert bool(((found >= 0) & (found < 1)).all())


@pytest.mark.parametrize("name", ["gaussian", "probit", "poisson"])
def test_what_is_inside_the_span_of_the_points_is_at_most_their_number(name):
    model, data = toy(name)
    posterior = batch(model, data)[0].posterior
    beta = posterior.sites.precision.expand(N)
    total = scores(model, data, Z)
    outside = beta * posterior.unexplained_at_data
    torch.testing.assert_close(total, beta * posterior.variance_at_data, rtol=1e-6, atol=1e-8)
    assert 0 < float((total - outside).sum()) <= len(Z)
    assert bool((outside >= 0).all())
