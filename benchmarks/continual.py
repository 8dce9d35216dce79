"""Does a process that sees its data once, in order, end where one fit of all data ends?

Split digits: five tasks of two classes each, a ten-way softmax, scored on all classes at the end, for no memory and 20
and 60 rows of memory a task, chosen by Bayesian leverage; three splits; hyperparameters frozen at lengthscale 2 (pixels
over 16) and variance 5, 100 inducing points. Split MNIST: 5000 images in five tasks, the same with 300 inducing points
(lengthscale 8 of pixels over 255, variance 30) and 160 rows of memory a task, that is a fifth of the rows, which count
five times once their task is over. Banana: 400 rows sorted by the first input, in four batches, 25 inducing points,
5 rows of memory a batch. Elevators and bike: training rows sorted by their first column, 50 batches, 100 inducing
points, 10 rows of memory a batch; hyperparameters are learned on the way; means of three seeds. Beside each stands the
batch fit of the same family, for the streams with inducing points at rows, as theirs are, and with learned ones, as
well as Bui-style learning (no memory, hyperparameters from batch and sites) and memory chosen uniformly.

Run ``python benchmarks/continual.py [--data DIR] [--only NAME ...]``. Keys of the last line: ``split_digits_20``,
``split_digits_60``, ``split_digits_none`` (mean accuracy), ``split_digits_batch``; ``mnist5k_gap``, ``banana_gap``
(batch accuracy minus the stream's); ``elevators_nlpd_gap``, ``bike_nlpd_gap`` (stream's NLPD minus the batch fit's,
points fixed; ``..._learned``: points learned).
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np
from _harness import finish, load, parser, table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from mercer import GPClassifier, GPRegressor
from mercer.families import Inducing
from mercer.kernels import RBF
from mercer.sequential import Stream

PARTS = ("digits", "mnist", "banana", "elevators", "bike")
SEEDS = range(3)
TASKS = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
BATCHES = 50


def images(kernel: Any, m: int, stream: Stream | None, seed: int) -> GPClassifier:
    """Return a classifier of images whose hyperparameters are frozen."""
    options: dict[str, Any] = {"optimizer": None, "standardize": False, "random_state": seed}
    return GPClassifier(kernel, family=Inducing(m), stream=stream, **options)


def split_classes(model: GPClassifier, X: np.ndarray, y: np.ndarray) -> GPClassifier:
    """Show the tasks one after the other."""
    for task in TASKS:
        rows = np.isin(y, task)
        model.partial_fit(X[rows], y[rows], classes=np.arange(10))
    return model


def score(name: str, model: Any, X: np.ndarray, y: np.ndarray, seconds: float) -> list[object]:
    """Return name, accuracy, NLPD and seconds."""
    return [name, float(model.score(X, y)), float(-model.log_predictive_density(X, y).mean()), seconds]


def averaged(rows: list[list[object]]) -> list[object]:
    """Return the mean over seeds of rows with one name."""
    numbers = np.array([row[1:] for row in rows], float).mean(0)
    return [rows[0][0], *map(float, numbers)]


def run_images(title: str, kernel: Any, m: int, splits: list[tuple[np.ndarray, ...]], settings: dict[str, Any]) -> Any:
    """Print the table of all settings and the batch fit; return accuracy by name."""
    rows = []
    for name, stream in settings.items():
        found = []
        for seed, (X, X_test, y, y_test) in enumerate(splits):
            model = images(kernel, m, stream, seed)
            began = time.perf_counter()
            model = model.fit(X, y) if stream is None else split_classes(model, X, y)
            found.append(score(name, model, X_test, y_test, time.perf_counter() - began))
        rows.append(averaged(found))
    table(title, ["", "accuracy", "NLPD (nats)", "seconds"], rows)
    return {row[0]: row[1] for row in rows}


def digits() -> dict[str, float]:
    """Return the keys of split digits."""
    X, y = load_digits(return_X_y=True)
    splits = [train_test_split(X / 16.0, y, test_size=0.2, random_state=seed, stratify=y) for seed in SEEDS]
    kept = {"memory": None, "policy": "bls_top"}
    settings = {
        "no memory": Stream(memory=0),
        "20 uniform": Stream(memory=None, memory_per_batch=20, policy="uniform"),
        "20 leverage, drawn": Stream(memory=None, memory_per_batch=20, policy="bls_sample"),
        "20 leverage, top": Stream(memory_per_batch=20, **kept),
        "60 leverage, top": Stream(memory_per_batch=60, **kept),
        "batch": None,
    }
    found = run_images("Split digits, 5 tasks, 3 splits", RBF(2.0, outputscale=5.0), 100, splits, settings)
    return {
        "split_digits_20": found["20 leverage, top"],
        "split_digits_60": found["60 leverage, top"],
        "split_digits_none": found["no memory"],
        "split_digits_batch": found["batch"],
    }


def mnist(folder: Any) -> dict[str, float]:
    """Return the key of split MNIST with 5000 images."""
    with np.load(folder / "images" / "mnist5k.npz") as file:
        X, y = file["X"].reshape(len(file["y"]), -1) / 255.0, file["y"].astype(int)
        test = np.unpackbits(file["test"], axis=0)[: len(y)].astype(bool)[:, 0]
    splits = [(X[~test], X[test], y[~test], y[test])]
    settings = {
        "no memory": Stream(memory=0),
        "160 leverage": Stream(memory=None, memory_per_batch=160),
        "160 leverage, weight 5": Stream(memory=None, memory_per_batch=160, memory_weight=5.0),
        "batch": None,
    }
    found = run_images("Split MNIST, 5000 images", RBF(8.0, outputscale=30.0), 300, splits, settings)
    return {"mnist5k_gap": found["batch"] - found["160 leverage, weight 5"]}


def banana(folder: Any) -> dict[str, float]:
    """Return the key of sorted banana."""
    data = load(folder, "classification/banana", n_train=400, rest_is_test=True, classes=True)
    order = data.X[:, 0].argsort(kind="stable")
    rows = []
    settings = {
        "no memory": Stream(memory=0, dense_rows=0),
        "5 a batch": Stream(memory=None, memory_per_batch=5, dense_rows=0),
        "batch": None,
    }
    for name, stream in settings.items():
        model = GPClassifier(RBF(ard=False), likelihood="probit", family=Inducing(25), stream=stream, random_state=0)
        began = time.perf_counter()
        if stream is None:
            model.fit(data.X, data.y)
        else:
            for some in np.array_split(order, 4):
                model.partial_fit(data.X[some], data.y[some], classes=[0, 1])
        rows.append(score(name, model, data.X_test, data.y_test, time.perf_counter() - began))
    table("Banana, 4 sorted batches of 100", ["", "accuracy", "NLPD (nats)", "seconds"], rows)
    return {"banana_gap": float(rows[2][1]) - float(rows[1][1])}


def regression(folder: Any, name: str) -> dict[str, float]:
    """Return the key of one sorted stream of real targets."""
    data = load(folder, f"uci/{name}")
    order = data.X[:, 0].argsort(kind="stable")
    kept: dict[str, Any] = {"memory": None, "memory_per_batch": 10, "n_hyper_iter": 20}
    settings = {
        "Bui-style (no memory, sites)": Stream(memory=0, objective="site", n_hyper_iter=20),
        "memory, hyperparameters from it": Stream(objective="memory_elbo", policy="uniform", **kept),
        "memory, uniform": Stream(policy="uniform", **kept),
        "memory, leverage": Stream(**kept),
        "batch, points fixed": None,
        "batch, points learned": None,
    }
    rows = []
    for label, stream in settings.items():
        places = "fixed" if label.endswith("fixed") else "learned"
        found = []
        for seed in SEEDS:  # of what is drawn into memory, which matters much on bike
            model = GPRegressor(family=Inducing(100, locations=places), stream=stream, random_state=seed)
            began = time.perf_counter()
            if stream is None:
                model.fit(data.X, data.y)
            else:
                for some in np.array_split(order, BATCHES):
                    model.partial_fit(data.X[some], data.y[some])
            seconds = time.perf_counter() - began
            error = float(np.sqrt(np.mean((model.predict(data.X_test) - data.y_test) ** 2)))
            density = float(-model.log_predictive_density(data.X_test, data.y_test).mean())
            found.append([label, error, density, seconds])
        rows.append(averaged(found))
    table(
        f"{name}, sorted, {BATCHES} batches, means of {len(SEEDS)} seeds", ["", "RMSE", "NLPD (nats)", "seconds"], rows
    )
    density = [float(row[2]) for row in rows]  # type: ignore[arg-type]
    return {f"{name}_nlpd_gap": density[3] - density[4], f"{name}_nlpd_gap_learned": density[3] - density[5]}


def main() -> None:
    """Run what is asked for and print the keys."""
    arguments = parser(__doc__)
    arguments.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    given = arguments.parse_args()
    warnings.simplefilter("ignore")  # streams lose nats here, and the tables say what comes of it
    keys: dict[str, float] = {}
    for part in given.only:
        if part == "digits":
            keys |= digits()
        elif part in ("mnist", "banana"):
            keys |= {"mnist": mnist, "banana": banana}[part](given.data)
        else:
            keys |= regression(given.data, part)
    finish(keys)


if __name__ == "__main__":
    main()
