"""Continual learning: numbers against matrices worked out by hand, hooks in their order, experiences of arrays."""

from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import SGDClassifier

from mercer import GPClassifier, GPRegressor
from mercer.interop.continual import (
    Benchmark,
    ContinualScore,
    ContinualStrategy,
    EstimatorHooks,
    Experience,
    arrays_of,
    class_incremental,
    permuted,
)
from mercer.kernels import RBF
from mercer.sequential import Stream

EVENTS = [f"{when}_{what}" for what in ("training", "training_exp", "eval", "eval_exp") for when in ("before", "after")]
# task 1 is known best after experience 2, task 2 is half known before it is taught
R = np.array([[0.8, 0.5, 0.1], [0.9, 0.6, 0.3], [0.4, 0.7, 1.0]])


class Recorder:
    """Every hook, and where the strategy was when it was called."""

    def __init__(self):
        self.calls = []
        for event in EVENTS:
            setattr(self, event, lambda strategy, event=event: self._note(event, strategy))

    def _note(self, event, strategy):
        number = None if strategy.experience is None else strategy.experience.current_experience
        self.calls.append((event, number, strategy.is_training))


def digits(n_rows):
    X, y = load_digits(return_X_y=True)
    return X[:n_rows] / 16, y[:n_rows]


def streaming(memory):
    stream = Stream(n_inducing=40, memory=memory, hyperparameters="frozen", dense_rows=0)
    kernel = RBF(lengthscale=2.0, outputscale=5.0)
    return GPClassifier(kernel, stream=stream, optimizer=None, standardize=False, random_state=0)


# ---- numbers


def test_numbers_of_a_small_matrix():
    score = ContinualScore(R, baseline=[0.1, 0.2, 0.3])
    assert score.average_accuracy() == pytest.approx((0.4 + 0.7 + 1.0) / 3)
    np.testing.assert_allclose(score.forgetting_by_task(), [0.9 - 0.4, 0.6 - 0.7])
    assert score.forgetting() == pytest.approx(0.2)
    assert score.backward_transfer() == pytest.approx(((0.4 - 0.8) + (0.7 - 0.6)) / 2)
    assert score.forward_transfer() == pytest.approx(((0.5 - 0.2) + (0.3 - 0.3)) / 2)


def test_numbers_after_some_experiences_do_not_see_later_ones():
    score = ContinualScore(R, baseline=0.2)
    assert score.average_accuracy(2) == pytest.approx(0.75)
    assert score.forgetting(2) == pytest.approx(0.8 - 0.9)
    assert score.backward_transfer(2) == pytest.approx(0.1)
    assert score.forward_transfer(2) == pytest.approx(0.3)
    unfinished = ContinualScore(R[:2], baseline=0.2)
    assert unfinished.summary() == {name: pytest.approx(value) for name, value in score.summary(2).items()}


def test_after_one_experience_there_is_nothing_to_forget_or_transfer():
    score = ContinualScore(R)
    assert score.average_accuracy(1) == 0.8
    assert len(score.forgetting_by_task(1)) == 0
    assert np.isnan([score.forgetting(1), score.backward_transfer(1), score.forward_transfer(1)]).all()


def test_forgetting_is_at_least_what_backward_transfer_lost():
    generator = np.random.default_rng(0)
    for _ in range(20):
        score = ContinualScore(generator.uniform(size=(5, 5)))
        assert score.forgetting() >= -score.backward_transfer() - 1e-12
    falling = ContinualScore(np.tril(np.linspace(1.0, 0.2, 5)[:, None] * np.ones(5)))
    assert falling.forgetting() == pytest.approx(-falling.backward_transfer())


def test_nlpd_is_that_of_the_tasks_seen():
    score = ContinualScore(R[:2], log_score=[[-0.1, -9, -9], [-0.3, -0.5, -9]])
    assert score.summary()["nlpd"] == pytest.approx(0.4)
    assert "nlpd" not in ContinualScore(R).summary()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"matrix": np.ones((3, 2))}, "matrix must be"),
        ({"matrix": np.ones(3)}, "matrix must be"),
        ({"matrix": R, "baseline": [0.1]}, "baseline must be"),
        ({"matrix": R, "log_score": R[:2]}, "log_score must have"),
        ({"matrix": R, "names": ["a"]}, "names must be 3"),
    ],
)
def test_scores_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ContinualScore(**arguments)


def test_after_counts_experiences_from_one():
    for wrong in (0, 4):
        with pytest.raises(ValueError, match="from 1 to 3"):
            ContinualScore(R).average_accuracy(wrong)


# ---- experiences


