"""Memory policies: what they promise of one choice, and what comes of many choices in a row."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mercer.sequential import (
    Candidates,
    ClassBalanced,
    LeverageSample,
    LeverageTop,
    Selection,
    Uniform,
    get_policy,
)
from mercer.sequential.sampling import inclusion_probabilities

BATCHES = (7, 1, 12, 3, 20)
CAPACITY = 6
POLICIES = [LeverageSample(), LeverageTop(), Uniform(), ClassBalanced(), ClassBalanced("bls_top")]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def fresh(score, **others):
    """Candidates that all come from the first batch."""
    score = torch.as_tensor(score, dtype=torch.float64)
    return Candidates(score, torch.zeros(len(score), dtype=torch.bool), len(score), **others)


def posterior(c, b=(), seed=0):
    """Posterior covariances of c points of the square, with curvatures."""
    random = np.random.default_rng(seed)
    X = random.uniform(size=(*b, c, 2))
    K = np.exp(-np.linalg.norm(X[..., :, None, :] - X[..., None, :, :], axis=-1))
    beta = random.uniform(0.1, 3.0, size=(*b, c))
    V = K - K @ np.linalg.solve(K + np.eye(c) / beta[..., None], K)
    return torch.as_tensor(V), torch.as_tensor(beta)


def conditional(V, beta, **others):
    variance = V.diagonal(dim1=-2, dim2=-1)
    score = (beta * variance).reshape(-1, V.shape[-1]).sum(0)
    return fresh(score, covariance=lambda j: V[..., j, :], variance=variance, beta=beta, **others)


def stream(policy, scores, seeded, labels=None, batches=BATCHES, capacity=CAPACITY, pass_on=True):
    """Put a stream through a policy; returns which rows are in memory in the end, and their inclusion."""
    rows, inclusion, n_seen = torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.float64), 0
    for size in batches:
        old = torch.cat([torch.ones(len(rows)), torch.zeros(size)]).bool()
        rows = torch.cat([rows, torch.arange(n_seen, n_seen + size)])
        n_seen += size
        inclusion = torch.cat([inclusion, torch.ones(size, dtype=torch.float64)])
        candidates = Candidates(
            scores[rows],
            old,
            n_seen,
            labels=None if labels is None else labels[rows],
            inclusion=inclusion if pass_on else None,
        )
        selection = policy.select(candidates, capacity, seeded)
        rows, inclusion = rows[selection.index], selection.inclusion
    return rows, inclusion


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@settings(max_examples=20, deadline=None)
@given(c=st.integers(0, 30), capacity=st.integers(0, 35), seed=st.integers(0, 99))
def test_memory_is_full_and_holds_each_row_once(policy, c, capacity, seed):
    random = np.random.default_rng(seed)
    candidates = fresh(random.exponential(size=c), labels=torch.as_tensor(random.integers(0, 4, size=c)))
    selection = policy.select(candidates, capacity, generator(seed))
    assert len(selection.index) == min(c, capacity) == len(selection.index.unique()) == len(selection.inclusion)
    assert ((selection.inclusion > 0) & (selection.inclusion <= 1)).all()
    assert selection.inclusion.dtype == torch.float64
    again = policy.select(candidates, capacity, generator(seed))
    assert torch.equal(again.index, selection.index)


def test_leverage_sample_has_its_inclusion_probabilities():
    score = torch.tensor([0.1, 0.4, -0.4, 0.9, 1.0, 1.6, 8.0], dtype=torch.float64)
    weight = torch.tensor([3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    chance, seeded, n_draws = inclusion_probabilities(score.abs() * weight, 3), generator(), 3000
    count = torch.zeros(7, dtype=torch.float64)
    for _ in range(n_draws):
        selection = LeverageSample().select(fresh(score, weight=weight), 3, seeded)
        torch.testing.assert_close(selection.inclusion, chance[selection.index], rtol=1e-15, atol=0)
        count[selection.index] += 1
    assert ((count / n_draws - chance).abs() <= 4.5 * (chance * (1 - chance) / n_draws).sqrt()).all()
    assert count[6] == n_draws


def test_leverage_sample_is_a_sample_of_the_whole_stream():
    """Every row seen is in memory in proportion to its leverage, whenever it came."""
    batches, seeded, n_runs = (20, 5, 12), generator(), 1000
    scores, count = torch.linspace(0.5, 1.5, 37, dtype=torch.float64).flip(0), torch.zeros(37, dtype=torch.float64)
    chance = CAPACITY * scores / scores.sum()
    for _ in range(n_runs):
        rows, inclusion = stream(LeverageSample(), scores, seeded, batches=batches)
        torch.testing.assert_close(inclusion, chance[rows], rtol=1e-13, atol=0)
        count[rows] += 1
    assert ((count / n_runs - chance).abs() <= 4.5 * (chance * (1 - chance) / n_runs).sqrt()).all()


def test_sums_over_the_stream_can_be_estimated_from_a_leverage_sample():
    """Σ y / inclusion over memory is unbiased for Σ y over all rows seen, also where some rows were certain once."""
    random, seeded, n_runs = np.random.default_rng(0), generator(), 1000
    scores, y = torch.as_tensor(random.exponential(size=43) + 0.2), torch.as_tensor(random.normal(size=43) + 2)
    estimates = np.empty(n_runs)
    for run in range(n_runs):
        rows, inclusion = stream(LeverageSample(), scores, seeded)
        estimates[run] = (y[rows] / inclusion).sum()
    error = estimates.std(ddof=1) / np.sqrt(n_runs)
    assert abs(estimates.mean() - y.sum()) <= 4 * error and error < 0.02 * y.sum()


@pytest.mark.parametrize("pass_on", [True, False])
def test_uniform_keeps_every_row_of_the_stream_with_equal_probability(pass_on):
    n, seeded, n_runs = sum(BATCHES), generator(), 700
    scores, count = torch.rand(n, generator=seeded), torch.zeros(n, dtype=torch.float64)
    for _ in range(n_runs):
        rows, inclusion = stream(Uniform(), scores, seeded, pass_on=pass_on)
        count[rows] += 1
        torch.testing.assert_close(inclusion, torch.full_like(inclusion, CAPACITY / n), rtol=1e-13, atol=0)
    chance = CAPACITY / n
    assert (abs(count / n_runs - chance) <= 4.5 * np.sqrt(chance * (1 - chance) / n_runs)).all()


def test_uniform_knows_of_a_capacity_that_has_changed():
    """A memory that grows fills itself with new rows and says so; one that shrinks stays uniform."""
    seeded, old = generator(), torch.arange(30) < 4
    candidates = Candidates(torch.ones(30), old, 100, inclusion=torch.where(old, 4 / 74, 1.0).double())
    shrunk = Uniform().select(candidates, 2, seeded)
    torch.testing.assert_close(shrunk.inclusion, torch.full((2,), 0.02, dtype=torch.float64))
    grown = Uniform().select(candidates, 20, seeded)
    assert set(range(4)) <= set(grown.index.tolist()) and len(grown.index) == 20
    expected = torch.where(grown.index < 4, candidates.inclusion[grown.index], 16 / 26)
    torch.testing.assert_close(grown.inclusion, expected)


def test_top_is_sorted_and_ties_go_to_the_lowest_position():
    selection = LeverageTop().select(fresh([1.0, 3.0, -3.0, 2.0, 1.0, 1.0]), 4, generator())
    assert selection.index.tolist() == [1, 2, 3, 0] and selection.inclusion.tolist() == [1.0] * 4
    weight = torch.tensor([9.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert LeverageTop().select(fresh([1.0, 3.0, 3.0, 2, 1, 1], weight=weight), 1, generator()).index.tolist() == [0]


@pytest.mark.parametrize("b", [(), (3,)])
@pytest.mark.parametrize("weighted", [False, True])
def test_conditional_top_equals_explicit_down_dating(b, weighted):
    V, beta = posterior(40, b)
    weight = torch.as_tensor(np.random.default_rng(1).integers(1, 4, size=40)) if weighted else None
    precision = beta if weight is None else beta * weight
    left, expected = V.clone(), []
    for _ in range(12):
        leverage = (precision * left.diagonal(dim1=-2, dim2=-1)).reshape(-1, 40).sum(0)
        leverage[expected] = -1
        j = int(leverage.argmax())
        expected.append(j)
        column = left[..., :, j]
        gain = 1.0 / (left[..., j, j] + 1.0 / precision[..., j])
        left = left - gain[..., None, None] * column[..., :, None] * column[..., None, :]
    candidates = conditional(V, beta, weight=weight)
    selection = LeverageTop(conditional=True).select(candidates, 12, generator())
    assert selection.index.tolist() == expected
    assert selection.index.tolist() != LeverageTop().select(candidates, 12, generator()).index.tolist()


def test_conditional_top_does_not_keep_copies_while_there_are_others():
    V, beta = posterior(20)
    copies = torch.cat([torch.tensor(5).repeat(30), torch.arange(20)])
    candidates = conditional(V[copies][:, copies] * 50, beta[copies] * 2)
    chosen = [LeverageTop(way).select(candidates, 10, generator()).index for way in (False, True)]
    distinct = [len(copies[index].unique()) for index in chosen]
    assert distinct[1] > distinct[0]


def test_conditional_top_fills_up_by_rank_where_no_leverage_is_left():
    V, _ = posterior(6)
    beta = torch.tensor([0.0, 2.0, -1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    selection = LeverageTop(conditional=True).select(conditional(V, beta), 5, generator())
    assert set(selection.index[:2].tolist()) == {1, 4} and selection.index[2:].tolist() == [2, 0, 3]


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=6), capacity=st.integers(0, 40), seed=st.integers(0, 9))
def test_classes_share_equally_and_leave_no_room_unused(sizes, capacity, seed):
    labels = torch.repeat_interleave(7 * torch.arange(len(sizes)), torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=generator(seed))]
    score = torch.rand(len(labels), generator=generator(seed), dtype=torch.float64)
    index = ClassBalanced().select(fresh(score, labels=labels), capacity, generator()).index
    kept = np.array([(labels[index] == 7 * code).sum() for code in range(len(sizes))])
    assert kept.sum() == min(capacity, sum(sizes))
    full = kept == np.array(sizes)
    if not full.all():
        share = kept[~full].min()
        assert kept.max() <= share + 1


def test_odd_rows_go_to_the_class_of_more_candidates_and_then_of_more_leverage():
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 2, 3, 3])
    score = torch.tensor([9.0, 8, 1, 2, 1, 2, 3, 5, 4], dtype=torch.float64)
    for capacity, expected in ((1, [6]), (2, [0, 6]), (5, [0, 3, 5, 6, 7]), (6, [0, 1, 3, 5, 6, 7])):
        selection = ClassBalanced(LeverageTop()).select(fresh(score, labels=labels), capacity, generator())
        assert sorted(selection.index.tolist()) == expected


def test_a_class_is_chosen_from_by_the_base():
    V, beta = posterior(30)
    labels = torch.arange(30) % 2
    base = LeverageTop(conditional=True)
    chosen = ClassBalanced(base).select(conditional(V, beta, labels=labels), 10, generator()).index
    for code in (0, 1):
        rows = torch.arange(code, 30, 2)
        alone = conditional(V[rows][:, rows], beta[rows])
        part = chosen[labels[chosen] == code]
        assert part.tolist() == rows[base.select(alone, 5, generator()).index].tolist()


def test_balanced_uniform_is_uniform_within_each_class_of_the_stream():
    seeded, n_runs = generator(), 400
    # the third class comes late, and the shares of the others shrink for it
    labels = torch.tensor(([0, 0, 1] * 8)[:23] + [2, 0, 2, 1, 2] * 4)
    count = torch.zeros(len(labels), dtype=torch.float64)
    for _ in range(n_runs):
        rows, inclusion = stream(ClassBalanced("uniform"), torch.ones(len(labels)), seeded, labels)
        count[rows] += 1
        for row, chance in zip(rows, inclusion, strict=True):
            assert abs(chance * (labels == labels[row]).sum() - 2) < 1e-12
    chance = 2 / labels.bincount()[labels]
    assert ((count / n_runs - chance).abs() <= 4.5 * (chance * (1 - chance) / n_runs).sqrt()).all()


def test_names_objects_and_functions_are_policies():
    names = {"bls_sample": LeverageSample(), "bls_top": LeverageTop(), "uniform": Uniform()}
    for name, policy in (names | {"class_balanced": ClassBalanced()}).items():
        assert get_policy(name) == policy and get_policy(policy) is policy
        assert dataclasses.is_dataclass(policy)

    def newest(candidates, capacity, generator):
        index = torch.arange(len(candidates)).flip(0)[:capacity]
        return Selection(index, torch.ones(len(index), dtype=torch.float64))

    assert get_policy(newest).select(fresh([1.0, 2, 3]), 2, generator()).index.tolist() == [2, 1]
    chosen = ClassBalanced(newest).select(fresh([1.0, 2, 3], labels=torch.tensor([0, 1, 1])), 2, generator())
    assert chosen.index.tolist() == [0, 2]
    with pytest.raises(ValueError, match="must be one of 'bls_sample', 'bls_top', 'uniform', 'class_balanced'"):
        get_policy("bls")
    with pytest.raises(TypeError, match=r"make an object of it, Uniform\(\)"):
        get_policy(Uniform)
    with pytest.raises(TypeError, match="have a method select or be callable"):
        get_policy(3)


@pytest.mark.parametrize(
    ("index", "inclusion", "message"),
    [
        ([0, 0], [1.0, 1.0], "each once"),
        ([0, 1, 2], [1.0, 1.0, 1.0], "at most 2 rows"),
        ([[0]], [[1.0]], "at most 2 rows"),
        ([3], [1.0], "outside of the 3 candidates"),
        ([-1], [1.0], "outside of the 3 candidates"),
        ([0], [0.0], "a probability"),
        ([0], [1.0, 1.0], "a probability"),
    ],
)
def test_answers_of_functions_are_checked(index, inclusion, message):
    policy = get_policy(lambda *_: Selection(torch.tensor(index), torch.tensor(inclusion)))
    with pytest.raises(ValueError, match=message):
        policy.select(fresh([1.0, 2, 3]), 2, generator())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": torch.ones(2, 3)}, "sum it over the latents"),
        ({"is_old": torch.zeros(2).bool()}, "is_old must have one entry"),
        ({"is_old": torch.zeros(3)}, "is_old must be boolean"),
        ({"labels": torch.zeros(2)}, "labels must have one entry"),
        ({"weight": torch.ones(2, 3)}, "weight must have one entry"),
        ({"beta": torch.ones(3, 2)}, "beta must have one entry"),
        ({"score": torch.tensor([1.0, torch.nan, 1.0])}, "score holds NaN"),
        ({"n_seen": 2}, "n_seen must count all rows"),
        ({"inclusion": torch.zeros(3)}, "inclusion must hold probabilities"),
        ({"inclusion": torch.full((3,), 1.1)}, "inclusion must hold probabilities"),
    ],
)
def test_candidates_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        Candidates(**({"score": torch.ones(3), "is_old": torch.zeros(3).bool(), "n_seen": 3} | change))


def test_what_a_policy_lacks_is_named():
    with pytest.raises(ValueError, match="ClassBalanced needs the labels"):
        ClassBalanced().select(fresh([1.0]), 1, generator())
    with pytest.raises(ValueError, match="needs covariance, variance and beta"):
        LeverageTop(conditional=True).select(fresh([1.0]), 1, generator())
    for policy in POLICIES:
        with pytest.raises(ValueError, match="capacity must not be negative"):
            policy.select(fresh([1.0], labels=torch.tensor([0])), -1, generator())


def test_a_part_of_the_candidates_knows_how_it_was_sampled():
    """Old rows of one class alone are not a uniform sample of the stream, but of their class."""
    candidates = Candidates(torch.ones(10), torch.arange(10) < 4, 46, labels=torch.arange(10) % 2)
    assert candidates.presence().tolist() == pytest.approx([0.1] * 4 + [1.0] * 6)
    part = candidates.take(torch.tensor([9, 2, 0]))
    assert part.presence().tolist() == pytest.approx([1.0, 0.1, 0.1]) and part.labels.tolist() == [1, 0, 0]
