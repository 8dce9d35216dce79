"""How a stream behaves: what it keeps, what it warns of, what can be taken out of it and put together."""

import copy
import math
from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest
import torch
from stream_toys import (
    DTYPE,
    FIXED,
    MEAN,
    NOISE,
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
    rows,
    titsias,
    toy,
)
from toys import normal

from mercer._typing import Data
from mercer.families.base import Prior
from mercer.inference.evidence import Evidence
from mercer.inference.streaming import noise_variance
from mercer.inference.theta import ThetaVector
from mercer.kernels import Matern52
from mercer.linalg.cholesky import NotPositiveDefiniteError
from mercer.sequential import LeverageTop, Selection, sums
from mercer.sequential import state as held
from mercer.sequential import stream as streams

GREEDY = {"hyperparameters": "frozen", "residual_tol": 0.1}


def n_floats(value, seen=None):
    """Count the numbers that an object holds, tensors that are shared once."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().nbytes() // value.element_size()
    if is_dataclass(value):
        return sum(n_floats(getattr(value, field.name), seen) for field in fields(value))
    return sum(n_floats(each, seen) for each in value.values()) if isinstance(value, dict) else 1


# ---- options


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_inducing": 0},
        {"n_inducing": 2.5},
        {"memory": -1},
        {"memory_per_batch": 3},
        {"memory": None, "memory_per_batch": -1},
        {"policy": "best"},
        {"objective": "elbo"},
        {"hyperparameters": "fixed"},
        {"n_hyper_iter": 0},
        {"forgetting": 0.0},
        {"forgetting": 1.1},
        {"forgetting": math.nan},
        {"memory_weight": 0.5},
        {"memory_weight": math.inf},
        {"inducing": "none"},
        {"residual_tol": -0.1},
        {"residual_tol": 1.5},
        {"loss_tol": -1.0},
        {"loss_tol": math.inf},
        {"dense_rows": -1},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused_by_name(wrong):
    name = next(reversed(wrong)) if "policy" not in wrong else "memory policy"
    with pytest.raises(ValueError, match=name):
        Stream(**wrong)


def test_a_policy_that_cannot_select_is_refused():
    with pytest.raises(TypeError, match="memory policy"):
        Stream(policy=3)
    with pytest.raises(TypeError, match="make an object"):
        Stream(policy=LeverageTop)


# ---- what is kept


@pytest.mark.parametrize("name", ["gaussian", "logit", "softmax"])
def test_what_is_kept_does_not_grow_with_rows_seen(name):
    model, data = toy(name, mean=None, n_inducing=8, n=160, tol=1e-7)
    options, state, sizes = Stream(memory=10, n_hyper_iter=1), None, []
    for part in parts_of([20] * 7, n=160):
        outcome = go(model, data, [part], options, learn=True, state=state, places=data.X[:0])
        state = outcome.state
        sizes.append((n_floats(state), len(state.Z)))
    assert state.n_seen == 160 and state.n_batches == 8
    full = [size for size, m in sizes if m == 8]
    assert len(full) > 3 and len(set(full)) == 1
    copied = copy.deepcopy(state)  # of views of something larger only the view would be left
    assert n_floats(copied) == full[-1]


def test_memory_holds_what_it_may_and_no_more():
    model, data = toy()
    for memory, expected in ((0, [0, 0, 0]), (5, [5, 5, 5]), (20, [12, 20, 20]), (100, [12, 24, 48])):
        state, found = None, []
        for part in parts_of([12, 12]):
            state = go(model, data, [part], Stream(memory=memory, **FIXED), state=state).state
            found.append(state.memory.data.n_rows)
        assert found == expected


def test_memory_without_limit_keeps_some_of_every_batch_for_ever():
    model, data = toy()
    options, state, before = Stream(memory=None, memory_per_batch=3, **FIXED), None, data.X[:0]
    for k, part in enumerate(parts_of([12, 2, 12])):
        state = go(model, data, [part], options, state=state).state
        X = state.memory.data.X
        assert torch.equal(X[: len(before)], before) and len(X) == [3, 5, 8, 11][k]
        assert torch.isin(X[len(before) :], data.X[part]).all()
        before = X
    state = go(model, data, parts_of([12]), Stream(memory=None, **FIXED)).state
    assert state.memory.data.n_rows == 0 and state.n_seen == N


def test_memory_has_rows_of_the_stream_with_their_targets_and_side():
    model, data = toy("poisson")
    data = replace(data, weight=1.0 + torch.arange(N) % 3, side={"exposure": 0.5 + torch.rand(N, dtype=DTYPE)})
    state = go(model, data, parts_of([12, 12]), Stream(memory=7, **FIXED)).state
    kept = state.memory.data
    at = (kept.X == data.X.T).int().argmax(1)
    assert len(at.unique()) == 7
    assert torch.equal(kept.X, data.X[at]) and torch.equal(kept.y, data.y[at])
    assert torch.equal(kept.weight, data.weight[at]) and torch.equal(kept.side["exposure"], data.side["exposure"][at])


@pytest.mark.parametrize("policy", ["bls_sample", "uniform"])
def test_every_batch_is_drawn_from_anew(policy):
    """With numbers that go on from the last draw, else the same positions of every batch would be kept."""
    model, data = toy(n=60)
    options, state, found = Stream(memory=None, memory_per_batch=5, policy=policy, **FIXED), None, []
    same = replace(data, X=data.X[:20].repeat(3, 1), y=data.y[:20].repeat(3))
    for part in torch.arange(60).split(20):
        state = go(model, same, [part], options, state=state).state
        found.append(set(state.memory.data.X[-5:, 0].tolist()))
    assert found[0] != found[1] != found[2] != found[0]


def test_a_policy_of_the_user_is_asked():
    asked = []

    def latest(candidates, capacity, generator):
        asked.append((len(candidates), int(candidates.is_old.sum()), candidates.n_seen, capacity))
        index = torch.arange(len(candidates))[-capacity:]
        return Selection(index, torch.full((len(index),), 0.5, dtype=torch.float64))

    model, data = toy()
    parts = parts_of([12, 12])
    state = go(model, data, parts, Stream(memory=5, policy=latest, **FIXED)).state
    assert asked == [(12, 0, 12, 5), (17, 5, 24, 5), (29, 5, 48, 5)]
    assert torch.equal(state.memory.data.X, data.X[parts[-1][-5:]])
    assert torch.equal(state.memory.inclusion, torch.full((5,), 0.5, dtype=torch.float64))


def test_policies_see_leverage_and_covariances():
    """h = β v, and covariances under which v is the diagonal, for latents of their own and outputs that share."""
    for name in ("logit", "softmax", "gaussian"):
        model, data = toy(name, mean=None, tol=1e-9)
        if name == "gaussian":
            data = replace(data, y=torch.stack([data.y, -data.y]))
        seen = []

        def top(candidates, capacity, generator, seen=seen):
            seen.append(candidates)
            return Selection(torch.arange(capacity), torch.ones(capacity, dtype=torch.float64))

        go(model, data, parts_of([12]), Stream(memory=5, policy=top, **FIXED))
        last = seen[-1]
        close(last.score, (last.beta * last.variance).reshape(-1, len(last)).sum(0), 1e-12)
        assert (last.labels is None) == (name == "gaussian")
        for j in (0, 7):
            row = last.covariance(torch.tensor([j])).reshape(-1, len(last))
            close(row[..., j], last.variance.reshape(-1, len(last))[..., j], 1e-8)
        go(model, data, parts_of([12]), Stream(memory=5, policy=LeverageTop(conditional=True), **FIXED))


# ---- what is reported


def test_the_score_is_the_log_density_before_the_batch_is_learned_from():
    model, data = toy()
    weighted = replace(data, weight=1.0 + torch.arange(N) % 3)
    parts = parts_of([20])
    first = go(model, weighted, parts[:1], Stream(memory=5, **FIXED))
    assert math.isnan(first.score) and first.surprise == 0.0
    new = weighted.rows(parts[1])
    with torch.no_grad():
        m, v = first.posterior.marginals(new.X)
        density = model.likelihood.log_predictive_density(new.y, m, v)
    expected = float((new.weight * density).sum() / new.weight.sum())
    second = go(model, weighted, parts[1:], Stream(memory=5, **FIXED), state=first.state)
    assert second.score == pytest.approx(expected, rel=1e-10)


def test_missing_targets_do_not_count_in_the_score():
    model, data = toy()
    y = torch.stack([data.y, data.y])
    y[1, 20:] = torch.nan
    both, parts = replace(data, y=y), [torch.arange(20), torch.arange(20, N)]
    alone = go(model, data, parts, Stream(memory=0, **FIXED)).score
    assert go(model, both, parts, Stream(memory=0, **FIXED)).score == pytest.approx(alone, rel=1e-10)


def surprises(model, data, size, options):
    state, found = None, []
    for part in torch.arange(data.n_rows).split(size):
        outcome = go(model, data, [part], options, state=state)
        state = outcome.state
        found.append(outcome.surprise)
    return torch.tensor(found)


@pytest.mark.parametrize("size", [1, 5, 40])
def test_a_process_that_goes_on_is_hardly_ever_surprising(size):
    """Rows of the model itself: a false alarm at four standard deviations is meant to be one in 10⁴ batches."""
    model, data = toy(mean=None, n=120 if size == 1 else 400, seed=2)
    assert float(surprises(model, data, size, Stream(memory=0, **FIXED)).max()) < 4.0


@pytest.mark.parametrize("size", [1, 5, 40])
def test_a_jump_of_the_process_is_surprising_at_once(size):
    n, jump = (100, 80) if size == 1 else (400, 320)
    model, data = toy(mean=None, n=n, seed=2)
    jumped = replace(data, y=data.y + 2.0 * (torch.arange(n) >= jump))
    found = surprises(model, jumped, size, Stream(memory=0, **FIXED))
    first = jump // size
    assert float(found[:first].max()) < 4.0 < float(found[first : first + max(1, 8 // size)].max())


def test_an_impossible_batch_does_not_spoil_the_scores(monkeypatch):
    model, data = toy(mean=None)
    parts = list(torch.arange(N).split(8))
    state = go(model, data, parts[:5], Stream(memory=0, **FIXED)).state
    never = torch.full((8,), -math.inf, dtype=DTYPE)
    monkeypatch.setattr(model.likelihood, "log_predictive_density", lambda y, m, v: never)
    outcome = go(model, data, parts[5:], Stream(memory=0, **FIXED), state=state)
    assert outcome.score == -math.inf and outcome.state.scores == state.scores
    monkeypatch.undo()
    assert math.isfinite(go(model, data, parts[:1], Stream(memory=0, **FIXED), state=outcome.state).surprise)


def test_inducing_points_that_explain_little_are_confessed():
    model, data = toy(n_inducing=1)
    outcome = go(model, data, parts_of([24]), Stream(memory=5, **GREEDY), places=data.X[:0])
    assert outcome.confession.warnings and "1 inducing points carry only" in outcome.confession.warnings[0]
    model, data = toy(n_inducing=20)
    outcome = go(model, data, parts_of([24]), Stream(memory=5, **GREEDY), places=data.X[:0])
    assert not outcome.confession.warnings


# ---- failures


@pytest.mark.parametrize("y", [1e200, -1e170])
def test_targets_out_of_range_are_refused(y):
    model, data = toy(mean=None)
    state = go(model, data, [range(20)], Stream(memory=5, **FIXED)).state
    wild = Data(data.X[:2], torch.full((2,), y, dtype=DTYPE), torch.ones(2, dtype=DTYPE))
    with pytest.raises(NotPositiveDefiniteError, match="out of range"):
        streams.update(model, state, wild, Stream(memory=5, **FIXED), learning=False)


def test_a_search_that_fails_leaves_hyperparameters_as_they_were(monkeypatch):
    model, data = toy()
    state = go(model, data, [range(20)], Stream(memory=5, inducing="fixed")).state
    before = ThetaVector(model).read()

    def fail(self, start, max_iter, steps):
        self.vector.write(start + 1.0)
        raise FloatingPointError("no way")

    monkeypatch.setattr(Evidence, "maximise", fail)
    outcome = go(model, data, [range(20, N)], Stream(memory=5, inducing="fixed"), learn=True, state=state)
    torch.testing.assert_close(ThetaVector(model).read(), before, rtol=1e-14, atol=1e-14)
    assert outcome.n_iter == 0 and "no way" in outcome.notes[0] and not outcome.state.moved


@pytest.mark.parametrize(("forgetting", "counted"), [(1.0, N), (0.75, 4 * 8)])
def test_first_steps_are_as_short_as_all_rows_that_count_ask_for(monkeypatch, forgetting, counted):
    """Were they as long as a batch alone would have it, every search would go astray first, the later the more."""
    model, data = toy()
    seen = []

    def look(self, start, max_iter, steps):
        seen.append(steps / self.vector.scale)
        raise FloatingPointError("looked")

    monkeypatch.setattr(Evidence, "maximise", look)
    options = Stream(memory=5, inducing="fixed", forgetting=forgetting)
    go(model, data, torch.arange(N).split(8), options, learn=True)
    np.testing.assert_allclose(seen[0], 8**-0.5)
    np.testing.assert_allclose(seen[-1], counted**-0.5)


def with_a_column_that_changes_once(n=120):
    """Return a model with a lengthscale per column, and rows whose second column is zero in the first of four parts."""
    model, _ = toy(mean=None, n_inducing=30)
    model = replace(model, prior=Prior(Matern52([0.8, 0.8], outputscale=1.2)))
    X, f = rows(n=n)
    column = torch.where(torch.arange(n) < n // 4, 0.0, 1.0 + torch.arange(n) % 3).to(X)
    y = f + math.sqrt(NOISE) * normal(n, seed=1)
    return (
        model,
        Data(torch.cat([X, column[:, None]], -1), y, torch.ones(n, dtype=DTYPE)),
        torch.arange(n).split(n // 4),
    )


def test_first_steps_of_a_lengthscale_are_long_while_its_column_has_not_varied(monkeypatch):
    model, data, parts = with_a_column_that_changes_once()
    seen = []

    def look(self, start, max_iter, steps):
        seen.append(dict(zip(self.vector.names, steps / self.vector.scale, strict=True)))
        raise FloatingPointError("looked")

    monkeypatch.setattr(Evidence, "maximise", look)
    go(model, data, parts, Stream(memory=5), learn=True, places=data.X[:0])
    name = "kernel.base_kernel.lengthscale"
    for k, each in enumerate(seen):
        assert each[f"{name}[0]"] == each["kernel.outputscale"] == pytest.approx((30 * (k + 1)) ** -0.5)
        assert each[f"{name}[1]"] == pytest.approx((30 if k < 2 else 30 * (k + 1)) ** -0.5)
        assert each["likelihood.noise_variance"] == pytest.approx((30 * (k + 1)) ** -0.5)


def test_kernels_that_are_not_learned_have_no_steps():
    model, data = toy()
    for parameter in model.prior.kernel.parameters():
        parameter.requires_grad_(False)
    outcome = go(model, data, parts_of([24]), Stream(memory=5), learn=True)
    assert outcome.n_evaluations > 0 and not outcome.notes


def test_an_interrupted_search_is_an_interrupted_update(monkeypatch):
    model, data = toy()
    state = go(model, data, [range(20)], Stream(memory=5, inducing="fixed")).state

    def interrupt(self, theta, gradient):
        if self.n_evaluations:
            raise KeyboardInterrupt
        return evaluate(self, theta, gradient)

    evaluate = Evidence._evaluate
    monkeypatch.setattr(Evidence, "_evaluate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        go(model, data, [range(20, N)], Stream(memory=5, inducing="fixed"), learn=True, state=state)


# ---- hyperparameters


def test_learning_leaves_no_gradients_behind():
    model, data = toy("poisson", n_inducing=12)
    go(model, data, parts_of([16, 16]), Stream(memory=5), learn=True, places=data.X[:0])
    modules = (model.prior.kernel, model.prior.mean, model.likelihood)
    assert all(p.grad is None for module in modules for p in module.parameters())


def test_the_mean_is_learned_while_all_rows_are_at_hand_and_held_afterwards():
    """What is known of rows that are gone is g = f − μ: were μ to follow a batch, f would move wherever they were."""
    model, data = toy("poisson", mean=-1.0, n_inducing=12)
    options, constant = Stream(memory=30), model.prior.mean.raw_constant
    parts = parts_of([16, 14])
    states = []
    for k, part in enumerate(parts):
        before = constant.item()
        scale = model.prior.kernel.outputscale.item()
        state = go(
            model, data, [part], options, learn=True, state=states[-1] if states else None, places=data.X[:0]
        ).state
        states.append(state)
        # the first two batches fit into memory, so that nothing is gone when the third comes
        assert constant.item() != before if k < 3 else constant.item() == before
        assert model.prior.kernel.outputscale.item() != scale
    before, scale = constant.item(), model.prior.kernel.outputscale.item()
    go(model, data, [parts[0]], options, learn=True, state=states[-1])
    assert constant.item() == before and model.prior.kernel.outputscale.item() != scale


def test_of_ordered_classes_the_first_threshold_is_held_and_the_others_are_learned():
    model, data = toy("ordinal", n_inducing=12)
    state = go(model, data, [range(24)], Stream(memory=2), places=data.X[:0]).state
    likelihood = model.likelihood
    first, others = likelihood.first_cutpoint.item(), likelihood.log_increments.clone()
    go(model, data, [range(24, N)], Stream(memory=2), learn=True, state=state)
    assert likelihood.first_cutpoint.item() == first and not torch.equal(likelihood.log_increments, others)
    assert likelihood.first_cutpoint.requires_grad


def test_a_mean_that_followed_the_batches_would_move_the_past():
    """Counts that rise along the line, in order: where rows came first the rate is still known at the end."""
    generator = torch.Generator().manual_seed(0)
    X = torch.linspace(0.0, 12.0, 300, dtype=DTYPE)[:, None]
    f = 0.5 * X[:, 0] - 1.0 + torch.sin(X[:, 0])
    data = Data(X, torch.poisson(f.exp(), generator=generator), torch.ones(300, dtype=DTYPE))
    model, _ = toy("poisson", mean=0.0, n_inducing=25, tol=1e-9)
    outcome = go(model, data, torch.arange(300).split(50), Stream(memory=0), learn=True, places=X[:0])
    m, v = outcome.posterior.marginals(X)
    z = (m - f)[:100] / v[:100].sqrt()
    assert z.square().mean().item() < 4.0


# ---- without


@pytest.mark.parametrize("memory", [0, 9, N])
def test_gaussian_rows_are_unlearned_wherever_they_are(memory):
    """In memory or not: as if they had never been there."""
    model, data = toy()
    data = replace(data, weight=1.0 + torch.arange(N, dtype=DTYPE) % 3)
    state = go(model, data, parts_of([10, 20]), Stream(memory=memory, **FIXED)).state
    unwanted = torch.arange(N) % 5 == 0
    inside = (state.memory.data.X == data.X[unwanted].T).any(-1)
    outside = unwanted & ~(data.X == state.memory.data.X.T).any(-1)
    gone = data.rows(outside.nonzero().squeeze(-1)) if outside.any() else None
    after = sums.without(model, state, (~inside).to(DTYPE), gone)
    rest = data.rows((~unwanted).nonzero().squeeze(-1))
    expected, bound = batch(model, rest)
    close(known(model, after.total), expected.posterior.tied(), 1e-10)
    close(held.posterior_of(model, after).joint(X_NEW), expected.posterior.joint(X_NEW), 1e-10)
    assert held.evidence_of(model, after) == pytest.approx(bound, rel=1e-9)
    assert after.n_seen == rest.n_rows and after.memory.data.n_rows == int((~inside).sum())


@pytest.mark.parametrize("name", ["logit", "poisson"])
def test_rows_in_memory_are_unlearned_by_all_that_are_there(name):
    """Sites of the other rows were found in the presence of those that leave; they are found again."""
    model, data = toy(name)
    state = go(model, data, parts_of([10, 20]), Stream(memory=N, **FIXED)).state
    unwanted = (state.memory.data.X < 1.0).squeeze(-1)
    after = sums.without(model, state, (~unwanted).to(DTYPE), None)
    expected, _ = batch(model, state.memory.data.rows((~unwanted).nonzero().squeeze(-1)))
    close(held.posterior_of(model, after).marginals(X_NEW), expected.posterior.marginals(X_NEW), 1e-5)
    close(after.total, expected.posterior.tied(), 1e-5)


@pytest.mark.parametrize("name", ["gaussian", "logit"])
def test_a_share_of_a_row_can_be_unlearned(name):
    """A row of weight three, of which one goes, has weight two."""
    model, data = toy(name)
    three = replace(data, weight=torch.full((N,), 3.0, dtype=DTYPE))
    state = go(model, three, parts_of([10, 20]), Stream(memory=N, **FIXED)).state
    left = torch.where(torch.arange(N) < 7, 2 / 3, 1.0).to(DTYPE)
    after = sums.without(model, state, left, None)
    expected, _ = batch(model, replace(state.memory.data, weight=3.0 * left))
    close(held.posterior_of(model, after).marginals(X_NEW), expected.posterior.marginals(X_NEW), 1e-5)
    close(after.memory.data.weight, 3.0 * left, 1e-14)
    assert after.n_seen == N


def test_rows_that_cannot_have_been_there_are_refused():
    model, data = toy()
    state = go(model, data, parts_of([10, 20]), Stream(memory=5, **FIXED)).state
    everything = torch.ones(5, dtype=DTYPE)
    far = Data(data.X[:3] + 10.0, data.y[:3], torch.ones(3, dtype=DTYPE))
    far = replace(far, X=Z[:3], weight=torch.full((3,), 50.0, dtype=DTYPE))
    with pytest.raises(ValueError, match="cannot have been among those seen"):
        sums.without(model, state, everything, far)
    many = Data(X_NEW.repeat(10, 1), torch.zeros(110, dtype=DTYPE), torch.full((110,), 1e-6, dtype=DTYPE))
    with pytest.raises(ValueError, match="cannot have been among those seen"):
        sums.without(model, state, everything, many)


# ---- merged


def shards(model, data, options, n_common=16):
    """Return a common start, two streams that went on from it with rows of their own, and all rows."""
    start, one, two = parts_of([n_common, 14])
    common = go(model, data, [start], options).state
    return common, [go(model, data, [part], options, state=common).state for part in (one, two)]


@pytest.mark.parametrize("memory", [0, 6, N])
@pytest.mark.parametrize("outputs", [1, 2])
def test_two_gaussian_streams_are_one_on_all_rows(memory, outputs):
    model, data = toy()
    if outputs == 2:
        y = torch.stack([data.y, 1.0 - data.y])
        y[0, ::4] = torch.nan
        data = replace(data, y=y)
    options = Stream(memory=memory, **FIXED)
    common, states = shards(model, data, options)
    state, kept = sums.merged(model, states, common, options)
    expected, bound = batch(model, data)
    close(known(model, state.total), expected.posterior.tied(), 1e-10)
    close(held.posterior_of(model, state).marginals(X_NEW), expected.posterior.marginals(X_NEW), 1e-10)
    assert held.evidence_of(model, state) == pytest.approx(bound, rel=1e-9)
    assert state.n_seen == N and state.memory.data.n_rows == min(memory, N) == len(kept)
    assert len(state.memory.data.X.unique()) == len(kept)  # rows of the common start are there once
    values = torch.linalg.eigvalsh(known(model, rest_of(state)).precision)
    assert float(values.min()) >= -1e-9 * float(values.max().clamp_min(1.0))
    memories = torch.cat([each.memory.data.X for each in states])
    assert torch.equal(memories[kept], state.memory.data.X)


def test_streams_without_a_common_start_add_up():
    model, data = toy()
    one, two = parts_of([20])
    options = Stream(memory=6, **FIXED)
    states = [go(model, data, [part], options).state for part in (one, two)]
    state, _ = sums.merged(model, states, None, options)
    expected, _ = batch(model, data)
    close(known(model, state.total), expected.posterior.tied(), 1e-10)


def test_rows_that_both_streams_have_seen_count_twice():
    model, data = toy()
    options = Stream(memory=N, **FIXED)
    states = [go(model, data, [part], options).state for part in (range(30), range(20, N))]
    state, _ = sums.merged(model, states, None, options)
    weight = 1.0 + ((torch.arange(N) >= 20) & (torch.arange(N) < 30)).to(DTYPE)
    expected, _ = batch(model, replace(data, weight=weight))
    close(known(model, state.total), expected.posterior.tied(), 1e-10)
    at = (state.memory.data.X == data.X.T).int().argmax(1)
    assert torch.equal(state.memory.data.weight, weight[at]) and len(at) == N


@pytest.mark.parametrize("name", ["logit", "poisson"])
def test_streams_of_other_likelihoods_with_all_rows_in_memory_are_one(name):
    model, data = toy(name)
    options = Stream(memory=N, **FIXED)
    common, states = shards(model, data, options)
    state, _ = sums.merged(model, states, common, options)
    expected, bound = batch(model, data)
    assert abs(held.evidence_of(model, state) - bound) < 1e-8
    close(held.posterior_of(model, state).marginals(X_NEW), expected.posterior.marginals(X_NEW), 1e-5)
    close(rest_of(state), (torch.zeros(9, dtype=DTYPE), torch.zeros(9, 9, dtype=DTYPE)), 1e-8)


@pytest.mark.parametrize("name", ["logit", "softmax"])
def test_merged_streams_of_other_likelihoods_are_near_one_of_all_rows(name):
    """Nearer than either of them: sites of what is gone are not those that all rows would have asked for."""
    model, data = toy(name, mean=None, tol=1e-9)
    options = Stream(memory=6, **FIXED)
    common, states = shards(model, data, options)
    state, _ = sums.merged(model, states, common, options)
    expected = batch(model, data)[0].posterior.mean(X_NEW)
    off = [float((held.posterior_of(model, each).mean(X_NEW) - expected).abs().max()) for each in (state, *states)]
    assert off[0] < 0.5 * min(off[1:])
    assert state.memory.data.n_rows == 6


def test_the_policy_chooses_the_memory_of_merged_streams():
    model, data = toy()
    options = Stream(memory=6, policy="bls_top", **FIXED)
    common, states = shards(model, data, options)
    state, _ = sums.merged(model, states, common, options)
    full, _ = sums.merged(model, states, common, replace(options, memory=None))
    posterior = held.posterior_of(model, full)
    best = (posterior.variance_at_data / NOISE).topk(6).indices
    assert set(state.memory.data.X[:, 0].tolist()) == set(full.memory.data.X[best, 0].tolist())


def test_streams_with_other_places_or_weights_are_not_merged():
    model, data = toy()
    options = Stream(memory=6, **FIXED)
    common, states = shards(model, data, options)
    with pytest.raises(ValueError, match="different inducing points"):
        sums.merged(model, [states[0], replace(states[1], Z=Z + 0.1)], common, options)
    for weighed in ({"forgetting": 0.9}, {"memory_weight": 2.0}):
        with pytest.raises(ValueError, match="forgetting=1"):
            sums.merged(model, states, common, replace(options, **weighed))


# ---- odd batches


@pytest.mark.parametrize("name", ["gaussian", "logit"])
def test_batches_of_one_row_and_of_equal_rows_are_taken(name):
    model, data = toy(name, n_inducing=6)
    same = Data(data.X[:1].repeat(5, 1), data.y[:1].repeat(5), torch.ones(5, dtype=DTYPE))
    options = Stream(memory=3, **GREEDY)
    state = held.start(model, data, 0)
    for part in (data.rows(torch.tensor([0])), same, data.rows(torch.arange(1, 9))):
        outcome = streams.update(model, state, part, options, learning=False)
        state = outcome.state
        mean, variance = outcome.posterior.marginals(X_NEW)
        assert bool(mean.isfinite().all()) and bool((variance > 0).all())
    assert state.n_seen == 14 and state.n_batches == 3


def test_evidence_of_a_state_is_the_bound_of_all_rows():
    """Whatever of them is in memory, and after hyperparameters of the noise have moved."""
    model, data = toy()
    for memory in (0, 7, N):
        state = go(model, data, parts_of([12, 12]), Stream(memory=memory, **FIXED)).state
        for noise in (NOISE, 0.3):
            with torch.no_grad():
                model.likelihood.log_noise_variance.fill_(math.log(noise))
            assert float(noise_variance(model, data.y[0])) == pytest.approx(noise)
            bound = float(titsias(data.X, data.y - MEAN, noise=noise))
            assert held.evidence_of(model, _again(model, state)) == pytest.approx(bound, rel=1e-9)
        with torch.no_grad():
            model.likelihood.log_noise_variance.fill_(math.log(NOISE))


def _again(model, state):
    """The state with sites of memory's rows at the present noise."""
    return sums.without(model, state, torch.ones(state.memory.data.n_rows, dtype=DTYPE), None)
