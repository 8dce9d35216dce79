"""``partial_fit``: every row is kept while there are few; afterwards the process lives on a stream."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from sklearn.utils import _safe_indexing
from sklearn.utils.validation import check_is_fitted

from mercer._typing import Data
from mercer.estimators._conditioning import fitted_attributes
from mercer.estimators._prequential import StreamScore, score_stream
from mercer.estimators._report import FitReport, peak_memory_mb
from mercer.estimators._rows import Rows, Units, canonical_rows, joined_rows, make_data, rows_of, user_rows
from mercer.families.inducing import Inducing
from mercer.families.tied import GaussianStatistics
from mercer.inference.conjugate import Conjugate
from mercer.inference.dual import Dual
from mercer.inference.theta import ThetaVector
from mercer.model import Model
from mercer.sequential import stream as streams
from mercer.sequential.options import Stream
from mercer.sequential.stream import StreamState, Update

if TYPE_CHECKING:
    from mercer.families.base import Posterior

_SURPRISING = 4.0  # standard deviations of the batches before
_STREAMING = ("auto", "inducing")


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
    posterior_: Posterior
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
        """Take in a batch; on any failure the estimator is left as it was."""
        estimator: Any = self
        first = not hasattr(self, "posterior_")
        with estimator._all_or_nothing():
            rows, device = estimator._checked_rows(X, y, encode, sample_weight, side, reset=first)
            if not first:
                device = self._model.policy.device
                _check_same_side(self._rows, rows)
            options, streams_on = self._stream_options(), self._family_streams()
            if hasattr(self, "stream_"):
                self._take_in(rows, options)
                return self
            known = rows if first else joined_rows(self._rows, rows)
            many = len(known.X) > options.dense_rows or self.family != "auto"
            if streams_on and many:
                if first:
                    estimator._infer(rows, device, X, y, family=self._inducing(options))
                    self._begin(options)
                else:
                    self._begin(options)
                    self._take_in(rows, options)
                return self
            estimator._infer(canonical_rows(*known.raw()), device, X, y, resume=not first)
        return self

    def _inducing(self, options: Stream) -> Inducing:
        """Return the family of the stream: points that are put somewhere stay there until the stream moves them."""
        family = self.family
        if isinstance(family, Inducing):
            return replace(family, locations="fixed" if family.locations == "fixed" else "learned")
        return Inducing(n_inducing=options.n_inducing)

    def _begin(self, options: Stream) -> None:
        """Go over from a posterior that knows all rows to a stream that has seen them."""
        model = self._model
        engine: Any = Conjugate() if model.likelihood.conjugate else Dual()
        if model.engine.name not in ("conjugate", "dual"):
            raise ValueError(
                f"engine={model.engine.name!r} knows no streams: partial_fit needs engine='auto' beyond "
                f"{options.dense_rows} rows."
            )
        family = replace(self._inducing(options), locations="fixed")
        own = model.family.name == "inducing"
        policy = model.policy
        data = make_data(self._rows, self._units, policy)
        model = Model(copy.deepcopy(model.prior), copy.deepcopy(model.likelihood), family, engine, policy)
        seed = int(self._seed())  # type: ignore[attr-defined]
        state = streams.start(model, data, options, seed, self.posterior_.plan.Z if own else None)  # type: ignore[attr-defined]
        began = time.perf_counter()
        how = replace(options, inducing="fixed") if own else options
        outcome = streams.update(model, state, data, how, learn=False)
        self._set_stream(model, outcome, self._rows, began, options)

    def _take_in(self, rows: Rows, options: Stream) -> None:
        """Update the stream with a batch."""
        began = time.perf_counter()
        model = self._model
        engine: Any = Conjugate() if model.likelihood.conjugate else Dual()
        model = replace(
            model, prior=copy.deepcopy(model.prior), likelihood=copy.deepcopy(model.likelihood), engine=engine
        )
        batch = make_data(rows, self._units, model.policy)
        model.likelihood.validate(batch.y, **batch.side)
        learn = options.hyperparameters == "auto" and self.optimizer is not None  # type: ignore[attr-defined]
        outcome = streams.update(model, self.stream_, batch, options, learn)
        self._set_stream(model, outcome, joined_rows(self._rows, rows), began, options)

    def _set_stream(self, model: Model, outcome: Update, rows: Rows, began: float, options: Stream) -> None:
        """Set the fitted attributes after an update; ``rows`` are memory's and the batch's."""
        state, units = outcome.state, self._units
        kept = rows_of(rows, outcome.kept.cpu().numpy(), state.memory.data.weight.cpu().numpy())
        past = state.total - state.memory.share
        engine: Any = streams.given(model, past)[0]
        posterior = outcome.posterior.release()
        at_hand = rows if isinstance(past, GaussianStatistics) else kept
        value = outcome.value + units.log_jacobian(at_hand)
        if isinstance(past, GaussianStatistics):
            value -= float((past.count.cpu() * torch.as_tensor(np.log(units.y_scale))).sum())
        model = replace(model, engine=engine)
        theta = ThetaVector(model).read()
        attributes, notes = fitted_attributes(model, kept, units, theta, posterior, value)
        self.__dict__.update(attributes, stream_=state, n_iter_=max(1, outcome.n_iter), converged_=outcome.converged)
        memory = len(kept.X)
        notes = [
            *notes,
            *outcome.notes,
            f"batch {state.n_batches} of a stream: {len(state.Z)} inducing points, {memory} row(s) in memory",
            f"moving inducing points lost {outcome.loss:.3g} nats, {state.loss:.3g} so far",
        ]
        found = []
        if state.loss > options.loss_tol * state.n_batches and state.loss > 1.0:
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
            family=model.family.name,
            family_reason=f"a stream of {state.n_seen} rows",
            engine=model.engine.name,
            engine_reason="sites of rows that are gone are tied at the inducing points",
            evidence=f"{model.engine.evidence} {model.family.evidence_of}",
            likelihood=type(getattr(model.likelihood, "module", model.likelihood)).__name__,
            n_rows=state.n_seen,
            n_iter=outcome.n_iter,
            n_evaluations=outcome.n_evaluations,
            n_inner=outcome.n_inner,
            converged=outcome.converged,
            status=f"batch {state.n_batches}",
            jitter=posterior.jitter,
            device=str(model.policy.device),
            seconds=time.perf_counter() - began,
            memory_mb=peak_memory_mb(model.policy.device),
            log_marginal_likelihood=value,
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
            Passed on to ``partial_fit``, such as ``classes``.

        Returns
        -------
        StreamScore
            Log score, score and seconds of each batch.
        """
        if not isinstance(batch_size, Integral) or batch_size < 1:
            raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}.")
        starts = range(0, len(X), int(batch_size))
        batches = (
            (_safe_indexing(X, slice(i, i + batch_size)), _safe_indexing(y, slice(i, i + batch_size))) for i in starts
        )
        return score_stream(self, batches, len(starts), **known)

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
        for each in given:
            if not hasattr(each, "stream_"):
                raise ValueError("merge needs streams: give each estimator more than stream.dense_rows rows first.")
            same = (each._units.x_scale, each._units.y_scale, each._theta)
            own = (self._units.x_scale, self._units.y_scale, self._theta)  # type: ignore[attr-defined]
            if not all(np.array_equal(a, b) for a, b in zip(same, own, strict=True)):
                raise ValueError(
                    "merge needs equal hyperparameters and units: make copies of one estimator with "
                    "Stream(inducing='fixed', hyperparameters='frozen')."
                )
        options = self._stream_options()
        states = [each.stream_ for each in (self, *others)]
        before = None if common is None else common.stream_
        state = streams.merged(self._model, states, before, options)
        self._set_state(state)
        return self

    def _set_state(self, state: StreamState) -> None:
        """Set the fitted attributes to those of a state that was put together from others."""
        model, units = self._model, self._units
        posterior = streams.posterior_of(model, state).release()
        model = replace(model, engine=streams.given(model, state.total - state.memory.share)[0])
        rows = user_rows(state.memory.data, units)
        # of rows that are gone the evidence cannot be told
        attributes, _ = fitted_attributes(model, rows, units, ThetaVector(model).read(), posterior, float("nan"))
        self.__dict__.update(attributes, stream_=state)

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
            Every row must have been seen. Once a stream has begun it must be in memory; rows with Gaussian noise may
            also have left it, as long as neither inducing points nor hyperparameters changed since, and nobody checks
            then that they were ever there.

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
            rows, device = estimator._checked_rows(X, y, estimator._encode_known, None, {}, reset=False)
            place = _find(self._rows, rows)
            missing = place < 0
            if not hasattr(self, "stream_"):
                if missing.any():
                    raise ValueError(f"row {int(np.flatnonzero(missing)[0])} of X was never seen with this y.")
                left = self._rows.weight.copy()
                np.subtract.at(left, place, rows.weight)
                if not (left > 1e-12).any():
                    raise ValueError("no row would be left; use a new estimator instead.")
                remaining = canonical_rows(*rows_of(self._rows, np.arange(len(left)), left.clip(min=0.0)).raw())
                self._keep_hyperparameters(remaining, device)
                return self
            self._forget_on_stream(rows, place)
        return self

    def _keep_hyperparameters(self, rows: Rows, device: torch.device) -> None:
        from mercer.estimators._conditioning import condition

        fitted, _ = condition(copy.deepcopy(self._model), rows, self._units, self._theta, None)  # type: ignore[attr-defined]
        self.__dict__.update(fitted)

    def _forget_on_stream(self, rows: Rows, place: np.ndarray) -> None:
        state, model = self.stream_, self._model
        gone = rows_of(rows, np.flatnonzero(place < 0), None)
        inside = place[place >= 0]
        if len(gone.X) and (state.moved or not isinstance(state.total, GaussianStatistics)):
            raise ValueError(
                f"{len(gone.X)} row(s) of X are not in memory, and what they said cannot be told from the rest any "
                "more. Use a larger memory, or Stream(inducing='fixed', hyperparameters='frozen') with Gaussian noise."
            )
        data: Data | None = make_data(gone, self._units, model.policy) if len(gone.X) else None
        after = streams.without(model, state, torch.as_tensor(inside, device=state.Z.device), data)
        kept = np.setdiff1d(np.arange(len(self._rows.X)), inside)
        rows = rows_of(self._rows, kept, None)
        self._set_state(after)
        self._rows = rows


def _check_same_side(known: Rows, new: Rows) -> None:
    if set(known.side) != set(new.side):
        before, now = sorted(known.side) or ["none"], sorted(new.side) or ["none"]
        raise ValueError(f"batches must have the same values per row: {before} before, {now} now.")
    if known.y.shape[1:] != new.y.shape[1:]:
        raise ValueError(f"y has {new.y.shape[1:] or 'one column'}, and batches before had {known.y.shape[1:]}.")


def _find(known: Rows, wanted: Rows) -> np.ndarray:
    """Return where each wanted row stands among the known ones, −1 where it does not."""

    def keys(rows: Rows) -> list[bytes]:
        table = np.column_stack([rows.X, rows.y.reshape(len(rows.y), -1)]) + 0.0
        return [row.tobytes() for row in table]

    at = {key: i for i, key in enumerate(keys(known))}
    return np.array([at.get(key, -1) for key in keys(wanted)])
