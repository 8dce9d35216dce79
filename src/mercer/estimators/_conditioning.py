"""The last step of a fit: condition on the data at given hyperparameters, with all the digits that predictions need."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mercer._typing import Sites
from mercer.estimators._rows import Rows, Units, make_data
from mercer.families.base import Prior
from mercer.inference.base import Inference, run
from mercer.inference.theta import ThetaVector
from mercer.kernels import rescale
from mercer.kernels.hyperparameters import unwrapped
from mercer.model import Model
from mercer.policy import NumericalPolicy

_FINAL_TOL = 1e-14  # relative tolerance of the sites that a fitted model keeps


def condition(
    model: Model, rows: Rows, units: Units, theta: np.ndarray, sites: Sites | None, plan: Any = None
) -> tuple[dict[str, Any], Inference]:
    """Condition on the data at θ, in float64 and to a tight tolerance.

    A posterior variance is a small difference of large numbers, and predictions, unlike the evidence, feel an error
    of the sites to first order.

    Parameters
    ----------
    model : Model
        Its modules are moved to float64 and to θ, in place.
    rows, units
        The data, and how they become model units.
    theta : (k,)
        In model units.
    sites : Sites or None
        Where to start.
    plan : Plan, optional
        The family's plan for the data in float64 at θ, where there is one already.

    Returns
    -------
    attributes : dict
        What predictions need, by the names that the estimator gives them.
    inference : Inference
        How it went.

    Raises
    ------
    ValueError
        The evidence is not a finite number.
    NotPositiveDefiniteError
        A factorisation failed.
    """
    loose = NumericalPolicy(device=model.policy.device)
    kernel, mean = model.prior.kernel.double(), model.prior.mean
    prior = Prior(kernel, None if mean is None else mean.double())
    model = replace(model, prior=prior, policy=replace(loose, tol=_FINAL_TOL))
    vector = ThetaVector(model)
    vector.write(theta)
    sites = None if sites is None else sites.double()
    data = make_data(rows, units, model.policy)
    if plan is None:
        plan = model.family.plan(model.prior, data.X, model.policy)
    elif hasattr(plan, "over"):  # which may have been made in less than float64
        plan = plan.over(data.X, model.policy)
    inference = run(model, plan, data, sites)
    if not inference.converged:  # rounding may stand in the way of the last digits
        inference = run(replace(model, policy=loose), plan, data, inference.state.sites)
    with torch.no_grad():
        value = float(model.engine.objective(model, plan, inference.state, data))
    if not np.isfinite(value):
        raise ValueError(f"The log evidence is {value}: y or X is out of range. Rescale it, or set standardize=True.")
    posterior = inference.state.posterior.release()
    attributes, notes = fitted_attributes(model, rows, units, theta, posterior, value + units.log_jacobian(rows))
    return attributes, replace(inference, notes=(*inference.notes, *notes))


def fitted_attributes(
    model: Model, rows: Rows, units: Units, theta: np.ndarray, posterior: Any, value: float
) -> tuple[dict[str, Any], list[str]]:
    """Return what predictions need, by the names that the estimator gives them, and what is to be reported.

    Parameters
    ----------
    model : Model
        At θ, in float64.
    rows, units
        The rows that the posterior knows.
    theta : (k,)
        In model units.
    posterior : Posterior
    value : float
        The log evidence, in nats, for y in the user's units.
    """
    kernel_ = copy.deepcopy(unwrapped(model.prior.kernel))
    unconverted = rescale(kernel_, torch.as_tensor(units.x_scale), units.output_scale)
    notes = [f"parameters of {', '.join(unconverted)} are reported in standardised units"] if unconverted else []
    vector = ThetaVector(model)
    attributes = {
        "_rows": rows,
        "_units": units,
        "_model": model,
        "_theta": theta,
        "_theta_names": vector.names,
        "_theta_bounds": vector.bounds,
        "posterior_": posterior,
        "kernel_": kernel_,
        "likelihood_": model.likelihood,
        "log_marginal_likelihood_value_": value,
    }
    return attributes, notes
