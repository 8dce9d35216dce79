"""Free-form sparse inverse Cholesky posteriors: q(g) = N(m, (V Vᵀ)⁻¹) of g = f − μ, with any m and V on a pattern.

The prior is Vecchia's, N(0, (U Uᵀ)⁻¹). KL[q ‖ p̂] is a sum over rows, in which row i needs column i of U and, of V,
the rows on which i depends: all its ancestors, or a reduced set of them, which makes every term cheap and biased.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from mercer._typing import Sites
from mercer.families.base import Confession, Prior
from mercer.families.nearness import Nearness
from mercer.families.sets import joint_of_sets
from mercer.families.sic_plan import SicPlan, plan_columns
from mercer.families.vecchia import Appended, append, columns_of, prior_factor
from mercer.geometry.ancestors import reduced_ancestors, reduced_ancestors_by
from mercer.kernels.evaluate import scaled_inputs
from mercer.linalg.sic import Pattern, solve
from mercer.linalg.sic_posterior import PosteriorPrecision
from mercer.policy import NumericalPolicy


@dataclass(frozen=True)
class FreeParameters:
    """What q is free in, in the order of the plan; V is ``factor``.

    Parameters
    ----------
    mean : (n,)
        m, the mean of g = f − μ, in units of f.
    off_diagonal : (n, w − 1)
        V at the earlier rows of each column, in units of 1/f; what stands at the padding does not count.
    log_diagonal : (n,)
        log Vᵢᵢ.
    """

    mean: Tensor
    off_diagonal: Tensor
    log_diagonal: Tensor

    @classmethod
    def of(cls, mean: Tensor, factor: Tensor) -> FreeParameters:
        """Return the parameters of N(mean, (V Vᵀ)⁻¹) for V (n, w) with a positive last column."""
        return cls(mean, factor[..., :-1], factor[..., -1].log())

    @property
    def factor(self) -> Tensor:
        """V, (n, w)."""
        return torch.cat([self.off_diagonal, self.log_diagonal.exp().unsqueeze(-1)], -1)

    def leaves(self) -> FreeParameters:
        """Return a copy that gradients can be taken in."""
        return FreeParameters(*(each.detach().clone().requires_grad_() for each in self.tensors()))

    def detached(self) -> FreeParameters:
        """Return a copy that stays as it is."""
        return FreeParameters(*(each.detach().clone() for each in self.tensors()))

    def double(self) -> FreeParameters:
        """Return the same in float64."""
        return FreeParameters(*(each.double() for each in self.tensors()))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the three of them."""
        return self.mean, self.off_diagonal, self.log_diagonal


@dataclass(frozen=True)
class FreePlan:
    """Order, neighbours and reduced ancestors for the rows of X, found without gradients.

    ``columns`` plans U, ``pattern`` is that of V, and ``sets`` (n, a + 1) holds for each row, in the order of the
    plan, its reduced ancestors ascending and itself last, −1 for padding on the left.
    """

    columns: SicPlan
    pattern: Pattern
    sets: Tensor
    n_neighbors_new: int

    @property
    def policy(self) -> NumericalPolicy:
        """The numerical policy."""
        return self.columns.policy

    @property
    def order(self) -> Tensor:
        """(n,), the rows of X in the order of the plan."""
        return self.columns.order

    @cached_property
    def inverse(self) -> Tensor:
        """(n,), where each row of X stands in the order of the plan."""
        return self.order.argsort()

    @cached_property
    def X(self) -> Tensor:
        """(n, d), the inputs in the order of the data."""
        return self.columns.in_data_order


