"""The peers of the exact benchmark, each as strong as its own documentation allows.

All take standardised data and return the evidence in nats of the standardised targets, so the numbers
compare.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

START_NOISE = 1.0  # the default noise_level of scikit-learn's WhiteKernel, in units of var(y)


@dataclass(frozen=True)
class Fit:
    """Say what a peer's fit reached: evidence in nats and how many times it evaluated the objective."""

    evidence: float
    evaluations: int


def fit_sklearn(X: np.ndarray, y: np.ndarray) -> Fit:
    """Fit scikit-learn's GaussianProcessRegressor, ARD RBF plus noise, with its default optimiser.

    Notes
    -----
    Length scales, amplitude and noise start at 1, its defaults. ``alpha=0``: the noise is in the WhiteKernel.
    """
    from scipy.optimize import minimize
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    counted = 0

    def optimiser(objective, theta, bounds):
        # The call inside scikit-learn, repeated here only to read the number of evaluations.
        nonlocal counted
        found = minimize(objective, theta, method="L-BFGS-B", jac=True, bounds=bounds)
        counted = found.nfev
        return found.x, found.fun

    kernel = ConstantKernel(1.0) * RBF(np.ones(X.shape[1])) + WhiteKernel(START_NOISE)
    model = GaussianProcessRegressor(kernel, alpha=0.0, optimizer=optimiser).fit(X, y)
    return Fit(float(model.log_marginal_likelihood_value_), counted)


def fit_gpytorch(X: np.ndarray, y: np.ndarray) -> Fit:
    """Fit gpytorch's ExactGP with Cholesky everywhere, by SciPy's L-BFGS-B on the exact evidence.

    Notes
    -----
    The same start, zero mean and optimiser tolerances as scikit-learn's. ``max_cholesky_size`` and
    ``fast_computations`` are set so that no conjugate gradients or Lanczos enter at any n.
    """
    import gpytorch
    import torch
    from scipy.optimize import minimize

    class Model(gpytorch.models.ExactGP):
        def __init__(self, X, y, likelihood):
            super().__init__(X, y, likelihood)
            self.mean_module = gpytorch.means.ZeroMean()
            self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel(ard_num_dims=X.shape[1]))

        def forward(self, X):
            return gpytorch.distributions.MultivariateNormal(self.mean_module(X), self.covar_module(X))

    inputs, targets = torch.as_tensor(X), torch.as_tensor(y)
    likelihood = gpytorch.likelihoods.GaussianLikelihood(noise_constraint=gpytorch.constraints.GreaterThan(1e-6))
    model = Model(inputs, targets, likelihood.double()).double()
    model.covar_module.base_kernel.lengthscale = 1.0
    model.covar_module.outputscale = 1.0
    likelihood.noise = START_NOISE
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.train()
    likelihood.train()

    def negative_evidence(theta: np.ndarray) -> tuple[float, np.ndarray]:
        torch.nn.utils.vector_to_parameters(torch.as_tensor(theta), parameters)
        loss = -mll(model(inputs), targets) * len(targets)
        gradients = torch.autograd.grad(loss, parameters)
        return loss.item(), torch.cat([g.reshape(-1) for g in gradients]).numpy()

    start = torch.nn.utils.parameters_to_vector(parameters).detach().numpy()
    with (
        gpytorch.settings.max_cholesky_size(10**9),
        gpytorch.settings.fast_computations(covar_root_decomposition=False, log_prob=False, solves=False),
    ):
        found = minimize(negative_evidence, start, jac=True, method="L-BFGS-B")
    return Fit(float(-found.fun), found.nfev)
