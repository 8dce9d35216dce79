"""What all estimators share: fit in seven hops, and the report.

A task class supplies its likelihood and says what the user reads off a latent marginal; everything else is here and
in the two mixins. Inference happens in model units (standardised); what the user reads is in the units of the data.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.callback import CallbackSupportMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from mercer._typing import Data
from mercer.estimators._conditioning import condition
from mercer.estimators._derivatives import check_orders
from mercer.estimators._diagnose import diagnose
from mercer.estimators._evidence import LogEvidence
from mercer.estimators._params import NestedKernelParams
from mercer.estimators._partial import PartialFit
from mercer.estimators._prediction import LatentPredictions
from mercer.estimators._progress import Progress
from mercer.estimators._report import Finding, FitReport, evidence_name, peak_memory_mb
from mercer.estimators._rows import Rows, Units, canonical_rows, make_data
from mercer.estimators._validation import (
    check_inputs,
    check_mean,
    check_row_vector,
    check_weight,
    resolve_device,
    resolve_dtype,
    to_numpy,
)
from mercer.families.base import Prior
from mercer.families.differentiated import differentiated
from mercer.inference.evidence import Learned
from mercer.inference.hyper import learn
from mercer.inference.theta import ThetaVector
from mercer.kernels import diag as prior_variance
from mercer.kernels import get_kernel, prepare, start_from_data, to_model_units
from mercer.kernels.means import constant_mean
from mercer.likelihoods import get_likelihood
from mercer.likelihoods.base import Likelihood
from mercer.linalg.cholesky import NotPositiveDefiniteError
from mercer.model import Model
from mercer.policy import NumericalPolicy
from mercer.resolve import resolve
from mercer.sequential.options import Stream

# attributes that scikit-learn's callbacks keep on the estimator while fit runs
_CALLBACK_STATE = ("_skl_", "_callback", "_parent_callback")
_FAR_FROM_ONE = 1e3
_CALLER = 6  # frames from a warning to the line that called fit
_MOST_DIGITS_LOST = 11.5


class BaseGP(NestedKernelParams, LatentPredictions, LogEvidence, PartialFit, CallbackSupportMixin, BaseEstimator):
    """Base of the task estimators; not for direct use."""

    _parameter_constraints: ClassVar[dict] = {
        "family": "no_validation",
        "engine": "no_validation",
        "kernel": "no_validation",
        "likelihood": "no_validation",
        "mean": "no_validation",
        "optimizer": [StrOptions({"lbfgs"}), None],
        "n_restarts": [Interval(Integral, 0, None, closed="left")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "stream": [Stream, None],
        "standardize": ["boolean"],
        "dtype": [StrOptions({"float64", "float32"})],
        "device": "no_validation",
        "warm_start": ["boolean"],
        "verbose": ["verbose"],
        "random_state": ["random_state"],
    }
    _learned_mean = False

    @property
    def _standardize_y(self) -> bool:
        """Whether y may change its units."""
        return False

    # ------------------------------------------------------------------ what a task supplies

    def _make_likelihood(self, rows: Rows, units: Units) -> Likelihood:
        """Return a likelihood in model units, free to be changed."""
        raise NotImplementedError

    def _caveats(self, rows: Rows) -> list[str]:
        """Return what the user must be warned of whatever the fit says."""
        if self.standardize:
            return []
        values = np.column_stack([rows.X, rows.y]) if self._standardize_y else rows.X
        spread = np.nanstd(values, axis=0)
        odd = spread[(spread > 0) & ((spread < 1 / _FAR_FROM_ONE) | (spread > _FAR_FROM_ONE))]
        if odd.size == 0:
            return []
        return [
            f"standardize=False and a column varies by {odd[0]:.3g}, but starting values and bounds of the "
            "hyperparameters are made for a spread near one"
        ]

    def _fresh_likelihood(self, likelihood: Any, units: Units, **context: Any) -> Likelihood:
        """Return an independent likelihood; values that the user gave move from user to model units."""
        fresh = copy.deepcopy(get_likelihood(likelihood, **context))
        if getattr(fresh, "_given", False):
            for path, parameter in fresh.named_parameters():
                parameter.data -= self._likelihood_offset(f"likelihood.{path.removeprefix('log_')}", units)
        return fresh

    # ------------------------------------------------------------------ fit

    def _fit(
        self,
        X: Any,
        y: Any,
        encode: Callable[[Any, Any, np.ndarray], np.ndarray],
        sample_weight: Any,
        side: dict[str, Any],
        derivative: Any = None,
    ) -> BaseGP:
        """Validate, infer and report; on any failure the estimator is left as it was.

        ``encode`` makes numbers of (y, X, weight); ``side`` holds values per row, None where there are none.
        """
        with self._all_or_nothing():
            rows, device = self._checked_rows(X, y, encode, sample_weight, side, derivative, reset=True)
            self._infer(rows, device, X, y)
        return self

    def _checked_rows(
        self,
        X: Any,
        y: Any,
        encode: Callable[[Any, Any, np.ndarray], np.ndarray],
        sample_weight: Any,
        side: dict[str, Any],
        derivative: Any = None,
        *,
        reset: bool,
    ) -> tuple[Rows, torch.device]:
        """Return validated rows in canonical order, and where to compute; ``reset`` forgets earlier columns."""
        self._validate_params()
        X_checked = check_inputs(self, X, reset=reset)
        check_mean(self.mean)
        weight = check_weight(sample_weight, X_checked)
        targets = encode(y, X_checked, weight)
        known = {k: check_row_vector(k, v, X_checked, positive=True) for k, v in side.items() if v is not None}
        orders = check_orders(derivative, X_checked)
        rows = canonical_rows(to_numpy(X_checked).astype(np.float64), targets, weight, known, orders)
        self._rows_at_hand = rows
        return rows, resolve_device(self.device, X_checked)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Leave the estimator as it was where anything fails, and say so in the user's words."""
        before = {k: v for k, v in self.__dict__.items() if not k.startswith(_CALLBACK_STATE)}
        try:
            yield
        except KeyboardInterrupt:
            if self.__dict__.get("fit_report_") is before.get("fit_report_"):
                self._restore(before)  # nothing worth keeping yet
            raise
        except NotPositiveDefiniteError as failure:
            cause = self._rows_at_hand.in_original_order(str(failure), failure.rows)
            self._restore(before)
            raise ValueError(f"{type(self).__name__} could not factor the covariance matrix. {cause}") from failure
        except FloatingPointError as failure:
            self._restore(before)
            raise ValueError(
                f"{type(self).__name__} could not start: {failure}. "
                "Use engine='dual', or set the kernel's starting values."
            ) from failure
        except BaseException:
            self._restore(before)
            raise
        finally:
            self.__dict__.pop("_rows_at_hand", None)

    def _restore(self, before: dict[str, Any]) -> None:
        for key in [k for k in self.__dict__ if not k.startswith(_CALLBACK_STATE)]:
            del self.__dict__[key]
        self.__dict__.update(before)

    def _infer(
        self, rows: Rows, device: torch.device, X: Any, y: Any, family: Any = None, resume: bool = False
    ) -> None:
        """Resolve the model, learn hyperparameters and condition; sets all fitted attributes at the end.

        ``family`` takes the place of the estimator's own; ``resume`` starts from the hyperparameters of the last fit.
        """
        began = time.perf_counter()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        policy = NumericalPolicy(dtype=resolve_dtype(self.dtype), device=device)
        units = Units.learn(rows, self.standardize, self._standardize_y and self.standardize)
        data = make_data(rows, units, policy)
        generator = torch.Generator().manual_seed(self._seed())
        likelihood = self._make_likelihood(rows, units)
        start_mean = likelihood.initialise(data.y, data.weight, **data.side)
        prior, notes = self._make_prior(rows, units, policy, start_mean)
        likelihood.to(device)
        family = self.family if family is None else family
        model, reasons = resolve(prior, likelihood, family, self.engine, data.n_rows, policy, rows.X.shape[1])
        if rows.orders is not None and model.family.name != "exact":
            raise ValueError(
                f"derivatives among the rows of y need family='exact', not {model.family.name!r}, which "
                f"{'was asked for' if model.family is family or family != 'auto' else reasons['family']}."
            )
        start = self._warm_start(model, units, resume)
        if units.output_scale != 1.0:
            notes += [f"The prior {name} applies to the value in standardised units." for name in likelihood.log_priors]
        if rows.n_merged:
            notes.append(f"{rows.n_merged} repeated row(s) merged into weights (exact)")
        if rows.n_dropped:
            notes.append(f"{rows.n_dropped} row(s) without weight or target dropped")
        counted = self.n_restarts == 0 and model.engine.name != "freeform"  # whose epochs are its own
        context = self._init_callback_context(max_subtasks=self.max_iter + 1 if counted else None)
        context.call_on_fit_task_begin(estimator=self, X=X, y=y)

        def snapshot() -> dict[str, Any]:
            theta = ThetaVector(model).read()
            return condition(copy.deepcopy(model), rows, units, theta, None)[0]

        progress = Progress(self, context, X, y, snapshot)
        frozen = resume and start is not None and self._stream_options().hyperparameters == "frozen"
        learned = self._learn(model, data, generator, start, progress, notes, frozen)
        if policy.dtype != torch.float64:
            notes.append(f"hyperparameters were learned in {self.dtype}; the posterior is in float64")
        plan = learned.plan if policy.dtype == torch.float64 or hasattr(learned.plan, "over") else None
        fitted, inference = condition(model, rows, units, learned.theta, learned.sites, plan)
        converged = bool(learned.converged and inference.converged)
        self.__dict__.pop("stream_", None)
        self.__dict__.update(fitted, n_iter_=max(1, learned.n_iter), converged_=converged)
        jacobian = units.log_jacobian(rows)
        confession = self.posterior_.confess()
        self.fit_report_ = FitReport(
            family=model.family.name,
            family_reason=reasons["family"],
            engine=model.engine.name,
            engine_reason=reasons["engine"],
            evidence=evidence_name(model.engine, model.family),
            likelihood=type(getattr(model.likelihood, "module", model.likelihood)).__name__,
            n_rows=data.n_rows,
            n_iter=learned.n_iter,
            n_evaluations=learned.n_evaluations,
            n_inner=inference.n_steps,
            converged=converged,
            status=learned.message,
            jitter=self.posterior_.jitter,
            dtype=self.dtype,
            device=str(device),
            seconds=time.perf_counter() - began,
            memory_mb=peak_memory_mb(device),
            log_marginal_likelihood=self.log_marginal_likelihood_value_,
            evidence_trace=[value + jacobian for value in learned.trace],
            optima=learned.optima,
            notes=[*notes, *learned.notes, *inference.notes, *confession.notes],
            warnings=[*self._caveats(rows), *confession.warnings],
        )
        self._warn(learned, progress.stopped, inference.converged)
        context.call_on_fit_task_end(estimator=self, X=X, y=y, reconstruction_attributes=fitted)
        if learned.interrupted:
            raise KeyboardInterrupt(
                "fit was interrupted; the best hyperparameters so far are kept, and warm_start=True resumes."
            )

    def _seed(self) -> int:
        """Return the integer seed behind all randomness of fit."""
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    def _make_prior(
        self, rows: Rows, units: Units, policy: NumericalPolicy, start_mean: Any
    ) -> tuple[Prior, list[str]]:
        """Return the prior in model units, and what was added to the user's kernel."""
        names = getattr(self, "feature_names_in_", None)
        kernel, notes = prepare(get_kernel("matern52" if self.kernel is None else self.kernel), rows.X.shape[1], names)
        # slopes have the waves of the function, if there are no values to look at, but other amplitudes
        slopes = rows.orders is not None and bool(rows.orders.any(axis=1).all())
        seen = np.asarray(rows.y if slopes else rows.values, dtype=np.float64)
        X, y = torch.as_tensor(rows.X), torch.as_tensor(seen)
        notes += start_from_data(kernel, X, y, amplitudes=self._standardize_y and not slopes)
        notes += to_model_units(kernel, torch.as_tensor(units.x_scale), units.output_scale)
        if np.size(units.y_scale) > 1:
            notes.append("with several outputs, variances are in units of the variance of each output")
        mean = copy.deepcopy(self.mean)
        if mean is None and self._learned_mean:
            mean = constant_mean(float(start_mean))
        kernel = kernel.to(dtype=policy.dtype, device=policy.device)
        prior = Prior(kernel, None if mean is None else mean.to(dtype=policy.dtype, device=policy.device))
        return prior if rows.orders is None else differentiated(prior), list(notes)

    def _warm_start(self, model: Model, units: Units, resume: bool) -> np.ndarray | None:
        """Return θ of the previous fit in the new model units, if there is one of the same shape."""
        if not ((self.warm_start or resume) and hasattr(self, "kernel_")):
            return None
        names = ThetaVector(model).names
        if self._theta_names != names:
            return None
        return self.theta_ - self._theta_offset(model, units)

    def _learn(
        self,
        model: Model,
        data: Data,
        generator: torch.Generator,
        start: np.ndarray | None,
        progress: Progress,
        notes: list[str],
        frozen: bool,
    ) -> Learned:
        """Learn θ, or keep it where there is nothing to learn."""
        vector = ThetaVector(model)
        if start is not None:
            vector.write(start)
        flat = self._standardize_y and not _varies(data.y)
        if self.optimizer is None or frozen or len(vector) == 0 or flat:
            if flat and self.optimizer is not None:
                notes.append("y is constant: hyperparameters say nothing and were left at their starting values")
            return Learned(vector.read(), float("nan"), message="hyperparameters kept as given")
        with progress:
            learned = learn(
                model,
                data,
                max_iter=self.max_iter,
                n_restarts=self.n_restarts,
                generator=generator,
                start=start,
                on_iteration=progress.step,
            )
        if progress.stopped:
            learned.converged, learned.message = False, "stopped by a callback"
        return learned

    def _warn(self, learned: Learned, stopped: bool, inner_converged: bool) -> None:
        """Warn of everything that the report must not be alone in saying."""
        report = self.fit_report_
        for message in report.warnings:
            warnings.warn(f"{type(self).__name__}: {message}.", UserWarning, stacklevel=_CALLER)
        n_caveats = len(report.warnings)
        if (digits := self._digits_lost()) > _MOST_DIGITS_LOST:
            report.warnings.append(
                f"some rows are known {10**digits:.0e} times better than the prior knows them, and predictions lose "
                f"{min(digits, 16):.0f} of 16 digits; raise the noise variance or lower the weights"
            )
        if report.jitter > 0:
            report.warnings.append(
                f"the covariance matrix needed a relative jitter of {report.jitter:g}: rows are nearly the same, or "
                "the kernel is very smooth beside their spacing"
            )
        if not (learned.converged or learned.interrupted or stopped):
            report.warnings.append(
                f"hyperparameters did not converge ({learned.message}); "
                f"raise max_iter={self.max_iter} or scale the data"
            )
        if not inner_converged:
            report.warnings.append("the sites did not converge at the final hyperparameters")
        for message in report.warnings[n_caveats:]:
            warnings.warn(f"{type(self).__name__}: {message}.", ConvergenceWarning, stacklevel=_CALLER)

    def _digits_lost(self) -> float:
        """Return log₁₀ of the largest ratio of prior to noise variance: the condition of B = I + W½ K W½ grows so."""
        with torch.no_grad():
            X = make_data(self._rows, self._units, self._model.policy).X
            prior = prior_variance(self._model.prior.kernel, X)
            ratio = float((self.posterior_.sites.precision * prior).amax()) if len(X) else 1.0
        return float(np.log10(max(ratio, 1.0)))

    def diagnose(self) -> list[Finding]:
        """Return what looks wrong with the data or the fit; an empty list is good news."""
        check_is_fitted(self, "posterior_")
        return diagnose(self)

    def to_botorch(self, input_transform: Any = None, outcome_transform: Any = None) -> Any:
        """Return the fitted model in BoTorch's terms, for acquisition functions; see `mercer.interop.botorch`.

        Parameters
        ----------
        input_transform, outcome_transform : BoTorch transforms, optional
            Those that X and y went through before ``fit``, so that the model takes and gives what came before them.

        Returns
        -------
        MercerModel
            A copy: it neither follows nor changes the estimator. Its posterior is that of the latent function.

        Raises
        ------
        ImportError
            BoTorch is not installed: ``pip install 'mercer[bo]'``.
        """
        check_is_fitted(self, "posterior_")
        if self._rows.orders is not None:
            raise ValueError("to_botorch knows values of f only, and this model was fitted to derivatives too.")
        try:
            from mercer.interop.botorch import MercerModel  # optional, and it takes seconds to import
        except ImportError as failure:
            raise ImportError("to_botorch needs BoTorch: pip install 'mercer[bo]'.") from failure
        from mercer.interop.fitted import Affine, Fitted

        units, n_latents = self._units, self._model.likelihood.n_latents
        inputs = Affine(torch.as_tensor(units.x_center), torch.as_tensor(units.x_scale))
        outputs = Affine(*(torch.as_tensor(np.atleast_1d(each)) for each in (units.y_center, units.y_scale)))
        outputs = outputs if n_latents == 1 else Affine.identity(n_latents)
        data = make_data(self._rows, units, self._model.policy)
        fitted = Fitted(self._model, self.posterior_, data, inputs, outputs)
        return MercerModel.of(fitted, input_transform, outcome_transform)

    def save(self, path: Any) -> None:
        """Write the fitted estimator to one file that `mercer.load` reads without executing code.

        Parameters
        ----------
        path : path-like

        Raises
        ------
        NotFittedError
            Not fitted yet.
        TypeError
            It holds an object of a foreign class, such as a kernel of your own; use pickle.
        """
        from mercer.estimators.persistence import save  # it lists the task classes, which import this file

        save(self, path)

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "posterior_")


def _varies(y: Tensor) -> bool:
    """Whether any output takes more than one value."""
    seen = y.isfinite()
    low = y.masked_fill(~seen, float("inf")).amin(-1)
    high = y.masked_fill(~seen, float("-inf")).amax(-1)
    return bool((high > low).any())
