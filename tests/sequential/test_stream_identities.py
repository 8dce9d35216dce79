"""What a stream keeps equals what all rows at once give, wherever that is a theorem; dense twins where it is not."""

import copy
import io
import math
import pickle
from dataclasses import replace

import pytest
import torch
from inducing_toys import THETA, kernel_of
from oracles import inducing as oracle
from scipy import optimize
from stream_toys import (
    DTYPE,
    FIXED,
    MEAN,
    NOISE,
    POLICIES,
    X_NEW,
    N,
    Stream,
    Z,
    batch,
    close,
    go,
    known,
    parts_of,
    rest_of,
    titsias,
    toy,
)
from toys import normal

from mercer._typing import Data
from mercer.families.inducing_plan import InducingPlan
from mercer.families.tied import Projection
from mercer.inference import Dual, run
from mercer.inference.streaming import ConjugateStream, noise_variance
from mercer.sequential import ClassBalanced, LeverageTop
from mercer.sequential import state as held
from mercer.sequential import stream as streams

PARTITIONS = {
    "ones": [1] * N,
    "uneven": [1, 13, 2, 20, 5],
    "whole": [N],
}
WEIGHT = 0.25 + torch.arange(N, dtype=DTYPE) % 4


# ---- 7: any order, any parts


@pytest.mark.parametrize(
    ("sizes", "memory"), [("ones", 6), ("uneven", 0), ("uneven", 6), ("uneven", N), ("whole", 0), ("whole", 6)]
)
def test_gaussian_rows_in_any_order_and_parts_are_one_batch(sizes, memory):
    model, data = toy()
    data = replace(data, weight=WEIGHT)
    state, _ = batch(model, data)
    outcome = go(model, data, parts_of(PARTITIONS[sizes], seed=memory), Stream(memory=memory, **FIXED))
    close(known(model, outcome.state.total), state.posterior.tied(), 1e-12)
    close(outcome.posterior.joint(X_NEW), state.posterior.joint(X_NEW), 1e-12)
    bound = float(titsias(data.X, data.y - MEAN, weight=WEIGHT))
    assert outcome.value == pytest.approx(bound, rel=1e-9)
    assert held.evidence_of(model, outcome.state) == pytest.approx(bound, rel=1e-9)


def test_outputs_with_missing_targets_are_one_batch():
    model, data = toy()
    y = torch.stack([data.y, 2.0 * data.y.flip(0) - 1.0])
    y[0, ::5], y[1, 2::7] = torch.nan, torch.nan
    data = Data(data.X, y, WEIGHT)
    state, bound = batch(model, data)
    outcome = go(model, data, parts_of([7, 1, 20]), Stream(memory=9, **FIXED))
    close(known(model, outcome.state.total), state.posterior.tied(), 1e-12)
    close(outcome.posterior.marginals(X_NEW), state.posterior.marginals(X_NEW), 1e-12)
    assert outcome.value == pytest.approx(bound, rel=1e-12)


def test_noise_known_row_by_row_is_one_batch():
    model, data = toy()
    data = Data(data.X, data.y, WEIGHT, {"noise_variance": 0.02 + normal(N, seed=5).square()})
    state, _ = batch(model, data)
    outcome = go(model, data, parts_of([7, 1, 20]), Stream(memory=9, **FIXED))
    close(outcome.state.total, state.posterior.tied(), 1e-12)
    close(outcome.posterior.joint(X_NEW), state.posterior.joint(X_NEW), 1e-12)


@pytest.mark.parametrize("name", ["probit", "logit", "poisson", "negative_binomial", "ordinal", "student_t"])
def test_with_all_rows_in_memory_the_bound_is_that_of_one_batch(name):
    model, data = toy(name)
    state, bound = batch(model, data)
    outcome = go(model, data, parts_of([10, 1, 25]), Stream(memory=N, **FIXED))
    assert outcome.converged and outcome.state.memory.data.n_rows == N
    assert abs(outcome.value - bound) < 1e-8
    close(outcome.posterior.marginals(X_NEW), state.posterior.marginals(X_NEW), 1e-5)


def test_with_single_rows_and_all_in_memory_the_bound_is_that_of_one_batch():
    model, data = toy("logit", n=20)
    _, bound = batch(model, data)
    outcome = go(model, data, parts_of([1] * 20, n=20), Stream(memory=None, memory_per_batch=1, **FIXED))
    assert abs(outcome.value - bound) < 1e-8


