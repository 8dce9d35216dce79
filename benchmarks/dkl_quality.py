"""How near the best Gaussian posterior do sparse inverse Cholesky posteriors come, and in what time?

The simulation of Cao et al. (2023): inputs uniform on the unit cube, Matérn-3/2 with lengthscales 0.25 j and variance
1; Gaussian noise of variance 0.01, Student's t noise of 2 degrees of freedom and scale 0.1, or labels by the logistic
function. All methods know the hyperparameters. The dense optimum has the exact prior and the best sites. ``sites`` is
mercer's family, with Vecchia's prior and the best sites; ``free`` has the same prior and a sparse factor trained as in
the paper, ``free_slow`` one trained at a tenth of the rate, and ``mean_field`` the best diagonal one. All four have the
same neighbours. ``svgp`` are gpytorch's inducing points, at k-means centres and under natural gradients, trained as
long as the slowest of the others took (``free_slow`` left aside).

Scores are of the latent function: root mean squared error and negative log density (nats) at test points, and at the
training points the Kullback-Leibler divergence (nats) from the dense optimum, and from the dense optimum under
Vecchia's prior. The latter leaves out what the prior itself misses, which is the same for all. Seconds count
plan, search and prediction, without what is measured on the way. Twenty neighbours miss more than a posterior can make
good, so ``sites`` and ``mean_field`` run with more, too; training takes a quarter of an hour with 150.

Run ``python benchmarks/dkl_quality.py [--only CASE ...] [--picture [PATH]]``. Cases are ``LIKELIHOOD_dD``. Keys of the
last line: ``kl_ratio_CASE`` and ``kl_ratio_same_prior_CASE`` (divergence of ``mean_field`` over that of ``sites``, with
the most neighbours), the same with ``_mM`` behind it for M neighbours, ``worst_kl_ratio``,
``worst_kl_ratio_same_prior``, and ``SCORE_METHOD_CASE`` with SCORE ``rmse``, ``nlpd``, ``kl``, ``kl_same_prior`` or
``seconds``, with 20 neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gpytorch
import torch
from _harness import finish, parser, table
from sklearn.cluster import KMeans
from torch import Tensor

from mercer._typing import Data
from mercer.families.base import Prior
from mercer.families.dklgp import DoubleKL, FreeParameters, FreePosterior
from mercer.families.exact import Exact, ExactPosterior
from mercer.families.sic import SparseInverseCholesky
from mercer.inference.base import run
from mercer.inference.conjugate import Conjugate
from mercer.inference.dual import Dual
from mercer.inference.freeform import Freeform, site_start
from mercer.kernels import Matern32, gram
from mercer.likelihoods import Bernoulli, Gaussian, StudentT
from mercer.linalg.sic import Pattern
from mercer.model import Model
from mercer.policy import NumericalPolicy

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "dkl_quality.png"
LIKELIHOODS = {
    "gaussian": lambda: Gaussian(0.01),
    "student": lambda: StudentT(df=2.0, scale=0.1),
    "bernoulli": lambda: Bernoulli("logit"),
}
NEIGHBOURS = 20
MORE_NEIGHBOURS = {2: (30, 60), 5: (30, 60, 100, 150)}  # by dimension
CASES = [f"{likelihood}_d{d}" for d in MORE_NEIGHBOURS for likelihood in LIKELIHOODS]
SPARSE = ("sites", "free", "free_slow", "mean_field")  # under Vecchia's prior
RATE = 0.01  # of the paper
NOTHING = FreeParameters(*[torch.empty(0)] * 3)
SVGP_CHECKS = 7  # curves have so many points, the time doubling from one to the next


@dataclass(frozen=True)
class Problem:
    """What a method is given: the model but for family and engine, data, and where to predict."""

    prior: Prior
    likelihood: Any
    data: Data
    X_test: Tensor
    f_test: Tensor
    n_neighbors: int
    epochs: int

    def model(self, family: Any, engine: Any) -> Model:
        """Return the model with a family and an engine."""
        return Model(self.prior, self.likelihood, family, engine, NumericalPolicy())

    @property
    def site_engine(self) -> Any:
        """The engine that finds the best sites."""
        return Conjugate() if isinstance(self.likelihood, Gaussian) else Dual()


@dataclass(frozen=True)
class Approximation:
    """A Gaussian posterior after some seconds.

    ``mean`` (n,) and ``root`` (n, n), a root of the covariance of log-determinant ``logdet``, are of f at the training
    points; ``test`` are mean and variance of f at the test points.
    """

    seconds: float
    mean: Tensor
    root: Tensor
    logdet: Tensor
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Target:
    """A dense optimum: its mean (n,) and the lower Cholesky factor of its precision (n, n)."""

    mean: Tensor
    factor: Tensor

    def kl(self, q: Approximation) -> float:
        """Return KL[q ‖ target] at the training points, in nats."""
        spread = (self.factor.mT @ q.root).square().sum()
        shift = (self.factor.mT @ (q.mean - self.mean)).square().sum()
        logs = 2.0 * self.factor.diagonal().log().sum() + q.logdet
        return float(0.5 * (spread + shift - len(q.mean) - logs))


class Watch:
    """A clock that runs inside its ``with`` blocks only."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._began


