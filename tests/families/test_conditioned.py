"""Posteriors conditioned on further sites: the definition, refits, fantasies that share a factor, and functions."""

import copy
import pickle
import time

import pytest
import torch
from toys import DTYPE, normal

from mercer._typing import Sites
from mercer.families import Exact, Inducing, InducingVecchia, Prior, SparseInverseCholesky
from mercer.families.conditioned import ConditionedPosterior, condition_further, has_cross_covariances
from mercer.families.dklgp import DoubleKL
from mercer.kernels import Matern32, Matern52, PolynomialKernel
from mercer.kernels.means import constant_mean
from mercer.linalg.cholesky import NotPositiveDefiniteError
from mercer.policy import NumericalPolicy

PRIOR = Prior(Matern52([0.6, 0.8], outputscale=1.5), constant_mean(0.4))
X, ROWS, X_NEW = (3.0 * torch.rand(k, 2, generator=torch.Generator().manual_seed(k), dtype=DTYPE) for k in (12, 3, 5))
# all rows are neighbours of all others, so that every family is exact; inducing points are an approximation
FAMILIES = {
    "exact": Exact(),
    "inducing": Inducing(8),
    "sic": SparseInverseCholesky(form="latent"),
    "inducing vecchia": InducingVecchia(3, form="latent"),
}


def sites_at(n, *batch, seed=0, negative=False):
    """Sites of which the last says nothing, and the first is negative if wanted."""
    precision = 0.1 + normal(*batch, n, seed=seed).square()
    precision[..., -1] = 0.0
    if negative:
        precision[..., 0] = -0.05
    return Sites(normal(*batch, n, seed=seed + 1), precision)


def conditioned(family, sites, rows=X, prior=PRIOR):
    return family.condition(prior, family.plan(prior, rows, NumericalPolicy()), sites)


def joined(one, other):
    pairs = (one.linear, other.linear), (one.precision, other.precision)
    return Sites(*(torch.cat(pair, -1) for pair in pairs))


def views(process, rows=X_NEW):
    with torch.no_grad():
        return (*process.joint(rows), *process.marginals(rows), process.mean(rows))


def assert_same(one, other, rtol, rows=X_NEW):
    for found, expected in zip(views(one, rows), views(other, rows), strict=True):
        torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)


# ---- what it is


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("name", ["exact", "sic", "inducing vecchia"])
def test_conditioning_equals_a_refit_on_all_rows(name, batch, negative):
    before, new = sites_at(12, *batch, negative=negative), sites_at(3, *batch, seed=5, negative=negative)
    process = ConditionedPosterior(conditioned(FAMILIES[name], before), ROWS, new)
    refit = conditioned(FAMILIES[name], joined(before, new), torch.cat([X, ROWS]))
    assert_same(process, refit, 1e-12 if name == "exact" else 1e-8)


@pytest.mark.parametrize("name", FAMILIES)
def test_conditioning_is_that_of_a_gaussian_within_the_process(name):
    base, new = conditioned(FAMILIES[name], sites_at(12)), sites_at(3, seed=5)
    with torch.no_grad():
        mean, C = base.joint(torch.cat([ROWS, X_NEW]))
        seen = new.precision > 0
        pseudo = (new.linear / new.precision)[seen] + 0.4
        rows = seen.nonzero().squeeze(-1)
        gain = C[3:][:, rows] @ torch.linalg.inv(C[rows][:, rows] + (1 / new.precision[seen]).diag())
        expected = mean[3:] + gain @ (pseudo - mean[rows]), C[3:, 3:] - gain @ C[rows][:, 3:]
        # the last site has λ1 but no λ2: it only moves the mean
        alone = ConditionedPosterior(base, ROWS, Sites(new.linear * seen, new.precision)).joint(X_NEW)
    for found, reference in zip(alone, expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-8, atol=1e-8)


