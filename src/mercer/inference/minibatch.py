"""Mini-batches: what rows say of the values u at inducing points is a sum, of which a batch is a small part.

Two ways to go through the rows. *Per datum* (`sites_by_batches`): every row keeps its site, a batch of them moves at a
time, and the difference is added to the sum at once, so that the next batch sees it. There is no factor n/|b| and no
noise; the steps keep their size and lead to the fixed point of all rows. *Tied* (`tied_by_batches`): nothing is kept
but the sum, which moves towards n/|b| times what a batch asks for. That is unbiased and noisy, the steps have to
shrink, and it is for rows of which not even two numbers each can be kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mercer._typing import Data, Sites
from mercer.families.inducing_plan import InducingPlan
from mercer.families.moments import moments_of, tied_from_white
from mercer.families.tied import TiedSites, inducing_factor
from mercer.inference.base import latent_shape, zero_sites
from mercer.inference.objective import expected_log_prob
from mercer.inference.riemann import second_order
from mercer.inference.target import check_positivity, clamped, target_sites
from mercer.inference.whitened import Seen, WhitenedSum, Whites, some_rows, whitened

if TYPE_CHECKING:
    from mercer.model import Model

_SETTLED = 1e-2  # nats per row: epochs are for the way there, and steps on all rows for the digits
_MOST_EPOCHS = 10
_REBUILD = 20  # epochs, after which differences that were added have left rounding in the sum
_SHORTENINGS, _SLACK = 8, 1e-8  # of steps, by four each, until a bound falls by no more than so much of itself


@dataclass(frozen=True)
class Epochs:
    """Where epochs of mini-batches led: sites (*b, n), how many epochs, and how many updates were rejected."""

    sites: Sites
    n_epochs: int
    n_rejected: int


@torch.no_grad()
def sites_by_batches(
    model: Model,
    plan: InducingPlan,
    data: Data,
    batch_size: int,
    *,
    step_size: float = 1.0,
    settled: float = _SETTLED,
    most: int = _MOST_EPOCHS,
    seed: int = 0,
) -> Epochs:
    """Move the sites batch by batch, from none, until an epoch gains little.

    A batch b sees all other rows by their present sites, and q changes with it:

        λᵢ ← (1−ρ) λᵢ + ρ λ̂ᵢ,    Σ λ1 w += Σ_b Δλ1ᵢ wᵢ,    B += Σ_b Δλ2ᵢ wᵢ wᵢᵀ.

    Negative curvature is clamped: B ⪰ I then, and no step is improper however far it is from the fixed point, which is
    the bound's own for likelihoods that are log-concave. In the first epoch, when q knows little and Newton's steps can
    lead far beyond the data, ρ is divided by four until the bound of the batch given all other sites does not fall.

    Parameters
    ----------
    model : Model
    plan : InducingPlan
        Without ``rest``.
    data : Data
        n rows; targets of NaN are missing.
    batch_size : int
        |b|; the last batch of an epoch has what is left.
    step_size : float, default=1.0
        ρ, in (0, 1].
    settled : float, default=0.01
        Nats per row by which an epoch has to raise Σ w E_q[log p(y|f)], of each batch as it was met, for another to
        follow.
    most : int, default=10
        Most epochs.
    seed : int, default=0
        Of the order of the rows, the same in all epochs.

    Returns
    -------
    Epochs
        Rows keep their sites where an update is not finite.

    Notes
    -----
    One epoch costs O(n m²) as a step on all rows does, and O(m³) per batch.

    References
    ----------
    Khan and Lin (2017); for memoised sites Hughes and Sudderth (2013), "Memoized online variational inference".
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(data.n_rows, generator=generator).to(data.X.device)
    data = data.rows(order)
    batches = [slice(i, min(i + batch_size, data.n_rows)) for i in range(0, data.n_rows, batch_size)]
    whites = Whites(model, plan, data.X)
    start = zero_sites(model, data)
    linear, precision = start.linear, start.precision
    q = WhitenedSum.of_tied(whites.L, tuple(linear.shape[:-1]), None)
    before, n_epochs = -torch.inf, 0
    rejected = torch.zeros((), dtype=torch.long, device=data.X.device)
    least = settled * max(1.0, float(data.weight.sum()))
    for n_epochs in range(1, most + 1):
        if n_epochs % _REBUILD == 0:
            q = whites.sum(batches, Sites(linear, precision))
        gained = data.X.new_zeros(())
        for rows in batches:
            batch = some_rows(data, rows)
            seen = Seen.of(model, q, batch.X, whites[rows], Sites(linear[..., rows], precision[..., rows]))
            m = seen.mean_at_data
            expected = expected_log_prob(model, batch, m, seen.variance_at_data)
            term = (batch.weight * expected.value).sum()
            gained += term
            target = clamped(target_sites(model, seen, m, expected, batch), m)
            if n_epochs == 1:
                q, moved, proper = _climb(model, seen, batch, term, target, step_size)
            else:
                q, moved, proper = _move(model, seen, target, step_size)
            linear[..., rows] = torch.where(proper.unsqueeze(-1), moved.linear, seen.sites.linear)
            precision[..., rows] = torch.where(proper.unsqueeze(-1), moved.precision, seen.sites.precision)
            rejected += (~proper).sum()
        after = float(gained)
        if not after - before >= least:  # True for NaN
            break
        before = after
    back = order.argsort()
    return Epochs(Sites(linear[..., back], precision[..., back]), n_epochs, int(rejected))