@dataclass(frozen=True)
class DensePrior(Exact):
    """The exact family with a covariance ``K`` (n, n) of its own at the training points."""

    K: Tensor

    def condition(self, prior: Prior, plan: Any, sites: Any) -> ExactPosterior:
        """Return the posterior under ``sites``."""
        return ExactPosterior(prior, plan, sites, self.K)


# ---- the simulation


def simulate(case: str, n: int, n_test: int, n_neighbors: int, epochs: int) -> Problem:
    """Draw the data of one case; f is the same for all likelihoods of one dimension."""
    name, d = case.split("_d")
    generator = torch.Generator().manual_seed(0)
    X = torch.rand(n + n_test, int(d), generator=generator, dtype=torch.float64)
    prior = Prior(Matern32([0.25 * (j + 1) for j in range(int(d))], outputscale=1.0))
    likelihood = LIKELIHOODS[name]()
    for parameter in (*prior.kernel.parameters(), *likelihood.parameters()):
        parameter.requires_grad_(False)
    f = torch.linalg.cholesky(gram(prior.kernel, X)) @ torch.randn(n + n_test, generator=generator, dtype=X.dtype)
    y = likelihood.sample(f[:n], generator)
    data = Data(X[:n], y.to(X), torch.ones(n, dtype=X.dtype))
    return Problem(prior, likelihood, data, X[n:], f[n:], n_neighbors, epochs)


# ---- the methods; each yields its posterior, those that train also on the way


def dense(problem: Problem) -> tuple[Approximation, Target]:
    """Return the dense optimum, as an approximation and as a target."""
    watch = Watch()
    K = gram(problem.prior.kernel, problem.data.X)
    with watch:
        posterior, target = optimum(problem, K, torch.cholesky_inverse(torch.linalg.cholesky(K)))
        test = posterior.marginals(problem.X_test)
    eye = torch.eye(len(K), dtype=K.dtype)
    root = torch.linalg.solve_triangular(target.factor, eye, upper=False).mT
    return Approximation(watch.seconds, target.mean, root, -2.0 * target.factor.diagonal().log().sum(), test), target


def optimum(problem: Problem, K: Tensor, precision: Tensor) -> tuple[ExactPosterior, Target]:
    """Return the best Gaussian posterior under a prior of covariance ``K`` and that precision."""
    model = problem.model(DensePrior(K), problem.site_engine)
    found = run(model, model.family.plan(problem.prior, problem.data.X, model.policy), problem.data)
    confess("dense", found)
    posterior = found.state.posterior
    factor = torch.linalg.cholesky(precision + posterior.sites.precision.diag())
    return posterior, Target(posterior.mean_at_data, factor)


def same_prior(problem: Problem) -> Target:
    """Return the dense optimum under the prior of all sparse methods."""
    plan = DoubleKL("mean-field", problem.n_neighbors).plan(problem.prior, problem.data.X, NumericalPolicy())
    U = as_dense(plan.columns.pattern, FreePosterior(problem.prior, plan, NOTHING).prior_factor)[plan.inverse]
    precision = U @ U.mT
    return optimum(problem, torch.cholesky_inverse(torch.linalg.cholesky(precision)), precision)[1]


def sites(problem: Problem) -> Iterator[Approximation]:
    """Yield the posterior of mercer's family under the best sites."""
    m, watch = problem.n_neighbors, Watch()
    with watch:
        model = problem.model(SparseInverseCholesky(m, 2 * m, form="latent"), problem.site_engine)
        plan = model.family.plan(problem.prior, problem.data.X, model.policy)
        found = run(model, plan, problem.data)
        posterior = found.state.posterior
        mean, V = posterior.mean_at_data, posterior.precision.factor
        test = posterior.marginals(problem.X_test)
    confess("sites", found)
    yield sparse(watch.seconds, mean, plan.pattern, V, plan.order, test)


