"""GPyTorch's stochastic variational Gaussian process, trained until a test NLPD is reached: the peer of sparse.py."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import gpytorch
import numpy as np
import torch
from _harness import Split
from torch import Tensor

BATCH = 1024
RATE, NATURAL_RATE = 0.01, 0.1
LOOK_EVERY = 10  # steps


class Approximate(gpytorch.models.ApproximateGP):
    """Inducing points with an ARD Matérn-3/2 kernel and a constant mean."""

    def __init__(self, Z: Tensor, natural: bool):
        make = gpytorch.variational.NaturalVariationalDistribution if natural else None
        make = make or gpytorch.variational.CholeskyVariationalDistribution
        strategy = gpytorch.variational.VariationalStrategy(self, Z, make(len(Z)), learn_inducing_locations=True)
        super().__init__(strategy)
        self.mean_module = gpytorch.means.ConstantMean()
        base = gpytorch.kernels.MaternKernel(nu=1.5, ard_num_dims=Z.shape[1])
        self.covar_module = gpytorch.kernels.ScaleKernel(base)

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


@dataclass
class Run:
    """Seconds of training (looks at the test rows are not counted) and test NLPD there."""

    seconds: list[float] = field(default_factory=list)
    nlpd: list[float] = field(default_factory=list)
    rmse: list[float] = field(default_factory=list)

    def reached(self, target: float) -> float:
        """Return the seconds after which the NLPD was at most ``target``; infinite if it never was."""
        return next((s for s, value in zip(self.seconds, self.nlpd, strict=True) if value <= target), math.inf)


def train(data: Split, m: int, natural: bool, target: float, limit: float, seed: int = 0) -> Run:
    """Train in single precision, GPyTorch's default, until ``target`` is reached or ``limit`` seconds are over.

    Adam at 0.01 for hyperparameters and inducing points, and for the variational parameters unless these take natural
    gradient steps at 0.1. Inducing points start at random rows.
    """
    torch.manual_seed(seed)
    X, y = (torch.as_tensor(each, dtype=torch.float32) for each in (data.X, data.y))
    X_test, y_test = (torch.as_tensor(each, dtype=torch.float32) for each in (data.X_test, data.y_test))
    generator = torch.Generator().manual_seed(seed)
    model = Approximate(X[torch.randperm(len(X), generator=generator)[:m]].clone(), natural)
    likelihood = gpytorch.likelihoods.GaussianLikelihood()
    bound = gpytorch.mlls.VariationalELBO(likelihood, model, num_data=len(y))
    optimisers = []
    if natural:
        variational = model.variational_parameters()
        optimisers.append(gpytorch.optim.NGD(variational, num_data=len(y), lr=NATURAL_RATE))
        others = [*model.hyperparameters(), *likelihood.parameters()]
    else:
        others = [*model.parameters(), *likelihood.parameters()]
    optimisers.append(torch.optim.Adam(others, lr=RATE))
    run, spent, step = Run(), 0.0, 0
    while spent < limit:
        order = torch.randperm(len(X), generator=generator)
        for rows in order.split(BATCH):
            began = time.perf_counter()
            model.train()
            likelihood.train()
            for optimiser in optimisers:
                optimiser.zero_grad()
            loss = -bound(model(X[rows]), y[rows])
            loss.backward()
            for optimiser in optimisers:
                optimiser.step()
            spent += time.perf_counter() - began
            step += 1
            if step % LOOK_EVERY == 0:
                look(run, model, likelihood, X_test, y_test, spent)
                if run.nlpd[-1] <= target or spent > limit:
                    return run
    return run


@torch.no_grad()
def look(run: Run, model: Approximate, likelihood: object, X: Tensor, y: Tensor, spent: float) -> None:
    """Score the test rows."""
    model.eval()
    mean, variance = [], []
    noise = float(likelihood.noise)  # type: ignore[attr-defined]
    for rows in X.split(2000):
        found = model(rows)
        mean.append(found.mean)
        variance.append(found.variance + noise)
    m, v = torch.cat(mean), torch.cat(variance)
    run.seconds.append(spent)
    run.nlpd.append(float((0.5 * (2 * math.pi * v).log() + 0.5 * (y - m).square() / v).mean()))
    run.rmse.append(float(np.sqrt(float((y - m).square().mean()))))
