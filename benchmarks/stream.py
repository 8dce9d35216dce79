"""Can a process live on a stream of a million rows in constant memory and time, and still be as good as a fresh fit?

Rows come in batches of 1000: two inputs, a smooth function (a draw from a Gaussian process of lengthscale 1 on
[−4, 4]², by 2000 random Fourier features), noise of standard deviation 0.3. Everything is at its default but the number
of rows up to which all are kept (none). Each batch is foretold, then learned from. The peer is an exact Gaussian
process on a sliding window of the last 5000 rows, fitted again (from its last hyperparameters) before every fiftieth
batch and scored on that batch, in a process of its own, so that memory is the stream's.

Run ``python benchmarks/stream.py [--rows N] [--plot FILE]``. Keys of the last line: ``memory_growth`` (resident memory
in the last tenth of the batches over that in the first tenth, after the first ten batches, minus 1), ``time_growth``
(the same of median seconds per batch), ``nlpd_gap`` (ours minus the peer's over the batches that both were scored on,
nats), ``nlpd``, ``seconds_per_batch``, ``rows_per_second``.
"""

from __future__ import annotations

import multiprocessing
import time
import warnings
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
from _harness import finish, parser, resident_mb, table

from mercer import GPRegressor
from mercer.sequential import Stream

BATCH = 1000
WINDOW = 5000
EVERY = 50  # batches between two fits of the peer
WARM_UP = 10  # batches in which inducing points are still found and the allocator fills
NOISE = 0.3


class Source:
    """Rows without end: a fixed smooth function of two inputs, with noise."""

    def __init__(self, seed: int = 0, n_features: int = 2000):
        self.rng = np.random.default_rng(seed)
        self.frequency = self.rng.standard_normal((2, n_features))
        self.phase = self.rng.uniform(0, 2 * np.pi, n_features)
        self.weight = self.rng.standard_normal(n_features) * np.sqrt(2.0 / n_features)

    def batch(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the next rows and their targets."""
        X = self.rng.uniform(-4, 4, (BATCH, 2))
        f = np.cos(X @ self.frequency + self.phase) @ self.weight
        return X, f + NOISE * self.rng.standard_normal(BATCH)


@cache
def peer() -> GPRegressor:
    """Return the peer of this process, which starts from its last hyperparameters."""
    return GPRegressor("rbf", family="exact", warm_start=True, max_iter=20, random_state=0)


def refit(X: np.ndarray, y: np.ndarray, X_new: np.ndarray, y_new: np.ndarray) -> tuple[float, float]:
    """Return the peer's log score on new rows after a fit, and the seconds of the fit."""
    warnings.simplefilter("ignore")
    began = time.perf_counter()
    peer().fit(X, y)
    spent = time.perf_counter() - began
    return float(peer().log_predictive_density(X_new, y_new).mean()), spent


def growth(values: list[float], reduce: object) -> float:
    """Return how much more the last tenth is than the first."""
    after = values[WARM_UP:]
    tenth = max(1, len(after) // 10)
    return float(reduce(after[-tenth:]) / reduce(after[:tenth]) - 1.0)


def main() -> None:
    """Run the stream beside its peer and print the keys."""
    arguments = parser(__doc__)
    arguments.add_argument("--rows", type=int, default=1_000_000)
    arguments.add_argument("--plot", type=Path, default=None)
    given = arguments.parse_args()
    warnings.simplefilter("ignore")
    source, window = Source(), deque(maxlen=WINDOW // BATCH)
    ours = GPRegressor("rbf", stream=Stream(dense_rows=0), random_state=0)
    elsewhere = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    seconds: list[float] = []
    memory: list[float] = []
    scores: list[float] = []
    both: list[tuple[float, float, float]] = []
    for k in range(given.rows // BATCH):
        X, y = source.batch()
        if k > 0:
            scores.append(float(ours.log_predictive_density(X, y).mean()))
        if k > 0 and k % EVERY == 0:
            X_past, y_past = (np.concatenate(each) for each in zip(*window, strict=True))
            both.append((scores[-1], *elsewhere.submit(refit, X_past, y_past, X, y).result()))
        began = time.perf_counter()
        ours.partial_fit(X, y)
        seconds.append(time.perf_counter() - began)
        memory.append(resident_mb())
        window.append((X, y))
        if k % 100 == 99:
            m, n = len(ours.stream_.Z), len(ours.memory_.X)
            print(
                f"batch {k + 1}: {m} points, {n} rows in memory, {memory[-1]:.0f} MB, {seconds[-1]:.3f} s", flush=True
            )
    late = both[len(both) // 10 :]
    mine, its, refits = (float(np.mean(column)) for column in zip(*late, strict=True))
    rows = [
        ["stream", -mine, float(np.median(seconds)), memory[-1]],
        [f"window of {WINDOW}, fitted again", -its, refits, float("nan")],
    ]
    table(f"{given.rows} rows in batches of {BATCH}", ["", "NLPD (nats)", "seconds a batch", "MB"], rows)
    if given.plot is not None:
        plot(given.plot, scores, seconds, both)
    finish(
        {
            "memory_growth": growth(memory, np.mean),
            "time_growth": growth(seconds, np.median),
            "nlpd_gap": its - mine,
            "nlpd": -float(np.mean(scores)),
            "seconds_per_batch": float(np.median(seconds)),
            "rows_per_second": BATCH / float(np.median(seconds)),
        }
    )


def plot(path: Path, scores: list[float], seconds: list[float], both: list[tuple[float, float, float]]) -> None:
    """Draw log score and seconds per batch."""
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(7, 5), layout="constrained")
    above.plot(np.arange(1, len(scores) + 1), scores, lw=0.6, label="stream")
    at = EVERY * np.arange(1, len(both) + 1)
    above.plot(at, [its for _, its, _ in both], "o", ms=4, label=f"window of {WINDOW}, fitted again")
    above.set_ylabel("log score (nats a row)")
    above.legend()
    below.plot(seconds, lw=0.6)
    below.set(xlabel="batch", ylabel="seconds", ylim=(0, None))
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