def test_class_incremental_experiences_share_no_row_and_no_class():
    X, y = digits(300)
    benchmark = class_incremental(X, y, [[3, 1], [0, 7]], test_size=0.25, random_state=1)
    assert [each.classes_in_this_experience for each in benchmark.train_stream] == [[1, 3], [0, 7]]
    assert [each.classes_in_this_experience for each in benchmark.test_stream] == [[1, 3], [0, 7]]
    assert benchmark.names == ["3, 1", "0, 7"]
    np.testing.assert_array_equal(benchmark.classes, [0, 1, 3, 7])
    parts = [*benchmark.train_stream, *benchmark.test_stream]
    assert sum(map(len, parts)) == np.isin(y, [0, 1, 3, 7]).sum()
    rows = np.concatenate([each.X for each in parts])
    assert len(np.unique(rows, axis=0)) == len(rows)
    for label in (0, 1, 3, 7):
        held_out = sum((each.y == label).sum() for each in benchmark.test_stream)
        assert held_out == round(0.25 * (y == label).sum())


def test_a_number_of_tasks_groups_the_sorted_labels():
    X, y = digits(200)
    benchmark = class_incremental(X, y, 4, test=(X[:100], y[:100]))
    assert [each.classes_in_this_experience for each in benchmark.train_stream] == [
        [0, 1, 2],
        [3, 4, 5],
        [6, 7],
        [8, 9],
    ]
    assert sum(map(len, benchmark.test_stream)) == 100
    again = class_incremental(X, y, 4, test=(X[:100], y[:100]))
    np.testing.assert_array_equal(again.train_stream[2].X, benchmark.train_stream[2].X)


def test_permutations_are_the_same_for_training_and_test_rows():
    X = np.arange(80.0).reshape(10, 8)
    benchmark = permuted(X, np.arange(10) % 2, 3, random_state=5)
    assert benchmark.names[0] == "as they are"
    for train, test in zip(benchmark.train_stream, benchmark.test_stream, strict=True):
        order = np.argsort(train.X[0] % 8)
        for stream, part in ((benchmark.train_stream, train), (benchmark.test_stream, test)):
            np.testing.assert_array_equal(part.X[:, order], stream[0].X)
            np.testing.assert_array_equal(part.y, stream[0].y)
    assert not np.array_equal(benchmark.train_stream[1].X, benchmark.train_stream[0].X)
    given = permuted(X, np.arange(10) % 2, [range(7, -1, -1)], random_state=5)
    np.testing.assert_array_equal(given.train_stream[0].X, benchmark.train_stream[0].X[:, ::-1])
    assert permuted(X, np.linspace(0, 1, 10), 2).classes is None


def test_experiences_that_cannot_be_are_refused():
    X, y = digits(100)
    for tasks, message in (([[0], [0, 1]], "each label once"), ([[0, 11]], "labels of y"), (11, "from 1 to 10")):
        with pytest.raises(ValueError, match=message):
            class_incremental(X, y, tasks)
    with pytest.raises(ValueError, match="permutations of 64 columns"):
        permuted(X, y, [[0, 1]])
    with pytest.raises(ValueError, match="test_size"):
        permuted(X, y, 2, test_size=1.0)
    with pytest.raises(ValueError, match="once only"):
        class_incremental(X[:11], [*y[:10], 0], 2)
    with pytest.raises(ValueError, match="one experience for each"):
        Benchmark((Experience(X, y, 0),), ())


def test_experiences_of_avalanche_are_read():
    items = [(np.full((1, 2, 2), i), i % 2, 0) for i in range(3)]
    X, y = arrays_of(SimpleNamespace(dataset=items))
    np.testing.assert_array_equal(X, [[0.0] * 4, [1.0] * 4, [2.0] * 4])
    np.testing.assert_array_equal(y, [0, 1, 0])
    with pytest.raises(TypeError, match="X and y, or a dataset"):
        arrays_of(object())


# ---- hooks and the strategy


def test_hooks_are_called_in_their_order():
    X, y = digits(60)
    benchmark = class_incremental(X, y, [[0, 1], [2, 3]])
    recorder = Recorder()
    ContinualStrategy(SGDClassifier(), plugins=[recorder, object()]).run(benchmark)
    train = ["before_training", "before_training_exp", "after_training_exp", "after_training"]
    test = ["before_eval", *["before_eval_exp", "after_eval_exp"] * 2, "after_eval"]
    assert [event for event, _, _ in recorder.calls] == (train + test) * 2
    assert all(training == ("training" in event) for event, _, training in recorder.calls)
    seen = [(event, number) for event, number, _ in recorder.calls if event.endswith("_exp")]
    tested = [(f"{when}_eval_exp", j) for j in (0, 1) for when in ("before", "after")]
    taught = [[(f"{when}_training_exp", i) for when in ("before", "after")] for i in (0, 1)]
    assert seen == taught[0] + tested + taught[1] + tested


