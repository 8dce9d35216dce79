"""Is exact classification faster than scikit-learn's at the same log loss, and right on ten classes of
digits?

Banana: 2000 training rows, every other row is test. scikit-learn's ``GaussianProcessClassifier`` is Laplace's
approximation; ours runs with the same kernel and approximation, and once more with all defaults (variational,
ARD Matérn). All see the same standardised arrays; seconds are of fit and predict_proba together, after a fit
of 40 rows that imports what is imported late. Ours is short, so it runs before, between and after, and the
median counts. Digits: scikit-learn's 8 × 8 images, 90/10 split with seed 0, ours alone with three seeds. The
64 pixels share one unit, so they are divided by 16 and not standardised, and one lengthscale serves them all.

Run ``python benchmarks/classify.py [--data DIR]``. Keys of the last line: ``banana_speedup`` (their seconds
over ours, same approximation), ``banana_logloss_gap`` (ours − theirs, nats), ``banana_speedup_default``,
``banana_logloss_gap_default``, and the worst of the three seeds in ``digits_error``, ``digits_logloss``,
``digits_seconds``.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from _harness import Split, finish, load, parser, table, timed
from sklearn.datasets import load_digits
from sklearn.gaussian_process import GaussianProcessClassifier
from sklearn.gaussian_process.kernels import RBF as SklearnRBF
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split

from mercer import GPClassifier
from mercer.kernels import RBF, Matern52

HEADER = ["", "seconds", "log loss (nats)", "error"]
SEEDS = range(3)
WARM_UP = 40  # rows


def laplace() -> GPClassifier:
    """Return scikit-learn's model in our words: one lengthscale, an amplitude, Laplace's approximation."""
    return GPClassifier(RBF(ard=False), engine="laplace")


def sklearn_laplace() -> GaussianProcessClassifier:
    """Return the peer; both hyperparameters start at 1."""
    return GaussianProcessClassifier(1.0 * SklearnRBF(1.0))


def measure(name: str, model: object, data: Split) -> list[object]:
    """Fit and predict; return name, seconds of both together, test log loss and test error."""
    seconds, probabilities = timed(lambda: model.fit(data.X, data.y).predict_proba(data.X_test))
    wrong = model.classes_[probabilities.argmax(axis=1)] != data.y_test
    return [
        name,
        seconds,
        float(log_loss(data.y_test, probabilities, labels=model.classes_)),
        float(wrong.mean()),
    ]


def compare_banana(data: Split) -> dict[str, float]:
    """Print the table of all on banana and return its keys."""
    makers = {"mercer, Laplace": laplace, "mercer, defaults": GPClassifier}
    for make in (*makers.values(), sklearn_laplace):
        make().fit(data.X[:WARM_UP], data.y[:WARM_UP])
    runs: dict[str, list[list[object]]] = {name: [] for name in makers}

    def round_of_ours() -> None:
        for name, make in makers.items():
            runs[name].append(measure(name, make(), data))

    round_of_ours()
    round_of_ours()
    theirs = measure("scikit-learn, Laplace", sklearn_laplace(), data)
    round_of_ours()
    ours, default = ([name, statistics.median(r[1] for r in rows), *rows[-1][2:]] for name, rows in runs.items())
    title = f"banana, {len(data.y)} training rows, {len(data.y_test)} test rows; ours: median of three"
    table(title, HEADER, [ours, default, theirs])
    return {
        "banana_speedup": theirs[1] / ours[1],
        "banana_logloss_gap": ours[2] - theirs[2],
        "banana_speedup_default": theirs[1] / default[1],
        "banana_logloss_gap_default": default[2] - theirs[2],
    }


def digits(n_train: int | None) -> dict[str, float]:
    """Print a row for each seed of digits and return their worst; ``n_train`` keeps fewer training rows."""
    X, y = load_digits(return_X_y=True)
    X_train, X_test, y_train, y_test = train_test_split(X / 16.0, y, test_size=0.1, random_state=0)
    data = Split(X_train[:n_train], y_train[:n_train], X_test, y_test)
    rows = []
    for seed in SEEDS:
        model = GPClassifier(Matern52(ard=False), standardize=False, random_state=seed)
        rows.append(measure(f"mercer, seed {seed}", model, data))
    table(f"digits, {len(data.y)} training rows, {len(y_test)} test rows, 10 classes", HEADER, rows)
    seconds, loss, error = (max(row[k] for row in rows) for k in (1, 2, 3))
    return {"digits_error": error, "digits_logloss": loss, "digits_seconds": seconds}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and finish with the JSON line."""
    options = parser(__doc__)
    options.add_argument("--n-banana", type=int, default=2000, help="training rows of banana")
    options.add_argument("--n-digits", type=int, default=None, help="training rows of digits; all by default")
    chosen = options.parse_args(arguments)
    banana = load(chosen.data, "classification/banana", n_train=chosen.n_banana, rest_is_test=True, classes=True)
    finish(compare_banana(banana) | digits(chosen.n_digits))


if __name__ == "__main__":
    main()