def _move(model: Model, seen: Seen, target: Sites, step_size: float) -> tuple[WhitenedSum, Sites, Tensor]:
    """Return q after a step towards ``target``, the sites of the rows then, and whether that is proper, (*b,)."""
    moved, q = seen.sites.blend(target, step_size), seen.q
    change = (moved.linear - seen.sites.linear, moved.precision - seen.sites.precision)
    pull, weighted = moments_of(seen.W, *change, model.policy)
    after, proper = WhitenedSum.of(q.pull + pull, q.precision + weighted).where_proper(q)
    return after, moved, proper


def _climb(
    model: Model, seen: Seen, batch: Data, term: Tensor, target: Sites, step_size: float
) -> tuple[WhitenedSum, Sites, Tensor]:
    """Return the same for the first of shorter and shorter steps that does not lower the bound of the batch."""
    before = float(seen.bound(term))
    least = before - _SLACK * max(1.0, abs(before)) - model.likelihood.resolution * float(batch.weight.sum())
    for _ in range(_SHORTENINGS + 1):
        q, moved, proper = _move(model, seen, target, step_size)
        there = Seen.of(model, q, batch.X, seen.W, moved)
        value = expected_log_prob(model, batch, there.mean_at_data, there.variance_at_data).value
        if there.bound((batch.weight * value).sum()) >= least:  # False for NaN
            return q, moved, proper
        step_size *= 0.25
    return seen.q, seen.sites, seen.q.pull.new_zeros(seen.q.pull.shape[:-1], dtype=torch.bool)


@dataclass(frozen=True)
class TiedFit:
    """What `tied_by_batches` leaves.

    Parameters
    ----------
    tied : TiedSites
        All rows, as far as they were seen, tied at the inducing points.
    posterior : InducingPosterior
        Of no rows and these sites: it predicts.
    n_steps, n_rejected : int
        Batches, and how many of their updates were rejected; of several latents each counts.
    """

    tied: TiedSites
    posterior: Any
    n_steps: int
    n_rejected: int


