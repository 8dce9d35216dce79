"""Does Bayesian optimisation go as well with our process as with BoTorch's own, and are its fantasies cheap?

Branin, Hartmann-6 and Ackley-10 (BoTorch's, maximised), 2 d + 2 Sobol points and then a small budget of LogEI, one
point at a time; both sides are fitted again after every point, share starting points, budget, acquisition function and
its optimiser, and differ in the model alone: ``SingleTaskGP`` (normalised inputs, standardised outcomes, BoTorch's
priors) or ``regressor_for_optimisation(d).fit(X, y).to_botorch()``, which has the same priors. Regret is the best value
ever minus the best value found; ratios are geometric means of ours over theirs over the seeds, with a floor of 1e-6 on
regrets, and p is Wilcoxon's signed-rank test of "ours is worse". A third column is ours with sequential updates:
hyperparameters are learned at the start and from every tenth point, in between new points are conditioned on.

Fantasies: 64 of four points each on a stream of 100 inducing points, and their means and standard deviations at 200
rows, at once against one factorisation of B (and K) for each. Updates: 5000 single rows by ``partial_fit`` with frozen
hyperparameters.

Run ``python benchmarks/bo.py [--seeds N] [--only NAME ...]``. Keys of the last line: ``regret_ratio_branin``,
``regret_ratio_hartmann6``, ``regret_ratio_ackley10``, ``p_worse_*``, ``regret_ratio_sequential_*``,
``fantasy_speedup``, ``update_ms`` (median of the last thousand), ``update_growth`` (that over the median of the first
thousand after the first hundred, minus 1).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from _harness import finish, interleaved, parser, table
from botorch.acquisition import LogExpectedImprovement
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.transforms import Normalize, Standardize
from botorch.optim import optimize_acqf
from botorch.sampling import SobolQMCNormalSampler
from botorch.test_functions import Ackley, Branin, Hartmann
from gpytorch.mlls import ExactMarginalLogLikelihood
from scipy.stats import wilcoxon
from torch import Tensor
from torch.quasirandom import SobolEngine

from mercer import GPRegressor
from mercer.families import Inducing
from mercer.families.inducing_plan import InducingPlan
from mercer.families.tied import TiedSites
from mercer.optimisation import regressor_for_optimisation
from mercer.sequential import Stream

PROBLEMS = {
    "branin": (Branin(negate=True), 20),
    "hartmann6": (Hartmann(dim=6, negate=True), 30),
    "ackley10": (Ackley(dim=10, negate=True), 30),
}
FLOOR = 1e-6
LEARN_EVERY = 10
DOUBLE = torch.float64


def theirs(X: Tensor, Y: Tensor, bounds: Tensor, before: Any) -> Any:
    """Return BoTorch's model of the data, fitted."""
    model = SingleTaskGP(X, Y, input_transform=Normalize(X.shape[1], bounds=bounds), outcome_transform=Standardize(1))
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    return model


def ours(X: Tensor, Y: Tensor, bounds: Tensor, before: Any) -> Any:
    """Return our model of the data, fitted, with the priors that `theirs` has."""
    return regressor_for_optimisation(X.shape[1], random_state=0).fit(X.numpy(), Y.numpy().ravel()).to_botorch()


def sequential(X: Tensor, Y: Tensor, bounds: Tensor, before: Any) -> Any:
    """Return our model, conditioned on the last point; hyperparameters are learned at every tenth."""
    if before is None or len(X) % LEARN_EVERY == 0:
        return ours(X, Y, bounds, before)
    return before.condition_on_observations(X[-1:], Y[-1:])


def optimise(problem: Any, budget: int, seed: int, make: Callable[..., Any]) -> tuple[float, float]:
    """Return the regret at the end and the seconds of fitting and optimising."""
    torch.manual_seed(seed)
    bounds = problem.bounds.to(DOUBLE)
    unit = SobolEngine(problem.dim, scramble=True, seed=seed).draw(2 * problem.dim + 2, dtype=DOUBLE)
    X = bounds[0] + (bounds[1] - bounds[0]) * unit
    Y = problem(X).unsqueeze(-1)
    model, began = None, time.perf_counter()
    for _ in range(budget):
        model = make(X, Y, bounds, model)
        acquisition = LogExpectedImprovement(model, best_f=Y.max())
        x, _ = optimize_acqf(acquisition, bounds, q=1, num_restarts=4, raw_samples=128, options={"maxiter": 50})
        X, Y = torch.cat([X, x]), torch.cat([Y, problem(x).unsqueeze(-1)])
    return float(problem.optimal_value - Y.max()), time.perf_counter() - began


