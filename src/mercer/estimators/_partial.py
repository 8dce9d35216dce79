"""``partial_fit``: every row is kept while there are few; afterwards the process lives on a stream."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.utils import _safe_indexing
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from mercer._typing import Data
from mercer.estimators._conditioning import condition, fitted_attributes
from mercer.estimators._prequential import StreamScore, score_stream
from mercer.estimators._report import FitReport, evidence_name, peak_memory_mb
from mercer.estimators._rows import Rows, Units, canonical_rows, joined_rows, make_data, rows_of
from mercer.families.inducing import Inducing
from mercer.families.tied import GaussianStatistics
from mercer.inference.conjugate import Conjugate
from mercer.inference.dual import Dual
from mercer.inference.theta import ThetaVector
from mercer.model import Model
from mercer.sequential import stream as streams
from mercer.sequential.options import Stream
from mercer.sequential.stream import StreamState, Update

_SURPRISING = 4.0  # standard deviations of the batches before
_LOST = 1.0  # nats
_MOST_WAITING = 1000  # rows whose targets are all the same
_FAR, _FARTHER = 30.0, 10.0  # in units of the first rows, and times what memory's rows have
_STREAMING = ("auto", "inducing")
_ENGINES = ("auto", "conjugate", "dual")
_PER_ROW = ("sample_weight", "exposure", "noise_variance")


class _Interrupted(BaseException):
    """A KeyboardInterrupt on its way out, after which nothing may be kept: the batch would be learned twice."""


@contextmanager
def _nothing_kept() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise _Interrupted from interrupt


class MemoryRows(NamedTuple):
    """Rows that a stream keeps as they are, in units of the data; ``inclusion`` as in `mercer.sequential.memory`."""

    X: np.ndarray
    y: np.ndarray
    sample_weight: np.ndarray
    inclusion: np.ndarray


class PartialFit:
    """Mixin: learning from batches that are not seen again."""

    family: Any
    engine: Any
    stream: Stream | None
    posterior_: Any
    log_marginal_likelihood_value_: float
    stream_: StreamState
    _rows: Rows
    _units: Units
    _model: Model

    def _stream_options(self) -> Stream:
        return Stream() if self.stream is None else self.stream

    def _family_streams(self) -> bool:
        return self.family in _STREAMING if isinstance(self.family, str) else isinstance(self.family, Inducing)

    def _partial_fit(
        self,
        X: Any,
        y: Any,
        encode: Callable[[Any, Any, np.ndarray], np.ndarray],
        sample_weight: Any,
        side: dict[str, Any],
    ) -> Any:
        """Take in a batch; on any failure or interrupt the estimator is left as it was."""
        estimator: Any = self
        first = not hasattr(self, "posterior_")
        try:
            with estimator._all_or_nothing(), _nothing_kept():
                rows, device = estimator._checked_rows(X, y, encode, sample_weight, side, reset=first)
                options = self._stream_options()
                if not first:
                    device = self._model.policy.device
                    _check_same_side(self._rows, rows)
                if hasattr(self, "stream_"):
                    self._take_in(rows, options)
                    return self
                known = rows if first else joined_rows(self._rows, rows)
                # of targets that are all the same nothing was learned, not even their units
                resume = not first and _vary(self._rows.y)
                if not self._stream_begins(known, options):
                    estimator._infer(canonical_rows(*known.raw()), device, X, y, resume=resume)
                    if self._family_streams() and not _vary(known.y):
                        self.fit_report_.notes.append("y has had one value so far: rows are kept until it varies")
                elif resume:
                    self._begin(options)
                    self._take_in(rows, options)
                else:
                    family = self._inducing(options)
                    estimator._infer(canonical_rows(*known.raw()), device, X, y, family=family)
                    self._begin(options)
        except _Interrupted:
            raise KeyboardInterrupt("partial_fit was interrupted; the estimator is as it was before.") from None
        return self

    def _stream_begins(self, known: Rows, options: Stream) -> bool:
        """Whether rows are too many to be kept, and say something that a stream can begin with."""
        if not self._family_streams() or (self.family == "auto" and len(known.X) <= options.dense_rows):
            return False
        engine = getattr(self.engine, "name", self.engine)
        if engine not in _ENGINES:
            raise ValueError(
                f"engine={engine!r} knows no streams: partial_fit needs engine='auto' beyond {options.dense_rows} rows."
            )
        return _vary(known.y) or len(known.X) > _MOST_WAITING

    def _inducing(self, options: Stream) -> Inducing:
        """Return the family of the stream."""
        return self.family if isinstance(self.family, Inducing) else Inducing(n_inducing=options.n_inducing)

    def _streaming(self, model: Model, options: Stream) -> Model:
        """Return a model of its own that streams use; the family's places stay where the stream puts them."""
        likelihood = copy.deepcopy(model.likelihood)
        engine: Any = Conjugate() if likelihood.conjugate else self.engine
        if not isinstance(engine, (Conjugate, Dual)):
            engine = Dual()
        family = replace(self._inducing(options), locations="fixed")
        return Model(copy.deepcopy(model.prior), likelihood, family, engine, model.policy)

    def _begin(self, options: Stream) -> None:
        """Go over from a posterior that knows all rows to a stream that has seen them."""
        own = self._model.family.name == "inducing"
        model = self._streaming(self._model, options)
        data = make_data(self._rows, self._units, model.policy)
        if self._standardize_y and not _vary(self._rows.y) and not data.side:  # type: ignore[attr-defined]
            # one value says that there is no noise, which later rows could hardly contradict
            model.likelihood.initialise(data.y[..., :1] + data.y.new_tensor([-1.0, 1.0]), data.weight.new_ones(2))
        seed = int(self._seed())  # type: ignore[attr-defined]
        state = streams.start(model, data, options, seed, self.posterior_.plan.Z if own else None)
        began = time.perf_counter()
        how = replace(options, inducing="fixed") if own else options
        outcome = streams.update(model, state, data, how, learn=False)
        self._set_stream(model, outcome, self._rows, began, options, [])

    def _take_in(self, rows: Rows, options: Stream) -> None:
        """Update the stream with a batch."""
        began = time.perf_counter()
        model = self._streaming(self._model, options)
        batch = make_data(rows, self._units, model.policy)
        model.likelihood.validate(batch.y, **batch.side)
        learn = options.hyperparameters == "auto" and self.optimizer is not None  # type: ignore[attr-defined]
        outcome = streams.update(model, self.stream_, batch, options, learn)
        found = []
        if self.standardize:  # type: ignore[attr-defined]
            names = getattr(self, "feature_names_in_", None)
            found = _misfits(batch, self.stream_.memory.data, names, self._standardize_y)  # type: ignore[attr-defined]
        self._set_stream(model, outcome, joined_rows(self._rows, rows), began, options, found)

    def _set_stream(
        self, model: Model, outcome: Update, rows: Rows, began: float, options: Stream, found: list[str]
    ) -> None:
        """Set the fitted attributes after an update; ``rows`` are memory's and the batch's."""
        state = outcome.state
        kept = rows_of(rows, outcome.kept.cpu().numpy(), state.memory.data.weight.cpu().numpy())
        notes = self._set_state(model, state, outcome.posterior, kept)
        self.__dict__.update(n_iter_=max(1, outcome.n_iter), converged_=outcome.converged)
        memory = len(kept.X)
        notes = [
            *notes,
            *outcome.notes,
            *outcome.confession.notes,
            f"batch {state.n_batches} of a stream: {len(state.Z)} inducing points, {memory} row(s) in memory",
            f"moving inducing points lost {outcome.loss:.3g} nats, {state.loss:.3g} so far",
        ]
        found = [*found, *outcome.confession.warnings]
        if _doublings(state.loss) > _doublings(state.loss - outcome.loss):
            found.append(
                f"{state.loss:.3g} nats were lost where inducing points moved: raise n_inducing={len(state.Z)}, or "
                "lower loss_tol"
            )
        if outcome.surprise > _SURPRISING:
            found.append(
                f"the batch scored {outcome.surprise:.1f} standard deviations below those before it: the process may "
                "have changed, and forgetting < 1 would let go of the past"
            )
        if not outcome.converged:
            found.append("the sites of the batch did not converge; what it says is not all learned")
        name = type(self).__name__
        self.fit_report_ = FitReport(
            family=self._model.family.name,
            family_reason=f"a stream of {state.n_seen} rows",
            engine=self._model.engine.name,
            engine_reason="sites of rows that are gone are tied at the inducing points",
            evidence=evidence_name(self._model.engine, self._model.family),
            likelihood=type(getattr(model.likelihood, "module", model.likelihood)).__name__,
            n_rows=state.n_seen,
            n_iter=outcome.n_iter,
            n_evaluations=outcome.n_evaluations,
            n_inner=outcome.n_inner,
            converged=outcome.converged,
            status=f"batch {state.n_batches}",
            jitter=self.posterior_.jitter,
            device=str(model.policy.device),
            seconds=time.perf_counter() - began,
            memory_mb=peak_memory_mb(model.policy.device),
            log_marginal_likelihood=self.log_marginal_likelihood_value_,
            notes=notes,
            warnings=found,
        )
        for message in found:
            warnings.warn(f"{name}: {message}.", UserWarning, stacklevel=6)

    def score_stream(self, X: Any, y: Any, batch_size: int = 100, **known: Any) -> StreamScore:
        """Go through rows in their order, batch by batch: test, then train.

        Parameters
        ----------
        X : (n, d)
        y : as in ``fit``
        batch_size : int, default=100
        **known
            Passed on to ``partial_fit``, such as ``classes``; values per row, such as ``exposure``, for all rows of X.

        Returns
        -------
        StreamScore
            Log score, score and seconds of each batch.
        """
        if not isinstance(batch_size, Integral) or batch_size < 1:
            raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}.")
        starts = range(0, len(X), int(batch_size))
        per_row = {k: v for k, v in known.items() if k in _PER_ROW and np.ndim(v) > 0}
        rest = {k: v for k, v in known.items() if k not in per_row}

        def batches() -> Iterator[tuple[Any, Any, dict[str, Any]]]:
            for i in starts:
                X_i, y_i, *values = (_some(each, slice(i, i + batch_size)) for each in (X, y, *per_row.values()))
                yield X_i, y_i, dict(zip(per_row, values, strict=True))

        return score_stream(self, batches(), len(starts), **rest)

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
            state, kept = streams.merged(model, states, before, self._stream_options())
            rows = rows_of(rows, kept.cpu().numpy(), state.memory.data.weight.cpu().numpy())
            self._set_state(model, state, streams.posterior_of(model, state), rows)
            self._report(f"merged {len(states)} streams")
        return self

    def _set_state(self, model: Model, state: StreamState, posterior: Any, rows: Rows) -> list[str]:
        """Set the fitted attributes to those of a stream with ``rows`` in memory; return what is to be reported."""
        units, past = self._units, state.total - state.memory.share
        engine: Any = streams.given(model, past)[0]
        if isinstance(past, GaussianStatistics):
            engine = replace(engine, offset=-float((past.count.cpu() * torch.as_tensor(np.log(units.y_scale))).sum()))
        offset = getattr(engine, "offset", 0.0)
        counted = rows_of(rows, np.arange(len(rows.X)), state.memory.counted.cpu().numpy())
        value = streams.evidence_of(model, state) + units.log_jacobian(counted) + offset
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

    @property
    def memory_(self) -> MemoryRows:
        """Rows that are kept as they are: all of them until a stream begins."""
        check_is_fitted(self, "posterior_")
        rows = self._rows
        inclusion = np.ones(len(rows.X))
        if hasattr(self, "stream_"):
            inclusion = self.stream_.memory.inclusion.cpu().numpy()
        return MemoryRows(rows.X, self._targets_of(rows), rows.weight, inclusion)

    def _targets_of(self, rows: Rows) -> np.ndarray:
        """Return the targets of rows as the user has them."""
        return rows.y

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
        after = streams.without(model, state, share, gone)
        kept = rows_of(self._rows, np.flatnonzero(left), after.memory.data.weight.cpu().numpy())
        self._set_state(model, after, streams.posterior_of(model, after), kept)