def test_softmax_with_all_rows_in_memory_has_the_bound_of_one_batch():
    """Which is known to 1e-5 nats a row: expectations are averages over draws."""
    model, data = toy("softmax", mean=None, tol=1e-9)
    _, bound = batch(model, data)
    outcome = go(model, data, parts_of([10, 25]), Stream(memory=N, **FIXED))
    assert abs(outcome.value - bound) < 1e-5 * N


def test_without_memory_the_order_of_other_rows_matters():
    """Frozen sites are not those of the fixed point: the equality above is not one of the code with itself."""
    model, data = toy("logit")
    state, _ = batch(model, data)
    found = [go(model, data, parts_of([10, 25], seed), Stream(memory=0, **FIXED)) for seed in (0, 1)]
    means = [each.posterior.mean(X_NEW) for each in found]
    assert (means[0] - means[1]).abs().max() > 1e-3
    for mean in means:
        assert (mean - state.posterior.mean(X_NEW)).abs().max() > 1e-3


# ---- 8: inducing points that move


def test_growth_changes_no_prediction_and_loses_nothing():
    """A batch of next to no weight asks for places all the same; rows in memory would be seen better from there."""
    model, data = toy(n_inducing=44)
    options = Stream(**{**FIXED, "inducing": "greedy"}, memory=0, residual_tol=0.02)
    before = go(model, data, parts_of([8])[:1], options)
    hardly = replace(data, weight=torch.full_like(data.weight, 1e-12))
    after = go(model, hardly, parts_of([8])[1:], options, state=before.state)
    m, n = len(before.state.Z), len(after.state.Z)
    assert m + 2 < n < 44 and torch.equal(after.state.Z[:m], before.state.Z)
    assert after.loss == after.state.loss == 0.0
    close(after.posterior.joint(X_NEW), before.posterior.joint(X_NEW), 1e-7)


@pytest.mark.parametrize("name", ["gaussian", "logit"])
def test_the_loss_of_moving_is_its_definition(name):
    """Δ = ½ tr(N (K_ZZ − P K_Z'Z)), and predictions from then on are those of the projected sites."""
    model, data = toy(name, n_inducing=7)
    options = Stream(**{**FIXED, "inducing": "greedy"}, memory=4, loss_tol=1e3, residual_tol=1e-4)
    left = data.X[:, 0] < 2.0
    parts = [left.nonzero().squeeze(-1), (~left).nonzero().squeeze(-1)]
    before = go(model, data, parts[:1], options, places=data.X[:0])
    after = go(model, data, parts[1:], options, state=before.state)
    old, new, kernel = before.state.Z, after.state.Z, kernel_of()
    assert len(old) == len(new) == 7 and not torch.equal(old, new)
    K, crossed = oracle.between(kernel, old, old), oracle.between(kernel, old, new)
    P = crossed @ torch.linalg.inv(oracle.between(kernel, new, new))
    N_old = known(model, before.state.total).precision
    expected = float(0.5 * torch.trace(N_old @ (K - P @ crossed.T)))
    assert expected > 1e-3
    assert after.loss == pytest.approx(expected, rel=1e-6)
    assert after.state.loss == pytest.approx(before.state.loss + expected, rel=1e-6)
    # what was known and is not at hand any more
    rest = known(model, rest_of(before.state))
    inner = held.given(model, rest_of(before.state).project(Projection(model.prior, old, new, model.policy)))
    close(known(model, inner[0].past) if name == "gaussian" else inner[1], _projected(rest, P), 1e-6)
    share = after.posterior.tied() + known(model, rest_of(after.state))
    close(known(model, after.state.total), share, 1e-9)


