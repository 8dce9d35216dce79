"""The memory of a stream as a replay buffer for any learner.

What a Gaussian process keeps of a stream are the rows that it is least sure of, by their Bayesian leverage. A network
trained on batches of a stream can rehearse on the same rows. Nothing is copied here: the buffer is a view of the
estimator's memory as it is now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_random_state
from torch.utils.data import TensorDataset

from mercer.interop.experiences import arrays_of
from mercer.sequential import Stream


class ReplayBuffer:
    """Rows that an estimator keeps of a stream, one by one or in mini-batches.

    Parameters
    ----------
    estimator : mercer estimator
        Its ``stream`` says how many rows are kept, and which: ``Stream(memory=200, policy="bls_sample",
        dense_rows=0)``. Until a stream begins all rows are in memory.
    classes : array-like, default=None
        All labels, for a classifier that learns by `post_adapt`.
    shape : tuple of int, default=None
        Of one row, if it was an image: (1, 8, 8), say.
    weighting : {"inclusion", "plain"}, default="inclusion"
        "inclusion": a row stands for sample_weight / inclusion rows seen, so that a weighted sum over the buffer is an
        unbiased estimate of the sum over the whole stream (Horvitz and Thompson, 1952). That is true of policies that
        draw; "bls_top" has no probabilities, and its weights are plain. "plain": sample_weight alone, so that the rows
        that the policy prefers count more than they came.
    random_state : int, RandomState or None, default=0
        Of `batches` and `sample`, which go on drawing from it call by call.
    wrap : callable, default=None
        What `buffer` makes of its dataset.

    Notes
    -----
    In Avalanche the buffer is the ``storage_policy`` of ``ReplayPlugin``; it has ``max_size``, ``buffer``, ``resize``,
    ``update`` and ``post_adapt`` for that. Avalanche wants its own datasets back, which ``wrap`` makes; its items have
    no weights. The estimator must not learn from the same experiences in another way beside::

        def wrap(rows):
            x, y, _ = rows.tensors
            data = TensorDataset(x.float(), y)
            data.targets = y.tolist()
            return as_classification_dataset(data)

        estimator = GPClassifier(stream=Stream(memory=200, dense_rows=0))
        buffer = ReplayBuffer(estimator, classes=range(10), shape=(1, 28, 28), wrap=wrap)
        strategy = Naive(..., plugins=[ReplayPlugin(mem_size=200, storage_policy=buffer)])

    Examples
    --------
    >>> import numpy as np
    >>> from mercer import GPRegressor
    >>> from mercer.interop.continual import ReplayBuffer
    >>> from mercer.sequential import Stream
    >>> model = GPRegressor("rbf", stream=Stream(memory=5, dense_rows=0), family="inducing", random_state=0)
    >>> buffer = ReplayBuffer(model)
    >>> X = np.linspace(0, 6, 40)[:, None]
    >>> _ = model.partial_fit(X, np.sin(X[:, 0]))
    >>> len(buffer), [len(y) for _, y, _ in buffer.batches(2)]
    (5, [2, 2, 1])
    """

    def __init__(
        self,
        estimator: Any,
        *,
        classes: Any = None,
        shape: tuple[int, ...] | None = None,
        weighting: str = "inclusion",
        random_state: Any = 0,
        wrap: Callable[[TensorDataset], Any] | None = None,
    ) -> None:
        if not hasattr(estimator, "partial_fit") or not hasattr(type(estimator), "memory_"):
            raise TypeError(f"estimator must have a memory of a stream, as GPClassifier has; got {estimator!r}.")
        if weighting not in ("inclusion", "plain"):
            raise ValueError(f"weighting must be 'inclusion' or 'plain', got {weighting!r}.")
        self.estimator = estimator
        self.classes = classes
        self.shape = shape
        self.weighting = weighting
        self.wrap = wrap
        self._rng = check_random_state(random_state)

    # ------------------------------------------------------------------ rows

    def rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the rows in memory, X (m, *shape), y (m,) and weight (m,)."""
        if not hasattr(self.estimator, "posterior_"):
            empty = np.empty(0)
            return np.empty((0, *(self.shape or (0,)))), empty, empty
        memory = self.estimator.memory_
        X = memory.X if self.shape is None else memory.X.reshape(len(memory.X), *self.shape)
        weight = memory.sample_weight
        return X, memory.y, weight / memory.inclusion if self.weighting == "inclusion" else weight

    def __len__(self) -> int:
        return len(self.rows()[1])

    def __iter__(self) -> Iterator[tuple[np.ndarray, Any, float]]:
        """Go through the rows: x (*shape), y and weight."""
        for x, y, weight in zip(*self.rows(), strict=True):
            yield x, y, float(weight)

    def batches(self, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Go through all rows once, in random order.

        Parameters
        ----------
        batch_size : int
            Rows of each mini-batch; the last has what is left.

        Yields
        ------
        X (b, *shape), y (b,), weight (b,)
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        rows = self.rows()
        order = self._rng.permutation(len(rows[1]))
        for start in range(0, len(order), batch_size):
            X, y, weight = (part[order[start : start + batch_size]] for part in rows)
            yield X, y, weight

    def sample(self, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw n different rows, all alike whatever their weights; all rows where there are fewer.

        Parameters
        ----------
        n : int

        Returns
        -------
        X (n, *shape), y (n,), weight (n,)
        """
        rows = self.rows()
        index = self._rng.permutation(len(rows[1]))[:n]
        X, y, weight = (part[index] for part in rows)
        return X, y, weight

    def dataset(self) -> TensorDataset:
        """Return the rows as a torch dataset with items (x, y, weight), in float64; labels must be numbers.

        Raises
        ------
        ValueError
            Labels that are no numbers.
        """
        X, y, weight = self.rows()
        if y.dtype.kind not in "biuf":
            raise ValueError(f"y has labels of type {y.dtype}, which no tensor holds; number the classes from 0.")
        return TensorDataset(*(torch.as_tensor(np.array(part)) for part in (X, y, weight)))

    # ------------------------------------------------------------------ as a storage policy of Avalanche

    @property
    def buffer(self) -> Any:
        """The `dataset`, wrapped if there is something in it."""
        rows = self.dataset()
        return rows if self.wrap is None or len(rows) == 0 else self.wrap(rows)

    @property
    def max_size(self) -> int | None:
        """Most rows that are kept; None if there is no limit."""
        return self._stream().memory

    def post_adapt(self, agent: Any, exp: Any) -> None:
        """Let the estimator learn from an experience, after which its memory has changed."""
        X, y = arrays_of(exp)
        known = {} if self.classes is None else {"classes": list(self.classes)}
        self.estimator.partial_fit(X, y, **known)

    def update(self, strategy: Any, **kwargs: Any) -> None:
        """Call `post_adapt` with the experience of a strategy."""
        self.post_adapt(strategy, strategy.experience)

    def resize(self, strategy: Any, new_size: int) -> None:
        """Set how many rows are kept from the next experience on."""
        self.estimator.stream = replace(self._stream(), memory=new_size, memory_per_batch=0)

    def _stream(self) -> Stream:
        return Stream() if self.estimator.stream is None else self.estimator.stream
