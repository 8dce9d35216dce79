"""From what the user passes to rows of tensors: containers, missing targets, weights and a canonical order.

Rows that are the same (inputs, target and side information) become one row with the summed weight, in
lexicographic order. Replication weights make that exact for every likelihood; it makes "weight 2" and "the row
twice" the same numbers, and a fit independent of the order of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mercer._typing import Data
from mercer.policy import NumericalPolicy

_SMALLEST = 1e-140  # spread of y; its square and what is learned relative to it are still normal numbers


@dataclass(frozen=True)
class Container:
    """How results go back: as NumPy float64, or as a tensor of the caller's dtype on the caller's device.

    ``differentiable`` says whether the caller wants gradients: of the inputs, never of our own parameters alone.
    """

    tensor: bool = False
    differentiable: bool = False
    dtype: torch.dtype = torch.float64
    device: torch.device = torch.device("cpu")

    @staticmethod
    def of(X: Any) -> Container:
        """Return the container of X."""
        if not isinstance(X, Tensor):
            return Container()
        dtype = X.dtype if X.dtype.is_floating_point else torch.float64
        return Container(True, X.requires_grad and torch.is_grad_enabled(), dtype, X.device)

    def wrap(self, value: Tensor) -> Any:
        """Return ``value`` in this container."""
        value = value if self.differentiable else value.detach()
        if self.tensor:
            return value.to(dtype=self.dtype, device=self.device)
        return value.double().cpu().numpy()


@dataclass(frozen=True)
class Rows:
    """Canonical training rows, still in the user's units (float64 NumPy).

    ``index`` (n_original,) maps each original row to its canonical row, −1 where it was dropped; ``n_dropped``
    counts rows of zero weight or without any target, ``n_merged`` rows that were merged into an equal one. ``orders``
    (n, d) says which derivative each target is, None where all are values.
    """

    X: np.ndarray
    y: np.ndarray
    weight: np.ndarray
    side: dict[str, np.ndarray]
    index: np.ndarray
    n_dropped: int
    n_merged: int
    orders: np.ndarray | None = None

    @property
    def values(self) -> np.ndarray:
        """Return y with NaN in the place of derivatives."""
        if self.orders is None:
            return self.y
        slopes = np.asarray(self.orders.any(axis=1))
        return np.where(slopes if self.y.ndim == 1 else slopes[:, None], np.nan, self.y)

    def raw(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Return what `canonical_rows` takes."""
        return self.X, self.y, self.weight, self.side

    def in_original_order(self, message: str, pair: tuple[int, ...]) -> str:
        """Return a message about two canonical rows with the numbers that these rows had in ``fit``."""
        if len(pair) != 2:
            return message
        first = [int(np.flatnonzero(self.index == row)[0]) for row in pair]
        return message.replace(f"Rows {pair[0]} and {pair[1]}", f"Rows {first[0]} and {first[1]}")


def canonical_rows(
    X: np.ndarray,
    y: np.ndarray,
    weight: np.ndarray,
    side: dict[str, np.ndarray],
    orders: np.ndarray | None = None,
) -> Rows:
    """Drop empty rows, merge equal ones, sort.

    Parameters
    ----------
    X : (n, d)
    y : (n,) or (n, p)
        NaN marks a missing target.
    weight : (n,)
        Non-negative.
    side : dict of (n,) arrays
    orders : (n, d), optional
        As in `Rows`.

    Raises
    ------
    ValueError
        No row is left.
    """
    targets = y.reshape(len(y), -1)
    observed = ~np.isnan(targets).all(axis=1)
    if not observed.any():
        raise ValueError("y contains no observed target: every entry is NaN. Pass at least one finite target.")
    if not (weight > 0).any():
        raise ValueError("sample_weight is zero for every row. Sample weights must contain a non-zero number.")
    kept = observed & (weight > 0)
    if not kept.any():
        raise ValueError("sample_weight is zero for every row whose y is observed; nothing is left to fit.")
    missing = np.isnan(targets[kept])
    known = np.where(missing, 0.0, targets[kept])
    which = np.empty((len(X), 0)) if orders is None else orders
    columns = np.column_stack([X[kept], which[kept], known, missing, *(side[name][kept] for name in sorted(side))])
    # adding 0.0 turns −0.0 into 0.0: equal rows have equal keys
    _, first, inverse = np.unique(columns + 0.0, axis=0, return_index=True, return_inverse=True)
    merged = np.bincount(inverse.reshape(-1), weights=weight[kept], minlength=len(first))
    index = np.full(len(X), -1)
    index[kept] = inverse.reshape(-1)
    source = np.flatnonzero(kept)[first]
    return Rows(
        X=X[source],
        y=y[source],
        weight=merged,
        side={name: value[source] for name, value in side.items()},
        index=index,
        n_dropped=int((~kept).sum()),
        n_merged=int(kept.sum() - len(first)),
        orders=None if orders is None else orders[source],
    )


