"""What all estimators share: fit in seven hops, the four prediction paths, evidence, leave-one-out, report.

A task class supplies its likelihood and says what the user reads off a latent marginal; everything else is here.
Inference happens in model units (standardised); nothing leaves this file that is not in the user's units.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
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
from tqdm.auto import tqdm

from mercer._typing import Data, Sites
from mercer.estimators._diagnose import diagnose
from mercer.estimators._params import NestedKernelParams
from mercer.estimators._report import Finding, FitReport, peak_memory_mb
from mercer.estimators._rows import Container, Rows, Units, canonical_rows
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
from mercer.inference.base import run
from mercer.inference.hyper import Evidence, Learned, ThetaVector, learn
from mercer.kernels import get_kernel, prepare, rescale, to_model_units
from mercer.kernels.means import constant_mean
from mercer.likelihoods import get_likelihood
from mercer.likelihoods.base import Likelihood
from mercer.linalg.cholesky import NotPositiveDefiniteError
from mercer.model import Model
from mercer.policy import NumericalPolicy
from mercer.resolve import resolve

# attributes that scikit-learn's callbacks keep on the estimator while fit runs
_CALLBACK_STATE = ("_skl_", "_callback", "_parent_callback")
_FAR_FROM_ONE = 1e3
_FARTHEST = 1e50  # from the training rows, in model units: squares and products of it still are numbers
_FINAL_TOL = 1e-14  # relative tolerance of the sites that a fitted model keeps


class BaseGP(NestedKernelParams, CallbackSupportMixin, BaseEstimator):
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
    ) -> BaseGP:
        """Validate, infer and report; on any failure the estimator is left as it was.

        ``encode`` makes numbers of (y, X, weight); ``side`` holds values per row, None where there are none.
        """
        before = {k: v for k, v in self.__dict__.items() if not k.startswith(_CALLBACK_STATE)}
        try:
            self._validate_params()
            X_checked = check_inputs(self, X, reset=True)
            check_mean(self.mean)
            weight = check_weight(sample_weight, X_checked)
            targets = encode(y, X_checked, weight)
            known = {k: check_row_vector(k, v, X_checked, positive=True) for k, v in side.items() if v is not None}
            rows = canonical_rows(to_numpy(X_checked).astype(np.float64), targets, weight, known)
            self._infer(rows, resolve_device(self.device, X_checked), X, y)
        except KeyboardInterrupt:
            if self.__dict__.get("fit_report_") is before.get("fit_report_"):
                self._restore(before)  # nothing worth keeping yet
            raise
        except NotPositiveDefiniteError as failure:
            self._restore(before)
            raise ValueError(f"{type(self).__name__} could not factor the covariance matrix. {failure}") from failure
        except FloatingPointError as failure:
            self._restore(before)
            raise ValueError(
                f"{type(self).__name__} could not start: {failure}. "
                "Use engine='dual', or set the kernel's starting values."
            ) from failure
        except BaseException:
            self._restore(before)
            raise
        return self

    def _restore(self, before: dict[str, Any]) -> None:
        for key in [k for k in self.__dict__ if not k.startswith(_CALLBACK_STATE)]:
            del self.__dict__[key]
        self.__dict__.update(before)

    def _infer(self, rows: Rows, device: torch.device, X: Any, y: Any) -> None:
        """Resolve the model, learn hyperparameters and condition; sets all fitted attributes at the end."""
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
        model, reasons = resolve(prior, likelihood, self.family, self.engine, data.n_rows, policy, data.X.shape[1])
        start = self._warm_start(model, units)
        if units.output_scale != 1.0:
            notes += [f"The prior {name} applies to the value in standardised units." for name in likelihood.log_priors]
        if rows.n_merged:
            notes.append(f"{rows.n_merged} repeated row(s) merged into weights (exact)")
        if rows.n_dropped:
            notes.append(f"{rows.n_dropped} row(s) without weight or target dropped")
        learned = self._learn(model, data, generator, start, X, y, notes)
        if policy.dtype != torch.float64:
            notes.append(f"hyperparameters were learned in {self.dtype}; the posterior is in float64")
        model, data, sites = self._final(model, rows, units, learned)
        plan = model.family.plan(model.prior, data.X, model.policy)
        inference = run(model, plan, data, sites)
        if not inference.converged:  # rounding may stand in the way of the last digits
            loose = replace(model, policy=replace(model.policy, tol=policy.tol))
            inference = run(loose, plan, data, inference.state.sites)
        with torch.no_grad():
            value = float(model.engine.objective(model, plan, inference.state, data))
        if not np.isfinite(value):
            raise ValueError(
                f"The log evidence is {value}: y or X is out of range. Rescale it, or set standardize=True."
            )
        posterior = inference.state.posterior.release()

        self._rows, self._units, self._model = rows, units, model
        self.posterior_ = posterior
        self.kernel_ = copy.deepcopy(model.prior.kernel)
        unconverted = rescale(self.kernel_, torch.as_tensor(units.x_scale), units.output_scale)
        if unconverted:
            notes.append(f"parameters of {', '.join(unconverted)} are reported in standardised units")
        self.likelihood_ = model.likelihood
        self.log_marginal_likelihood_value_ = value + self._log_jacobian()
        self.n_iter_ = max(1, learned.n_iter)
        self.converged_ = bool(learned.converged and inference.converged)
        self.fit_report_ = FitReport(
            family=model.family.name,
            family_reason=reasons["family"],
            engine=model.engine.name,
            engine_reason=reasons["engine"],
            evidence=model.engine.evidence,
            likelihood=type(getattr(model.likelihood, "module", model.likelihood)).__name__,
            n_rows=data.n_rows,
            n_iter=learned.n_iter,
            n_evaluations=learned.n_evaluations,
            n_inner=inference.n_steps,
            converged=self.converged_,
            status=learned.message,
            jitter=posterior.jitter,
            dtype=self.dtype,
            device=str(device),
            seconds=time.perf_counter() - began,
            memory_mb=peak_memory_mb(device),
            log_marginal_likelihood=self.log_marginal_likelihood_value_,
            evidence_trace=[v + self._log_jacobian() for v in learned.trace],
            optima=[v + self._log_jacobian() for v in learned.optima],
            notes=[*notes, *learned.notes, *inference.notes],
            warnings=self._caveats(rows),
        )
        self._warn(learned, inference.converged)
        if learned.interrupted:
            raise KeyboardInterrupt(
                "fit was interrupted; the best hyperparameters so far are kept, and warm_start=True resumes."
            )

    @staticmethod
    def _final(model: Model, rows: Rows, units: Units, learned: Learned) -> tuple[Model, Data, Sites | None]:
        """Return model, data and sites for the posterior: always in float64, sites to more digits than for learning.

        A posterior variance is a small difference of large numbers, and predictions, unlike the evidence, feel an
        error of the sites to first order.
        """
        policy = NumericalPolicy(device=model.policy.device, tol=_FINAL_TOL)
        kernel, mean = model.prior.kernel.double(), model.prior.mean
        model = replace(model, prior=Prior(kernel, None if mean is None else mean.double()), policy=policy)
        ThetaVector(model).write(learned.theta)
        sites = learned.sites
        if sites is not None:
            sites = Sites(sites.linear.double(), sites.precision.double())
        return model, make_data(rows, units, policy), sites

    def _seed(self) -> int:
        """Return the integer seed behind all randomness of fit."""
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    def _make_prior(
        self, rows: Rows, units: Units, policy: NumericalPolicy, start_mean: Any
    ) -> tuple[Prior, list[str]]:
        """Return the prior in model units, and what was added to the user's kernel."""
        names = getattr(self, "feature_names_in_", None)
        kernel, notes = prepare(get_kernel("matern52" if self.kernel is None else self.kernel), rows.X.shape[1], names)
        notes += to_model_units(kernel, torch.as_tensor(units.x_scale), units.output_scale)
        if np.size(units.y_scale) > 1:
            notes.append("with several outputs, variances are in units of the variance of each output")
        mean = copy.deepcopy(self.mean)
        if mean is None and self._learned_mean:
            mean = constant_mean(float(start_mean))
        kernel = kernel.to(dtype=policy.dtype, device=policy.device)
        return Prior(kernel, None if mean is None else mean.to(dtype=policy.dtype, device=policy.device)), list(notes)

    def _warm_start(self, model: Model, units: Units) -> np.ndarray | None:
        """Return θ of the previous fit in the new model units, if there is one of the same shape."""
        if not (self.warm_start and hasattr(self, "kernel_")):
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
        X: Any,
        y: Any,
        notes: list[str],
    ) -> Learned:
        """Learn θ with progress, or keep it where there is nothing to learn."""
        vector = ThetaVector(model)
        context = self._init_callback_context(max_subtasks=self.max_iter)
        context.call_on_fit_task_begin(estimator=self, X=X, y=y)
        if start is not None:
            vector.write(start)
        flat = self._standardize_y and not _varies(data.y)
        if self.optimizer is None or len(vector) == 0 or flat:
            if flat and self.optimizer is not None:
                notes.append("y is constant: hyperparameters say nothing and were left at their starting values")
            learned = Learned(vector.read(), float("nan"), message="hyperparameters kept as given")
        else:
            bar = tqdm(total=self.max_iter, desc=type(self).__name__, disable=not self.verbose)

            def on_iteration(iteration: int, value: float) -> None:
                bar.update(1)
                bar.set_postfix(evidence=f"{value:.3f}")
                task = context.subcontext(task_name="iteration")
                task.call_on_fit_task_begin(estimator=self, X=X, y=y)
                if task.call_on_fit_task_end(estimator=self, X=X, y=y):
                    raise StopIteration

            with bar:
                learned = learn(
                    model,
                    data,
                    max_iter=self.max_iter,
                    n_restarts=self.n_restarts,
                    generator=generator,
                    start=start,
                    on_iteration=on_iteration,
                )
        self._theta, self._theta_names = learned.theta, vector.names
        self._theta_bounds = vector.bounds
        context.call_on_fit_task_end(estimator=self, X=X, y=y)
        return learned

    def _warn(self, learned: Learned, inner_converged: bool) -> None:
        """Warn of everything that the report must not be alone in saying."""
        report = self.fit_report_
        for message in report.warnings:
            warnings.warn(f"{type(self).__name__}: {message}.", UserWarning, stacklevel=4)
        n_caveats = len(report.warnings)
        if report.jitter > 0:
            report.warnings.append(
                f"the covariance matrix needed a relative jitter of {report.jitter:g}; look for near-duplicate rows"
            )
        if not learned.converged and not learned.interrupted:
            report.warnings.append(
                f"hyperparameters did not converge ({learned.message}); "
                f"raise max_iter={self.max_iter} or scale the data"
            )
        if not inner_converged:
            report.warnings.append("the sites did not converge at the final hyperparameters")
        for message in report.warnings[n_caveats:]:
            warnings.warn(f"{type(self).__name__}: {message}.", ConvergenceWarning, stacklevel=4)

    # ------------------------------------------------------------------ predictions

    def _prepare_X(self, X: Any) -> tuple[Tensor, Container]:
        """Return checked rows as a tensor, and the container that results go back in."""
        check_is_fitted(self, "posterior_")
        container = Container.of(X)
        checked = check_inputs(self, X, reset=False)
        if not isinstance(checked, Tensor):
            checked = torch.as_tensor(np.require(checked, requirements="W"))
        if bool((self._units.inputs(checked.detach().double()).abs() > _FARTHEST).any()):
            raise ValueError(
                f"X holds values more than {_FARTHEST:g} times the spread of the training rows away from them; "
                "nothing can be computed there. Check their units."
            )
        return checked, container

    def _map_rows(self, X: Tensor, function: Callable[[Tensor], Any]) -> list[Any]:
        """Apply ``function`` to model-unit chunks of X, so that memory is flat in the number of rows."""
        policy = self._model.policy
        size = policy.chunk_rows(4 * len(self._rows.X) * max(1, self._model.likelihood.n_latents))
        out = []
        for chunk in X.split(size):
            moved = self._units.inputs(chunk.to(dtype=policy.dtype, device=policy.device))
            with torch.set_grad_enabled(torch.is_grad_enabled() and chunk.requires_grad):
                out.append(function(moved))
        return out

    def _latent_mean(self, X: Tensor) -> Tensor:
        return torch.cat(self._map_rows(X, self.posterior_.mean), dim=-1)

    def _latent_marginals(self, X: Tensor) -> tuple[Tensor, Tensor]:
        parts = self._map_rows(X, self.posterior_.marginals)
        return torch.cat([m for m, _ in parts], -1), torch.cat([v for _, v in parts], -1)

    def _loo_marginals(self) -> tuple[Tensor, Tensor]:
        """Return cavity means and variances of f per canonical row: one replicate of its site removed."""
        with torch.no_grad():
            m, v = self.posterior_.at_data()
            prior = self._model.prior.mean_at(self.posterior_.plan.X)
            weight = make_data(self._rows, self._units, self._model.policy).weight.clamp_min(1.0)
            linear = self.posterior_.sites.linear / weight
            precision = self.posterior_.sites.precision / weight
            # v/(1 − v λ2) and its mean; v λ2 < 1 always, by definition of the posterior
            keep = (1.0 - v * precision).clamp_min(torch.finfo(v.dtype).eps)
            return ((m - prior) - v * linear) / keep + prior, v / keep

    def _to_original_rows(self, value: Tensor) -> Tensor:
        """Return canonical-row results (*b, n_canonical) at the rows passed to fit; NaN where dropped."""
        index = torch.as_tensor(self._rows.index, device=value.device)
        return value[..., index.clamp_min(0)].masked_fill(index < 0, float("nan"))

    def _draw(self, X: Tensor, n_samples: int, random_state: Any) -> Tensor:
        """Return latent draws (n_samples, *b, n) at X, warning when they are joint draws at X only."""
        if not isinstance(n_samples, Integral) or n_samples < 1:
            raise ValueError(f"n_samples must be a positive integer, got {n_samples!r}.")
        policy = self._model.policy
        seed = int(check_random_state(random_state).randint(2**31 - 1))
        generator = torch.Generator().manual_seed(seed)
        if not self.posterior_.pathwise:
            warnings.warn(
                f"{type(self).__name__}.sample_y: no spectral density is known for this kernel, so samples are exact "
                "joint draws at these rows and differ between calls with other rows.",
                UserWarning,
                stacklevel=3,
            )
        moved = self._units.inputs(X.to(dtype=policy.dtype, device=policy.device))
        with torch.no_grad():
            return self.posterior_.sample(moved, n_samples, generator)

    @staticmethod
    def _noise_generator(random_state: Any) -> torch.Generator:
        """Return a generator for observation noise, apart from the one that draws functions."""
        return torch.Generator().manual_seed(int(check_random_state(random_state).randint(2**31 - 1)) ^ 0x5EED)

    def _require_fitted(self) -> None:
        check_is_fitted(self, "posterior_")

    # ------------------------------------------------------------------ evidence

    @property
    def theta_(self) -> np.ndarray:
        """Learned hyperparameters as one vector in the user's units; logarithms of positive quantities."""
        check_is_fitted(self, "posterior_")
        return self._theta + self._theta_offset(self._model, self._units)

    @property
    def theta_names_(self) -> list[str]:
        """Name of each entry of ``theta_``."""
        check_is_fitted(self, "posterior_")
        return list(self._theta_names)

    def _theta_offset(self, model: Model, units: Units) -> np.ndarray:
        """Return log(user unit / model unit) for each entry of θ.

        One lengthscale over columns of unequal units is one per column in user units; θ then holds their geometric
        mean.
        """
        probe = copy.deepcopy(model)
        before = [h.to_theta(h.parameter.detach()) for _, h in ThetaVector(probe).parts]
        rescale(probe.prior.kernel, torch.as_tensor(units.x_scale), units.output_scale)
        offset = [np.empty(0)]
        for (name, h), old in zip(ThetaVector(probe).parts, before, strict=True):
            if name.startswith("likelihood."):
                moved = torch.full_like(old, self._likelihood_offset(name, units))
            elif h.log_scale:
                new = h.to_theta(h.parameter.detach())
                moved = new - old if new.shape == old.shape else (new - old).mean().expand_as(old)
            else:
                moved = torch.zeros_like(old)
            offset.append(moved.reshape(-1).double().cpu().numpy())
        return np.concatenate(offset)

    def _likelihood_offset(self, name: str, units: Units) -> float:
        """Return the log of the unit of a likelihood parameter; dimensionless by default."""
        return 0.0

    def _log_jacobian(self) -> float:
        """Return log |d y_model / d y_user| summed over observed targets; zero where y keeps its units."""
        seen = ~np.isnan(self._rows.y)
        weight = self._rows.weight if seen.ndim == 1 else self._rows.weight[:, None]
        return -float((seen * weight * np.log(self._units.y_scale)).sum())

    def log_marginal_likelihood(self, theta: Any = None, eval_gradient: bool = False) -> Any:
        """Return the log evidence (or the engine's bound or approximation) of the training data.

        Parameters
        ----------
        theta : (k,) array-like, optional
            Hyperparameters as in ``theta_`` (user units; logarithms of positive quantities). None takes the
            fitted ones.
        eval_gradient : bool, default=False
            Also return the gradient in theta.

        Returns
        -------
        value : float
            In nats, for y in the user's units.
        gradient : (k,) ndarray
            Only if ``eval_gradient``.

        Raises
        ------
        ValueError
            theta has the wrong length or the covariance cannot be factored there.
        """
        check_is_fitted(self, "posterior_")
        if theta is None and not eval_gradient:
            return self.log_marginal_likelihood_value_
        point = self.theta_ if theta is None else np.asarray(theta, dtype=np.float64)
        if point.shape != self._theta.shape:
            raise ValueError(
                f"theta must have shape {self._theta.shape}, one entry per name in theta_names_; got {point.shape}."
            )
        model = copy.deepcopy(self._model)
        data = make_data(self._rows, self._units, model.policy)
        plan = model.family.plan(model.prior, data.X, model.policy)
        evidence = Evidence(model, plan, data, with_priors=False)
        evidence.sites = self.posterior_.sites
        try:
            value, gradient = evidence(point - self._theta_offset(model, self._units), eval_gradient)
        except (NotPositiveDefiniteError, FloatingPointError) as failure:
            raise ValueError(f"theta gives no evidence: {failure}") from failure
        value += self._log_jacobian()
        return (value, gradient) if eval_gradient else value

    def diagnose(self) -> list[Finding]:
        """Return what looks wrong with the data or the fit; an empty list is good news."""
        check_is_fitted(self, "posterior_")
        return diagnose(self)

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


def make_data(rows: Rows, units: Units, policy: NumericalPolicy) -> Data:
    """Return canonical rows as tensors in model units, targets with the row axis last."""

    def tensor(values: np.ndarray) -> Tensor:
        return torch.as_tensor(np.ascontiguousarray(values), dtype=policy.dtype, device=policy.device)

    X = tensor((rows.X - units.x_center) / units.x_scale)
    y = tensor(((rows.y - units.y_center) / units.y_scale).T)
    side = {name: tensor(value) for name, value in rows.side.items()}
    if "noise_variance" in side:
        scale = tensor(np.atleast_1d(units.y_scale)).unsqueeze(-1)
        side["noise_variance"] = (side["noise_variance"] / scale.square()).reshape(y.shape)
    return Data(X, y, tensor(rows.weight), side)