@pytest.mark.parametrize("name", ["gaussian", "logit"])
def test_points_taken_for_the_time_of_learning_leave_no_trace(name, monkeypatch):
    """With hyperparameters that cannot move, learning from wider points and choosing then is choosing at once."""
    model, data = toy(name, n_inducing=7)
    for parameter in [*model.prior.kernel.parameters(), *model.likelihood.parameters()]:
        parameter.requires_grad_(False)
    options = Stream(memory=0, loss_tol=1e-9, residual_tol=1e-4)
    far = Data(torch.cat([data.X[:8], data.X[8:] + 6.0]), data.y, data.weight)  # saves more than is lost
    before = go(model, far, [torch.arange(8)], options, places=data.X[:0])
    wide, learn = [], streams.learn
    monkeypatch.setattr(streams, "learn", lambda m, state, *a: wide.append(len(state.Z)) or learn(m, state, *a))
    at_once, later = (go(model, far, [torch.arange(8, N)], options, learn, state=before.state) for learn in (0, 1))
    assert len(before.state.Z) == 7 < wide[0] <= 14 and at_once.loss > options.loss_tol
    assert torch.equal(later.state.Z, at_once.state.Z) and later.loss == pytest.approx(at_once.loss, rel=1e-9)
    close(later.posterior.joint(X_NEW + 4.0), at_once.posterior.joint(X_NEW + 4.0), 1e-7)
    close(known(model, later.state.total), known(model, at_once.state.total), 1e-6)


def test_the_past_is_accounted_for_at_the_points_where_it_is_known(monkeypatch):
    """What is left of it under other hyperparameters is told by memory at old points, whatever was added."""
    model, data = toy(mean=None, n_inducing=7)
    options = Stream(memory=6, policy="uniform", loss_tol=1e-9, residual_tol=1e-4)
    far = Data(torch.cat([data.X[:8], data.X[8:] + 6.0]), data.y, data.weight)
    state = go(model, far, [torch.arange(8)], options, places=data.X[:0]).state
    seen, learn = [], streams.learn

    def look(model, wide, rest, rows, batch, sites, options, unexplained, before):
        found = learn(model, wide, rest, rows, batch, sites, options, unexplained, before)
        with torch.no_grad():
            seen.append((len(wide.Z), unexplained.ratio(model), dense(model)))
        return found

    def dense(model):
        scaled = model.prior.kernel
        kernel = kernel_of(scaled.base_kernel.lengthscale.item(), scaled.outputscale.item())
        X, Z, weight = state.memory.data.X, state.Z, 1.0 / state.memory.inclusion
        Kuf = kernel(Z, X)
        return weight @ (kernel(X, X).diagonal() - (Kuf * torch.linalg.solve(oracle.between(kernel, Z, Z), Kuf)).sum(0))

    monkeypatch.setattr(streams, "learn", look)
    before = dense(model)
    go(model, far, [torch.arange(8, N)], options, learn=True, state=state)
    (n_points, ratio, after), *_ = seen
    assert n_points > len(state.Z) and abs(float(after / before) - 1.0) > 0.01
    torch.testing.assert_close(ratio, after / before, rtol=1e-5, atol=0.0)


def _projected(sites, P):
    return type(sites)(P.T @ sites.linear, P.T @ sites.precision @ P)


def test_without_memory_a_stream_is_that_of_bui():
    """Bui, Nguyen and Turner (2017): q, and the bound as the gain of the objective, at places that move each time."""
    model, data = toy(mean=None, n_inducing=7)
    options = Stream(**{**FIXED, "inducing": "greedy"}, memory=0, objective="site", loss_tol=1e3, residual_tol=1e-4)
    order = data.X[:, 0].argsort()
    state, value, kernel = None, 0.0, kernel_of()
    for part in order.split(12):
        outcome = go(model, data, [part], options, state=state, places=data.X[:0])
        after, X, y = outcome.state, data.X[part], data.y[part]
        if state is None:
            m, S = oracle.optimal_q(*oracle.covariances(kernel, after.Z, X)[:2], y, NOISE * torch.eye(12, dtype=DTYPE))
        else:
            R = NOISE * torch.eye(12, dtype=DTYPE)
            gain, m, S = oracle.streaming(kernel, state.Z, m, S, after.Z, X, y, R)
            assert outcome.value - value == pytest.approx(float(gain), abs=1e-7)
        value, state = outcome.value, after
        tied = known(model, after.total)
        close(
            oracle.q_of_form("U", oracle.between(kernel, after.Z, after.Z), tied.linear, tied.precision), (m, S), 1e-7
        )
    assert state.loss > 1e-3  # it did move


# ---- 9: every row once


