"""Mini-batches of rows lead where all rows lead, and users are told how it went."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from inducing_toys import kernels_of_their_own
from minibatch_toys import LIKELIHOODS, PLACES, M, problem
from toys import DTYPE

from mercer import GPClassifier, GPCountRegressor, load
from mercer._typing import Data
from mercer.families import Exact, Inducing, Prior
from mercer.families.inducing_plan import InducingPlan
from mercer.inference import Dual, run
from mercer.inference.minibatch import sites_by_batches, tied_by_batches
from mercer.inference.objective import evidence_lower_bound
from mercer.kernels import Matern52
from mercer.likelihoods import Bernoulli, Poisson, Softmax, StudentT
from mercer.model import Model
from mercer.policy import NumericalPolicy
from mercer.resolve import resolve
from mercer.testing import check_engine


@pytest.mark.parametrize("batch_size", [7, 59, 60, 1000])
@pytest.mark.parametrize("name", ["probit", "poisson", "softmax"])
def test_epochs_lead_to_the_fixed_point_of_all_rows(name, batch_size):
    """Identity 16: also over epochs in which the sum is made anew."""
    model, plan, data = problem(name)
    expected = run(model, plan, data).state
    found = sites_by_batches(model, plan, data, batch_size, settled=-math.inf, most=25)
    assert found.n_epochs == 25 and found.n_rejected == 0
    posterior = expected.posterior.with_sites(found.sites)
    # what all sets of 128 draws agree on is not much; a softmax is known to that
    atol = 1e-2 if name == "softmax" else 1e-6
    for one, other in zip(posterior.at_data(), expected.posterior.at_data(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)
    with torch.no_grad():
        bound = float(evidence_lower_bound(model, posterior, data))
    assert bound == pytest.approx(expected.value, abs=1e-4 if name == "softmax" else 1e-9)


def test_shorter_steps_lead_there_too():
    model, plan, data = problem("poisson")
    expected = run(model, plan, data).state
    found = sites_by_batches(model, plan, data, 7, step_size=0.5, settled=-math.inf, most=50)
    torch.testing.assert_close(found.sites.linear, expected.target.linear, rtol=0, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_one_epoch_is_exact_for_gaussian_noise(batch_size):
    model, plan, data = problem("gaussian")
    found = sites_by_batches(model, plan, data, batch_size, most=1)
    seen = ~data.y.isnan()
    torch.testing.assert_close(found.sites.precision, data.weight * seen / 0.3)
    torch.testing.assert_close(found.sites.linear, (data.weight * (data.y - 0.1) / 0.3).nan_to_num(0.0))


def test_epochs_clamp_negative_curvature():
    """It would make most of the first updates improper; what it is worth is for the steps on all rows."""
    model, plan, data = problem("student_t", n=300)
    found = sites_by_batches(model, plan, data, 30)
    assert found.n_rejected == 0 and float(found.sites.precision.min()) >= 0
    best = run(model, plan, data).state
    with torch.no_grad():
        start = model.engine.init(model, plan, data, found.sites).value
    assert 0 < best.value - start < 1.0 and float(best.sites.precision.min()) < 0


def test_the_order_of_rows_is_seeded_and_nobody_elses():
    model, plan, data = problem("probit")
    before = torch.random.get_rng_state()
    first, again, other = (sites_by_batches(model, plan, data, 7, seed=seed, most=2).sites for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.linear, again.linear) and torch.equal(first.precision, again.precision)
    assert not torch.equal(first.linear, other.linear)


@pytest.mark.parametrize("batch_size", [10, 20])
def test_first_epochs_of_small_batches_do_not_overshoot(batch_size):
    """Newton's steps for the counts of a few rows would, and what exp makes of that takes many epochs to undo."""
    model, plan, data = problem("poisson", n=400, seed=3)
    data = replace(data, y=10.0 * data.y)
    best = run(model, plan, data).state.value
    found = sites_by_batches(model, plan, data, batch_size)
    with torch.no_grad():
        start = model.engine.init(model, plan, data, found.sites).value
    assert found.n_rejected == 0 and best - start < 0.1


class Broken(Bernoulli):
    """Says nothing finite of rows without weight to speak of."""

    def expected_log_prob(self, y, m, v, **side):
        found = super().expected_log_prob(y, m, v)
        return found._replace(alpha=torch.where(side["broken"] > 0, torch.nan, found.alpha))


