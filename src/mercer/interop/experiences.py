"""Experiences: the parts of a data set that a continual learner meets one after the other.

The words are Avalanche's: a benchmark has a stream of training experiences and one of test experiences, each with its
number ``current_experience``. Only arrays are held here, and nothing of Avalanche is imported; `arrays_of` reads its
experiences as well as ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import type_of_target


@dataclass(frozen=True, eq=False)
class Experience:
    """Rows that come together.

    Parameters
    ----------
    X : (n, d)
    y : (n,)
    current_experience : int
        Its number in the stream, from 0.
    name : str
        For tables and pictures.
    """

    X: np.ndarray
    y: np.ndarray
    current_experience: int
    name: str = ""

    def __len__(self) -> int:
        return len(self.X)

    @property
    def classes_in_this_experience(self) -> list:
        """Labels that occur, sorted."""
        return np.unique(self.y).tolist()


@dataclass(frozen=True, eq=False)
class Benchmark:
    """A sequence of experiences with a test set each.

    Parameters
    ----------
    train_stream, test_stream : tuple of Experience
        Equally many; ``test_stream[j]`` tests what ``train_stream[j]`` teaches.
    classes : ndarray or None
        All labels, which a classifier must be told before it has seen them; None for regression.
    """

    train_stream: tuple[Experience, ...]
    test_stream: tuple[Experience, ...]
    classes: np.ndarray | None = None

    def __post_init__(self) -> None:
        n_train, n_test = len(self.train_stream), len(self.test_stream)
        if n_train != n_test or n_train == 0:
            raise ValueError(f"test_stream must have one experience for each of train_stream, got {n_test}, {n_train}.")

    def __len__(self) -> int:
        return len(self.train_stream)

    @property
    def names(self) -> list[str]:
        """Names of the experiences."""
        return [each.name or f"task {each.current_experience + 1}" for each in self.train_stream]


def class_incremental(
    X: Any,
    y: Any,
    tasks: int | Sequence[Sequence[Any]],
    *,
    test_size: float = 0.2,
    test: Any = None,
    random_state: Any = 0,
) -> Benchmark:
    """Return experiences that bring new classes: split digits, split MNIST.

    Parameters
    ----------
    X : (n, d)
    y : (n,)
        Labels.
    tasks : sequence of sequences of labels, or int
        Labels of each experience, no label twice; rows of other labels are left out. A number makes so many groups of
        the sorted labels, as equal as they can be.
    test_size : float in (0, 1), default=0.2
        Share of the rows of each label that are held out.
    test : (X_test, y_test), default=None
        Test rows of their own; nothing is then held out.
    random_state : int, RandomState or None, default=0
        Draws the rows that are held out. The others keep their order.

    Returns
    -------
    Benchmark
        A label is never told which task it is of: one classifier for all classes ("class-incremental").

    Raises
    ------
    ValueError
        A label in two tasks or in no row, or more tasks than labels.
    """
    X, y = _rows(X, y)
    labels = np.unique(y)
    if isinstance(tasks, int | np.integer):
        if not 1 <= tasks <= len(labels):
            raise ValueError(f"tasks must be from 1 to {len(labels)}, the number of labels in y, got {tasks}.")
        groups = [group.tolist() for group in np.array_split(labels, tasks)]
    else:
        groups = [list(task) for task in tasks]
    flat = [label for group in groups for label in group]
    twice = [label for label in flat if flat.count(label) > 1]
    if twice:
        raise ValueError(f"tasks must have each label once; {twice[0]!r} is in several.")
    unknown = [label for label in flat if label not in set(labels.tolist())]
    if unknown or not all(groups):
        raise ValueError(f"tasks must hold labels of y, {labels.tolist()}, in every task; got {groups}.")
    (X, y), (X_test, y_test) = _parts(X, y, test_size, test, random_state)
    train: list[Experience] = []
    held_out: list[Experience] = []
    for i, group in enumerate(groups):
        name = ", ".join(map(str, group))
        for stream, rows, targets in ((train, X, y), (held_out, X_test, y_test)):
            inside = np.isin(targets, group)
            stream.append(Experience(rows[inside], targets[inside], i, name))
    return Benchmark(tuple(train), tuple(held_out), np.unique(np.array(flat)))


def permuted(
    X: Any, y: Any, tasks: int | Any, *, test_size: float = 0.2, test: Any = None, random_state: Any = 0
) -> Benchmark:
    """Return experiences with the same rows, their columns in another order each time: permuted MNIST.

    Parameters
    ----------
    X : (n, d)
    y : (n,)
        Labels or real targets.
    tasks : int, or int array of shape (n_tasks, d)
        Number of experiences, the first with the columns as they are; or the order of the columns in each.
    test_size, test, random_state
        As in `class_incremental`; ``random_state`` draws the permutations too, which are the same for training and
        test rows.

    Returns
    -------
    Benchmark

    Raises
    ------
    ValueError
        ``tasks`` are no permutations of the columns.

    Notes
    -----
    An isotropic kernel sees distances only, which one permutation of all rows leaves as they are: each experience by
    itself is as hard as the first. What is tested is room for several of them at once, and forgetting.

    References
    ----------
    Goodfellow, Mirza, Xiao, Courville and Bengio (2014), "An empirical investigation of catastrophic forgetting".
    """
    X, y = _rows(X, y)
    rng = check_random_state(random_state)
    train, held_out = _parts(X, y, test_size, test, rng)
    d = X.shape[1]
    if isinstance(tasks, int | np.integer):
        if tasks < 1:
            raise ValueError(f"tasks must be at least 1, got {tasks}.")
        orders = np.array([np.arange(d), *(rng.permutation(d) for _ in range(tasks - 1))])
    else:
        orders = np.asarray(tasks)
    if orders.ndim != 2 or not np.array_equal(np.sort(orders, axis=1), np.tile(np.arange(d), (len(orders), 1))):
        raise ValueError(f"tasks must be a number, or permutations of {d} columns in rows; got shape {orders.shape}.")
    names = ["as they are" if (order == np.arange(d)).all() else f"permuted {i}" for i, order in enumerate(orders)]
    streams = [
        tuple(Experience(rows[:, order], targets, i, names[i]) for i, order in enumerate(orders))
        for rows, targets in (train, held_out)
    ]
    return Benchmark(streams[0], streams[1], np.unique(y) if _discrete(y) else None)


def arrays_of(experience: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of an experience, (n, d) and (n,).

    Parameters
    ----------
    experience : Experience, or one of Avalanche
        Of the latter the ``dataset`` is gone through, whose items start with x and y; x of any shape is made flat.

    Raises
    ------
    TypeError
        Neither of both.
    """
    if hasattr(experience, "X") and hasattr(experience, "y"):
        return np.asarray(experience.X), np.asarray(experience.y)
    dataset = getattr(experience, "dataset", None)
    if dataset is None:
        raise TypeError(f"experience must have X and y, or a dataset as in Avalanche; got {type(experience).__name__}.")
    items = [dataset[i] for i in range(len(dataset))]
    X = np.stack([np.asarray(item[0], dtype=np.float64).reshape(-1) for item in items])
    return X, np.array([np.asarray(item[1]).item() for item in items])