def rows_of(rows: Rows, index: np.ndarray, weight: np.ndarray | None) -> Rows:
    """Return the rows ``index``, in that order, with other weights if given."""
    side = {name: value[index] for name, value in rows.side.items()}
    own = rows.weight[index] if weight is None else weight
    return Rows(rows.X[index], rows.y[index], own, side, np.arange(len(index)), 0, 0)


def joined_rows(first: Rows, second: Rows) -> Rows:
    """Return the rows of both, one after the other; equal ones are not merged."""
    side = {name: np.concatenate([first.side[name], second.side[name]]) for name in first.side}
    X, y, weight = (np.concatenate([getattr(first, name), getattr(second, name)]) for name in ("X", "y", "weight"))
    return Rows(X, y, weight, side, np.arange(len(X)), 0, 0)


@dataclass(frozen=True)
class Units:
    """Affine change between the user's units and model units (zero mean, unit variance).

    x_center, x_scale : (d,); y_center, y_scale : (p,) or scalars, in units of X and y. ``with_orders`` says that rows
    of model units have an order of derivation per column beside them.
    """

    x_center: np.ndarray
    x_scale: np.ndarray
    y_center: np.ndarray
    y_scale: np.ndarray
    with_orders: bool = False

    @staticmethod
    def learn(rows: Rows, standardize: bool, standardize_y: bool) -> Units:
        """Return weighted means and standard deviations; a constant column keeps scale 1."""
        d, p = rows.X.shape[1], rows.y.reshape(len(rows.y), -1).shape[1]
        x_center, x_scale = np.zeros(d), np.ones(d)
        y_center, y_scale = np.zeros(p), np.ones(p)
        if standardize:
            x_center, x_scale = _moments(rows.X, rows.weight)
        if standardize_y:
            y_center, y_scale = _target_moments(rows, x_scale)
            if not ((y_scale > _SMALLEST) & (y_scale < 1 / _SMALLEST)).all():
                raise ValueError(
                    f"y varies by {y_scale.max():.3g}, and variances in units of y² would leave the range of float64; "
                    "rescale y."
                )
        if rows.y.ndim == 1:
            y_center, y_scale = y_center[0], y_scale[0]
        return Units(x_center, x_scale, y_center, y_scale, rows.orders is not None)

    @property
    def output_scale(self) -> float:
        """Unit of the latent function: the scale of y, or 1 where several outputs have scales of their own."""
        return float(np.ravel(self.y_scale)[0]) if np.size(self.y_scale) == 1 else 1.0

    def log_jacobian(self, rows: Rows) -> float:
        """Return log |d y_model / d y_user| summed over observed targets; zero where y keeps its units."""
        seen = ~np.isnan(rows.y)
        weight = rows.weight if seen.ndim == 1 else rows.weight[:, None]
        return -float((seen * weight * np.log(self.target_units(rows)[1])).sum())

    def derivative_scale(self, orders: np.ndarray) -> np.ndarray:
        """Return the unit of the derivative of each order (*n, d): (*n,) or, with several outputs, (*n, p)."""
        slopes = np.prod(self.x_scale ** -np.asarray(orders, dtype=np.float64), axis=-1)
        return slopes * self.y_scale if np.ndim(self.y_scale) == 0 else slopes[..., None] * self.y_scale

    def target_units(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """Return centre and scale of the targets, per row where some are derivatives, which have no centre."""
        if rows.orders is None:
            return self.y_center, self.y_scale
        values = np.asarray(~rows.orders.any(axis=1))
        return (values if rows.y.ndim == 1 else values[:, None]) * self.y_center, self.derivative_scale(rows.orders)

    def inputs(self, X: Tensor) -> Tensor:
        """Return X in model units; differentiable."""
        moved = (X - torch.as_tensor(self.x_center).to(X)) / torch.as_tensor(self.x_scale).to(X)
        return torch.cat([moved, torch.zeros_like(moved)], -1) if self.with_orders else moved


def _target_moments(rows: Rows, x_scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of the values in y (p,), or the size of its derivatives if there are none."""
    y = rows.values.reshape(len(rows.y), -1)
    center, scale = _moments(y, rows.weight)
    if rows.orders is None:
        return center, scale
    slopes = rows.y.reshape(y.shape) * np.prod(x_scale**rows.orders, axis=1)[:, None]
    _, steepness = _moments(np.concatenate([slopes, -slopes]), np.tile(rows.weight, 2))
    return center, np.where(np.isnan(y).all(axis=0), steepness, scale)


def _moments(values: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return weighted mean and standard deviation per column, ignoring NaN; scale 1 for constant columns."""
    seen = ~np.isnan(values)
    w = np.where(seen, weight[:, None], 0.0)
    total = w.sum(0)
    filled = np.where(seen, values, 0.0)
    # the largest magnitude is divided out first, so that squares of 1e200 do not overflow
    size = np.abs(filled).max(0)
    size = np.where(size > 0, size, 1.0)
    unit = filled / size
    center = (w * unit).sum(0) / np.where(total > 0, total, 1.0)
    spread = np.sqrt((w * (unit - center) ** 2).sum(0) / np.where(total > 0, total, 1.0))
    constant = spread <= 1e-14 * np.maximum(np.abs(center), 1e-300)
    magnitude = np.abs(center) * size
    return center * size, np.where(constant, np.where(magnitude > 0, magnitude, 1.0), spread * size)


def make_data(rows: Rows, units: Units, policy: NumericalPolicy) -> Data:
    """Return canonical rows as tensors in model units, targets with the row axis last."""

    def tensor(values: np.ndarray) -> Tensor:
        return torch.as_tensor(np.ascontiguousarray(values), dtype=policy.dtype, device=policy.device)

    X = tensor((rows.X - units.x_center) / units.x_scale)
    if rows.orders is not None:
        X = torch.cat([X, tensor(rows.orders)], -1)
    center, scale = units.target_units(rows)
    y = tensor(((rows.y - center) / scale).T)
    side = {name: tensor(value) for name, value in rows.side.items()}
    if "noise_variance" in side:
        # (p, 1), or (p, n) where rows have units of their own
        scales = np.atleast_1d(scale)[:, None] if rows.orders is None else np.atleast_2d(scale.T)
        side["noise_variance"] = (side["noise_variance"] / tensor(scales).square()).reshape(y.shape)
    return Data(X, y, tensor(rows.weight), side)


def user_rows(data: Data, units: Units) -> Rows:
    """Return rows of tensors in model units as rows in the user's; rounded."""

    def array(value: Tensor) -> np.ndarray:
        return value.detach().double().cpu().numpy()

    side = {name: array(value) for name, value in data.side.items()}
    if "noise_variance" in side:
        side["noise_variance"] = (side["noise_variance"].reshape(-1, data.n_rows)[0]) * np.ravel(units.y_scale)[0] ** 2
    y = array(data.y).T * units.y_scale + units.y_center
    X = array(data.X) * units.x_scale + units.x_center
    return Rows(X, y, array(data.weight), side, np.arange(data.n_rows), 0, 0)