def _check_same_side(known: Rows, new: Rows) -> None:
    if set(known.side) != set(new.side):
        before, now = sorted(known.side) or ["none"], sorted(new.side) or ["none"]
        raise ValueError(f"batches must have the same values per row: {before} before, {now} now.")
    if known.y.shape[1:] != new.y.shape[1:]:
        raise ValueError(f"y has {new.y.shape[1:] or 'one column'}, and batches before had {known.y.shape[1:]}.")


def _vary(y: np.ndarray) -> bool:
    """Whether any output takes more than one value."""
    columns = y.reshape(len(y), -1).T
    return any(len(np.unique(column[~np.isnan(column)])) > 1 for column in columns)


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


def _doublings(nats: float) -> int:
    """Return how often a loss has doubled since it became worth mentioning."""
    return 0 if nats < _LOST else 1 + int(math.log2(nats / _LOST))


def _misfits(batch: Data, memory: Data, names: Any, with_y: bool) -> list[str]:
    """Return warnings of rows that the units of the first rows do not fit, unless memory has such rows already."""
    found = []

    def stands_out(size: Tensor, known: Tensor) -> Tensor:
        return size > _FARTHER * known.clamp_min(_FAR / _FARTHER)

    sizes = [data.y.square().nanmean(-1).sqrt().nan_to_num(0.0) for data in (batch, memory)]
    if with_y and bool((far := stands_out(*sizes)).any()):
        size = float(sizes[0][far].max())
        found.append(
            f"y of the batch is {size:.3g} standard deviations of the first rows away from their mean; hyperparameters "
            "are learned in units of those and may not get there: begin anew with rows that are typical"
        )
    spreads = [
        data.X.std(0, correction=0) if data.n_rows else data.X.new_zeros(data.X.shape[1]) for data in (batch, memory)
    ]
    for j in stands_out(*spreads).nonzero().squeeze(-1).tolist():
        name = j if names is None else repr(names[j])
        found.append(
            f"column {name} of the batch varies by {float(spreads[0][j]):.3g} standard deviations of the first rows; "
            "lengthscales are learned in units of those and may not get there: begin anew with rows that are typical"
        )
    return found


def _some(values: Any, rows: slice) -> Any:
    """Return some rows of an array, a data frame, a list or a tensor."""
    return values[rows] if isinstance(values, Tensor) else _safe_indexing(values, rows)