@dataclass(frozen=True)
class DoubleKL:
    """The family of Cao et al. (2023), its variants, and how they are planned.

    Parameters
    ----------
    variant : {"dkl", "mean-field", "global"}
        V on the pattern of U; V diagonal, which is the posterior of VNNGP under the same prior; or V and U on the
        pattern in which every row sees the first ``n_neighbors`` rows of the maximin order.
    n_neighbors : int
        m nearest earlier rows; with ``rho`` the most that a row may have.
    rho : float ≥ 1, optional
        Take the earlier rows within ρ maximin distances, as the paper does.
    ancestor_rho : float, optional
        ρ of reduced ancestors, see `mercer.geometry.ancestors`; by default ``rho``, or as far as neighbours reach.
    n_ancestors : int
        Most reduced ancestors of a row.
    nugget : float
        Prior variance added to every row, independently, as a share of the mean prior variance; more where factors
        break down.

    References
    ----------
    Cao, Kang, Jimenez, Sang, Schäfer and Katzfuss (2023), "Variational sparse inverse Cholesky approximation for
    latent Gaussian processes via double Kullback-Leibler minimization"; Wu, Pleiss and Cunningham (2022),
    "Variational nearest neighbor Gaussian processes", for the diagonal V.
    """

    variant: Literal["dkl", "mean-field", "global"] = "dkl"
    n_neighbors: int = 30
    rho: float | None = None
    ancestor_rho: float | None = None
    n_ancestors: int = 256
    nugget: float = 0.0
    name: ClassVar[str] = "dklgp"
    sums_over_columns: ClassVar[bool] = False
    stage_growth: ClassVar[int] = 4
    stage_rows: ClassVar[int] = 200
    dense: ClassVar[bool] = False
    evidence_of: ClassVar[str] = "under Vecchia's approximation"

    def __post_init__(self) -> None:
        if self.variant not in ("dkl", "mean-field", "global"):
            raise ValueError(f"variant must be 'dkl', 'mean-field' or 'global', got {self.variant!r}.")

    def plan(self, prior: Prior, X: Tensor, policy: NumericalPolicy) -> FreePlan:
        """Order the rows X (n, d) and find their neighbours and reduced ancestors."""
        columns = plan_columns(prior, X, policy, self.n_neighbors, self.rho)
        if self.variant == "global":
            first = torch.arange(min(self.n_neighbors, max(1, len(X) - 1)), device=X.device).expand(len(X), -1)
            own = torch.arange(len(X), device=X.device).unsqueeze(-1)
            columns = replace(columns, pattern=Pattern(torch.where(first < own, first, -1)))
        pattern = columns.pattern
        if self.variant == "mean-field":
            pattern = Pattern(columns.order.new_empty(len(X), 0))
        # without "dkl" chains of neighbours lead nowhere else
        sets = self._sets(prior, columns) if self.variant == "dkl" else columns.pattern.columns
        columns.nugget.value = max(columns.nugget.value, self.nugget)
        return FreePlan(columns, pattern, sets, min(len(X), 2 * self.n_neighbors))

    def stale(self, prior: Prior, plan: FreePlan) -> bool:
        """Whether the plan should be made anew for the prior's present lengthscales."""
        return plan.columns.stale(prior)

    def _sets(self, prior: Prior, columns: SicPlan) -> Tensor:
        nearness, X = Nearness(prior.kernel, columns.X, columns.policy), columns.X
        distance, neighbours = columns.distance.cpu().numpy(), columns.pattern.columns[:, :-1].cpu().numpy()
        rho = self.rho if self.ancestor_rho is None else self.ancestor_rho
        how = (distance, neighbours, rho, self.n_ancestors)
        if nearness.by_correlation:
            block = columns.policy.chunk_rows(2 * len(X))
            found = reduced_ancestors_by(lambda rows: nearness.squared(X[rows], X).cpu().numpy(), *how, block)
        else:
            scaled = scaled_inputs(prior.kernel, X)
            found = reduced_ancestors((X if scaled is None else scaled).double().cpu().numpy(), *how)
        return Pattern(torch.as_tensor(found, device=X.device)).columns

    def condition(self, prior: Prior, plan: FreePlan, sites: Sites) -> FreePosterior:
        """Return q under Gaussian sites (n,): the exact mean, and V by incomplete Cholesky of P̂ + diag(λ2).

        The precision agrees with V Vᵀ on the pattern of V, so that a diagonal V is the best one for these λ2.
        """
        return FreePosterior(prior, plan, FreeParameters(*[plan.X.new_empty(0)] * 3)).with_sites(sites)

    def variational(self, prior: Prior, plan: FreePlan, parameters: FreeParameters) -> FreePosterior:
        """Return q with the given parameters."""
        return FreePosterior(prior, plan, parameters)


