"""``check_engine``: what the fit loop relies on in an engine, as plain assertions for one's own tests.

Nothing here knows what the engine approximates: it is compared with itself, at other starts, weights, orders and
hyperparameters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mercer._typing import Data, Sites
from mercer.families.base import Prior
from mercer.families.exact import Exact
from mercer.inference.base import Inference, run
from mercer.inference.evidence import Evidence
from mercer.kernels import Matern52
from mercer.kernels.means import constant_mean
from mercer.likelihoods.base import Likelihood
from mercer.model import Model
from mercer.policy import NumericalPolicy
from mercer.testing._twin import draw
from mercer.testing.kernel import _close

TOL = 1e-13  # inner tolerance: what is left of the fixed point must not show in differences
STEP = 2e-3
VANISHING = 1e-9


def check_engine(
    engine: Any,
    likelihood: Likelihood,
    y: Tensor,
    *,
    family: Any = None,
    rtol: float = 1e-6,
    **side: Tensor,
) -> None:
    """Assert that an engine finds a fixed point that is a function of the data and the hyperparameters alone.

    Parameters
    ----------
    engine : Engine
    likelihood : Likelihood
        In float64, left as it was.
    y : (n,), in units of y
        Observed targets (no NaN), n ≥ 6.
    family : Family, optional
        ``Exact()`` by default.
    rtol : float, default=1e-6
        Agreement of evidences, gradients and posterior moments, relative to their size. A likelihood that averages
        over draws (softmax) finds its fixed point to about 1e-4 only.
    **side : (n,)
        Side information for the rows of y.

    Raises
    ------
    AssertionError
        Naming the property that fails.

    Notes
    -----
    Checked: convergence, from no sites, from other sites and from those of other hyperparameters; the bound never
    falls (where ``evidence`` is "lower bound"); the fixed point stays; the objective's gradient is that of the
    re-converged objective; weight 2 is the row twice, a vanishing weight and a missing target are the row absent;
    the order of rows does not matter; outputs are independent.

    Examples
    --------
    >>> from mercer.inference import Conjugate
    >>> from mercer.likelihoods import Gaussian
    >>> check_engine(Conjugate(), Gaussian(0.3), torch.linspace(-1, 1, 8, dtype=torch.float64).sin())
    """
    assert engine.evidence in ("exact", "lower bound", "approximation"), f"unknown evidence {engine.evidence!r}"
    trial = _trial(engine, likelihood, y.to(torch.float64), family, side)
    vector = Evidence(trial.model, None, trial.data).vector
    start = vector.read()
    try:
        _check_monotone(trial)
        _check_fixed_point(trial, rtol)
        _check_starts(trial, rtol)
        _check_rows(trial, rtol)
        _check_outputs(trial, rtol)
        _check_gradient(trial, rtol)
    finally:
        vector.write(start)


@dataclass(frozen=True)
class _Trial:
    """A model and data on which it is tried."""

    model: Model
    data: Data

    def run(self, data: Data | None = None, sites: Sites | None = None) -> tuple[Inference, float]:
        """Return the converged inference and its evidence, on other data if given."""
        data = self.data if data is None else data
        plan = self.model.family.plan(self.model.prior, data.X, self.model.policy)
        inference = run(self.model, plan, data, sites)
        with torch.no_grad():
            value = self.model.engine.objective(self.model, plan, inference.state, data)
        return inference, float(value)


def _trial(engine: Any, likelihood: Likelihood, y: Tensor, family: Any, side: dict[str, Tensor]) -> _Trial:
    n = len(y)
    assert y.dim() == 1 and n >= 6 and not torch.isnan(y).any(), "y must be (n,), n ≥ 6, without NaN"
    X = torch.linspace(0.0, 3.0, n, dtype=torch.float64).unsqueeze(-1) + 0.1 * draw(n, 1, seed=3)
    prior = Prior(Matern52(0.8, outputscale=1.2), constant_mean(0.2))
    policy = NumericalPolicy(tol=TOL, max_inner=1000)
    model = Model(prior, likelihood, Exact() if family is None else family, engine, policy)
    return _Trial(model, Data(X, y, torch.ones(n, dtype=torch.float64), side))


def _check_monotone(trial: _Trial) -> None:
    """From no sites, every accepted step of a bound climbs, and the steps end."""
    model, data = trial.model, trial.data
    plan = model.family.plan(model.prior, data.X, model.policy)
    with torch.no_grad():
        state = model.engine.init(model, plan, data)
        for _ in range(model.policy.max_inner):
            before = state.value
            state, info = model.engine.step(model, plan, state, data)
            if model.engine.evidence == "lower bound":
                slack = 1e-9 * max(1.0, abs(before)) + model.likelihood.resolution * data.n_rows
                assert state.value >= before - slack, f"a step lowers the bound by {before - state.value:.2g}"
            if info["converged"]:
                return
            assert not info.get("stalled", False), "the engine stalls before it converges"
    raise AssertionError(f"no convergence in {model.policy.max_inner} steps")


def _check_fixed_point(trial: _Trial, rtol: float) -> None:
    first, value = trial.run()
    second, again = trial.run(sites=first.state.sites)
    assert second.converged and second.n_steps <= 2, f"a converged start takes {second.n_steps} steps"
    _same(second, again, first, value, rtol, "the fixed point does not stay")


def _check_starts(trial: _Trial, rtol: float) -> None:
    """Other starting sites, and those of other hyperparameters, lead to the same fixed point."""
    cold, value = trial.run()
    shape = cold.state.sites.linear.shape
    other = Sites(draw(*shape, seed=8), draw(*shape, seed=9).square() + 0.1)
    vector = Evidence(trial.model, None, trial.data).vector
    theta = vector.read()
    vector.write(theta + 0.3)
    elsewhere = trial.run()[0].state.sites
    vector.write(theta)
    for name, sites in (("arbitrary sites", other), ("the sites of other hyperparameters", elsewhere)):
        warm, again = trial.run(sites=sites)
        assert warm.converged, f"no convergence from {name}"
        _same(warm, again, cold, value, rtol, f"{name} lead to another fixed point")


def _check_rows(trial: _Trial, rtol: float) -> None:
    """Weights have replication semantics, missing targets say nothing, order does not matter."""
    data, n = trial.data, trial.data.n_rows
    rows = torch.arange(n)

    def compare(data: Data, reference: Data, message: str) -> None:
        _same(*trial.run(data), *trial.run(reference), rtol, message)

    weight = data.weight.clone()
    weight[1] = 2.0
    compare(replace(data, weight=weight), data.rows(torch.cat([rows, rows[1:2]])), "weight 2 is not the row twice")
    weight[1] = VANISHING
    absent = data.rows(torch.cat([rows[:1], rows[2:]]))
    compare(replace(data, weight=weight), absent, "a vanishing weight is not the row absent")
    y = data.y.clone()
    y[1] = torch.nan
    compare(replace(data, y=y), absent, "a missing target is not the row absent")
    compare(data.rows(rows.flip(0).roll(2)), data, "the result depends on the order of the rows")


def _check_outputs(trial: _Trial, rtol: float) -> None:
    """Two outputs with the same prior are two separate problems."""
    if trial.model.likelihood.n_latents > 1:
        return
    data = trial.data
    other = replace(data, y=data.y.flip(0))
    both, value = trial.run(replace(data, y=torch.stack([data.y, other.y])))
    parts = [trial.run(data), trial.run(other)]
    assert both.converged, "no convergence with two outputs"
    total = sum(part for _, part in parts)
    _near(value, total, rtol, "the evidence of two outputs is not the sum of theirs")
    for i, (inference, _) in enumerate(parts):
        m, v = _moments(both)
        for found, expected in zip((m[i], v[i]), _moments(inference), strict=True):
            _near(found, expected, rtol, f"output {i} differs from the same output alone")


def _check_gradient(trial: _Trial, rtol: float) -> None:
    """The gradient in every hyperparameter against a five-point difference of the re-converged objective."""
    weight = 1.0 + 0.5 * (torch.arange(trial.data.n_rows, dtype=torch.float64) % 3)
    trial = replace(trial, data=replace(trial.data, weight=weight))
    plan = trial.model.family.plan(trial.model.prior, trial.data.X, trial.model.policy)
    evidence = Evidence(trial.model, plan, trial.data, with_priors=False)
    theta = evidence.vector.read()
    value, gradient = evidence(theta)
    _near(value, trial.run()[1], rtol, "the objective differs when gradients are recorded")
    for i, name in enumerate(evidence.vector.names):
        values = {}
        for k in (-2, -1, 1, 2):
            moved = theta.copy()
            moved[i] += k * STEP
            values[k] = evidence(moved, gradient=False)[0]
        slope = (8.0 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12.0 * STEP)
        _near(gradient[i], slope, rtol, f"the gradient in {name} is not that of the re-converged objective")


def _moments(inference: Inference) -> tuple[Tensor, Tensor]:
    """Return mean and variance of the latents at the test rows."""
    posterior = inference.state.posterior
    X_new = torch.tensor([[-0.3], [0.4], [1.5], [3.6]], dtype=torch.float64)
    with torch.no_grad():
        m, v = posterior.marginals(X_new)
    return m, v


def _same(one: Inference, value: float, other: Inference, reference: float, rtol: float, message: str) -> None:
    _near(value, reference, rtol, f"{message}: evidence")
    for name, found, expected in zip(("mean", "variance"), _moments(one), _moments(other), strict=True):
        _near(found, expected, rtol, f"{message}: latent {name}")


def _near(value: Any, reference: Any, rtol: float, message: str) -> None:
    """Assert closeness relative to the largest entry of ``reference``, or to 1 where all are smaller."""
    found, expected = torch.as_tensor(value).detach().double(), torch.as_tensor(reference).detach().double()
    _close(found, expected, max(1.0, expected.abs().max().item()), rtol, message)