def free(problem: Problem, rate: float = RATE) -> Iterator[Approximation]:
    """Yield the trained posterior at its start and after a few epochs, then at the end."""
    watch, epochs = Watch(), problem.epochs
    with watch:
        model = problem.model(DoubleKL(n_neighbors=problem.n_neighbors), Freeform(epochs, learning_rate=rate))
        plan = model.family.plan(problem.prior, problem.data.X, model.policy)
        state = model.engine.init(model, plan, problem.data)
    yield free_form(watch, problem, state.posterior)
    for epoch in range(1, epochs + 1):
        with watch:
            state, _ = model.engine.step(model, plan, state, problem.data)
        if epoch == epochs or epoch & (epoch - 1) == 0:
            yield free_form(watch, problem, state.posterior)


def free_slow(problem: Problem) -> Iterator[Approximation]:
    """Yield the same at a tenth of the rate."""
    return free(problem, RATE / 10)


def mean_field(problem: Problem) -> Iterator[Approximation]:
    """Yield the best posterior with a diagonal factor."""
    watch = Watch()
    with watch:
        model = problem.model(DoubleKL("mean-field", n_neighbors=problem.n_neighbors), Freeform())
        plan = model.family.plan(problem.prior, problem.data.X, model.policy)
        posterior = site_start(model, plan, problem.data, n_steps=200, laplace=False)
    yield free_form(watch, problem, posterior)


@torch.no_grad()
def free_form(watch: Watch, problem: Problem, posterior: FreePosterior) -> Approximation:
    """Return a free-form posterior in the common shape."""
    with watch:
        test = posterior.marginals(problem.X_test)
    V, plan = posterior.parameters.factor, posterior.plan
    return sparse(watch.seconds, posterior.mean_at_data, plan.pattern, V, plan.order, test)


def sparse(
    seconds: float, mean: Tensor, pattern: Pattern, V: Tensor, order: Tensor, test: tuple[Tensor, Tensor]
) -> Approximation:
    """Return N(mean, (V Vᵀ)⁻¹), ``mean`` in the order of the data and V in the given one."""
    eye = torch.eye(len(order), dtype=V.dtype)
    root = torch.linalg.solve_triangular(as_dense(pattern, V).mT, eye, upper=False)
    return Approximation(seconds, mean, root[order.argsort()], -2.0 * V[:, -1].log().sum(), test)


def as_dense(pattern: Pattern, factor: Tensor) -> Tensor:
    """Return the (n, n) upper triangular matrix of a sparse factor (n, w)."""
    n = len(factor)
    kept = factor.detach().masked_fill(pattern.padding, 0.0)
    return factor.new_zeros(n, n).scatter_add(1, pattern.columns.clamp_min(0), kept).mT


