"""Does mean-only prediction keep its memory flat in the number of test rows?

A child process fits a small model, draws the test rows, notes its memory, sets the high-water mark back and
predicts means. The *increment* is the peak above the note, less the returned means: what prediction itself
needs. The *total* is the peak of the whole process less test rows and means, which belong to the caller.

Run ``python benchmarks/memory.py``. Keys of the last line: ``mean_only_memory_ratio`` (total, most rows over
fewest), ``increment_small_mb``, ``increment_large_mb``, ``peak_ratio`` (whole processes, nothing taken off).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from _harness import child, finish, parser, reset_peak, resident_mb, table, timed

from mercer import GPRegressor

D = 4
MIB = 2.0**20


def measure(n_train: int, n_test: int) -> dict[str, float]:
    """Fit, predict ``n_test`` means in this process and return memory in MiB and seconds."""
    generator = np.random.default_rng(0)
    X = generator.standard_normal((n_train, D))
    y = np.sin(X[:, 0]) + 0.1 * generator.standard_normal(n_train)
    model = GPRegressor("rbf", family="exact", optimizer=None).fit(X, y)
    model.predict(X[:10])
    X_test = generator.standard_normal((n_test, D))
    before = resident_mb()
    reset_peak()
    seconds, mean = timed(lambda: model.predict(X_test))
    peak = resident_mb("VmHWM")
    arrays = (X_test.nbytes + mean.nbytes) / MIB
    return {
        "increment": peak - before - mean.nbytes / MIB,
        "peak": peak,
        "own": peak - arrays,
        "seconds": seconds,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure in child processes, print and finish with the JSON line."""
    options = parser(__doc__)
    options.add_argument("--n-train", type=int, default=2000, help="training rows")
    options.add_argument("--n-test", type=int, nargs=2, default=(10_000, 1_000_000), help="test rows, few and many")
    options.add_argument("--memory-child", type=int, help="only predict so many rows in this process")
    chosen = options.parse_args(arguments)
    if chosen.memory_child is not None:
        finish(measure(chosen.n_train, chosen.memory_child))
        return
    few, many = (child(__file__, "--n-train", str(chosen.n_train), "--memory-child", str(n)) for n in chosen.n_test)
    header = ["test rows", "seconds", "increment (MiB)", "less arrays (MiB)", "whole process (MiB)"]
    rows = [
        [f"{n:,}", m["seconds"], m["increment"], m["own"], m["peak"]]
        for n, m in zip(chosen.n_test, (few, many), strict=True)
    ]
    table(f"mean-only prediction, {chosen.n_train} training rows, {D} columns", header, rows)
    finish(
        {
            "mean_only_memory_ratio": many["own"] / few["own"],
            "increment_small_mb": few["increment"],
            "increment_large_mb": many["increment"],
            "peak_ratio": many["peak"] / few["peak"],
        }
    )


if __name__ == "__main__":
    main()