@torch.no_grad()
def tied_by_batches(
    model: Model,
    Z: Tensor,
    batches: Iterable[Data],
    n_rows: int,
    *,
    step_size: float = 0.1,
    delay: float = 100.0,
    decay: float = 0.7,
    positivity: str = "riemann",
    start: TiedSites | None = None,
) -> TiedFit:
    """Infer q(u) from random batches of rows, keeping nothing per row: stochastic natural gradients.

        ν ← (1−ρ) ν + ρ n/|b| Σ_b w (α + βm) a,    N ← (1−ρ) N + ρ n/|b| Σ_b w β a aᵀ,    ρ = ρ₀ (1 + t/τ)^−κ.

    Use it where data come from a disk or do not fit; where two numbers per row and latent fit, an engine
    ``Dual(batch_size=...)`` has no noise and nothing to tune.

    Parameters
    ----------
    model : Model
        Its hyperparameters stay.
    Z : (m, d)
        Inducing points, in model units.
    batches : iterable of Data
        Rows drawn at random, with or without replacement; there is one step for each.
    n_rows : int
        n, how many rows they are drawn from.
    step_size, delay, decay : float
        ρ₀ in (0, 1], τ > 0 in batches and κ in [0, 1]. With κ in (½, 1] the noise vanishes in the end; κ = 0 keeps ρ₀,
        and leaves noise in proportion to it.
    positivity : {"riemann", "allow", "clamp"}, default="riemann"
        What to do about negative β: add the term of second order that keeps q proper (`mercer.inference.riemann`);
        take them as they are, and reject a batch after which q would be improper, which may be most of them; or clamp
        them, which moves the fixed point.
    start : TiedSites, optional
        At Z, such as those of a fit to fewer rows; nothing is known by default.

    Returns
    -------
    TiedFit
        Updates after which q is no finite, proper Gaussian are rejected.

    Raises
    ------
    ValueError
        A parameter is out of its range, or there are no batches.

    Notes
    -----
    O(|b| m² + m³) per batch and latent. No bound is evaluated on the way: `tied_bound` says how far it got.

    References
    ----------
    Hensman, Fusi and Lawrence (2013), "Gaussian processes for big data"; Adam, Chang, Khan and Solin (2021).
    """
    if not (0 < step_size <= 1 and delay > 0 and 0 <= decay <= 1):
        raise ValueError(f"step_size, delay and decay must be in (0, 1], > 0 and in [0, 1]: {step_size, delay, decay}.")
    check_positivity(positivity)
    policy, q, n_steps = model.policy, None, 0
    L, _ = inducing_factor(model.prior, Z, policy)
    rejected = torch.zeros((), dtype=torch.long, device=Z.device)
    for n_steps, batch in enumerate(batches, 1):
        if q is None:
            q = WhitenedSum.of_tied(L, latent_shape(model, batch)[:-1], start)
        rho = step_size * (1.0 + (n_steps - 1) / delay) ** -decay
        W = whitened(model, L, Z, batch.X)
        seen = Seen.of(model, q, batch.X, W, zero_sites(model, batch))
        m = seen.mean_at_data
        expected = expected_log_prob(model, batch, m, seen.variance_at_data)
        weight = batch.weight * (n_rows / batch.n_rows)
        target = Sites(weight * (expected.alpha + expected.beta * m), weight * expected.beta)
        if positivity == "clamp":
            target = clamped(target, m)
        pull, products = moments_of(W, target.linear, target.precision, policy)
        change = products + torch.eye(len(Z)).to(W) - q.precision
        pull, precision = torch.lerp(q.pull, pull, rho), q.precision + rho * change
        if positivity == "riemann":
            curved = second_order(q.root, change, rho)
            pull = pull + (curved @ q.mean.unsqueeze(-1)).squeeze(-1)
            precision = precision + curved
        q, proper = WhitenedSum.of(pull, precision).where_proper(q)
        rejected += (~proper).sum()
    if q is None:
        raise ValueError("batches are empty; give at least one.")
    tied = tied_from_white(L, q.pull, q.precision - torch.eye(len(Z)).to(L))
    nothing = q.pull.new_zeros(*q.pull.shape[:-1], 0)
    plan = InducingPlan(Z[:0], Z, policy, rest=tied)
    posterior = model.family.condition(model.prior, plan, Sites(nothing, nothing))
    return TiedFit(tied, posterior, n_steps, int(rejected))


@torch.no_grad()
def tied_bound(model: Model, fit: TiedFit, batches: Iterable[Data]) -> float:
    """Return the evidence lower bound of a fit, Σ w E_q[log p(y|f)] − KL[q(u) ‖ p(u)], in nats.

    Parameters
    ----------
    model : Model
    fit : TiedFit
    batches : iterable of Data
        All rows, each once.
    """
    total = 0.0
    for batch in batches:
        m, v = fit.posterior.marginals(batch.X)
        term = model.likelihood.expected_log_prob(batch.y, m, v, **batch.side).value
        total += float((batch.weight * term).sum())
    state = fit.posterior.state
    m = state.root.shape[-1]
    inverse = torch.linalg.solve_triangular(state.root, torch.eye(m).to(state.root), upper=False)
    logdet = 2.0 * state.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    kl = 0.5 * (logdet + inverse.square().sum((-2, -1)) - m + state.mean.square().sum(-1))
    return total - float(kl.sum())
