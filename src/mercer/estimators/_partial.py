"""``partial_fit``: every row is kept while there are few; afterwards the process lives on a stream."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
from sklearn.utils import _safe_indexing
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from mercer.estimators._learned_sums import LearnedSums
from mercer.estimators._prequential import StreamScore, score_stream
from mercer.estimators._report import FitReport, evidence_name, peak_memory_mb
from mercer.estimators._rows import Rows, canonical_rows, joined_rows, make_data, rows_of
from mercer.estimators._stream_warnings import doublings, misfits
from mercer.families.inducing import Inducing
from mercer.inference.conjugate import Conjugate
from mercer.inference.dual import Dual
from mercer.model import Model
from mercer.sequential import state as held
from mercer.sequential import stream as streams
from mercer.sequential.options import Stream
from mercer.sequential.stream import Update

_SURPRISING = 4.0  # standard deviations of the batches before
_MOST_WAITING = 1000  # rows whose targets are all the same
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


class PartialFit(LearnedSums):
    """Mixin: learning from batches that are not seen again."""

    family: Any
    engine: Any

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
        if not first and self._rows.orders is not None:
            raise ValueError("partial_fit takes values of y only, and fit had derivatives too; fit all rows together.")
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
        state = held.start(model, data, seed, self.posterior_.plan.Z if own else None)
        began = time.perf_counter()
        how = replace(options, inducing="fixed") if own else options
        outcome = streams.update(model, state, data, how, learning=False)
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
            found = misfits(batch, self.stream_.memory.data, names, self._standardize_y)  # type: ignore[attr-defined]
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
        if doublings(state.loss) > doublings(state.loss - outcome.loss):
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


def _some(values: Any, rows: slice) -> Any:
    """Return some rows of an array, a data frame, a list or a tensor."""
    return values[rows] if isinstance(values, Tensor) else _safe_indexing(values, rows)