def test_a_site_without_curvature_moves_the_mean_by_the_covariance():
    base = conditioned(Exact(), sites_at(12))
    process = ConditionedPosterior(base, ROWS[:1], Sites(torch.tensor([0.7], dtype=DTYPE), torch.zeros(1, dtype=DTYPE)))
    with torch.no_grad():
        mean, C = base.joint(torch.cat([ROWS[:1], X_NEW]))
        found = process.joint(X_NEW)
    torch.testing.assert_close(found[0], mean[1:] + 0.7 * C[1:, 0], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found[1], C[1:, 1:], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("name", FAMILIES)
def test_twice_equals_once(name, batch):
    base, new = conditioned(FAMILIES[name], sites_at(12, *batch)), sites_at(3, *batch, seed=5)
    first, rest = (Sites(new.linear[..., part], new.precision[..., part]) for part in (slice(1), slice(1, None)))
    once = ConditionedPosterior(base, ROWS, new)
    nested = ConditionedPosterior(ConditionedPosterior(base, ROWS[:1], first), ROWS[1:], rest)
    assert_same(nested, once, 1e-9)
    merged = condition_further(condition_further(base, ROWS[:1], first), ROWS[1:], rest)
    assert merged.base is base
    assert_same(merged, once, 1e-14)


def test_rows_that_coincide_with_each_other_and_with_data():
    sites = Sites(torch.tensor([1.0, 2.0, 0.5], dtype=DTYPE), torch.tensor([50.0, 1e8, 3.0], dtype=DTYPE))
    rows = torch.stack([X[0], X[0], ROWS[0]])
    before = sites_at(12)
    process = ConditionedPosterior(conditioned(Exact(), before), rows, sites)
    assert_same(process, conditioned(Exact(), joined(before, sites), torch.cat([X, rows])), 1e-9)


def test_sites_that_outweigh_the_process_are_refused():
    sites = Sites(torch.zeros(1, dtype=DTYPE), torch.tensor([-1e3], dtype=DTYPE))
    with pytest.raises(NotPositiveDefiniteError, match="outweigh"):
        ConditionedPosterior(conditioned(Exact(), sites_at(12)), ROWS[:1], sites)


# ---- many at once


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("name", FAMILIES)
def test_fantasies_share_a_factor_and_equal_each_alone(name, batch):
    base = conditioned(FAMILIES[name], sites_at(12, *batch))
    rows = torch.stack([ROWS, ROWS + 0.3])
    linear, precision = normal(*batch, 4, 2, 3, seed=3), 0.1 + normal(*batch, *[1] * len(batch), 2, 3, seed=4).square()
    process = ConditionedPosterior(base, rows, Sites(linear, precision))
    assert process.sets == (4, 2)
    assert process.update.chol.shape[:-2].numel() == 2 * (2 if batch else 1)  # not 4 times as many
    mean, covariance = process.joint(X_NEW)
    for s in range(4):
        for t in range(2):
            own = Sites(linear[..., s, t, :], precision.expand(linear.shape)[..., s, t, :])
            alone = ConditionedPosterior(base, rows[t], own).joint(X_NEW)
            torch.testing.assert_close(mean[..., s, t, :], alone[0], rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(covariance[..., s, t, :, :], alone[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("name", FAMILIES)
def test_sets_of_new_rows_broadcast_with_those_of_the_process(name, batch):
    base = conditioned(FAMILIES[name], sites_at(12, *batch))
    sites = Sites(normal(*batch, 4, 2, 3, seed=3), torch.full((3,), 0.7, dtype=DTYPE))
    process = ConditionedPosterior(base, torch.stack([ROWS, ROWS + 0.3]), sites)
    further = condition_further(process, X_NEW[:2], Sites(normal(*batch, 3, 4, 2, 2), torch.ones(2, dtype=DTYPE)))
    for own, sets in ((process, (4, 2)), (further, (3, 4, 2))):
        for shape in ((), (2,), (4, 1), (6, 1, 1, 1)):
            new = X_NEW.expand(*shape, 5, 2)
            mean, covariance = own.joint(new)
            assert mean.shape == (*batch, *torch.broadcast_shapes(sets, shape), 5)
            assert covariance.shape == (*mean.shape, 5)
            m, v = own.marginals(new)
            torch.testing.assert_close(m, mean, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(v, covariance.diagonal(dim1=-2, dim2=-1), rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(own.mean(new), mean, rtol=1e-9, atol=1e-9)


def test_no_rows_say_nothing():
    base = conditioned(Exact(), sites_at(12))
    empty = Sites(torch.zeros(4, 0, dtype=DTYPE), torch.zeros(0, dtype=DTYPE))
    process = ConditionedPosterior(base, X[:0], empty)
    torch.testing.assert_close(process.mean(X_NEW), base.mean(X_NEW).expand(4, -1))
    assert process.joint(X_NEW[:0])[1].shape == (4, 0, 0)


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("name", ["exact", "inducing", "sic"])
def test_gradients_in_rows_sites_and_new_rows(name, negative):
    base = conditioned(FAMILIES[name], sites_at(12), prior=frozen(PRIOR))
    precision = 0.2 + normal(2, 3, seed=4).square()
    precision[0, 0] = 0.0
    if negative:
        precision[1, 1] = -0.1
    leaves = [torch.stack([ROWS, ROWS + 0.3]), normal(4, 2, 3, seed=3), precision, X_NEW.clone()]

    def functional(rows, linear, precision, new):
        mean, covariance = ConditionedPosterior(base, rows, Sites(linear, precision)).joint(new)
        return mean.square().sum() + covariance.square().sum()

    parameters = [leaf.clone().requires_grad_() for leaf in leaves]
    slopes = torch.autograd.grad(functional(*parameters), parameters)
    for i, slope in enumerate(slopes):
        direction = normal(*leaves[i].shape, seed=20 + i)
        if i == 2:
            direction *= leaves[2].abs()  # no precision may change its sign
        h = 1e-5
        with torch.no_grad():
            ends = [
                functional(*(x + k * h * direction if j == i else x for j, x in enumerate(leaves))) for k in (1, -1)
            ]
        expected = float(ends[0] - ends[1]) / (2 * h)
        assert float((slope * direction).sum()) == pytest.approx(expected, rel=1e-6, abs=1e-7)


def frozen(prior):
    prior = copy.deepcopy(prior)
    for module in (prior.kernel, prior.mean):
        module.requires_grad_(False)
    return prior


# ---- samples, copies


def test_samples_are_functions_where_those_of_the_base_are():
    base = conditioned(Exact(), sites_at(12))
    process = ConditionedPosterior(base, ROWS, sites_at(3, seed=5))
    assert process.pathwise
    paths = process.paths(3, torch.Generator().manual_seed(1))
    whole, part = paths(X_NEW), paths(X_NEW[2:4])
    torch.testing.assert_close(part, whole[..., 2:4], rtol=1e-12, atol=1e-12)
    assert paths(X_NEW.expand(2, 3, 5, 2)).shape == (3, 2, 3, 5)
    assert not ConditionedPosterior(base, ROWS, sites_at(3, seed=5, negative=True)).pathwise
    assert not ConditionedPosterior(base, ROWS, Sites(normal(4, 3), torch.ones(3, dtype=DTYPE))).pathwise
    polynomial = Prior(Matern32(0.7) + PolynomialKernel(2).double())
    assert not ConditionedPosterior(conditioned(Exact(), sites_at(12), prior=polynomial), ROWS, sites_at(3)).pathwise


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_moments_of_samples(name, batch):
    base = conditioned(FAMILIES[name], sites_at(12, *batch))
    process = ConditionedPosterior(base, ROWS, sites_at(3, *batch, seed=5))
    draws = process.sample(X_NEW, 4000, torch.Generator().manual_seed(3))
    mean, covariance = process.joint(X_NEW)
    gap = draws - mean
    products = gap.unsqueeze(-1) * gap.unsqueeze(-2)
    assert ((draws.mean(0) - mean).abs() <= 5 * draws.std(0) / 4000**0.5).all()
    # prior functions come in groups of 32 that share frequencies, which adds to the error
    assert ((products.mean(0) - covariance).abs() <= 5 * products.std(0) / 4000**0.5 + 0.01).all()
    again = process.sample(X_NEW, 4000, torch.Generator().manual_seed(3))
    assert torch.equal(draws, again)


def test_copies_and_pickles_are_the_same_also_with_a_graph():
    base = conditioned(Exact(), sites_at(12), prior=frozen(PRIOR))
    process = ConditionedPosterior(base, ROWS.clone().requires_grad_(), sites_at(3, seed=5))
    for other in (copy.deepcopy(process), pickle.loads(pickle.dumps(process))):
        assert torch.equal(other.joint(X_NEW)[1], process.joint(X_NEW)[1].detach())


def test_families_say_whether_they_have_covariances_with_given_rows():
    has = {name: has_cross_covariances(conditioned(family, sites_at(12))) for name, family in FAMILIES.items()}
    assert has == {"exact": True, "inducing": True, "sic": False, "inducing vecchia": False}
    assert has_cross_covariances(ConditionedPosterior(conditioned(Exact(), sites_at(12)), ROWS, sites_at(3)))


def test_free_posteriors_can_be_conditioned():
    family = DoubleKL(n_neighbors=12)
    process = ConditionedPosterior(conditioned(family, sites_at(12)), ROWS, sites_at(3, seed=5))
    # what new rows are given changes with the rows that come before them
    exact = conditioned(Exact(), joined(sites_at(12), sites_at(3, seed=5)), torch.cat([X, ROWS]))
    torch.testing.assert_close(process.mean(X_NEW), exact.mean(X_NEW), rtol=0.05, atol=0.05)


@pytest.mark.slow
def test_64_fantasies_of_4_rows_are_many_times_faster_than_64_refits():
    n, rows, y = 500, X_NEW[:4], normal(64, 4)
    data = 3.0 * torch.rand(n, 2, generator=torch.Generator().manual_seed(7), dtype=DTYPE)
    before, noise = Sites(normal(n), torch.full((n,), 10.0, dtype=DTYPE)), torch.full((4,), 10.0, dtype=DTYPE)
    family = Exact()
    base = conditioned(family, before, data).release()
    base.mean(X_NEW)
    plan = family.plan(PRIOR, torch.cat([data, rows]), NumericalPolicy())

    def shared():
        return ConditionedPosterior(base, rows, Sites(10.0 * y, noise)).joint(X_NEW)

    def refits():
        found = [family.condition(PRIOR, plan, joined(before, Sites(10.0 * each, noise))).joint(X_NEW) for each in y]
        return tuple(torch.stack(parts) for parts in zip(*found, strict=True))

    with torch.no_grad():
        shared()
        times = []
        for function in (shared, refits):
            began = time.perf_counter()
            found = function()
            times.append(time.perf_counter() - began)
            if function is shared:
                together = found
    for one, other in zip(together, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert times[1] > 20 * times[0]
