"""Is the exact Gaussian process faster than scikit-learn and gpytorch at the same evidence, and near the
hardware?

(a) A full fit on kin40k, ARD RBF, float64: ours against ``GaussianProcessRegressor`` (its default
optimiser) and against gpytorch's ``ExactGP`` with Cholesky and L-BFGS-B. All see the same standardised
arrays; evidences are in nats of the standardised targets. Peers start at length scale, amplitude and noise
1; ours starts as its users' do. (b) One evidence-and-gradient evaluation of ours over a bare
``torch.linalg.cholesky`` + ``torch.cholesky_inverse`` of the same matrix size, interleaved; and the peak
memory of a child process that does only ours.

Run ``python benchmarks/exact.py [--data DIR]``. Keys of the last line: ``fit_speedup_sklearn`` and
``fit_speedup_gpytorch`` (their seconds over ours), ``evidence_gap_nats`` (best peer − ours),
``eval_over_bare``, ``peak_mb`` (MiB).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np
import torch
from _harness import child, finish, interleaved, load, parser, resident_mb, table, timed
from _peers import fit_gpytorch, fit_sklearn

from mercer import GPRegressor

DATA_SET = "uci/kin40k"


def unfitted(**options: object) -> GPRegressor:
    """Return our side of the comparison: an exact regressor with an ARD RBF kernel in float64."""
    return GPRegressor("rbf", family="exact", dtype="float64", **options)


def compare_fits(X: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Fit all three on the same rows, print the table and return the keys of part (a).

    Ours is short, so it runs before, between and after the peers and its median counts.
    """
    runs = [timed(lambda: unfitted().fit(X, y))]
    rows: list[list[object]] = []
    seconds, evidences = {}, {}
    for name, fit in {"gpytorch (Cholesky)": fit_gpytorch, "scikit-learn": fit_sklearn}.items():
        seconds[name], found = timed(lambda fit=fit: fit(X, y))
        evidences[name] = found.evidence
        rows.append([name, seconds[name], found.evidence, found.evaluations])
        runs.append(timed(lambda: unfitted().fit(X, y)))
    ours_seconds, ours = statistics.median(elapsed for elapsed, _ in runs), runs[-1][1]
    evidence = float(ours.log_marginal_likelihood_value_)
    rows.insert(0, ["mercer", ours_seconds, evidence, ours.fit_report_.n_evaluations])
    title = f"full fit, n = {len(y)}, d = {X.shape[1]}, ARD RBF, float64, {torch.get_num_threads()} threads"
    table(title, ["", "seconds", "evidence (nats)", "evaluations"], rows)
    return {
        "fit_speedup_sklearn": seconds["scikit-learn"] / ours_seconds,
        "fit_speedup_gpytorch": seconds["gpytorch (Cholesky)"] / ours_seconds,
        "evidence_gap_nats": max(evidences.values()) - evidence,
    }


def evaluation(X: np.ndarray, y: np.ndarray):
    """Return a callable of the round: our evidence and gradient at a θ that moves, so nothing is cached."""
    model = unfitted(optimizer=None).fit(X, y)
    theta = np.asarray(model.theta_)
    return lambda i: model.log_marginal_likelihood(theta + 1e-3 * i, eval_gradient=True)


def compare_evaluations(X: np.ndarray, y: np.ndarray, repeats: int) -> float:
    """Time one evaluation against the bare factor and inverse; print the table and return the ratio."""
    distance = torch.cdist(torch.as_tensor(X), torch.as_tensor(X))
    K = torch.exp(-0.5 * (distance / X.shape[1] ** 0.5) ** 2)
    del distance
    K.diagonal().add_(0.1)

    def bare(i: int) -> torch.Tensor:
        return torch.cholesky_inverse(torch.linalg.cholesky(K))

    seconds = interleaved({"ours": evaluation(X, y), "bare": bare}, repeats)
    ratio = seconds["ours"] / seconds["bare"]
    rows = [
        ["bare Cholesky + inverse", seconds["bare"], 1.0],
        ["evidence + gradient", seconds["ours"], ratio],
    ]
    table(f"one evaluation, n = {len(y)}, median of {repeats}", ["", "seconds", "over bare"], rows)
    return ratio


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and finish with the JSON line."""
    options = parser(__doc__)
    options.add_argument("--n-fit", type=int, default=2000, help="training rows of the full fit")
    options.add_argument("--n-eval", type=int, default=5000, help="training rows of the single evaluation")
    options.add_argument("--repeats", type=int, default=3, help="counted rounds of the evaluation")
    options.add_argument("--memory-child", action="store_true", help="only evaluate once and print the peak memory")
    chosen = options.parse_args(arguments)
    wide = load(chosen.data, DATA_SET, n_train=chosen.n_eval)
    if chosen.memory_child:
        evaluation(wide.X, wide.y)(1)
        finish({"peak_mb": resident_mb("VmHWM")})
        return
    small = load(chosen.data, DATA_SET, n_train=chosen.n_fit)
    values = compare_fits(small.X, small.y)
    values["eval_over_bare"] = compare_evaluations(wide.X, wide.y, chosen.repeats)
    memory = child(__file__, "--memory-child", "--data", str(chosen.data), "--n-eval", str(chosen.n_eval))
    values["peak_mb"] = memory["peak_mb"]
    n = len(wide.y)
    print(
        f"\npeak memory of a child that evaluates once at n = {n}: {values['peak_mb']:.0f} MiB,"
        f" of which one {n} × {n} matrix takes {8 * n * n / 2**20:.0f} MiB"
    )
    finish(values)


if __name__ == "__main__":
    main()
