"""Derivatives at the user's end: which one is meant, in what units, and rows of y that are derivatives."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mercer.estimators._rows import Container, Rows, Units
from mercer.estimators._validation import to_numpy
from mercer.families.differentiated import at_derivative, differentiable

_ACCEPTED = "a column's name or position, several names, or one order per column such as (1, 0)"


class DerivativePredictions:
    """Mixin: means, standard deviations and covariances of ∂f at new rows."""

    _rows: Rows
    _units: Units
    _model: Any
    posterior_: Any

    def _predict_derivative(
        self, X: Tensor, container: Container, derivative: Any, return_std: bool, return_cov: bool
    ) -> Any:
        """Return what `predict` returns, for a derivative of f in units of y over those of X."""
        names = getattr(self, "feature_names_in_", None)
        order = parse_order(derivative, X.shape[1], names)
        posterior, policy = differentiable(self.posterior_), self._model.policy
        rows = at_derivative(posterior, self._units.inputs(X.to(dtype=policy.dtype, device=policy.device)), order)
        scale = torch.as_tensor(self._units.derivative_scale(np.asarray(order))).to(rows)

        def outputs(value: Tensor) -> Tensor:
            return (value.mT if value.dim() > 1 else value) * scale

        center = torch.as_tensor(np.asarray(self._units.y_center)).to(rows) * (not any(order))
        if return_cov:
            mean, covariance = posterior.joint(rows)
            covariance = covariance.movedim(0, -1) if mean.dim() == 2 else covariance
            return container.wrap(outputs(mean) + center), container.wrap(covariance * scale.square())
        if not return_std:
            return container.wrap(outputs(posterior.mean(rows)) + center)
        mean, variance = posterior.marginals(rows)
        return container.wrap(outputs(mean) + center), container.wrap(outputs(variance.sqrt()))


def parse_order(derivative: Any, d: int, names: Any) -> tuple[int, ...]:
    """Return the order of a derivative in each of d columns.

    Raises
    ------
    ValueError
        No such column, or not one order per column.
    TypeError
        None of what is accepted.
    """
    if isinstance(derivative, str) or (isinstance(derivative, (list, tuple)) and any(map(_is_name, derivative))):
        asked = [derivative] if isinstance(derivative, str) else list(derivative)
        known = [] if names is None else list(names)
        unknown = [name for name in asked if name not in known]
        if unknown:
            where = "fit had no column names" if names is None else f"the columns are {known}"
            raise ValueError(f"derivative={derivative!r}: there is no column {unknown[0]!r}; {where}.")
        return tuple(asked.count(name) for name in known)
    if isinstance(derivative, Integral) and not isinstance(derivative, bool):
        position = int(derivative)
        if not -d <= position < d:
            raise ValueError(f"derivative={derivative}: there is no column {position}; X has {d} columns.")
        return tuple(int(j == position % d) for j in range(d))
    orders = _integers(derivative)
    if orders is None:
        raise TypeError(f"derivative must be {_ACCEPTED}; got {derivative!r}.")
    if orders.shape != (d,) or (orders < 0).any():
        raise ValueError(f"derivative={derivative!r} must have one order ≥ 0 for each of the {d} columns of X.")
    return tuple(orders.tolist())


def in_columns_of(X: Any, derivative: Any) -> Any:
    """Return orders in the sequence of the columns of X, where both have names for them.

    Raises
    ------
    ValueError
        Not the same names.
    """
    asked, known = getattr(derivative, "columns", None), getattr(X, "columns", None)
    if asked is None or known is None:
        return derivative
    if len(asked) != len(known) or set(asked) != set(known):
        raise ValueError(
            f"derivative has the columns {list(asked)} and X has {list(known)}; give one column of orders per column "
            "of X, under the same names, or an array."
        )
    return derivative[list(known)]


def check_orders(derivative: Any, X: Any) -> np.ndarray | None:
    """Return the order in each column of what each row of y is (n, d), or None where all rows are values.

    Raises
    ------
    ValueError
        Not one integer ≥ 0 per entry of X.
    """
    if derivative is None:
        return None
    orders, shape = _integers(to_numpy(derivative)), tuple(np.shape(X))
    if orders is not None and orders.ndim == 1 and shape[1] == 1:
        orders = orders[:, None]
    if orders is None or orders.shape != shape or (orders < 0).any():
        raise ValueError(
            f"derivative must be {shape}, for each row of y the order ≥ 0 of its derivative in each column of X and "
            f"zeros for a value; got {'no integers' if orders is None else orders.shape}."
        )
    return orders if orders.any() else None


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _integers(values: Any) -> np.ndarray | None:
    """Return whole numbers as int64, None for anything else."""
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    whole = np.isfinite(numbers).all() and (numbers == np.round(numbers)).all() and numbers.ndim > 0
    return numbers.astype(np.int64) if whole else None