class Svgp(gpytorch.models.ApproximateGP):
    """gpytorch's sparse variational Gaussian process, whitened, with a free covariance at fixed inducing points."""

    def __init__(self, kernel: gpytorch.kernels.Kernel, inducing: Tensor, distribution: Any):
        super().__init__(
            gpytorch.variational.VariationalStrategy(self, inducing, distribution, learn_inducing_locations=False)
        )
        self.kernel = kernel

    def forward(self, X: Tensor) -> gpytorch.distributions.MultivariateNormal:
        """Return the prior at X."""
        return gpytorch.distributions.MultivariateNormal(X.new_zeros(X.shape[:-1]), self.kernel(X))

    @torch.no_grad()
    def moments(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and covariance of f at X without the jitter that gpytorch adds to the latter."""
        strategy, q = self.variational_strategy, self.variational_strategy.variational_distribution
        Z = strategy.inducing_points
        K_z = self.kernel(Z).to_dense() + strategy.jitter_val * torch.eye(len(Z), dtype=Z.dtype)
        A = torch.linalg.solve_triangular(torch.linalg.cholesky(K_z), self.kernel(Z, X).to_dense(), upper=False)
        inner = q.covariance_matrix - torch.eye(len(Z), dtype=Z.dtype)
        return A.mT @ q.mean, self.kernel(X).to_dense() + A.mT @ inner @ A


def svgp(problem: Problem, n_inducing: int, limit: float) -> Iterator[Approximation]:
    """Yield gpytorch's posterior at doubling times until ``limit`` seconds.

    The likelihood's expectations are ours: gpytorch's own Student's t does not go down to 2 degrees of freedom, and its
    Bernoulli has no logistic function. Steps take all rows and are as long as each likelihood bears: where it is not
    log-concave, natural parameters end as no precision, and those of gpytorch's triangular kind do not.
    """
    natural = gpytorch.variational.NaturalVariationalDistribution, 0.9
    triangular = gpytorch.variational.TrilNaturalVariationalDistribution, 0.1
    kind, rate = natural if problem.likelihood.log_concave else triangular
    data, watch = problem.data, Watch()
    with watch:
        d = data.X.shape[1]
        lengthscale = 0.25 * torch.arange(1, d + 1, dtype=data.X.dtype)
        kernel = gpytorch.kernels.MaternKernel(nu=1.5, ard_num_dims=d).double()
        kernel.lengthscale = lengthscale
        kernel.requires_grad_(False)
        clusters = KMeans(min(n_inducing, len(data.X)), random_state=0).fit((data.X / lengthscale).numpy())
        inducing = torch.as_tensor(clusters.cluster_centers_) * lengthscale
        model = Svgp(kernel, inducing, kind(len(inducing))).double()
        model.train()
        optimiser = gpytorch.optim.NGD(model.variational_parameters(), num_data=data.n_rows, lr=rate)
    for check in range(SVGP_CHECKS - 1, -1, -1):
        while watch.seconds < limit / 2**check:
            with watch:
                optimiser.zero_grad()
                q = model(data.X)
                expected = problem.likelihood.expected_log_prob(data.y, q.mean, q.variance).value
                bound = expected.sum() - model.variational_strategy.kl_divergence()
                (-bound / data.n_rows).backward()
                optimiser.step()
        mean, covariance = model.moments(data.X)
        root = torch.linalg.cholesky(covariance)
        test_mean, test_covariance = model.moments(problem.X_test)
        test = test_mean, test_covariance.diagonal()
        yield Approximation(watch.seconds, mean, root, 2.0 * root.diagonal().log().sum(), test)


def confess(name: str, found: Any) -> None:
    """Print what went wrong in the search for sites."""
    if not found.converged or found.notes:
        print(f"  {name}: {found.n_steps} steps, converged: {found.converged}", *found.notes, sep="; ")


# ---- comparison

METHODS = {"sites": sites, "free": free, "free_slow": free_slow, "mean_field": mean_field}
RATIO = ("mean_field", "sites")
Scores = dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """Scores of one case: along each method's way, the last at its end; and of few methods by number of neighbours."""

    trails: dict[str, list[Scores]]
    by_neighbours: dict[int, dict[str, Scores]]

    def keys(self, case: str) -> Scores:
        """Return the keys of the case."""
        last = {name: trail[-1] for name, trail in self.trails.items()}
        values = {
            f"kl_ratio{prior}_{case}_m{m}": found["mean_field"][f"kl{prior}"] / found["sites"][f"kl{prior}"]
            for m, found in self.by_neighbours.items()
            for prior in ("", "_same_prior")
        }
        most = max(self.by_neighbours)
        values |= {
            f"kl_ratio{prior}_{case}": values[f"kl_ratio{prior}_{case}_m{most}"] for prior in ("", "_same_prior")
        }
        for name, scores in last.items():
            kept = set(scores) - ({"kl", "kl_same_prior"} if name == "dense" else set())
            kept -= set() if name in SPARSE else {"kl_same_prior"}
            values |= {f"{score}_{name}_{case}": scores[score] for score in scores if score in kept}
        return values


def compare(case: str, problem: Problem, n_inducing: int, more_neighbours: Sequence[int]) -> Comparison:
    """Run all methods on one case, print its tables and return the scores."""
    reference, exact = dense(problem)
    vecchia = same_prior(problem)

    def score(q: Approximation, vecchia: Target = vecchia) -> Scores:
        mean, variance = q.test
        error = problem.f_test - mean
        return {
            "rmse": float(error.square().mean().sqrt()),
            "nlpd": float(0.5 * ((2 * torch.pi * variance).log() + error.square() / variance).mean()),
            "kl": exact.kl(q),
            "kl_same_prior": vecchia.kl(q),
            "seconds": q.seconds,
        }

    trails = {name: [score(q) for q in method(problem)] for name, method in METHODS.items()}
    limit = max(trails[name][-1]["seconds"] for name in SPARSE if name != "free_slow")
    trails["svgp"] = [score(q) for q in svgp(problem, n_inducing, limit)]
    trails["dense"] = [score(reference)]
    by_neighbours = {problem.n_neighbors: {name: trails[name][-1] for name in RATIO}}
    for m in more_neighbours:
        wider = replace(problem, n_neighbors=m)
        prior = same_prior(wider)
        by_neighbours[m] = {name: score(next(METHODS[name](wider)), prior) for name in RATIO}
    n, d = problem.data.X.shape
    title = f"{case}, {n} × {d}, {problem.n_neighbors} neighbours, {torch.get_num_threads()} threads"
    header = ["rmse", "nlpd", "KL, exact prior", "KL, same prior", "seconds"]
    table(title, ["", *header], [[name, *trail[-1].values()] for name, trail in trails.items()])
    if more_neighbours:
        rows = [[f"{name}, {m}", *found[name].values()] for m, found in by_neighbours.items() for name in RATIO]
        table(f"{case}, more neighbours", ["", *header], rows)
    return Comparison(trails, by_neighbours)


def draw(found: dict[str, Comparison], path: Path) -> None:
    """Draw divergence against time, a panel per case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    from mercer.display._style import BLUE, GREEN, INK, VERMILLION, tidy

    looks = {
        "sites": (BLUE, "o", "-", "sites"),
        "mean_field": (GREEN, "s", "-", "mean-field"),
        "free": (VERMILLION, ".", "-", "free factor, rate 0.01"),
        "free_slow": (VERMILLION, ".", ":", "free factor, rate 0.001"),
        "svgp": (INK, ".", "--", "inducing points (gpytorch)"),
    }
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    size = (1.2 + 3.0 * columns, 1.0 + 2.7 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for ax, (case, compared) in zip(axes.flat, found.items(), strict=False):
        for name, (colour, marker, line, label) in looks.items():
            trail = compared.trails[name]
            points = [each["seconds"] for each in trail], [each["kl"] for each in trail]
            ax.plot(*points, color=colour, marker=marker, linestyle=line, label=label)
        most = max(compared.by_neighbours)
        if len(compared.by_neighbours) > 1:
            for name, scores in compared.by_neighbours[most].items():
                colour, marker, _, label = looks[name]
                point = [scores["seconds"]], [scores["kl"]]
                ax.plot(*point, color=colour, marker=marker, mfc="none", ls="", label=f"{label}, {most} neighbours")
        ax.set(xscale="log", yscale="log")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_minor_formatter(NullFormatter())
        likelihood, d = case.split("_d")
        tidy(ax, xlabel="seconds", ylabel="KL (nats)", title=f"{likelihood.capitalize()}, {d} inputs")
    for ax in axes.flat[len(found) :]:
        ax.set_visible(False)
    handles = {label: line for ax in axes.flat for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path, dpi=80, metadata={"Software": None})


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, draw if asked to, and finish with the JSON line."""
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=CASES, default=CASES, help="run these cases alone")
    options.add_argument("--n", type=int, default=2000, help="training points")
    options.add_argument("--n-test", type=int, default=500, help="test points")
    options.add_argument("--n-neighbors", type=int, default=NEIGHBOURS, help="neighbours of all methods")
    options.add_argument("--more-neighbors", type=int, nargs="*", help="others of sites and mean_field")
    options.add_argument("--n-inducing", type=int, default=512, help="inducing points")
    options.add_argument("--epochs", type=int, default=35, help="epochs of free-form training")
    options.add_argument("--picture", type=Path, nargs="?", const=PICTURE, help="draw time and accuracy into this file")
    chosen = options.parse_args(arguments)
    found: dict[str, Comparison] = {}
    for case in chosen.only:
        few = simulate(case, 60, 5, 5, 1)
        for method in METHODS.values():  # compiles what is compiled late
            list(method(few))
        problem = simulate(case, chosen.n, chosen.n_test, chosen.n_neighbors, chosen.epochs)
        more = MORE_NEIGHBOURS[int(case.split("_d")[1])] if chosen.more_neighbors is None else chosen.more_neighbors
        found[case] = compare(case, problem, chosen.n_inducing, more)
        if chosen.picture is not None:  # after each case, since all of them take a while
            draw(found, chosen.picture)
    values = {name: value for case, compared in found.items() for name, value in compared.keys(case).items()}
    for prior in ("", "_same_prior"):
        values[f"worst_kl_ratio{prior}"] = min(values[f"kl_ratio{prior}_{case}"] for case in found)
    finish(values)


if __name__ == "__main__":
    main()
