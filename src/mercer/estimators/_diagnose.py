"""Look at a fitted estimator for the usual troubles and say what to do about each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mercer.estimators._report import Finding
from mercer.inference.theta import at_bounds

if TYPE_CHECKING:
    from mercer.estimators._base import BaseGP

_UNSCALED = 1e3  # ratio of column scales from which an unstandardised fit is suspect
_OPTIMA_NATS = 1.0
_TINY_NOISE = 1e-3  # of the variance of y: below it a model interpolates


def diagnose(estimator: BaseGP) -> list[Finding]:
    """Return the findings for a fitted estimator, most fundamental first."""
    kept = len(estimator._rows.X) > 0  # a stream may keep none
    return [
        *(_columns(estimator) if kept else []),
        *(_duplicates(estimator) if kept else []),
        *_hyperparameters(estimator),
        *_optima(estimator),
        *_fit(estimator),
    ]


def _name(estimator: BaseGP, column: int) -> str:
    names = getattr(estimator, "feature_names_in_", None)
    return f"column {column}" if names is None else f"column {names[column]!r}"


def _columns(estimator: BaseGP) -> list[Finding]:
    X = estimator._rows.X
    constant: Any = np.flatnonzero((X[:1] == X).all(axis=0)) if len(X) > 1 else []
    found = [
        Finding(
            "constant_column",
            f"{_name(estimator, j)} has one value only and carries no information.",
            "Drop it; predictions at other values of it are extrapolation.",
        )
        for j in constant
    ]
    scales = X.std(axis=0)
    scales = scales[scales > 0]
    if not estimator.standardize and len(scales) > 1 and scales.max() > _UNSCALED * scales.min():
        found.append(
            Finding(
                "unscaled_columns",
                f"column scales differ by a factor of {scales.max() / scales.min():.2g} and standardize=False.",
                "Set standardize=True or scale the columns.",
            )
        )
    return found


def _duplicates(estimator: BaseGP) -> list[Finding]:
    rows = estimator._rows
    observed = rows.X if rows.orders is None else np.column_stack([rows.X, rows.orders])
    _, inverse = np.unique(observed + 0.0, axis=0, return_inverse=True)
    repeated = len(rows.X) - (inverse.max() + 1)
    if repeated == 0:
        return []
    inverse = inverse.reshape(-1)
    if hasattr(estimator, "classes_"):
        spread = "with another label"
    else:
        spread = f"with another target (largest deviation from their mean {_deviation(rows.y, inverse):.3g})"
    return [
        Finding(
            "duplicates",
            f"{repeated} row(s) repeat the inputs of another row {spread}.",
            "This is fine if it is measurement noise; the noise level is then well determined by these rows.",
        )
    ]


def _deviation(y: np.ndarray, group: np.ndarray) -> float:
    """Return the largest deviation of a target from the mean of its group, over all outputs."""
    largest = 0.0
    for targets in y.reshape(len(y), -1).T:
        seen = ~np.isnan(targets)
        total = np.bincount(group[seen], weights=targets[seen], minlength=group.max() + 1)
        count = np.bincount(group[seen], minlength=group.max() + 1)
        mean = total / np.maximum(count, 1)
        largest = max(largest, float(np.abs(targets - mean[group])[seen].max(initial=0.0)))
    return largest


def _hyperparameters(estimator: BaseGP) -> list[Finding]:
    found = []
    flags = at_bounds(estimator._theta, estimator._theta_bounds)
    for name, flag, bounds in zip(estimator._theta_names, flags, estimator._theta_bounds, strict=True):
        if flag == 0 or estimator.optimizer is None:
            continue
        where = "upper" if flag > 0 else "lower"
        if name.endswith("noise_variance") and flag < 0 and bounds[0] < np.log(_TINY_NOISE):
            found.append(
                Finding(
                    "noise_at_floor",
                    "the noise variance is at its lower bound: the model interpolates y.",
                    "Expected for deterministic simulations; otherwise look for duplicates or add noise_variance.",
                )
            )
        elif "lengthscale" in name:
            meaning = "the input looks irrelevant" if flag > 0 else "y looks like white noise along the input"
            found.append(
                Finding(
                    "lengthscale_at_bound",
                    f"{name} is at its {where} bound: {meaning}.",
                    "Drop the column, or try another kernel or more data.",
                )
            )
        else:
            found.append(
                Finding("at_bound", f"{name} is at its {where} bound.", "Try another kernel or standardize=True.")
            )
    return found


def _optima(estimator: BaseGP) -> list[Finding]:
    optima = np.array(estimator.fit_report_.optima)
    if len(optima) < 2 or -optima.min() < _OPTIMA_NATS:
        return []
    return [
        Finding(
            "several_optima",
            f"starts ended up to {-optima.min():.4g} nats below the best, which was kept.",
            "Raise n_restarts, or put a prior on the lengthscale.",
        )
    ]


def _fit(estimator: BaseGP) -> list[Finding]:
    report = estimator.fit_report_
    found = []
    if not report.converged:
        found.append(Finding("not_converged", f"the fit did not converge ({report.status}).", "Raise max_iter."))
    if report.jitter > 0:
        found.append(
            Finding(
                "jitter",
                f"the covariance matrix needed a relative jitter of {report.jitter:g}.",
                "Remove near-duplicate rows or use dtype='float64'.",
            )
        )
    return found
