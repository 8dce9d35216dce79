"""Fewer inducing points than rows: every number against dense matrices, and what the contract does not cover."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inducing_toys import kernels_of_their_own
from oracles import inducing as oracle
from toys import DTYPE, normal

from mercer._typing import Sites
from mercer.families import Inducing, Prior
from mercer.families.conditioned import ConditionedPosterior
from mercer.families.inducing_plan import InducingPlan
from mercer.families.tied import Projection
from mercer.inference import Conjugate, Dual, Laplace
from mercer.kernels import Linear, Matern12, Matern52, PolynomialKernel, gram
from mercer.kernels.means import constant_mean
from mercer.likelihoods import Bernoulli, Gaussian, Softmax, StudentT
from mercer.linalg.cholesky import NotPositiveDefiniteError
from mercer.policy import NumericalPolicy
from mercer.testing import check_engine

POLICY = NumericalPolicy()
N, M, D = 20, 6, 2
SCALE = 1.4


def uniform(n=N, d=D, seed=0):
    return torch.rand(n, d, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


X, X_NEW = uniform(), uniform(5, seed=7)
Z = uniform(M, seed=3)


def prior_of(lengthscale=(0.5, 0.8), mean=0.3, outputscale=SCALE):
    return Prior(Matern52(list(lengthscale), outputscale=outputscale), None if mean is None else constant_mean(mean))


def sites_of(*batch, n=N, seed=1, shared=False):
    return Sites(normal(*batch, n, seed=seed), 0.1 + normal(*(() if shared else batch), n, seed=seed + 1).square())


def conditioned(sites=None, places=Z, rows=X, prior=None, policy=POLICY, rest=None, learned=False):
    plan = InducingPlan(rows, places, policy, learned, rest)
    return Inducing(len(places)).condition(prior or prior_of(), plan, sites_of(3) if sites is None else sites)


def closed(lengthscale=(0.5, 0.8), outputscale=SCALE):
    ell = torch.tensor(lengthscale, dtype=DTYPE) if isinstance(lengthscale, tuple) else lengthscale
    return lambda A, B: oracle.matern52(A, B, ell, outputscale)


def twin(kernel, places, rows, new, linear, precision):
    """Numbers of one latent: moments at rows and at new ones, log Z, evidence and KL."""
    Kuu, Kuf, Kff = oracle.covariances(kernel, places, rows)
    m, S = oracle.q_of_sites(Kuu, Kuf, linear, precision)
    mean, covariance = oracle.predict(Kuu, Kuf, Kff, m, S)
    log_z = oracle.log_partition(Kuu, Kuf, Kff, linear, precision)
    seen = precision != 0
    found = {
        "mean at data": mean,
        "variance at data": covariance.diagonal(),
        "log Z": log_z,
        "evidence": log_z - 0.5 * (linear[seen].square() / precision[seen]).sum(),
        "KL": oracle.kl(Kuu, m, S),
        "acting": covariance - Kff + Kuf.T @ torch.linalg.inv(Kuu) @ Kuf,
    }
    if new is not None:
        found["mean"], found["covariance"] = oracle.predict(Kuu, kernel(places, new), kernel(new, new), m, S)
    return found


def twins(kernel, places, rows, new, sites):
    """The same for latents (*b)."""
    linear, precision = torch.broadcast_tensors(sites.linear, sites.precision)
    batch, n = linear.shape[:-1], linear.shape[-1]
    pairs = zip(linear.reshape(-1, n), precision.reshape(-1, n), strict=True)
    parts = [twin(kernel, places, rows, new, *pair) for pair in pairs]
    return {key: torch.stack([part[key] for part in parts]).reshape(batch + parts[0][key].shape) for key in parts[0]}


def numbers(posterior, new=None):
    """What a posterior says of the same, prior mean taken off."""
    log_z, mean, variance = posterior.site_terms()
    found = {
        "mean at data": mean,
        "variance at data": variance.expand_as(mean),
        "log Z": log_z,
        "evidence": posterior.log_evidence().expand_as(log_z),
        "KL": posterior.kl(),
    }
    if new is not None:
        off = posterior.prior.mean_at(new)
        found["mean"], found["covariance"] = posterior.joint(new)[0] - off, posterior.joint(new)[1]
    return found


def assert_equal(found, expected, tolerance):
    for key, value in found.items():
        named = lambda message, key=key: f"{key}: {message}"  # noqa: E731
        torch.testing.assert_close(value, expected[key], rtol=tolerance, atol=tolerance, msg=named)


# ---- the twin


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 15),
    m=st.integers(1, 8),
    d=st.integers(1, 3),
    batch=st.sampled_from([(), (1,), (2,), (2, 3)]),
    shared=st.booleans(),
    missing=st.booleans(),
    seed=st.integers(0, 10**6),
)
@torch.no_grad()
def test_every_number_is_the_twin_s(n, m, d, batch, shared, missing, seed):
    rows, places, new = uniform(n, d, seed), uniform(m, d, seed + 1), uniform(3, d, seed + 2)
    sites, kernel = sites_of(*batch, n=n, seed=seed, shared=shared), closed(0.4)
    if missing:
        seen = torch.arange(n) % 3 > 0
        sites = Sites(sites.linear * seen, sites.precision * seen)
    posterior = conditioned(sites, places, rows, prior_of([0.4] * d))
    expected = twins(kernel, places, rows, new, sites)
    # twins invert K_uu, which places by chance make ill-conditioned
    tolerance = 1e-11 + 1e-14 * float(torch.linalg.cond(oracle.between(kernel, places, places)))
    assert_equal(numbers(posterior, new), expected, tolerance)
    mean, variance = posterior.marginals(new)
    assert_equal({"mean": mean - 0.3, "mean at data": posterior.mean_at_data}, expected, tolerance)
    assert_equal({"mean": posterior.mean(new) - 0.3, "mean at data": posterior.at_data()[0] - 0.3}, expected, tolerance)
    diagonal = expected["covariance"].diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(variance, diagonal, rtol=tolerance, atol=tolerance)
    at_data = expected["variance at data"]
    torch.testing.assert_close(posterior.at_data()[1], at_data, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(posterior.variance_at_data.expand_as(at_data), at_data, rtol=tolerance, atol=tolerance)
    # Cov(f(X), f(x)) is linear in the kernel
    R, weights = posterior.covariance_weights(new[:2])
    found = kernel(new[:2], new[2:]) - weights.mT @ kernel(R, new[2:])
    crossed = expected["covariance"][..., :2, 2:]
    torch.testing.assert_close(found.expand_as(crossed), crossed, rtol=tolerance, atol=tolerance)
    vectors = normal(*batch, n, seed=seed + 3)
    product = (expected["acting"] @ vectors.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(posterior.covariance_product(vectors), product, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_are_those_of_the_dense_twin(shared):
    """In lengthscales, amplitude, places, λ1 and λ2, by autograd through explicit inverses."""
    linear, precision = sites_of(3, shared=shared).linear, sites_of(3, shared=shared).precision
    outcomes = []
    for dense in (False, True):
        leaves = [each.clone().requires_grad_() for each in (linear, precision, Z)]
        sites, places = Sites(*leaves[:2]), leaves[2]
        if dense:
            ell = torch.tensor([0.5, 0.8], dtype=DTYPE, requires_grad=True)
            scale = torch.tensor(SCALE, dtype=DTYPE, requires_grad=True)
            kernel = lambda A, B: oracle.matern52(A, B, ell, scale)  # noqa: B023, E731
            found, parameters = twins(kernel, places, X, None, sites), [ell, scale]
        else:
            prior = prior_of()
            kernel = prior.kernel
            posterior = Inducing(M).condition(prior, InducingPlan(X, places, POLICY), sites)
            found, parameters = numbers(posterior), [kernel.base_kernel.raw_lengthscale, kernel.raw_outputscale]
        slopes = {}
        for key in ("mean at data", "variance at data", "log Z", "evidence", "KL"):
            value = (found[key] * normal(*found[key].shape, seed=9)).sum()
            arguments = [*leaves, *parameters]
            own = list(torch.autograd.grad(value, arguments, retain_graph=True, materialize_grads=True))
            if not dense:  # softplus
                own[-2] = own[-2].squeeze(0) / torch.sigmoid(parameters[0].detach().squeeze(0))
                own[-1] = own[-1] / torch.sigmoid(parameters[1].detach())
            slopes[key] = own
        outcomes.append((found, slopes))
    (found, slopes), (expected, dense_slopes) = outcomes
    assert_equal(found, expected, 1e-11)
    for key, own in slopes.items():
        for k, (one, other) in enumerate(zip(own, dense_slopes[key], strict=True)):
            assert float(other.abs().max()) > 1e-3 or (key, k) == ("variance at data", 0)  # which λ1 does not change
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@torch.no_grad()
def test_latents_may_have_kernels_of_their_own():
    kernel, sites = kernels_of_their_own(), sites_of(2)
    both = conditioned(sites, prior=Prior(kernel))
    for i in range(2):
        alone = conditioned(Sites(sites.linear[i], sites.precision[i]), prior=Prior(kernel[i]))
        together = {key: value[i] for key, value in numbers(both, X_NEW).items()}
        assert_equal(numbers(alone, X_NEW), together, 1e-12)
        torch.testing.assert_close(both.mean(X_NEW)[i], alone.mean(X_NEW), rtol=1e-12, atol=1e-12)
        weights = both.covariance_weights(X_NEW)[1][i], alone.covariance_weights(X_NEW)[1]
        torch.testing.assert_close(*weights, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_rows_of_no_weight_and_no_rows_at_all_say_nothing():
    sites = sites_of(2)
    seen = torch.arange(N) < 13
    some = conditioned(Sites(sites.linear * seen, sites.precision * seen))
    fewer = conditioned(Sites(sites.linear[:, :13], sites.precision[:, :13]), rows=X[:13])
    for one, other in zip(some.joint(X_NEW), fewer.joint(X_NEW), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(some.log_evidence(), fewer.log_evidence(), rtol=1e-12, atol=1e-12)
    nothing = conditioned(Sites(X.new_zeros(2, 0), X.new_zeros(2, 0)), rows=X[:0])
    mean, covariance = nothing.joint(X_NEW)
    torch.testing.assert_close(mean, torch.full((2, 5), 0.3, dtype=DTYPE))
    torch.testing.assert_close(covariance, gram(prior_of().kernel, X_NEW).expand(2, 5, 5), rtol=1e-9, atol=1e-9)
    assert nothing.kl().tolist() == nothing.log_evidence().tolist() == [0.0, 0.0]
    assert nothing.at_data()[0].shape == (2, 0) and nothing.confess().notes == ()


@torch.no_grad()
def test_rows_known_as_tied_sites_act_as_they_did():
    """Some rows by themselves and the others in ``rest``: one posterior; the bound is a sum over the rows present."""
    sites = sites_of(3)
    whole = conditioned(sites)
    first, second = torch.arange(12), torch.arange(12, N)
    parts = [Sites(sites.linear[:, rows], sites.precision[:, rows]) for rows in (first, second)]
    rest = conditioned(parts[0], rows=X[first]).tied()
    found = conditioned(parts[1], rows=X[second], rest=rest)
    for one, other in zip(found.joint(X_NEW), whole.joint(X_NEW), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    moments = numbers(found)
    for i in range(3):
        Kuu, Kuf, Kff = oracle.covariances(closed(), Z, X[second])
        extra = rest.linear[i], rest.precision[i]
        value = oracle.log_partition(Kuu, Kuf, Kff, parts[1].linear[i], parts[1].precision[i], *extra)
        assert float(moments["log Z"][i]) == pytest.approx(float(value), rel=1e-11)
    # J of the specification, section 5: Σ ℓ + E_q[log t_rest] − KL[q ‖ p], where Σ ℓ is any function of the marginals
    with_rest = found.expected_log_sites(*found.site_terms()[1:]) - found.kl()
    torch.testing.assert_close(with_rest, moments["log Z"], rtol=1e-11, atol=1e-11)
    assert found.plan.given(None).rest is None


def test_negative_sites_that_outweigh_the_prior_are_refused():
    sites = sites_of()
    with pytest.raises(NotPositiveDefiniteError, match="Negative sites"):
        _ = conditioned(Sites(sites.linear, -10.0 * sites.precision)).state
    mild = Sites(sites.linear, torch.where(torch.arange(N) % 4 == 0, -0.05, sites.precision))
    expected = twin(closed(), Z, X, X_NEW, mild.linear, mild.precision)
    assert_equal(numbers(conditioned(mild), X_NEW), expected, 1e-11)


# ---- draws


@pytest.mark.parametrize("kernel", [prior_of().kernel, Matern12([0.5, 0.8]) + PolynomialKernel(2)])
@torch.no_grad()
def test_moments_of_draws_are_the_joint_s(kernel):
    posterior = conditioned(sites_of(2, shared=True), prior=Prior(kernel.double()))
    assert posterior.pathwise == isinstance(posterior.prior.kernel, type(prior_of().kernel))
    new = torch.cat([X_NEW[:2], Z[:1]])
    n = 3000
    draws = posterior.sample(new, n, torch.Generator().manual_seed(0))
    mean, covariance = posterior.joint(new)
    gap = draws - mean
    products = gap.unsqueeze(-1) * gap.unsqueeze(-2)
    assert bool((gap.mean(0).abs() < 5 * gap.std(0) / n**0.5).all())
    assert bool(((products.mean(0) - covariance).abs() < 5 * products.std(0) / n**0.5).all())
    # and not what places and rows by themselves would give
    prior = gram(posterior.prior.kernel, new)
    assert float((products.mean(0) - prior).abs().max()) > 0.1
    assert torch.equal(draws, posterior.sample(new, n, torch.Generator().manual_seed(0)))


@torch.no_grad()
def test_paths_are_functions_whose_values_at_the_places_are_draws_of_q():
    """With precise data at the places all functions pass there."""
    precision = torch.full((M,), 1e8, dtype=DTYPE)
    target = torch.sin(4.0 * Z.sum(-1))
    prior = Prior(Matern12([0.5, 0.8]))  # 2048 random features miss faint directions of smoother ones
    posterior = conditioned(Sites(precision * target, precision), rows=Z, prior=prior)
    paths = posterior.paths(5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(paths(Z), target.expand(5, -1), rtol=0, atol=6e-4)  # 6 deviations of 1e-4
    torch.testing.assert_close(paths(torch.cat([X_NEW, Z]))[:, :5], paths(X_NEW), rtol=1e-10, atol=1e-10)
    assert paths(X_NEW).std(0).max() > 1e-2


# ---- chunks, memory, precision, copies


@pytest.mark.parametrize("elements", [1, M * 7])
def test_chunks_change_no_number(elements):
    whole, policy = numbers(conditioned(), X_NEW), NumericalPolicy(chunk_elements=elements)
    plain = conditioned(policy=policy)
    with torch.no_grad():
        assert_equal(numbers(plain, X_NEW), whole, 1e-12)
        for one, other in zip(plain.marginals(X_NEW), conditioned().marginals(X_NEW), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        vectors = normal(3, N, seed=8)
        products = [each.covariance_product(vectors) for each in (plain, conditioned())]
        torch.testing.assert_close(*products, rtol=1e-12, atol=1e-12)
    assert_equal(numbers(conditioned(policy=policy), X_NEW), whole, 1e-12)  # with gradients recorded


def test_no_matrix_of_all_rows_and_places_is_made(monkeypatch):
    """Kernel values in evidence, moments, their gradients, predictions and the confession, chunk by chunk."""
    seen, m, policy = [], 60, NumericalPolicy(chunk_elements=60 * 60)

    def watched(kernel, X1, X2=None, policy=None):
        seen.append(X1.shape[-2] * (X1 if X2 is None else X2).shape[-2])
        return gram(kernel, X1, X2, policy)

    for module in ("moments", "inducing_posterior"):
        monkeypatch.setattr(f"mercer.families.{module}.gram", watched)

    def held(n):
        """Return how many bytes autograd holds of an evaluation."""
        kept, rows = {}, uniform(n, seed=5)

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor  # many are views of one
            return tensor

        posterior = conditioned(sites_of(2, n=n), rows[:m], rows, policy=policy)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value = posterior.kl().sum() + posterior.log_evidence().sum()
        value.backward()
        with torch.no_grad():
            for call in (posterior.marginals, posterior.mean):
                call(rows)
            posterior.confess()
            posterior.covariance_product(normal(2, n, seed=2))
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    more = (held(1200) - held(600)) / 600 / 8
    assert max(seen) <= policy.chunk_elements and len(seen) > 100
    assert more < m  # numbers of one more row: sites and the like, and not m


@torch.no_grad()
def test_sites_that_change_find_the_factor_and_the_rows_again(monkeypatch):
    posterior = conditioned()
    _ = posterior.state
    count = []
    monkeypatch.setattr("mercer.families.inducing_posterior.gram", lambda *a, **k: count.append(1) or gram(*a, **k))
    other = posterior.with_sites(sites_of(3, seed=11))
    found = numbers(other)
    assert not count and other.L is posterior.L
    assert_equal(found, numbers(conditioned(sites_of(3, seed=11))), 1e-12)


def test_float32_agrees_with_float64():
    kernel, mean = Matern52([0.5, 0.8], outputscale=SCALE).float(), constant_mean(0.3).float()
    sites = sites_of(3)
    single = Sites(sites.linear.float(), sites.precision.float())
    policy = NumericalPolicy(dtype=torch.float32)
    posterior = conditioned(single, Z.float(), X.float(), Prior(kernel, mean), policy)
    found = numbers(posterior, X_NEW.float())
    (slope,) = torch.autograd.grad(found["evidence"].sum(), kernel.raw_outputscale)
    double = conditioned()
    expected = numbers(double, X_NEW)
    (other,) = torch.autograd.grad(expected["evidence"].sum(), double.prior.kernel.raw_outputscale)
    assert all(value.dtype == torch.float32 for value in found.values()) and slope.dtype == torch.float32
    assert_equal({key: value.double() for key, value in found.items()}, expected, 1e-4)
    assert float(slope) == pytest.approx(float(other), rel=1e-3)


@pytest.mark.parametrize("way", ["pickled", "released", "pickled before use"])
def test_copies_predict_the_same_bits_and_keep_their_gradients(way):
    posterior = conditioned(learned=True)
    expected, draws = posterior.marginals(X_NEW), posterior.sample(X_NEW, 2, torch.Generator().manual_seed(0))
    leaves = lambda p: [p.prior.kernel.raw_outputscale, p.prior.kernel.base_kernel.raw_lengthscale]  # noqa: E731
    slopes = torch.autograd.grad(posterior.log_evidence().sum(), leaves(posterior))
    if way == "pickled before use":
        posterior = conditioned(learned=True)
    other = posterior.release() if way == "released" else pickle.loads(pickle.dumps(posterior))
    assert way != "released" or not (other.plan.Z.requires_grad or other.L.requires_grad)
    for one, value in zip(other.marginals(X_NEW), expected, strict=True):
        assert torch.equal(one, value)
    # a product of places that are no parameter any more may be rounded in another order
    again, tolerance = other.sample(X_NEW, 2, torch.Generator().manual_seed(0)), 1e-12 * (way == "released")
    torch.testing.assert_close(again, draws, rtol=tolerance, atol=tolerance)
    for one, value in zip(torch.autograd.grad(other.log_evidence().sum(), leaves(other)), slopes, strict=True):
        torch.testing.assert_close(one, value, rtol=1e-12, atol=1e-12)


# ---- conditioning further


@pytest.mark.parametrize("shared", [False, True])
@torch.no_grad()
def test_conditioning_on_sets_of_rows_is_growing_the_places_by_them(shared):
    """Maddox, Stanton and Wilson (2021) by a projection: places that are added lose nothing. Set by set."""
    posterior = conditioned(sites_of(3, shared=shared))
    sets = torch.stack([X_NEW[:2], X_NEW[2:4], X_NEW[3:]])
    sites = Sites(normal(3, 3, 2, seed=4), torch.full((3, 3, 2), 1.7, dtype=DTYPE))
    found = ConditionedPosterior(posterior, sets, sites).joint(X[:4])
    for t, rows in enumerate(sets):
        places = torch.cat([Z, rows])
        moved = posterior.tied().project(Projection(posterior.prior, Z, places, POLICY))
        grown = conditioned(Sites(sites.linear[:, t], sites.precision[:, t]), places, rows, rest=moved)
        for one, other in zip(found, grown.joint(X[:4]), strict=True):
            torch.testing.assert_close(one[:, t], other, rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_weights_of_latents_that_share_them_are_of_size_one():
    sets = torch.stack([X_NEW[:2], X_NEW[2:4]])
    for sites, size in ((sites_of(3), 3), (sites_of(3, shared=True), 1)):
        assert conditioned(sites).covariance_weights(sets)[1].shape == (size, 2, M, 2)
    assert conditioned(sites_of()).covariance_weights(sets)[1].shape == (2, M, 2)


# ---- plans


def test_places_are_means_of_clusters_or_rows_and_no_more_than_rows_that_differ():
    prior = prior_of()
    plan = Inducing(4).plan(prior, X, POLICY)
    assert plan.Z.shape == (4, D) and isinstance(plan.Z, torch.nn.Parameter) and plan.learned
    assert not any(bool((z == X).all(-1).any()) for z in plan.Z)
    rows = Inducing(4, placement="kmeans++", locations="fixed").plan(prior, X, POLICY)
    assert all(bool((z == X).all(-1).any()) for z in rows.Z) and rows.learnable() == []
    assert torch.equal(plan.Z, Inducing(4).plan(prior, X, POLICY).Z)
    assert not torch.equal(plan.Z, Inducing(4, seed=1).plan(prior, X, POLICY).Z)
    for most in (N, N + 1):
        everything = Inducing(most).plan(prior, X, POLICY)
        assert everything.Z.shape == X.shape and not everything.learned
    assert Inducing().plan(prior, torch.cat([X, X]), POLICY).Z.shape == X.shape
    assert not Inducing(1).plan(prior, X[:1], POLICY).learned  # and so no spread of one row is asked for


def test_places_spread_by_lengthscales():
    """A column that hardly matters is not covered."""
    flat = Inducing(5).plan(prior_of((0.05, 50.0)), uniform(300), POLICY).Z.detach()
    assert float(flat[:, 0].std()) > 5 * float(flat[:, 1].std())
    assert Inducing(5).plan(Prior(Linear(0.7)), X, POLICY).Z.shape == (5, D)  # no lengthscales


def test_learned_places_have_coordinates_and_move_to_other_rows_and_precisions():
    plan = Inducing(4).plan(prior_of(), X, POLICY)
    (coordinate,) = plan.learnable()
    assert coordinate.parameter is plan.Z and not coordinate.log_scale
    single = plan.over(X[:7].float(), NumericalPolicy(dtype=torch.float32))
    assert single.Z.dtype == single.policy.dtype == torch.float32 and single.learned and len(single.X) == 7
    back = single.over(X, POLICY)
    assert back.Z.dtype == DTYPE and back.Z.requires_grad and back.Z is not plan.Z
    torch.testing.assert_close(back.Z, plan.Z, rtol=1e-6, atol=1e-6)
    assert not Inducing(4).stale(prior_of(), plan)


def test_places_may_move_as_far_as_their_neighbours_are_away_in_the_units_of_each_column():
    units = torch.tensor([1.0, 1000.0], dtype=DTYPE)[:D]
    plan = InducingPlan(X, X[:4].clone(), POLICY, learned=True)
    other = InducingPlan(X * units, X[:4] * units, POLICY, learned=True)
    (own,), (scaled,) = plan.learnable(), other.learnable()
    assert own.scale.shape == (D,) and bool((own.scale > 0).all())
    torch.testing.assert_close(scaled.scale, own.scale * units)
    half = InducingPlan(X, X[:4] / 2, POLICY, learned=True).learnable()[0]
    torch.testing.assert_close(half.scale, own.scale / 2)  # nearer points have less room
    alone = InducingPlan(X, X[:1].clone(), POLICY, learned=True).learnable()[0]
    assert bool(alone.scale.isfinite().all()) and bool((alone.scale > 0).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_inducing": 0}, "n_inducing must be at least 1"),
        ({"n_inducing": 2.5}, "n_inducing must be at least 1 and an integer"),
        ({"locations": "free"}, "locations must be 'learned' or 'fixed'"),
        ({"placement": "grid"}, "placement must be"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Inducing(**options)


@torch.no_grad()
def test_what_the_places_leave_is_confessed():
    Kuu, Kuf, Kff = oracle.covariances(closed(), Z, X)
    q = (Kuf * torch.linalg.solve(Kuu, Kuf)).sum(0)
    share, sites = float(q.sum() / Kff.trace()), sites_of(3)
    lost = float(0.5 * ((Kff.diagonal() - q) * sites.precision).sum())
    confession = conditioned(sites).confess()
    assert f"{M} inducing points carry {100 * share:.1f} %" in confession.notes[0]
    assert f"costs {lost:.3g} nats" in confession.notes[0] and not confession.warnings
    poor = conditioned(sites_of(), places=Z[:1], prior=prior_of((0.05, 0.05))).confess()
    assert "raise n_inducing" in poor.warnings[0]


# ---- engines


class AtPlaces(Inducing):
    """Places that do not depend on the rows, so that rows may be repeated, left out and put in another order."""

    def plan(self, prior, X, policy):
        return InducingPlan(X, torch.tensor([[0.1], [1.0], [2.0], [2.9]], dtype=X.dtype), policy)


@pytest.mark.parametrize(
    ("engine", "likelihood", "y", "options"),
    [
        (Conjugate(), Gaussian(0.3), [-1.3, 0.2, 0.9, 2.5, -0.4, 0.3, 1.1], {}),
        (Dual(), Bernoulli(), [0, 1, 1, 0, 1, 1, 0], {}),
        (Dual(), StudentT(scale=0.5), [-1.3, 0.2, 0.9, 4.5, -0.4, 0.3, 1.1], {}),
        (Dual(), Softmax(3), [0, 1, 2, 2, 1, 0, 1], {"rtol": 1e-3}),
        (Laplace(), Bernoulli(), [0, 1, 1, 0, 1, 1, 0], {}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_engines_keep_their_contract_with_fewer_places_than_rows(engine, likelihood, y, options):
    check_engine(engine, likelihood, torch.tensor(y, dtype=DTYPE), family=AtPlaces(4), **options)