def _rows(X: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    X, y = np.asarray(X), np.asarray(y)
    if X.ndim != 2 or y.shape != (len(X),):
        raise ValueError(f"X must be (n, d) and y (n,), got {X.shape} and {y.shape}; make images flat.")
    return X, y


def _discrete(y: np.ndarray) -> bool:
    return type_of_target(y) in ("binary", "multiclass")


def _parts(X: np.ndarray, y: np.ndarray, test_size: float, test: Any, random_state: Any) -> tuple[Any, Any]:
    """Return training and test rows, each (X, y)."""
    if test is not None:
        X_test, y_test = _rows(*test)
        if X_test.shape[1] != X.shape[1]:
            raise ValueError(f"test must have the {X.shape[1]} columns of X, got {X_test.shape[1]}.")
        return (X, y), (X_test, y_test)
    if not 0 < test_size < 1:
        raise ValueError(f"test_size must be a share between 0 and 1, got {test_size!r}.")
    rng = check_random_state(random_state)
    held_out = np.zeros(len(y), dtype=bool)
    for group in [np.flatnonzero(y == label) for label in np.unique(y)] if _discrete(y) else [np.arange(len(y))]:
        if len(group) < 2:
            raise ValueError(f"y has the label {y[group[0]]!r} once only; a row to learn and one to test are needed.")
        n_test = int(np.clip(round(test_size * len(group)), 1, len(group) - 1))
        held_out[rng.permutation(group)[:n_test]] = True
    return (X[~held_out], y[~held_out]), (X[held_out], y[held_out])