def test_updates_that_are_not_finite_are_rejected():
    model, plan, data = problem("probit", weighted=False)
    broken = torch.zeros(60, dtype=DTYPE)
    broken[11] = 1.0
    data = replace(data, side={"broken": broken})
    model = replace(model, likelihood=Broken())
    found = sites_by_batches(model, plan, data, 7, most=2)
    assert found.n_rejected == found.n_epochs == 2
    for values in (found.sites.linear, found.sites.precision):
        assert int((values == 0).sum()) == 7 and bool(values.isfinite().all())
    tied = tied_by_batches(model, plan.Z, [data.rows(torch.arange(i, 60, 6)) for i in range(6)], 60)
    assert tied.n_rejected == 1 and bool(tied.tied.precision.isfinite().all())


# ---- the engine that starts from there


@pytest.mark.parametrize("batch_size", [1, 7, 59])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_engine_has_the_same_fixed_point_with_and_without_batches(name, batch_size):
    expected = run(*problem(name))
    found = run(*problem(name, Dual(batch_size=batch_size)))
    assert found.converged and found.n_steps <= expected.n_steps
    atol = 1e-4 if name == "softmax" else 1e-8
    assert found.state.value == pytest.approx(expected.state.value, abs=atol)
    atol = 1e-2 if name == "softmax" else 1e-6
    for one, other in zip(found.state.posterior.at_data(), expected.state.posterior.at_data(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)
    assert found.state.posterior.plan.rest is None


@pytest.mark.parametrize("name", ["poisson", "student_t", "softmax"])
def test_steps_climb_from_there_whatever_the_first_step_size(name):
    model, plan, data = problem(name, Dual(step_size=5.0, batch_size=7))
    slack = 1e-7 + model.likelihood.resolution * data.n_rows
    with torch.no_grad():
        state = model.engine.init(model, plan, data)
        assert state.value > Dual().init(model, plan, data).value
        for _ in range(30):
            before = state.value
            state, _ = model.engine.step(model, plan, state, data)
            assert state.value >= before - slack
    assert state.value == pytest.approx(run(*problem(name)).state.value, abs=1e-4 if name == "softmax" else 1e-8)


@dataclass(frozen=True)
class Placed(Inducing):
    """Inducing points at places of their own, whatever the rows."""

    def plan(self, prior, X, policy):
        return InducingPlan(X, PLACES.to(X), policy)


CONTRACTS = {
    "probit": (Bernoulli(), [0, 1, 1, 0, 1, 1, 0], Dual(batch_size=3), {}),
    "poisson": (Poisson(), [0, 1, 3, 2, 7, 1, 0], Dual(batch_size=2), {"exposure": torch.linspace(0.5, 2, 7).double()}),
    "student_t": (StudentT(scale=0.5), [-1.3, 0.2, 0.9, 4.5, -0.4, 0.3, 1.1], Dual(batch_size=3), {}),
    "softmax": (Softmax(3), [0, 1, 2, 2, 1, 0, 1], Dual(batch_size=3), {"rtol": 1e-3}),
    "riemann": (StudentT(scale=0.5), [-1.3, 0.2, 0.9, 4.5, -0.4, 0.3, 1.1], Dual(positivity="riemann"), {}),
}


@pytest.mark.parametrize("name", CONTRACTS)
def test_the_engine_keeps_its_contract(name):
    likelihood, y, engine, options = CONTRACTS[name]
    check_engine(engine, likelihood, torch.tensor(y, dtype=DTYPE), family=Placed(M), **options)


def test_two_outputs_are_two_fits():
    model, plan, data = problem("student_t", Dual(batch_size=7))
    both = replace(data, y=torch.stack([data.y, data.y.flip(0)]))
    found = run(model, plan, both)
    parts = [run(model, plan, replace(data, y=y)).state.value for y in both.y]
    assert found.converged and found.state.value == pytest.approx(sum(parts), rel=1e-9)


def test_latents_may_have_kernels_of_their_own():
    rng = np.random.default_rng(3)
    X = torch.as_tensor(rng.uniform(0, 2, (40, 2)))
    y = torch.as_tensor(rng.poisson(np.exp(np.sin(3 * X.numpy().T))), dtype=DTYPE)
    data, policy = Data(X, y, torch.ones(40, dtype=DTYPE)), NumericalPolicy(tol=1e-13)
    model = Model(Prior(kernels_of_their_own()), Poisson(), Inducing(5), Dual(), policy)
    plan = InducingPlan(X, X[:5].clone(), policy)
    expected = run(model, plan, data).state.value
    found = sites_by_batches(model, plan, data, 9, settled=-math.inf, most=40).sites
    with torch.no_grad():
        start = model.engine.init(model, plan, data, found)
    assert start.value == pytest.approx(expected, abs=1e-9)


def test_batches_that_lead_astray_are_given_up():
    """At zero latents the Newton target of a count of thousands lies at e^thousands."""
    model, plan, data = problem("poisson", Dual(batch_size=7), weighted=False)
    y = data.y.clone()
    y[::7] = 40000.0
    data = replace(data, y=y)
    found = sites_by_batches(model, plan, data, 7).sites
    with torch.no_grad():
        assert Dual().init(model, plan, data, found).value < Dual().init(model, plan, data).value
        start = model.engine.init(model, plan, data)
    assert not start.sites.linear.any()
    assert run(model, plan, data).converged


def test_a_prior_that_is_not_finite_is_an_error():
    model, plan, data = problem("probit", Dual(batch_size=7))
    model.prior.kernel.base_kernel.raw_lengthscale.data.fill_(torch.nan)
    with pytest.raises(ArithmeticError):
        run(model, plan, data)


def test_single_precision_starts_from_batches_too():
    model, plan, data = problem("probit", Dual(batch_size=7), dtype=torch.float32, tol=1e-6)
    data = Data(data.X.float(), data.y.float(), data.weight.float())
    model.prior.kernel.float()
    model.prior.mean.float()
    plan = InducingPlan(data.X, PLACES.float(), model.policy)
    found = run(model, plan, data)
    assert found.converged and found.state.value == pytest.approx(run(*problem("probit")).state.value, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["probit", "poisson", "student_t"])
def test_a_few_epochs_are_within_a_nat_of_many_rows(name):
    model, plan, data = problem(name, Dual(batch_size=500), n=10_000)
    best = run(model, plan, data)
    with torch.no_grad():
        start = model.engine.init(model, plan, data)
    assert best.converged and best.state.value - start.value < 1.0


# ---- what users can ask for, and what they are told


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (Dual(batch_size=100), r"Dual\(batch_size=100\) .* not family='exact'; use family='inducing', or .*None"),
        (Dual(positivity="riemann"), r"Dual\(positivity='riemann'\) .* use family='inducing', or .*'allow'"),
    ],
)
def test_families_without_inducing_points_are_refused(engine, message):
    prior, policy = Prior(Matern52()), NumericalPolicy()
    with pytest.raises(ValueError, match=message):
        resolve(prior, StudentT(), Exact(), engine, 300, policy, 1)
    assert resolve(prior, StudentT(), Inducing(5), engine, 300, policy, 1)[0].engine is engine
    assert resolve(prior, StudentT(), Exact(), Dual(positivity="clamp"), 300, policy, 1)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": 2.5}, {"positivity": "hope"}])
