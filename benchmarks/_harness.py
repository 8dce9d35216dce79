"""What the benchmark scripts share: data, standardisation, interleaved timing, memory of a child, the last
JSON line.

A script asks one question, runs the peer in the same process on the same arrays, prints a table and ends
with one JSON object on its last line. Data come from ``--data`` (default ``../shared/data`` beside the
repository).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DEFAULT_DATA = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
KIB = 1024.0


@dataclass(frozen=True)
class Split:
    """Hold standardised train and test arrays of one data set.

    Attributes
    ----------
    X, X_test : ndarray of shape (n, d), (n_test, d), float64
        Columns without spread in the training rows are gone, the others have training mean 0 and sd 1.
    y, y_test : ndarray of shape (n,), (n_test,)
        Targets: z-scored with training statistics for regression, integer codes for classification.
    """

    X: np.ndarray
    y: np.ndarray
    X_test: np.ndarray
    y_test: np.ndarray


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return an argument parser that already knows ``--data``."""
    out = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder with uci/, classification/, images/")
    return out


def load(
    folder: Path,
    name: str,
    *,
    n_train: int | None = None,
    split: int = 0,
    rest_is_test: bool = False,
    classes: bool = False,
) -> Split:
    """Load one npz file, cut it by its stored test mask and standardise it.

    Parameters
    ----------
    folder : Path
        The data folder.
    name : str
        Path of the file below it without suffix, such as ``"uci/kin40k"``.
    n_train : int or None
        Keep so many training rows, drawn without replacement with seed 0. None keeps all.
    split : int
        Which of the stored test masks to use.
    rest_is_test : bool
        Test on every row that was not drawn, not only on the mask.
    classes : bool
        Leave y as integer codes.

    Returns
    -------
    Split
        The standardised arrays.
    """
    path = Path(folder) / f"{name}.npz"
    if not path.exists():
        raise SystemExit(f"{path} is missing; name the data folder with --data DIR.")
    with np.load(path) as file:
        X, y = file["X"].astype(np.float64), file["y"]
        test = np.unpackbits(file["test"], axis=0)[: len(y)].astype(bool)[:, split]
    train_rows = np.flatnonzero(~test)
    if n_train is not None:
        train_rows = np.sort(np.random.default_rng(0).permutation(train_rows)[:n_train])
    test_rows = np.setdiff1d(np.arange(len(y)), train_rows) if rest_is_test else np.flatnonzero(test)
    X_train, X_test = standardise(X[train_rows], X[test_rows])
    if classes:
        return Split(X_train, y[train_rows].astype(int), X_test, y[test_rows].astype(int))
    y = y.astype(np.float64)
    y_train, y_test = standardise(y[train_rows, None], y[test_rows, None])
    return Split(X_train, y_train[:, 0], X_test, y_test[:, 0])


def standardise(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drop columns that are constant in ``train``; z-score the others with the statistics of ``train``."""
    spread = train.std(axis=0)
    keep = spread > 0
    mean = train[:, keep].mean(axis=0)
    return (train[:, keep] - mean) / spread[keep], (test[:, keep] - mean) / spread[keep]


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Run ``call`` once; return seconds of wall time and its value."""
    start = time.perf_counter()
    value = call()
    return time.perf_counter() - start, value


def interleaved(calls: Mapping[str, Callable[[int], Any]], repeats: int) -> dict[str, float]:
    """Time several calls in turn, so that a busy spell of the machine meets them all.

    Parameters
    ----------
    calls : mapping of str to callable
        Each is called with the number of the round, 0 for a warm-up that is not counted.
    repeats : int
        Counted rounds.

    Returns
    -------
    dict
        Median seconds per call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(repeats + 1):
        for name, call in calls.items():
            elapsed, _ = timed(lambda call=call, i=i: call(i))
            if i > 0:
                seconds[name].append(elapsed)
    return {name: statistics.median(values) for name, values in seconds.items()}


def resident_mb(field: str = "VmRSS") -> float:
    """Return resident memory of this process in MiB, now (``VmRSS``) or at its highest (``VmHWM``).

    ``ru_maxrss`` is the fall-back only: on Linux a child inherits the maximum of the process that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith(field + ":"):
                return float(line.split()[1]) / KIB
    peak = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return peak / KIB**2 if sys.platform == "darwin" else peak / KIB


def reset_peak() -> bool:
    """Set the high-water mark of resident memory back to the present; return whether it was allowed."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def child(script: str, *arguments: str) -> dict[str, Any]:
    """Run ``script`` in a fresh interpreter and return the JSON object on its last line."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table with aligned columns; floats with four significant digits."""

    def text(cell: object) -> str:
        return f"{cell:.4g}" if isinstance(cell, float) else str(cell)

    cells = [list(header), *[[text(cell) for cell in row] for row in rows]]
    widths = [max(len(row[j]) for row in cells) for j in range(len(header))]
    print(f"\n{title}")
    for i, row in enumerate(cells):
        print(
            "  " + "  ".join(cell.ljust(widths[j]) if j == 0 else cell.rjust(widths[j]) for j, cell in enumerate(row))
        )
        if i == 0:
            print("  " + "  ".join("-" * width for width in widths))


def finish(values: Mapping[str, float]) -> None:
    """Print the measured values as one JSON object, the last line of the script."""
    print(json.dumps({name: float(f"{float(value):.6g}") for name, value in values.items()}), flush=True)