@pytest.mark.parametrize("policy", [*POLICIES, LeverageTop(conditional=True)], ids=str)
def test_no_row_is_counted_twice(policy):
    """The plain sum over all rows, whatever memory held meanwhile."""
    model, data = toy()
    kernel = kernel_of()
    A = torch.linalg.solve(oracle.between(kernel, Z, Z), kernel(Z, data.X))
    state, weight = None, torch.zeros(N, dtype=DTYPE)
    for part in parts_of([9] * 5):
        outcome = go(model, data, [part], Stream(memory=6, policy=policy, **FIXED), state=state)
        state = outcome.state
        weight[part] = 1.0
        close(known(model, state.total).precision, (A * weight / NOISE) @ A.T, 1e-9)
        assert float(torch.linalg.eigvalsh(known(model, rest_of(state)).precision).min()) >= -1e-10
        inside = (data.X == state.memory.data.X.T).any(-1)
        close(known(model, rest_of(state)).precision, (A * (weight * ~inside) / NOISE) @ A.T, 1e-9)


@pytest.mark.parametrize("name", ["logit", "poisson", "softmax"])
def test_what_is_not_in_memory_never_turns_negative(name):
    model, data = toy(name, mean=None, tol=1e-9)
    state = None
    for part in parts_of([9] * 5):
        outcome = go(model, data, [part], Stream(memory=6, **FIXED), state=state)
        state = outcome.state
        values = torch.linalg.eigvalsh(rest_of(state).precision)
        assert bool((values >= -1e-10 * values[..., -1:].clamp_min(1.0)).all())


def test_memory_weight_counts_rows_of_memory_so_often():
    """A row counts once while it is new, and ``memory_weight`` times from when it came out of memory."""
    model, data = toy()
    kernel = kernel_of()
    A = torch.linalg.solve(oracle.between(kernel, Z, Z), kernel(Z, data.X))
    options, state, weight = Stream(memory=6, memory_weight=3.0, **FIXED), None, torch.zeros(N, dtype=DTYPE)
    for part in parts_of([9] * 5):
        if state is not None:
            weight[(data.X == state.memory.data.X.T).any(-1)] = 3.0
        weight[part] = 1.0
        state = go(model, data, [part], options, state=state).state
        close(known(model, state.total).precision, (A * weight / NOISE) @ A.T, 1e-9)
    assert (weight == 3.0).sum() > 6 and state.moved


def test_forgetting_is_a_batch_with_geometric_weights():
    model, data = toy()
    gamma, parts = 0.7, parts_of([10, 5, 20])
    weight = torch.ones(N, dtype=DTYPE)
    for age, part in enumerate(reversed(parts)):
        weight[part] = gamma**age
    expected, bound = batch(model, replace(data, weight=weight))
    for memory in (0, 8):
        outcome = go(model, data, parts, Stream(memory=memory, forgetting=gamma, **FIXED))
        close(known(model, outcome.state.total), expected.posterior.tied(), 1e-12)
        close(outcome.posterior.joint(X_NEW), expected.posterior.joint(X_NEW), 1e-12)
        assert outcome.value == pytest.approx(bound, rel=1e-12)
        kept = outcome.state.memory.data
        close(kept.weight, weight[(kept.X == data.X.T).int().argmax(1)] if memory else weight[:0], 1e-12)


# ---- 13: inner steps


@pytest.mark.parametrize("name", ["logit", "poisson", "student_t", "softmax"])
@pytest.mark.parametrize("engine", [Dual(), Dual(step_size=5.0), Dual(step_size=5.0, memory=0)], ids=str)
def test_inner_steps_climb_given_the_past_and_end_at_one_point(name, engine):
    """Whatever the first step: 5 is far beyond what any of these likelihoods bears undamped."""
    model, data = toy(name, mean=None, tol=1e-11)
    parts = parts_of([24])
    state = go(model, data, parts[:1], Stream(memory=0, **FIXED)).state
    new = data.rows(parts[1])
    plan = InducingPlan(new.X, Z, model.policy, rest=state.total)
    with torch.no_grad():
        at = engine.init(model, plan, new)
        values = [at.value]
        for _ in range(500):
            at, info = engine.step(model, plan, at, new)
            values.append(at.value)
            if info["converged"]:
                break
        assert info["converged"]
        steps = torch.tensor(values).diff()
        assert (
            bool((steps >= -1e-6 * abs(values[-1]) - model.likelihood.resolution * N).all()) and values[-1] > values[0]
        )
        expected = go(model, data, parts[1:], Stream(memory=0, **FIXED), state=state).value
    assert values[-1] == pytest.approx(expected, abs=1e-5 * N if name == "softmax" else 1e-8)


