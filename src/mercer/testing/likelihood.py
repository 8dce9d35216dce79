"""Conformance suite for likelihoods: what inference and prediction rely on, asserted for any object.

The references here are brute force (a fine trapezoidal rule in the whitened latent, sums over a support), so
they share nothing with the rules under test except ``log_prob``.
"""

from __future__ import annotations

import copy
import pickle

import torch
from torch import Tensor

from mercer.likelihoods.base import Likelihood
from mercer.likelihoods.quadrature import elementwise_derivatives

TRAPEZOID = 1201
LARGEST_COUNT = 4000
SAMPLES = 20_000


def check_likelihood(likelihood: Likelihood, y: Tensor, rtol: float = 1e-6, **side: Tensor) -> None:
    """Assert that a likelihood keeps its contract.

    Parameters
    ----------
    likelihood : Likelihood
        Object under test; it is not changed.
    y : (n,), in units of y
        Observed targets (no NaN) on which to test, n ≥ 2.
    rtol : float, default=1e-6
        Relative tolerance of expectations against brute force; sampling rules (softmax) are compared with
        themselves instead.
    **side : (n,)
        Side information for the rows of y.

    Raises
    ------
    AssertionError
        Says which property failed.

    Notes
    -----
    Checked: α and β against autograd of brute-force expectations; positivity of β if log-concave, for v from
    1e-12 to 1e3; gradients of ``value`` in m, v and parameters; derivatives 1–3; normalisation; predictive
    moments; missing targets; batch dimensions; float32; copies; sampling.
    """
    likelihood = copy.deepcopy(likelihood)
    y = y.to(torch.float64)
    assert y.dim() == 1 and len(y) >= 2 and not torch.isnan(y).any(), "y must be (n,), n ≥ 2, without NaN"
    likelihood.validate(y, **side)
    m, v = _marginals(likelihood, len(y))
    if likelihood.n_latents == 1:
        _check_expectations(likelihood, y, m, v, rtol, side)
        _check_derivatives(likelihood, y, m, side)
    _check_value_gradients(likelihood, y, m, v, side)
    _check_positive_precision(likelihood, y, m, v, side)
    _check_normalisation(likelihood, m, v, side)
    _check_missing(likelihood, y, m, v, side)
    _check_batches(likelihood, y, m, v, side)
    _check_float32(likelihood, y, m, v, side)
    _check_copies(likelihood, y, m, v, side)
    _check_samples(likelihood, m, side)


def _marginals(likelihood: Likelihood, n: int) -> tuple[Tensor, Tensor]:
    shape = (n,) if likelihood.n_latents == 1 else (likelihood.n_latents, n)
    generator = torch.Generator().manual_seed(0)
    m = torch.randn(shape, generator=generator, dtype=torch.float64)
    v = 0.02 + 0.4 * torch.rand(shape, generator=generator, dtype=torch.float64)
    return m, v


def _close(actual: Tensor, expected: Tensor, rtol: float, what: str, atol: float | None = None) -> None:
    torch.testing.assert_close(
        actual, expected, rtol=rtol, atol=rtol if atol is None else atol, msg=lambda text: f"{what}: {text}"
    )