def prior_columns(prior: Prior, plan: FreePlan, rows: Tensor) -> Tensor:
    """Return the columns of U at ``rows`` (r,) of the plan's order, (r, w); differentiable in the hyperparameters."""
    return columns_of(prior, plan.columns, None, plan.columns.pattern.columns[rows], plan.columns.nugget.value)[0]


class Terms(NamedTuple):
    """Per row: mean and variance of g under q, (r,), and the share of KL[q ‖ p̂], (r,), in nats."""

    mean: Tensor
    variance: Tensor
    kl: Tensor


def divergence_terms(
    prior: Prior,
    plan: FreePlan,
    parameters: FreeParameters,
    rows: Tensor | None = None,
    exact: bool = False,
    prior_factor: Tensor | None = None,
) -> Terms:
    """Return what each row adds to the evidence lower bound.

    KL[q ‖ p̂] = Σᵢ log Vᵢᵢ − log Uᵢᵢ + ½ ‖V⁻¹ uᵢ‖² + ½ (uᵢᵀ m)² − ½ with uᵢ column i of U, and vᵢ = ‖V⁻¹ eᵢ‖².

    Parameters
    ----------
    prior : Prior
    plan : FreePlan
    parameters : FreeParameters
    rows : (r,) int tensor, optional
        Positions in the plan's order; all by default.
    exact : bool
        Solve with all of V, in O(n m) a row, instead of with reduced ancestors, in O(a²). With the latter the terms
        are off either way, and their sum is no strict bound.
    prior_factor : (n, w), optional
        U, where it is known and nobody asks for gradients in the hyperparameters.

    Returns
    -------
    Terms
        In the order of ``rows``; differentiable in the parameters and the hyperparameters.
    """
    rows = torch.arange(plan.pattern.n, device=plan.X.device) if rows is None else rows
    widths = plan.pattern.columns.shape[-1] * plan.pattern.n if exact else plan.sets.shape[-1] ** 2
    factor = parameters.factor
    means, variances, shares = [], [], []
    for chunk in rows.split(plan.policy.chunk_rows(4 * widths)):
        u = prior_columns(prior, plan, chunk) if prior_factor is None else prior_factor[chunk]
        forms = _forms(plan, factor, u, chunk) if exact else _ReducedForms.apply(factor, u, plan, chunk)
        pull = (u * parameters.mean[plan.columns.pattern.columns[chunk].clamp_min(0)]).sum(-1)
        logs = parameters.log_diagonal[chunk] - u[:, -1].log()
        means.append(parameters.mean[chunk])
        variances.append(forms[0])
        shares.append(logs + 0.5 * (forms[1] + pull.square() - 1.0))
    return Terms(torch.cat(means), torch.cat(variances), torch.cat(shares))