# ---- 14: checkpoints


def _same(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other) and one.dtype == other.dtype
    elif hasattr(one, "__dataclass_fields__"):
        for name in one.__dataclass_fields__:
            _same(getattr(one, name), getattr(other, name))
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            _same(one[name], other[name])
    else:
        assert one == other or (one != one and other != other)


def _saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


STORES = {"copy": copy.deepcopy, "pickle": lambda held: pickle.loads(pickle.dumps(held)), "torch": _saved}
STORED = [("bls_sample", store) for store in STORES] + [
    ("bls_top", "copy"),
    ("uniform", "pickle"),
    ("class_balanced", "copy"),
    (ClassBalanced("bls_top"), "pickle"),
    (LeverageTop(conditional=True), "pickle"),
]


@pytest.mark.parametrize(("policy", "store"), STORED, ids=str)
def test_a_stream_resumed_is_the_stream_uninterrupted(policy, store):
    """Bit for bit, the generator of the memory included."""
    model, data = toy("logit", n_inducing=10, tol=1e-9)
    options, parts = Stream(memory=7, policy=policy, residual_tol=0.1, n_hyper_iter=2), parts_of([12, 12, 12])
    whole = go(copy.deepcopy(model), data, parts, options, learn=True, places=data.X[:0])
    own = copy.deepcopy(model)
    state = go(own, data, parts[:2], options, learn=True, places=data.X[:0]).state
    own, state = STORES[store]((own, state))
    resumed = go(own, data, parts[2:], options, learn=True, state=state)
    _same(resumed.state, whole.state)
    assert torch.equal(resumed.posterior.mean(X_NEW), whole.posterior.mean(X_NEW))
    assert resumed.value == whole.value


def test_the_seed_decides_what_is_remembered():
    model, data = toy()
    found = [go(model, data, parts_of([20]), Stream(memory=8, **FIXED), seed=seed).state for seed in (0, 0, 1)]
    _same(found[0], found[1])
    assert not torch.equal(found[0].memory.data.X, found[2].memory.data.X)


def test_updates_leave_their_arguments_alone():
    model, data = toy("poisson", n_inducing=12)
    options, parts = Stream(memory=7), parts_of([12, 12])
    state = go(model, data, parts[:1], options, places=data.X[:0]).state
    before, rows = copy.deepcopy(state), copy.deepcopy(data)
    go(model, data, parts[1:], options, state=state)
    _same(state, before)
    _same(data, rows)


# ---- 15: the mean


@pytest.mark.parametrize("memory", [0, 6])
@pytest.mark.parametrize("name", ["gaussian", "student_t", "poisson"])
def test_shifting_targets_and_mean_together_changes_nothing(name, memory):
    """For counts, exposure takes the shift of the log rate."""
    found = []
    for shift in (0.0, 0.7):
        model, data = toy(name, mean=MEAN + shift)
        if name == "poisson":
            data = replace(data, side={"exposure": torch.full((N,), math.exp(-shift), dtype=DTYPE)})
        else:
            data = replace(data, y=data.y + shift)
        outcome = go(model, data, parts_of([10, 25]), Stream(memory=memory, policy="bls_top", **FIXED))
        tied = known(model, outcome.state.total)
        found.append((tied.linear, tied.precision, outcome.posterior.mean(X_NEW) - shift, torch.tensor(outcome.value)))
    close(*found, 1e-12 if name == "gaussian" else 1e-6)


# ---- objectives for hyperparameters


def _twin(theta, past, own, frozen, sample=None):
    """log ∫ p_θ(u) ∏ p(y | u) du, dense: rows ``past`` as seen from Z at ``frozen``, rows ``own`` at θ.

    Rows are (X, y, weight); θ holds log lengthscale, outputscale and noise. The variance that u leaves of the past
    changes as that of ``sample`` does, (X, how many rows each stands for).
    """
    kernel, held = kernel_of(*theta[:2].exp()), kernel_of(*frozen)
    noise, K = theta[2].exp(), oracle.between(kernel, Z, Z)

    def from_places(covariance, X):
        Kuf = covariance(Z, X)
        A = torch.linalg.solve(oracle.between(covariance, Z, Z), Kuf).T
        variance = torch.stack([covariance(x[None], x[None])[0, 0] for x in X]) if len(X) else X.new_zeros(0)
        return A, variance - (A * Kuf.T).sum(1)

    ratio = 1.0
    if sample is not None:
        now, then = ((sample[1] * from_places(covariance, sample[0])[1]).sum() for covariance in (kernel, held))
        ratio = now / then
    parts = []
    for (X, y, weight), covariance, change in ((past, held, ratio), (own, kernel, 1.0)):
        A, left = from_places(covariance, X)
        parts.append((A, y, weight, change * left))
    A, y, weight, left = (torch.cat(each) for each in zip(*parts, strict=True))
    scale = -0.5 * ((weight - 1) * (2 * math.pi * noise).log() + weight.log()).sum()
    fit = oracle.log_density(y, torch.zeros_like(y), A @ K @ A.T + torch.diag(noise / weight))
    return fit + scale - 0.5 * (weight * left).sum() / noise


