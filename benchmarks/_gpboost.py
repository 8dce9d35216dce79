"""GPBoost, the peer of the Vecchia benchmark, with the settings that its documentation recommends and every core.

All take standardised inputs. The model has no linear predictor: targets are z-scored, or counts around rate 1.
"""

from __future__ import annotations

import os

import numpy as np


def fit_predict(
    X: np.ndarray,
    y: np.ndarray,
    X_test: np.ndarray,
    *,
    likelihood: str = "gaussian",
    ard: bool = True,
    n_neighbors: int = 20,
    max_iter: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Fit a Matérn-3/2 process by Vecchia's approximation and predict the response.

    Parameters
    ----------
    X, y, X_test : (n, d), (n,), (n_test, d) arrays
    likelihood : {"gaussian", "poisson"}
        Counts go through Laplace's approximation with its iterative solvers, its default.
    ard : bool
        One lengthscale per column; GPBoost then finds its neighbours anew while they change.
    n_neighbors : int
        For fitting; prediction takes twice as many, its default.
    max_iter : int, optional
        None lets L-BFGS, its default, converge.

    Returns
    -------
    mean, variance : (n_test,) arrays
        Of the response, noise included.
    """
    import gpboost

    model = gpboost.GPModel(
        gp_coords=X,
        cov_function="matern_ard" if ard else "matern",
        cov_fct_shape=1.5,
        likelihood=likelihood,
        gp_approx="vecchia",
        num_neighbors=n_neighbors,
        # its own default is the number of physical cores
        num_parallel_threads=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    )
    model.fit(y=y, params={} if max_iter is None else {"maxit": max_iter})
    found = model.predict(gp_coords_pred=X_test, predict_var=True, predict_response=True)
    return np.asarray(found["mu"]), np.asarray(found["var"])
