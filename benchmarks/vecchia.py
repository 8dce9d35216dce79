"""Is the sparse inverse Cholesky family faster than GPBoost at the same accuracy, and does it reach 300 000 rows?

(a) protein, 41 157 × 9, ARD Matérn-3/2, 20 neighbours; GPBoost is held to ten iterations, as in its published run.
(b) A simulated field of 10⁵ points on the unit square, Matérn-3/2 with one lengthscale, noise variance 0.1; GPBoost
runs until it converges. (c) Counts drawn from Poisson(exp(z)), z the standardised target of 10⁴ rows of kin40k;
Matérn-3/2 with one lengthscale and Laplace's approximation, GPBoost's defaults. (d) nycflights13, 294 611 × 12, ours
alone, in a fresh process. Both sides see the same arrays, have every core and find 20 neighbours; seconds are of fit
and prediction of all test rows together, after a fit of few rows that compiles what is compiled late.

Run ``python benchmarks/vecchia.py [--only CASE ...] [--sides SIDE ...] [--data DIR]``. Keys of the last line:
``protein_speedup``, ``field_speedup``, ``poisson_speedup`` (their seconds over ours); ``field_nlpd_gap``,
``poisson_dev_gap`` (ours − theirs, nats and mean deviance); ``flights_seconds``, ``flights_peak_mb`` (MiB). Ours alone
are ``CASE_SCORE`` and theirs ``CASE_gpboost_SCORE``, where SCORE is ``seconds``, ``rmse``, ``nlpd`` or ``dev``.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence

import numpy as np
import torch
from _gpboost import fit_predict
from _harness import Split, child, finish, load, parser, resident_mb, table, timed
from sklearn.metrics import mean_poisson_deviance

from mercer import GPCountRegressor, GPRegressor
from mercer.geometry.neighbours import nearest_earlier
from mercer.geometry.ordering import maximin
from mercer.kernels import Matern32
from mercer.linalg.sic import Pattern, column_factors, solve

SIDES = ("mercer", "gpboost")
NEIGHBOURS, NEIGHBOURS_PREDICT = 20, 60
PUBLISHED_ITERATIONS = 10  # of GPBoost on protein
LENGTHSCALE, NOISE_VARIANCE = 0.1, 0.1  # of the field, whose variance is 1
WARM_UP = 200  # rows

Predictions = tuple[np.ndarray, np.ndarray]  # mean and variance of the response, noise included


def ours(estimator: type, X: np.ndarray, y: np.ndarray, X_test: np.ndarray, ard: bool = True) -> Predictions:
    """Fit our side of the comparison and predict the response."""
    from mercer.families import SparseInverseCholesky

    family = SparseInverseCholesky(n_neighbors=NEIGHBOURS, n_neighbors_predict=NEIGHBOURS_PREDICT)
    model = estimator(kernel=Matern32(ard=ard), family=family).fit(X, y)
    mean, deviation = model.predict(X_test, return_std=True)
    return mean, deviation**2


def theirs(X: np.ndarray, y: np.ndarray, X_test: np.ndarray, **options: object) -> Predictions:
    """Do the same with GPBoost."""
    return fit_predict(X, y, X_test, n_neighbors=NEIGHBOURS, **options)


def gaussian_scores(y: np.ndarray, predicted: Predictions) -> dict[str, float]:
    """Return root mean squared error and mean negative log predictive density, in units of y and in nats."""
    mean, variance = predicted
    density = 0.5 * (np.log(2 * np.pi * variance) + (y - mean) ** 2 / variance)
    return {"rmse": float(np.sqrt(np.mean((y - mean) ** 2))), "nlpd": float(density.mean())}


def count_scores(y: np.ndarray, predicted: Predictions) -> dict[str, float]:
    """Return the mean Poisson deviance of the predicted expected counts."""
    return {"dev": float(mean_poisson_deviance(y, predicted[0]))}


def compare(
    case: str,
    split: Split,
    calls: dict[str, Callable[[Split], Predictions]],
    score: Callable[[np.ndarray, Predictions], dict[str, float]],
    sides: Sequence[str],
) -> dict[str, float]:
    """Run the chosen sides on one case, print its table and return its keys."""
    few = Split(split.X[:WARM_UP], split.y[:WARM_UP], split.X_test[:10], split.y_test[:10])
    scores = {}
    for side in sides:
        calls[side](few)
        seconds, predicted = timed(lambda side=side: calls[side](split))
        scores[side] = {"seconds": seconds} | score(split.y_test, predicted)
    (n, d), names = split.X.shape, list(scores[sides[0]])
    title = f"{case}, {n} × {d}, {len(split.y_test)} test rows, {torch.get_num_threads()} threads"
    table(title, ["", *names], [[side, *scores[side].values()] for side in sides])
    values = {
        f"{case}_{name}" if side == "mercer" else f"{case}_{side}_{name}": value
        for side in sides
        for name, value in scores[side].items()
    }
    if len(scores) == 2:
        values[f"{case}_speedup"] = scores["gpboost"]["seconds"] / scores["mercer"]["seconds"]
        values[f"{case}_{names[-1]}_gap"] = scores["mercer"][names[-1]] - scores["gpboost"][names[-1]]
    return values


def protein(chosen: Namespace) -> dict[str, float]:
    """Compare on protein, GPBoost at ten iterations."""
    calls = {
        "mercer": lambda s: ours(GPRegressor, s.X, s.y, s.X_test),
        "gpboost": lambda s: theirs(s.X, s.y, s.X_test, max_iter=PUBLISHED_ITERATIONS),
    }
    split = load(chosen.data, "uci/protein", n_train=chosen.n_protein)
    return compare("protein", split, calls, gaussian_scores, chosen.sides)


def field(chosen: Namespace) -> dict[str, float]:
    """Compare on a simulated field."""
    calls = {
        "mercer": lambda s: ours(GPRegressor, s.X, s.y, s.X_test, ard=False),
        "gpboost": lambda s: theirs(s.X, s.y, s.X_test, ard=False),
    }
    return compare("field", simulate(chosen.n_field, chosen.n_test), calls, gaussian_scores, chosen.sides)


def poisson(chosen: Namespace) -> dict[str, float]:
    """Compare on counts whose log rate is the standardised target of kin40k."""
    calls = {
        "mercer": lambda s: ours(GPCountRegressor, s.X, s.y, s.X_test, ard=False),
        "gpboost": lambda s: theirs(s.X, s.y, s.X_test, ard=False, likelihood="poisson"),
    }
    rows = load(chosen.data, "uci/kin40k", n_train=chosen.n_poisson)
    X_test, log_rate = rows.X_test[: chosen.n_test], rows.y_test[: chosen.n_test]
    generator = np.random.default_rng(0)
    y, y_test = (generator.poisson(np.exp(each)).astype(float) for each in (rows.y, log_rate))
    values = compare("poisson", Split(rows.X, y, X_test, y_test), calls, count_scores, chosen.sides)
    print(f"  the rates that drew the counts: {mean_poisson_deviance(y_test, np.exp(log_rate)):.4g}")
    return values


def flights(chosen: Namespace) -> dict[str, float]:
    """Fit flight delays in a child process, for its time and memory."""
    if "mercer" not in chosen.sides:
        return {}
    size = [] if chosen.n_flights is None else ["--n-flights", str(chosen.n_flights)]
    found = child(__file__, "--flights-child", "--data", str(chosen.data), *size)
    table("flights, in a process of its own", list(found), [[float(value) for value in found.values()]])
    return {f"flights_{name}": value for name, value in found.items() if name != "rows"}


def measure_flights(chosen: Namespace) -> dict[str, float]:
    """Fit flight delays in this process."""
    split = load(chosen.data, "spatial/nycflights13", n_train=chosen.n_flights)
    ours(GPRegressor, split.X[:WARM_UP], split.y[:WARM_UP], split.X_test[:10])
    seconds, predicted = timed(lambda: ours(GPRegressor, split.X, split.y, split.X_test))
    measured = {"rows": len(split.y), "seconds": seconds, "peak_mb": resident_mb("VmHWM")}
    return measured | gaussian_scores(split.y_test, predicted)


def simulate(n_train: int, n_test: int) -> Split:
    """Draw a noisy Matérn-3/2 field on the unit square by a sparse inverse Cholesky factor with 60 neighbours."""
    generator = np.random.default_rng(0)
    n = n_train + n_test
    X = generator.uniform(size=(n, 2))
    order = maximin(X, generator).order
    ordered = torch.as_tensor(X[order] / LENGTHSCALE)
    pattern = Pattern(torch.as_tensor(nearest_earlier(X[order], min(60, n - 1))))
    factors = []
    for columns, padding in zip(pattern.columns.split(2000), pattern.padding.split(2000), strict=True):
        near = ordered[columns.clamp_min(0)]
        scaled = 3**0.5 * torch.cdist(near, near, compute_mode="donot_use_mm_for_euclid_dist")
        factors.append(column_factors((1 + scaled) * torch.exp(-scaled), padding))
    white = torch.as_tensor(generator.standard_normal(n))
    y = np.empty(n)
    y[order] = solve(pattern, torch.cat(factors), white, transposed=True).numpy()
    y += NOISE_VARIANCE**0.5 * generator.standard_normal(n)
    return Split(X[:n_train], y[:n_train], X[n_train:], y[n_train:])


CASES = {"protein": protein, "field": field, "poisson": poisson, "flights": flights}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and finish with the JSON line."""
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="run these cases alone")
    options.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="run these sides alone")
    options.add_argument("--n-protein", type=int, default=None, help="training rows of protein; all by default")
    options.add_argument("--n-field", type=int, default=100_000, help="training points of the field")
    options.add_argument("--n-poisson", type=int, default=10_000, help="training rows of the counts")
    options.add_argument("--n-flights", type=int, default=None, help="training rows of flights; all by default")
    options.add_argument("--n-test", type=int, default=2000, help="test rows of field and counts")
    options.add_argument("--flights-child", action="store_true", help="only fit flights in this process")
    chosen = options.parse_args(arguments)
    if chosen.flights_child:
        finish(measure_flights(chosen))
        return
    values: dict[str, float] = {}
    for case in chosen.only:
        values |= CASES[case](chosen)
    finish(values)


if __name__ == "__main__":
    main()