def test_odd_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Dual(**options)


def classes(n=200):
    rng = np.random.default_rng(5)
    X = rng.uniform(0, 4, (n, 1))
    return X, (np.sin(2 * X[:, 0]) + 0.4 * rng.normal(size=n) > 0).astype(int)


@pytest.mark.filterwarnings("ignore:.*carry only")
def test_estimators_take_batches_and_files_keep_them(tmp_path):
    X, y = classes()
    fits = [
        GPClassifier(Matern52(1.0), family=Inducing(8), engine=engine, optimizer=None).fit(X, y)
        for engine in (Dual(), Dual(batch_size=30))
    ]
    np.testing.assert_allclose(fits[1].predict_proba(X), fits[0].predict_proba(X), atol=1e-7)
    fits[1].save(tmp_path / "fit")
    assert load(tmp_path / "fit").get_params()["engine"] == Dual(batch_size=30)


def test_halvings_reach_the_report_in_words():
    rng = np.random.default_rng(0)
    X, y = rng.uniform(0, 3, (40, 1)), rng.poisson(3, 40)
    y[3], y[20] = 40000, 9000
    report = GPCountRegressor(Matern52(0.3), optimizer=None, engine=Dual(step_size=5.0, memory=0)).fit(X, y).fit_report_
    assert any(note.startswith("steps of the sites were halved") for note in report.notes)
    assert "steps of the sites were halved" in str(report)


@dataclass(frozen=True)
class Restless(Dual):
    """An engine that never has enough."""

    def step(self, model, plan, state, data):
        state, info = super().step(model, plan, state, data)
        return state, {**info, "converged": False}


def test_sites_that_do_not_converge_reach_the_report_in_words():
    X, y = classes(20)
    with pytest.warns(UserWarning, match="the sites did not converge"):
        fit = GPClassifier(Matern52(1.0), engine=Restless(), optimizer=None).fit(X, y)
    assert any(
        note.startswith("the sites did not converge after 200 step(s), where one") for note in fit.fit_report_.notes
    )
    assert not fit.converged_