def _split(n_past=30):
    model, data = toy(mean=None)
    parts = parts_of([n_past])
    state = go(model, data, parts[:1], Stream(memory=0, **FIXED)).state
    return model, state, data, parts


def test_the_objective_and_its_gradient_are_those_of_a_dense_twin():
    """Rows at hand move with θ, the past is held; noise is learned from both."""
    model, state, data, (past, new) = _split()
    plan = InducingPlan(data.X[new], Z, model.policy)
    engine = ConjugateStream(state.total)
    own = data.rows(new)
    value = engine.objective(model, plan, run(replace(model, engine=engine), plan, own).state, own)
    scale, leaf = model.prior.kernel, model.prior.kernel.base_kernel
    slopes = torch.autograd.grad(
        value, [leaf.raw_lengthscale, scale.raw_outputscale, model.likelihood.log_noise_variance]
    )
    theta = torch.tensor([*THETA, NOISE], dtype=DTYPE).log().requires_grad_()
    ones = torch.ones(N, dtype=DTYPE)
    rows = [(data.X[part], data.y[part], ones[part]) for part in (past, new)]
    twin = _twin(theta, *rows, THETA)
    (expected,) = torch.autograd.grad(twin, theta)
    assert value.item() == pytest.approx(twin.item(), rel=1e-10)
    assert value.item() == pytest.approx(titsias(data.X, data.y).item(), rel=1e-10)
    # raw parameters are softplus of which the logarithm is θ
    for slope, one, raw in zip(slopes[:2], expected[:2], (leaf.raw_lengthscale, scale.raw_outputscale), strict=True):
        chain = torch.sigmoid(raw) / torch.nn.functional.softplus(raw)
        assert slope.item() == pytest.approx((one * chain).item(), rel=1e-7)
    assert float(slopes[2]) == pytest.approx(float(expected[2]), rel=1e-9)


def test_the_gradient_in_the_noise_is_that_of_all_rows():
    """At the kernel at which rows were seen, statistics of the past are all that matters of them for the noise."""
    model, state, data, (_, new) = _split()
    own, plan, engine = data.rows(new), InducingPlan(data.X[new], Z, model.policy), ConjugateStream(state.total)
    for noise in (0.02, NOISE, 0.5):
        with torch.no_grad():
            model.likelihood.log_noise_variance.fill_(math.log(noise))
        value = engine.objective(model, plan, engine.init(model, plan, own), own)
        (slope,) = torch.autograd.grad(value, model.likelihood.log_noise_variance)
        logged = torch.tensor(math.log(noise), dtype=DTYPE, requires_grad=True)
        bound = titsias(data.X, data.y, noise=logged.exp())
        (expected,) = torch.autograd.grad(bound, logged)
        assert value.item() == pytest.approx(bound.item(), rel=1e-10)
        assert float(slope) == pytest.approx(float(expected), rel=1e-9)


