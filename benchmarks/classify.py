"""Is exact classification faster than scikit-learn's at the same log loss, and right on ten classes of
digits?

Banana: 2000 training rows, every other row is test; ours (``GPClassifier()``) against
``GaussianProcessClassifier(1.0 * RBF(1.0))``, the same standardised arrays, both from import to predictions
in this process. Digits: scikit-learn's 8 × 8 images, 90/10 split with seed 0, pixels divided by 16, ours
alone.

Run ``python benchmarks/classify.py [--data DIR]``. Keys of the last line: ``banana_speedup`` (their seconds
over ours), ``banana_logloss_gap`` (ours − theirs, nats), ``digits_error``, ``digits_logloss``,
``digits_seconds``.
"""

from __future__ import annotations

from collections.abc import Sequence

from _harness import Split, finish, load, parser, table, timed
from sklearn.datasets import load_digits
from sklearn.gaussian_process import GaussianProcessClassifier
from sklearn.gaussian_process.kernels import RBF
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split

from mercer import GPClassifier

HEADER = ["", "seconds", "log loss (nats)", "error"]


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
    """Print the table of both on banana and return its keys."""
    ours = measure("mercer", GPClassifier(), data)
    theirs = measure("scikit-learn", GaussianProcessClassifier(1.0 * RBF(1.0)), data)
    table(f"banana, {len(data.y)} training rows, {len(data.y_test)} test rows", HEADER, [ours, theirs])
    return {"banana_speedup": theirs[1] / ours[1], "banana_logloss_gap": ours[2] - theirs[2]}


def digits(n_train: int | None) -> dict[str, float]:
    """Print the row of digits and return its keys; ``n_train`` keeps fewer training rows."""
    X, y = load_digits(return_X_y=True)
    X_train, X_test, y_train, y_test = train_test_split(X / 16.0, y, test_size=0.1, random_state=0)
    data = Split(X_train[:n_train], y_train[:n_train], X_test, y_test)
    row = measure("mercer", GPClassifier(), data)
    table(f"digits, {len(data.y)} training rows, {len(y_test)} test rows, 10 classes", HEADER, [row])
    return {"digits_error": row[3], "digits_logloss": row[2], "digits_seconds": row[1]}


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