def _fine_rule(m: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return latents (n, q) and log weights of a trapezoidal rule for N(m, v)."""
    u = torch.linspace(-12, 12, TRAPEZOID, dtype=m.dtype)
    log_weight = torch.log_softmax(-0.5 * u.square(), 0)
    return m.unsqueeze(-1) + v.sqrt().unsqueeze(-1) * u, log_weight


def _fine_log_prob(likelihood: Likelihood, y: Tensor, f: Tensor, side: dict[str, Tensor]) -> Tensor:
    """Return log p(y | f) on (n, q); rows stay on the last axis for the likelihood."""
    return likelihood.log_prob(y, f.transpose(-1, -2), **side).transpose(-1, -2)


def _check_expectations(
    likelihood: Likelihood, y: Tensor, m: Tensor, v: Tensor, rtol: float, side: dict[str, Tensor]
) -> None:
    m, v = m.clone().requires_grad_(), v.clone().requires_grad_()
    f, log_weight = _fine_rule(m, v)
    log_prob = _fine_log_prob(likelihood, y, f, side)
    brute = (log_prob * log_weight.exp()).sum(-1)
    slope_m, slope_v = torch.autograd.grad(brute.sum(), (m, v), retain_graph=True)
    found = likelihood.expected_log_prob(y, m, v, **side)
    _close(found.value, brute, rtol, "expected_log_prob.value against brute force")
    _close(found.alpha, slope_m, rtol, "α = ∂ℓ/∂m against brute force")
    _close(found.beta, -2 * slope_v, rtol, "β = −2 ∂ℓ/∂v against brute force")
    density = likelihood.log_predictive_density(y, m, v, **side)
    brute = torch.logsumexp(log_prob + log_weight, -1)
    _close(density, brute, rtol, "log_predictive_density against brute force")
    expected = torch.autograd.grad(brute.sum(), (m, v))
    actual = torch.autograd.grad(density.sum(), (m, v))
    for name, one, other in zip("mv", actual, expected, strict=True):
        _close(one, other, rtol, f"∂ log_predictive_density / ∂{name}")


def _check_derivatives(likelihood: Likelihood, y: Tensor, f: Tensor, side: dict[str, Tensor]) -> None:
    expected = elementwise_derivatives(lambda g: likelihood.log_prob(y, g, **side), f, 3)
    actual = likelihood.log_prob_derivatives(y, f, **side)
    for name, one, other in zip(actual._fields, actual, expected, strict=True):
        _close(one, other, 1e-7, f"log_prob_derivatives.{name} against autograd")


def _check_value_gradients(likelihood: Likelihood, y: Tensor, m: Tensor, v: Tensor, side: dict[str, Tensor]) -> None:
    """∂value = (α, −½β) on the same nodes, also at v = 0; the parameters agree with finite differences."""
    for variance in (v, torch.zeros_like(v)):
        a, b = m.clone().requires_grad_(), variance.clone().requires_grad_()
        found = likelihood.expected_log_prob(y, a, b, **side)
        slope_m, slope_v = torch.autograd.grad(found.value.sum(), (a, b))
        _close(slope_m, found.alpha, 1e-12, "∂value/∂m = α")
        _close(slope_v, -0.5 * found.beta, 1e-12, "∂value/∂v = −½β")
        assert not (found.alpha.requires_grad or found.beta.requires_grad), "α and β must carry no graph"
    for item in likelihood.hyperparameters():
        value = likelihood.expected_log_prob(y, m, v, **side).value.sum()
        if not value.requires_grad:
            continue  # side information replaces the parameter
        (slope,) = torch.autograd.grad(value, item.parameter, materialize_grads=True)
        start, step = item.parameter.detach().clone(), 1e-5
        direction = torch.ones_like(start)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                item.parameter.copy_(start + sign * step * direction)
                ends.append(likelihood.expected_log_prob(y, m, v, **side).value.sum())
                item.parameter.copy_(start)
        _close((slope * direction).sum(), (ends[0] - ends[1]) / (2 * step), 1e-6, f"∂value/∂{item.name}")


def _check_positive_precision(likelihood: Likelihood, y: Tensor, m: Tensor, v: Tensor, side: dict[str, Tensor]) -> None:
    for power in range(-12, 4):
        found = likelihood.expected_log_prob(y, m, torch.full_like(v, 10.0**power), **side)
        assert all(torch.isfinite(item).all() for item in found), f"non-finite expectation at v = 1e{power}"
        if likelihood.log_concave:
            assert (found.beta > 0).all(), f"β ≤ 0 at v = 1e{power} for a log-concave likelihood"


def _support(likelihood: Likelihood, m: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return every value of y (or a fine grid) and its log measure; None when the support is not known."""
    if likelihood.support == "real":
        t = torch.linspace(-16, 16, 2401, dtype=m.dtype)
        return t.sinh(), (t[1] - t[0]).log() + t.cosh().log()
    n_classes = getattr(likelihood, "n_classes", LARGEST_COUNT)
    if likelihood.support in ("count", "classes"):
        grid = torch.arange(n_classes, dtype=m.dtype)
        return grid, torch.zeros_like(grid)
    return None


def _check_normalisation(likelihood: Likelihood, m: Tensor, v: Tensor, side: dict[str, Tensor]) -> None:
    support = _support(likelihood, m)
    if support is None:
        return
    grid, log_measure = support
    # Small latents and one short row keep the tails of counts inside the grid.
    m, v = 0.5 * m[..., :2], 0.3 * v[..., :2]
    side = {name: value[:2] for name, value in side.items()}
    found = likelihood.predictive(m, v, **side)
    y = grid.unsqueeze(-1).expand(len(grid), 2)
    mass = torch.exp(likelihood.log_predictive_density(y, m, v, **side) + log_measure.unsqueeze(-1))
    _close(mass.sum(0), torch.ones(2, dtype=m.dtype), 1e-6, "the predictive distribution sums to one")
    _close(found.mean, (mass * y).sum(0), 1e-5, "predictive mean")
    finite = torch.isfinite(found.variance)
    variance = (mass * (y - found.mean).square()).sum(0)
    _close(found.variance[finite], variance[finite], 1e-4, "predictive variance")
    if found.probs is not None:
        one = torch.ones_like(found.mean)
        _close(found.probs.sum(-1), one, 1e-12, "probs sum to one")
        _close(found.probs, mass.transpose(0, 1), 1e-6, "probs against log_predictive_density")


def _check_missing(likelihood: Likelihood, y: Tensor, m: Tensor, v: Tensor, side: dict[str, Tensor]) -> None:
    holes = y.clone()
    holes[0] = torch.nan
    m, v = m.clone().requires_grad_(), v.clone().requires_grad_()
    found = likelihood.expected_log_prob(holes, m, v, **side)
    whole = likelihood.expected_log_prob(y, m, v, **side)
    for name, one, other in zip(found._fields, found, whole, strict=True):
        assert (one[..., 0] == 0).all(), f"{name} must be 0 where y is NaN"
        _close(one[..., 1:], other[..., 1:], 1e-12, f"{name} beside a missing target")
    slots = [m, v, *(item.parameter for item in likelihood.hyperparameters())]
    for slope in torch.autograd.grad(found.value.sum(), slots, materialize_grads=True):
        assert torch.isfinite(slope).all(), "a missing target must not spoil gradients"
    for method in (
        likelihood.log_prob(holes, m, **side),
        likelihood.log_predictive_density(holes, m, v, **side),
    ):
        assert method[..., 0] == 0 and torch.isfinite(method).all(), "log densities are 0 where y is NaN"


def _check_batches(likelihood: Likelihood, y: Tensor, m: Tensor, v: Tensor, side: dict[str, Tensor]) -> None:
    shift = torch.tensor([0.0, 0.3, -0.2], dtype=m.dtype).view(3, *([1] * m.dim()))
    batch = likelihood.expected_log_prob(y, m + shift, v.expand_as(m + shift), **side)
    densities = likelihood.log_predictive_density(y, m + shift, v.expand_as(m + shift), **side)
    means = likelihood.predictive(m + shift, v.expand_as(m + shift), **side).mean
    for k in range(3):
        single = likelihood.expected_log_prob(y, m + shift[k], v, **side)
        for name, one, other in zip(batch._fields, batch, single, strict=True):
            _close(one[k], other, 1e-12, f"{name} of batch element {k}")
        density = likelihood.log_predictive_density(y, m + shift[k], v, **side)
        _close(densities[k], density, 1e-12, f"log_predictive_density of batch element {k}")
        _close(means[k], likelihood.predictive(m + shift[k], v, **side).mean, 1e-12, f"mean of element {k}")


def _check_float32(likelihood: Likelihood, y: Tensor, m: Tensor, v: Tensor, side: dict[str, Tensor]) -> None:
    double = likelihood.expected_log_prob(y, m, v, **side)
    single = likelihood.expected_log_prob(y.float(), m.float(), v.float(), **side)
    for name, one, other in zip(single._fields, single, double, strict=True):
        assert one.dtype == torch.float32, f"{name} must keep the dtype of m"
        _close(one.double(), other, 2e-4, f"{name} in float32")
    density = likelihood.log_predictive_density(y.float(), m.float(), v.float(), **side)
    assert density.dtype == torch.float32, "log_predictive_density must keep the dtype of m"
    expected = likelihood.log_predictive_density(y, m, v, **side)
    _close(density.double(), expected, 2e-4, "log_predictive_density in float32")
    if likelihood.log_concave:
        for power in range(-12, 4):
            found = likelihood.expected_log_prob(y.float(), m.float(), (0 * v + 10.0**power).float(), **side)
            assert (found.beta > 0).all(), f"β ≤ 0 in float32 at v = 1e{power}"


def _check_copies(likelihood: Likelihood, y: Tensor, m: Tensor, v: Tensor, side: dict[str, Tensor]) -> None:
    expected = likelihood.expected_log_prob(y, m, v, **side).value
    loaded = copy.deepcopy(likelihood)
    loaded.load_state_dict(likelihood.state_dict())
    for twin in (copy.deepcopy(likelihood), pickle.loads(pickle.dumps(likelihood)), loaded):
        assert torch.equal(twin.expected_log_prob(y, m, v, **side).value, expected), "copies must agree"
        names = [item.name for item in likelihood.hyperparameters()]
        assert [item.name for item in twin.hyperparameters()] == names, "copies must keep hyperparameters"
    for item in likelihood.hyperparameters():
        assert item.parameter.dtype == torch.float64, f"{item.name} must be stored in float64"
        theta = item.to_theta(item.parameter)
        _close(item.to_storage(theta), item.parameter, 1e-9, f"θ of {item.name} round trip")
        assert (theta >= item.lower).all() and (theta <= item.upper).all(), f"{item.name} out of bounds"


def _check_samples(likelihood: Likelihood, m: Tensor, side: dict[str, Tensor]) -> None:
    """Sample frequencies of two bounded statistics lie within five standard errors of their probability."""
    f = 0.5 * m
    many = f.expand(SAMPLES, *f.shape)
    y = likelihood.sample(many, torch.Generator().manual_seed(1), **side)
    assert torch.equal(y, likelihood.sample(many, torch.Generator().manual_seed(1), **side)), "seeded draws differ"
    assert y.dtype == f.dtype and y.shape == (SAMPLES, f.shape[-1]), "samples keep dtype and row shape"
    support = _support(likelihood, m)
    if support is None:
        return
    grid, log_measure = support
    rows = grid.unsqueeze(-1).expand(len(grid), f.shape[-1])
    mass = torch.exp(likelihood.log_prob(rows, f, **side) + log_measure.unsqueeze(-1)).detach()
    for name, statistic in (("tanh", torch.tanh), ("square", lambda x: 1 / (1 + x.square()))):
        expected = (mass * statistic(rows)).sum(0)
        error = statistic(y).std(0) / SAMPLES**0.5
        gap = (statistic(y).mean(0) - expected).abs()
        assert (gap <= 5 * error + 1e-6).all(), f"sample mean of {name}(y) is off by {(gap / error).max():.1f} s.e."
