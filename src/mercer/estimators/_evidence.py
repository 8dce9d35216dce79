"""The log evidence as the user sees it: a function of θ in the units of the data."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted

from mercer.estimators._rows import Rows, Units, make_data
from mercer.inference.evidence import Evidence
from mercer.inference.theta import ThetaVector
from mercer.kernels import rescale
from mercer.linalg.cholesky import NotPositiveDefiniteError

if TYPE_CHECKING:
    from mercer.model import Model


class LogEvidence:
    """Mixin: ``theta_``, ``theta_names_`` and ``log_marginal_likelihood`` of a fitted estimator."""

    _rows: Rows
    _units: Units
    _model: Model
    _theta: np.ndarray
    _theta_names: list[str]
    posterior_: Any
    log_marginal_likelihood_value_: float

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
        plan = self.posterior_.plan
        evidence = Evidence(model, plan, data, with_priors=False)
        evidence.sites = self.posterior_.sites
        try:
            value, gradient = evidence(point - self._theta_offset(model, self._units), eval_gradient)
        except (NotPositiveDefiniteError, FloatingPointError) as failure:
            raise ValueError(f"theta gives no evidence: {failure}") from failure
        value += self._units.log_jacobian(self._rows)
        return (value, gradient) if eval_gradient else value