def test_the_estimator_has_learned_when_others_hear_of_it():
    X, y = digits(60)
    known = []
    plugin = SimpleNamespace(
        before_training_exp=lambda strategy: known.append(hasattr(strategy.estimator, "coef_")),
        after_training_exp=lambda strategy: known.append(hasattr(strategy.estimator, "coef_")),
    )
    strategy = ContinualStrategy(SGDClassifier(), plugins=[plugin], classes=range(10))
    strategy.train(Experience(X, y, 0))
    assert known == [False, True]


def test_the_matrix_is_what_score_says():
    X, y = digits(200)
    benchmark = class_incremental(X, y, 3)
    score = ContinualStrategy(SGDClassifier(random_state=0)).run(benchmark)
    model = SGDClassifier(random_state=0)
    for i, taught in enumerate(benchmark.train_stream):
        model.partial_fit(taught.X, taught.y, classes=benchmark.classes)
        np.testing.assert_array_equal(score.matrix[i], [model.score(each.X, each.y) for each in benchmark.test_stream])
    assert score.baseline == pytest.approx(0.1)
    assert score.log_score is None
    assert len(score.seconds) == 3
    assert score.names == benchmark.names


def test_a_second_run_goes_on_learning_with_a_matrix_of_its_own():
    X, y = digits(100)
    strategy = ContinualStrategy(SGDClassifier(random_state=0))
    benchmark = class_incremental(X, y, 2)
    strategy.run(benchmark)
    assert strategy.run(benchmark).matrix[0].min() > 0  # neither task is new


@pytest.mark.filterwarnings("ignore:.*nats were lost")
def test_memory_keeps_split_digits_from_being_forgotten():
    benchmark = class_incremental(*digits(600), 5)
    none, some = (ContinualStrategy(streaming(memory)).run(benchmark) for memory in (0, 50))
    assert none.forgetting() > 0.08
    assert some.forgetting() < 0.06
    assert some.average_accuracy() > none.average_accuracy() + 0.05
    assert some.summary()["nlpd"] < none.summary()["nlpd"]
    assert np.array_equal(np.triu(some.matrix, 1), np.zeros((5, 5)))  # classes to come are never predicted
    assert some.forward_transfer() == pytest.approx(-0.1)


def test_isotropic_kernels_do_not_see_one_permutation_of_all_rows():
    benchmark = permuted(*digits(120), 2)
    probabilities = []
    for taught, tested in zip(benchmark.train_stream, benchmark.test_stream, strict=True):
        model = GPClassifier(RBF(2.0), optimizer=None, standardize=False).fit(taught.X, taught.y)
        probabilities.append(model.predict_proba(tested.X))
    np.testing.assert_allclose(probabilities[0], probabilities[1], atol=1e-6)


def test_regression_in_batches_is_scored_by_r2():
    X = np.linspace(0, 6, 60)[:, None]
    benchmark = permuted(X, np.sin(X[:, 0]), 1)
    strategy = ContinualStrategy(GPRegressor(RBF(1.0), optimizer=None), batch_size=20)
    score = strategy.run(benchmark)
    assert score.matrix[0, 0] > 0.9
    assert score.baseline == 0
    assert score.log_score.shape == (1, 1)
    assert strategy.estimator.fit_report_.n_rows == 48


def test_hooks_live_in_a_strategy_of_another_library():
    X, y = digits(80)
    images = [(X[i].reshape(1, 8, 8), y[i], 0) for i in range(80)]
    hooks = EstimatorHooks(GPClassifier(RBF(2.0), optimizer=None, standardize=False), classes=range(10))
    other = SimpleNamespace(experience=SimpleNamespace(dataset=images[:50], current_experience=0))
    hooks.after_eval_exp(other)  # before anything was learned
    with pytest.raises(ValueError, match="no scores yet"):
        hooks.score()
    hooks.after_training_exp(other, num_workers=0)
    other.experience = SimpleNamespace(dataset=images[50:], current_experience=2)
    hooks.after_eval_exp(other)
    score = hooks.score()
    assert np.isnan(score.matrix[0, :2]).all()
    assert score.matrix[0, 2] == hooks.estimator.score(X[50:], y[50:])


def test_what_cannot_learn_is_refused():
    with pytest.raises(TypeError, match="partial_fit"):
        ContinualStrategy(object())
    with pytest.raises(ValueError, match="batch_size"):
        EstimatorHooks(SGDClassifier(), batch_size=0)
