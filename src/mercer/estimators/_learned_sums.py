"""Sums of what was learned: forgetting rows, and adding what other estimators have seen."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted

from mercer._typing import Data
from mercer.estimators._conditioning import condition, fitted_attributes
from mercer.estimators._rows import Rows, Units, canonical_rows, joined_rows, make_data, rows_of
from mercer.families.tied import GaussianStatistics
from mercer.inference.theta import ThetaVector
from mercer.model import Model
from mercer.sequential import state as held
from mercer.sequential import sums
from mercer.sequential.options import Stream
from mercer.sequential.state import StreamState


class LearnedSums:
    """Mixin: ``forget`` and ``merge``, and setting the fitted attributes to those of a stream."""

    fit_report_: Any
    posterior_: Any
    log_marginal_likelihood_value_: float
    stream_: StreamState
    _rows: Rows
    _units: Units
    _model: Model

    stream: Stream | None

    def _stream_options(self) -> Stream:
        return Stream() if self.stream is None else self.stream

    def merge(self, *others: Any, common: Any = None) -> Any:
        """Add what other estimators have seen, each on rows of its own.

        Parameters
        ----------
        *others : estimators of this class
            On streams with the same hyperparameters and inducing points as this one, as copies of one estimator have
            that then saw different rows under ``Stream(inducing="fixed", hyperparameters="frozen")``.
        common : estimator, default=None
            The one that they are copies of; what it had seen counts once. None if it had seen nothing.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            Hyperparameters, units or inducing points differ, or a stream has not begun. Nothing is changed.
        """
        given = [self, *others, *([] if common is None else [common])]
        if len({id(each) for each in given}) < len(given):
            raise ValueError("merge needs different estimators; what one has seen would count twice.")
        for each in given:
            if not hasattr(each, "stream_"):
                raise ValueError("merge needs streams: give each estimator more than stream.dense_rows rows first.")
            if not _same_process(self, each):
                raise ValueError(
                    "merge needs equal hyperparameters and units: make copies of one estimator with "
                    "Stream(inducing='fixed', hyperparameters='frozen')."
                )
        states = [each.stream_ for each in (self, *others)]
        before = None if common is None else common.stream_
        with self._all_or_nothing():  # type: ignore[attr-defined]
            rows = self._rows_at_hand = self._rows
            for other in others:
                rows = joined_rows(rows, other._rows)
            model = self._model
            state, kept = sums.merged(model, states, before, self._stream_options())
            rows = rows_of(rows, kept.cpu().numpy(), state.memory.data.weight.cpu().numpy())
            self._set_state(model, state, held.posterior_of(model, state), rows)
            self._report(f"merged {len(states)} streams")
        return self

    def _set_state(self, model: Model, state: StreamState, posterior: Any, rows: Rows) -> list[str]:
        """Set the fitted attributes to those of a stream with ``rows`` in memory; return what is to be reported."""
        units, past = self._units, state.total - state.memory.share
        engine: Any = held.given(model, past)[0]
        if isinstance(past, GaussianStatistics):
            engine = replace(engine, offset=-float((past.count.cpu() * torch.as_tensor(np.log(units.y_scale))).sum()))
        offset = getattr(engine, "offset", 0.0)
        counted = rows_of(rows, np.arange(len(rows.X)), state.memory.counted.cpu().numpy())
        value = held.evidence_of(model, state) + units.log_jacobian(counted) + offset
        model = replace(model, engine=engine)
        theta = ThetaVector(model).read()
        attributes, notes = fitted_attributes(model, rows, units, theta, posterior.release(), value)
        self.__dict__.update(attributes, stream_=state)
        return notes

    def _report(self, status: str) -> None:
        """Set the report to what came of the last one by something that is no fit."""
        n_rows = self.stream_.n_seen if hasattr(self, "stream_") else len(self._rows.X)
        value = self.log_marginal_likelihood_value_
        self.fit_report_ = replace(self.fit_report_, n_rows=n_rows, log_marginal_likelihood=value, status=status)

    def forget(self, X: Any, y: Any) -> Any:
        """Unlearn rows, as if they had never been seen; hyperparameters stay.

        Parameters
        ----------
        X : (n, d)
        y : as in ``fit``
            Every row must have been seen; one of weight w was seen w times, and each mention takes one away. Once a
            stream has begun it must be in memory; rows with Gaussian noise may also have left it, as long as neither
            inducing points nor hyperparameters nor weights changed since, and nobody checks then that they were ever
            there.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            A row that cannot be unlearned; nothing is.
        """
        check_is_fitted(self, "posterior_")
        estimator: Any = self
        with estimator._all_or_nothing():
            rows, _ = estimator._checked_rows(X, y, estimator._encode_known, None, {}, reset=False)
            left, missing = _taken_off(self._rows, rows)
            if hasattr(self, "stream_"):
                self._forget_on_stream(rows, left, missing)
            else:
                if missing.any():
                    row = int(np.flatnonzero(rows.index == np.flatnonzero(missing)[0])[0])
                    raise ValueError(f"row {row} of X was not seen with this y, or not so often.")
                if not left.any():
                    raise ValueError("no row would be left; use a new estimator instead.")
                self._keep_hyperparameters(canonical_rows(*rows_of(self._rows, np.arange(len(left)), left).raw()))
            self._report(f"unlearned {len(rows.X)} row(s)")
        return self

    def _keep_hyperparameters(self, rows: Rows) -> None:
        """Condition on rows at the hyperparameters, and the inducing points, that there are."""
        plan = self.posterior_.plan
        theta = self._theta  # type: ignore[attr-defined]
        model = copy.deepcopy(self._model)
        self.__dict__.update(
            condition(model, rows, self._units, theta, None, plan if hasattr(plan, "over") else None)[0]
        )

    def _forget_on_stream(self, rows: Rows, left: np.ndarray, missing: np.ndarray) -> None:
        state, model = self.stream_, self._model
        absent = np.flatnonzero(missing)
        if len(absent) and (state.moved or not isinstance(state.total, GaussianStatistics)):
            raise ValueError(
                f"{len(absent)} row(s) of X are not in memory, and what they said cannot be told from the rest any "
                "more. Use a larger memory, or Stream(inducing='fixed', hyperparameters='frozen') with Gaussian noise."
            )
        gone: Data | None = None
        if len(absent):
            gone = make_data(rows_of(rows, absent, missing[absent]), self._units, model.policy)
        share = torch.as_tensor(left / self._rows.weight).to(state.memory.data.weight)
        after = sums.without(model, state, share, gone)
        kept = rows_of(self._rows, np.flatnonzero(left), after.memory.data.weight.cpu().numpy())
        self._set_state(model, after, held.posterior_of(model, after), kept)


def _taken_off(known: Rows, unwanted: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights that known rows have left, and how many of each unwanted row are not among them.

    A weight of up to one is one row; equal rows are taken one after the other.
    """

    def keys(rows: Rows) -> list[bytes]:
        table = np.column_stack([rows.X, rows.y]) + 0.0
        table[np.isnan(table)] = np.nan  # of which there are many
        return [row.tobytes() for row in table]

    at: dict[bytes, list[int]] = {}
    for i, key in enumerate(keys(known)):
        at.setdefault(key, []).append(i)
    left, missing = known.weight.copy(), unwanted.weight.copy()
    for i, key in enumerate(keys(unwanted)):
        for j in at.get(key, []):
            n = min(missing[i], math.ceil(left[j]))
            left[j], missing[i] = max(left[j] - n, 0.0), missing[i] - n
    return left, missing


def _same_process(one: Any, other: Any) -> bool:
    """Whether two estimators have the same prior, likelihood and units."""

    def parts(each: Any) -> tuple[list[Any], list[Any]]:
        prior, units = each._model.prior, each._units
        modules = [m for m in (prior.kernel, prior.mean, each._model.likelihood) if m is not None]
        kinds = [(type(m), getattr(m, "nu", None)) for module in modules for m in module.modules()]
        numbers = [value.detach().cpu().numpy() for module in modules for value in module.state_dict().values()]
        where = [units.x_center, units.x_scale, units.y_center, units.y_scale, getattr(each, "classes_", 0)]
        return [type(each), *kinds, *sorted(each._rows.side), each._rows.y.shape[1:]], [*numbers, *where]

    kinds, numbers = zip(parts(one), parts(other), strict=True)
    return kinds[0] == kinds[1] and all(np.array_equal(a, b) for a, b in zip(*numbers, strict=True))