def regrets(name: str, n_seeds: int) -> dict[str, float]:
    """Return the keys of one problem."""
    problem, budget = PROBLEMS[name]
    sides = {"SingleTaskGP": theirs, "mercer": ours, "mercer, sequential": sequential}
    found: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for seed in range(n_seeds):
        for side, make in sides.items():
            found[side].append(optimise(problem, budget, seed, make))
        print(f"{name}, seed {seed}: " + ", ".join(f"{side} {found[side][-1][0]:.3g}" for side in sides), flush=True)
    logs = {side: np.log(np.maximum([r for r, _ in runs], FLOOR)) for side, runs in found.items()}
    rows = [
        [
            side,
            float(np.exp(logs[side].mean())),
            float(np.median([r for r, _ in runs])),
            float(np.mean([s for _, s in runs])),
        ]
        for side, runs in found.items()
    ]
    table(f"{name}, {n_seeds} seeds, {budget} points", ["", "mean regret (geometric)", "median", "seconds"], rows)
    apart = logs["mercer"] - logs["SingleTaskGP"]
    worse = float(wilcoxon(apart, alternative="greater").pvalue) if np.any(apart) else 1.0
    later = logs["mercer, sequential"] - logs["SingleTaskGP"]
    return {
        f"regret_ratio_{name}": float(np.exp(apart.mean())),
        f"p_worse_{name}": worse,
        f"regret_ratio_sequential_{name}": float(np.exp(later.mean())),
    }


def fantasies() -> dict[str, float]:
    """Return how much faster 64 fantasies are than 64 factorisations."""
    rng = np.random.default_rng(0)
    X = rng.uniform(-3, 3, (1000, 2))
    y = np.sin(2 * X[:, 0]) + np.cos(X[:, 1]) + 0.1 * rng.standard_normal(1000)
    stream = Stream(dense_rows=0, memory=0)
    estimator = GPRegressor("rbf", family=Inducing(100), stream=stream, max_iter=20, random_state=0).partial_fit(X, y)
    model = estimator.to_botorch()
    at = torch.as_tensor(rng.uniform(-3, 3, (4, 2)))
    X_new = torch.as_tensor(rng.uniform(-3, 3, (200, 2)))
    sampler = SobolQMCNormalSampler(torch.Size([64]), seed=0)
    with torch.no_grad():
        drawn = sampler(model.posterior(at, observation_noise=True)).squeeze(-1)

    def at_once(_: int) -> Any:
        with torch.no_grad():
            posterior = model.condition_on_observations(at, drawn.unsqueeze(-1)).posterior(X_new.reshape(-1, 1, 1, 2))
            return posterior.mean, posterior.variance.sqrt()

    inner = estimator._model
    units, base = estimator._units, estimator.posterior_
    moved, moved_new = units.inputs(at), units.inputs(X_new)
    noise = float(inner.likelihood.value_of("noise_variance", at))

    def one_by_one(_: int) -> Any:
        """Factor K and B anew for each: the known sites at Z, and the four rows as data."""
        means = []
        with torch.no_grad():
            for f in (drawn - float(units.y_center)) / float(units.y_scale):
                rest = TiedSites(base.plan.rest.linear, base.plan.rest.precision)
                plan = InducingPlan(moved, base.plan.Z, base.plan.policy, rest=rest)
                sites = replace(base.sites, linear=f / noise, precision=torch.full_like(f, 1.0 / noise))
                means.append(inner.family.condition(inner.prior, plan, sites).marginals(moved_new))
        return means

    seconds = interleaved({"at once": at_once, "one by one": one_by_one}, 9)
    rows = [[name, 1e3 * value] for name, value in seconds.items()]
    table("64 fantasies of 4 rows, 100 inducing points", ["", "ms"], rows)
    return {"fantasy_speedup": seconds["one by one"] / seconds["at once"]}


def updates(n: int = 5000) -> dict[str, float]:
    """Return the time of single updates without a refit."""
    rng = np.random.default_rng(0)
    stream = Stream(dense_rows=0, hyperparameters="frozen", memory=50)
    model = GPRegressor(family=Inducing(100), stream=stream, max_iter=20, random_state=0)
    X = rng.uniform(-3, 3, (n + 200, 2))
    y = np.sin(2 * X[:, 0]) + np.cos(X[:, 1]) + 0.1 * rng.standard_normal(n + 200)
    model.partial_fit(X[:200], y[:200])
    seconds = []
    for i in range(200, n + 200):
        began = time.perf_counter()
        model.partial_fit(X[i : i + 1], y[i : i + 1])
        seconds.append(time.perf_counter() - began)
    first, last = float(np.median(seconds[100:1100])), float(np.median(seconds[-1000:]))
    X_new = rng.uniform(-3, 3, (500, 2))
    error = float(np.sqrt(np.mean((model.predict(X_new) - np.sin(2 * X_new[:, 0]) - np.cos(X_new[:, 1])) ** 2)))
    table(
        f"{n} single updates",
        ["", "ms", "RMSE at the end"],
        [["first thousand", 1e3 * first, ""], ["last", 1e3 * last, error]],
    )
    return {"update_ms": 1e3 * last, "update_growth": last / first - 1.0}


def main() -> None:
    """Run what is asked for and print the keys."""
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, default=20)
    arguments.add_argument("--only", nargs="+", choices=[*PROBLEMS, "fantasies", "updates"], default=None)
    given = arguments.parse_args()
    warnings.simplefilter("ignore")
    chosen = given.only or [*PROBLEMS, "fantasies", "updates"]
    keys: dict[str, float] = {}
    for name in PROBLEMS:
        if name in chosen:
            keys |= regrets(name, given.seeds)
    if "fantasies" in chosen:
        keys |= fantasies()
    if "updates" in chosen:
        keys |= updates()
    finish(keys)


if __name__ == "__main__":
    main()