def test_with_every_row_its_own_place_the_objective_is_the_evidence_at_any_hyperparameters():
    """There what past rows say does not depend on the kernel: value and gradient are those of all rows at once."""
    model, data = toy(mean=None, n=16)
    places = data.X.clone()
    state = go(model, data, [range(10)], Stream(memory=0, **FIXED), places=places).state
    own, plan = data.rows(torch.arange(10, 16)), InducingPlan(data.X[10:], places, model.policy)
    engine = ConjugateStream(state.total)
    for lengthscale, outputscale in ((0.5, 1.2), (0.8, 2.0)):
        model.prior.kernel.base_kernel.lengthscale, model.prior.kernel.outputscale = lengthscale, outputscale
        value = engine.objective(model, plan, engine.init(model, plan, own), own)
        raw = model.prior.kernel.base_kernel.raw_lengthscale
        (slope,) = torch.autograd.grad(value, raw)
        leaf = torch.tensor(lengthscale, dtype=DTYPE, requires_grad=True)
        K = kernel_of(leaf, outputscale)(data.X, data.X)
        evidence = oracle.log_density(data.y, torch.zeros_like(data.y), K + NOISE * torch.eye(16, dtype=DTYPE))
        (expected,) = torch.autograd.grad(evidence, leaf)
        assert value.item() == pytest.approx(evidence.item(), abs=1e-6)
        assert float(slope) == pytest.approx(float(expected * torch.sigmoid(raw)), rel=1e-5)


@pytest.mark.parametrize(
    ("objective", "policy"),
    [("hybrid", "bls_sample"), ("site", "bls_sample"), ("memory_elbo", "bls_sample"), ("memory_elbo", "bls_top")],
)
def test_each_objective_is_climbed_as_it_is_written(objective, policy, monkeypatch):
    """The top of the dense twin, found by scipy, is where a long search of ours ends."""
    monkeypatch.setattr("mercer.sequential.learn._SETTLED", 1e-12)
    model, data = toy(mean=None, seed=3)
    options = Stream(memory=10, policy=policy, inducing="fixed", objective=objective, n_hyper_iter=200)
    first, second = parts_of([32])
    state = go(model, data, [first], options).state
    go(model, data, [second], options, learn=True, state=state)
    kernel = model.prior.kernel
    found = [
        kernel.base_kernel.lengthscale.item(),
        kernel.outputscale.item(),
        model.likelihood.value_of("noise_variance", Z).item(),
    ]
    kept, ones = state.memory, torch.ones(N, dtype=DTYPE)
    inside = (data.X == kept.data.X.T).any(-1)
    seen = torch.isin(torch.arange(N), first)
    new = (data.X[second], data.y[second], ones[second])
    none = (data.X[:0], data.y[:0], ones[:0])
    gone = (data.X[seen & ~inside], data.y[seen & ~inside], ones[seen & ~inside])
    if policy == "bls_top":
        stands_for = torch.full((10,), 32 / 10, dtype=DTYPE)
    else:
        stands_for = 1.0 / kept.inclusion
        assert stands_for.std() > 0.1
    memory = (kept.data.X, kept.data.y, ones[:10])
    past, own = {
        "hybrid": (gone, _both(memory, new)),
        "site": ((data.X[first], data.y[first], ones[first]), new),
        "memory_elbo": (none, _both((*memory[:2], stands_for), new)),
    }[objective]

    def negative(theta):
        theta = torch.tensor(theta, requires_grad=True)
        value = -_twin(theta, past, own, THETA, (kept.data.X, 1.0 / kept.inclusion))
        return value.item(), torch.autograd.grad(value, theta)[0].numpy()

    start = torch.tensor([*THETA, NOISE], dtype=DTYPE).log().numpy()
    best = optimize.minimize(negative, start, jac=True, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-8})
    assert abs(best.x - start).max() > 0.1
    torch.testing.assert_close(torch.tensor(found).log(), torch.tensor(best.x).float(), rtol=0, atol=2e-3)


def _both(one, other):
    return tuple(torch.cat(each) for each in zip(one, other, strict=True))


def test_noise_learned_on_a_stream_approaches_that_of_all_rows():
    """Within its standard error, √(2/n), from a start four times too high; frozen sites would stay near the start."""
    model, data = toy(mean=None, n=300, seed=4)
    with torch.no_grad():
        model.likelihood.log_noise_variance.fill_(math.log(4 * NOISE))
    all_rows = copy.deepcopy(model)
    options = Stream(inducing="fixed", memory=20)
    go(model, data, torch.arange(300).split(30), options, learn=True)
    go(all_rows, data, [range(300)], replace(options, n_hyper_iter=100), learn=True)
    streamed, batched = (float(noise_variance(each, torch.zeros((), dtype=DTYPE))) for each in (model, all_rows))
    assert math.log(streamed) == pytest.approx(math.log(batched), abs=math.sqrt(2 / 300))
    assert batched == pytest.approx(NOISE, rel=3 * math.sqrt(2 / 300))
