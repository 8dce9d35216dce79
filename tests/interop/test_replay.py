"""ReplayBuffer: a seeded view of the memory of a stream, with weights that stand for the rows that are gone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import SGDClassifier

from mercer import GPClassifier, GPRegressor
from mercer.interop.continual import ReplayBuffer
from mercer.kernels import RBF
from mercer.sequential import Stream


def regressor(memory=12, policy="bls_sample", seed=0):
    stream = Stream(n_inducing=20, memory=memory, policy=policy, hyperparameters="frozen", dense_rows=0)
    return GPRegressor(RBF(1.0), stream=stream, optimizer=None, random_state=seed)


def rows(n_rows, seed=0):
    X = np.random.default_rng(seed).uniform(0, 6, size=(n_rows, 1))
    return X, np.sin(X[:, 0])


@pytest.fixture
def filled():
    model = regressor()
    for seed in range(3):
        model.partial_fit(*rows(40, seed))
    return model


def test_the_buffer_is_the_memory(filled):
    buffer = ReplayBuffer(filled)
    X, y, weight = buffer.rows()
    memory = filled.memory_
    np.testing.assert_array_equal(X, memory.X)
    np.testing.assert_array_equal(weight, memory.sample_weight / memory.inclusion)
    assert len(buffer) == buffer.max_size == 12
    one_by_one = list(buffer)
    np.testing.assert_array_equal([target for _, target, _ in one_by_one], y)
    assert one_by_one[3][2] == weight[3]
    filled.partial_fit(*rows(40, 3))
    assert not np.array_equal(buffer.rows()[0], X)


def test_batches_are_seeded_and_bring_each_row_once(filled):
    first, second = (ReplayBuffer(filled, random_state=7) for _ in range(2))
    for _ in range(2):  # the second pass goes on drawing
        passes = [list(buffer.batches(5)) for buffer in (first, second)]
        assert [len(y) for _, y, _ in passes[0]] == [5, 5, 2]
        for ours, theirs in zip(*passes, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(np.sort(np.concatenate([y for _, y, _ in passes[0]])), np.sort(filled.memory_.y))
    orders = [np.concatenate([y for _, y, _ in first.batches(5)]) for _ in range(2)]
    assert not np.array_equal(*orders)
    assert not np.array_equal(next(ReplayBuffer(filled, random_state=8).batches(12))[1], orders[0])


def test_sample_draws_different_rows(filled):
    buffer = ReplayBuffer(filled)
    X, y, weight = buffer.sample(5)
    assert X.shape == (5, 1)
    assert len(np.unique(X)) == len(y) == len(weight) == 5
    assert len(buffer.sample(100)[1]) == 12


@pytest.mark.parametrize("policy", ["uniform", "bls_sample"])
def test_weighted_sums_estimate_those_of_the_stream(policy):
    X, y = rows(60, 1)
    sums, counts = [], []
    for seed in range(16):
        model = regressor(15, policy, seed)
        for start in range(0, 60, 20):
            model.partial_fit(X[start : start + 20], y[start : start + 20])
        _, kept, weight = ReplayBuffer(model).rows()
        sums.append(weight @ kept**2)
        counts.append(weight.sum())
    for found, truth in ((sums, (y**2).sum()), (counts, 60)):
        error = np.std(found) / np.sqrt(len(found))
        assert abs(np.mean(found) - truth) < 4 * error + 1e-9


def test_plain_weights_count_rows(filled):
    np.testing.assert_array_equal(ReplayBuffer(filled, weighting="plain").rows()[2], filled.memory_.sample_weight)


def test_rows_get_their_shape_back_and_become_tensors():
    X = np.random.default_rng(0).normal(size=(30, 4))
    stream = Stream(n_inducing=20, memory=6, hyperparameters="frozen", dense_rows=0)
    model = GPClassifier(RBF(1.0), stream=stream, optimizer=None, random_state=0)
    buffer = ReplayBuffer(model, classes=[0, 1], shape=(1, 2, 2), wrap=lambda rows: ("wrapped", len(rows)))
    assert len(buffer) == len(list(buffer)) == len(buffer.buffer) == 0
    strategy = SimpleNamespace(experience=SimpleNamespace(X=X, y=(X[:, 0] > 0).astype(int)))
    buffer.update(strategy, num_workers=0)
    assert model.stream_.n_seen == 30
    assert buffer.buffer == ("wrapped", 6)
    image, label, weight = buffer.dataset()[0]
    assert image.shape == (1, 2, 2)
    assert (label.dtype, weight.dtype) == (torch.int64, torch.float64)
    np.testing.assert_array_equal(image.reshape(-1), model.memory_.X[0])
    buffer.resize(strategy, 4)
    buffer.update(strategy)
    assert len(buffer) == buffer.max_size == 4


def test_labels_without_numbers_make_no_tensors():
    X = np.random.default_rng(0).normal(size=(20, 1))
    model = GPClassifier(RBF(1.0), optimizer=None).partial_fit(X, np.where(X[:, 0] > 0, "yes", "no"))
    assert set(ReplayBuffer(model).rows()[1]) == {"yes", "no"}
    with pytest.raises(ValueError, match="number the classes"):
        ReplayBuffer(model).dataset()


def test_what_makes_no_buffer_is_refused(filled):
    with pytest.raises(TypeError, match="memory of a stream"):
        ReplayBuffer(SGDClassifier())
    with pytest.raises(ValueError, match="weighting"):
        ReplayBuffer(filled, weighting="leverage")
    with pytest.raises(ValueError, match="batch_size"):
        next(ReplayBuffer(filled).batches(0))