def _forms(plan: FreePlan, factor: Tensor, u: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return ‖V⁻¹ eᵢ‖² and ‖V⁻¹ uᵢ‖² by solves with all of V."""
    blank = u.new_zeros(len(rows), plan.pattern.n)
    axes = blank.scatter(1, rows.unsqueeze(-1), 1.0)
    spread = blank.scatter_add(1, plan.columns.pattern.columns[rows].clamp_min(0), u)  # the padding adds zero
    return tuple(solve(plan.pattern, factor, rhs).square().sum(-1) for rhs in (axes, spread))  # type: ignore[return-value]


class _ReducedForms(torch.autograd.Function):
    """‖V_A⁻¹ eᵢ‖² and ‖V_A⁻¹ uᵢ‖², V_A the rows and columns of V at i and its reduced ancestors.

    With x = V_A⁻¹ r and y = V_A⁻ᵀ x, d‖x‖² = 2 yᵀ dr − 2 yᵀ dV_A x: no dense gradient is needed for a sparse V.
    """

    @staticmethod
    def forward(ctx: Any, factor: Tensor, u: Tensor, plan: FreePlan, rows: Tensor) -> tuple[Tensor, Tensor]:
        sets = plan.sets[rows]
        (r, a), index = sets.shape, sets.clamp_min(0)
        at = _places(sets, plan.pattern.columns[index].flatten(1)).unflatten(1, (a, -1))
        at_u = _places(sets, plan.columns.pattern.columns[rows])
        # Vᵀ, with one more row of V: below the diagonal, where no solve looks, it takes what falls outside the set.
        # x and y are zero there and at the padding
        transposed = u.new_zeros(r, a + 1, a + 1)
        transposed[:, :-1].scatter_(2, at, factor[index])
        transposed.diagonal(dim1=-2, dim2=-1).masked_fill_(torch.nn.functional.pad(sets < 0, (0, 1), value=True), 1.0)
        rhs = u.new_zeros(r, a + 1, 2)
        rhs[:, -2, 0] = 1.0
        rhs[..., 1].scatter_(1, at_u, u)
        rhs[:, -1] = 0.0
        x = torch.linalg.solve_triangular(transposed.mT, rhs, upper=True)
        y = torch.linalg.solve_triangular(transposed, x, upper=False)
        ctx.save_for_backward(x, y, index, at, at_u)
        ctx.shape = factor.shape
        variance, trace = x.square().sum(-2).unbind(-1)
        return variance, trace

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, y, index, at, at_u = ctx.saved_tensors
        pulled = 2.0 * y * torch.stack(grads, -1).unsqueeze(-2)
        by_u = pulled[..., 1].gather(1, at_u)
        left = pulled.gather(1, at.flatten(1).unsqueeze(-1).expand(-1, -1, 2)).unflatten(1, at.shape[1:])
        by_entry = left[..., 0] * x[:, :-1, :1] + left[..., 1] * x[:, :-1, 1:]
        by_factor = x.new_zeros(ctx.shape).index_add_(0, index.flatten(), by_entry.flatten(0, 1), alpha=-1.0)
        return by_factor, by_u, None, None


def _places(sets: Tensor, wanted: Tensor) -> Tensor:
    """Return where each entry of ``wanted`` (r, k) stands in its ascending set (r, a); a where it does not."""
    a = sets.shape[-1]
    at = torch.searchsorted(sets, wanted.contiguous()).clamp_max(a - 1)
    return at.masked_fill((sets.gather(-1, at) != wanted) | (wanted < 0), a)


class FreePosterior:
    """A Gaussian process whose values at the training rows are q, and whose others follow the prior given those.

    Parameters
    ----------
    prior : Prior
    plan : FreePlan
    parameters : FreeParameters
    sites : Sites, optional
        Those that q was made from, if it was.
    factor : (n, w), optional
        U, when the caller has it already.
    """

    pathwise = False
    jitter = 0.0

    def __init__(
        self,
        prior: Prior,
        plan: FreePlan,
        parameters: FreeParameters,
        sites: Sites | None = None,
        factor: Tensor | None = None,
    ):
        self.prior, self.plan, self.parameters, self.sites = prior, plan, parameters, sites
        if factor is not None:
            self.prior_factor = factor

    @cached_property
    def prior_factor(self) -> Tensor:
        """U, (n, w); no gradients flow."""
        with torch.no_grad():
            return prior_factor(self.prior, self.plan.columns)[0]

    @torch.no_grad()
    def with_sites(self, sites: Sites) -> FreePosterior:
        """Return q under other sites (n,), see `DoubleKL.condition`; U is shared."""
        plan, U = self.plan, self.prior_factor
        precision = PosteriorPrecision(plan.columns.pattern, U, sites.precision[plan.order])
        mean = precision.solve(sites.linear[plan.order]).value
        diagonal = plan.pattern.columns.shape[-1] == 1
        V = precision.diagonal.sqrt().unsqueeze(-1) if diagonal else precision.factor
        return FreePosterior(self.prior, plan, FreeParameters.of(mean, V), sites, U)

    def release(self) -> FreePosterior:
        """Return itself: there is nothing to forget."""
        return self

    def confess(self) -> Confession:
        """Say what q is."""
        return Confession(("the bound uses reduced ancestor sets and is no strict bound",))

    @property
    def row_elements(self) -> int:
        """Elements of temporaries per new row."""
        return 4 * max(self.plan.pattern.n, self.plan.n_neighbors_new**2)

    # ---- at the training rows, in the order of the data

    @property
    def mean_at_data(self) -> Tensor:
        """Mean of g = f − μ, (n,)."""
        return self.parameters.mean[self.plan.inverse]

    @cached_property
    def variance_at_data(self) -> Tensor:
        """Variance of g, (n,), in units of f², by exact solves; not differentiable. O(n² m) operations."""
        with torch.no_grad():
            return self._exact().variance[self.plan.inverse]

    def at_data(self) -> tuple[Tensor, Tensor]:
        """Return mean (prior mean included) and variance of f, each (n,)."""
        return self.mean_at_data + self.prior.mean_at(self.plan.X), self.variance_at_data

    def kl(self) -> Tensor:
        """Return KL[q ‖ p̂] in nats, by exact solves; differentiable. O(n² m) operations."""
        return self._exact().kl.sum()

    def _exact(self) -> Terms:
        return divergence_terms(self.prior, self.plan, self.parameters, exact=True)

    # ---- predictions: columns of U for new rows behind those of the data, which say nothing about them

    def mean(self, X: Tensor) -> Tensor:
        """Return the mean of f at X (q, d), (q,)."""
        return torch.cat([self._mean(self._append(rows, joint=False), rows) for rows in self._chunks(X)])

    def marginals(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of f at X (q, d), each (q,), every row given its nearest training rows."""
        means, variances = [], []
        for rows in self._chunks(X):
            new = self._append(rows, joint=False)
            own = new.factor[:, -1].reciprocal()
            means.append(self._mean(new, rows))
            # σ² + bᵀ Σ b, all covariances in it
            variances.append(own.square() + (self._white(new) * own.unsqueeze(-1)).square().sum(-1))
        return torch.cat(means), torch.cat(variances)

    def joint(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean (*t, q) and covariance (*t, q, q) of f at X (*t, q, d), sets of rows each by itself.

        Rows are given the nearest training rows and rows of their set before them.
        """
        return joint_of_sets(self._joint, X, self.row_elements + 2 * self.plan.pattern.n, self.plan.policy)

    def _joint(self, X: Tensor) -> tuple[Tensor, Tensor]:
        new = self._append(X, joint=True)
        root = new.white_noise(X.shape[:-1])
        through = root @ self._white(new).unflatten(-2, X.shape[:-1])
        return self._mean(new, X), root @ root.mT + through @ through.mT

    def sample(self, X: Tensor, n_samples: int, generator: torch.Generator) -> Tensor:
        """Draw f at the rows of X together: (n_samples, q), with the moments of `joint`."""
        n, new = self.plan.pattern.n, self._append(X, joint=True)
        shape = (n_samples, n + len(X))
        noise = torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device).to(X)
        g = self.parameters.mean + solve(self.plan.pattern, self.parameters.factor, noise[:, :n], True)
        return new.spread(new.pull(g) + noise[:, n:]) + self.prior.mean_at(X)

    def _chunks(self, X: Tensor) -> tuple[Tensor, ...]:
        return X.split(self.plan.policy.chunk_rows(self.row_elements))

    def _append(self, X: Tensor, joint: bool) -> Appended:
        columns = self.plan.columns
        return append(self.prior, columns, X, None, self.plan.n_neighbors_new, joint, columns.nugget.value)

    def _mean(self, new: Appended, X: Tensor) -> Tensor:
        return new.spread(new.pull(self.parameters.mean)).unflatten(-1, X.shape[:-1]) + self.prior.mean_at(X)

    def _white(self, new: Appended) -> Tensor:
        """Return V⁻¹ times what each new row takes of the data, (q, n)."""
        kept = new.weights.masked_fill(new.near < 0, 0.0)
        pulls = kept.new_zeros(len(kept), self.plan.pattern.n).scatter_add(-1, new.near.clamp_min(0), kept)
        return solve(self.plan.pattern, self.parameters.factor, pulls)
