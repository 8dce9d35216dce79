"""Fisher's information of Vecchia's likelihood against the dense formula, and learning with its help."""

import numpy as np
import pytest
import torch
from test_hyper import NATS, evidence_of, fit, wave
from toys import DTYPE

from mercer._typing import Data
from mercer.families import Exact, Prior, SparseInverseCholesky
from mercer.inference import Conjugate
from mercer.inference.evidence import Evidence
from mercer.inference.fisher import fisher_information
from mercer.inference.theta import ThetaVector
from mercer.kernels import Matern52, gram
from mercer.kernels.means import constant_mean
from mercer.likelihoods import Gaussian
from mercer.model import Model
from mercer.policy import NumericalPolicy

POLICY = NumericalPolicy()


def model_of(family, kernel=None, mean=None, noise=0.1):
    kernel = Matern52([0.8, 1.5], outputscale=1.3) if kernel is None else kernel
    return Model(Prior(kernel, mean), Gaussian(noise), family, Conjugate(), POLICY)


def information(model, data, rows=None):
    plan = model.family.plan_some(model.prior, data.X, POLICY, rows)
    return fisher_information(model, plan, data)


@torch.no_grad()
def dense_information(model, data):
    """½ tr(Σ⁻¹ ∂Σ Σ⁻¹ ∂Σ) + ∂μᵀ Σ⁻¹ ∂μ, derivatives by the five-point rule on the dense matrices."""
    vector, theta, h = ThetaVector(model), ThetaVector(model).read(), 1e-3

    def at(point):
        vector.write(point)
        noise = model.likelihood.value_of("noise_variance", data.y) / data.weight
        return gram(model.prior.kernel, data.X) + noise.diag(), model.prior.mean_at(data.X).clone()

    slopes = []
    for step in h * np.eye(len(theta)):
        there = [at(theta + k * step) for k in (1, -1, 2, -2)]
        slopes.append([(8 * (a - b) - (c - d)) / (12 * h) for a, b, c, d in zip(*there, strict=True)])
    S, _ = at(theta)
    turned = [torch.linalg.solve(S, dS) for dS, _ in slopes]
    inverse = torch.linalg.inv(S)
    return np.array(
        [
            [float(0.5 * (A * B.mT).sum() + p @ inverse @ q) for B, (_, q) in zip(turned, slopes, strict=True)]
            for A, (_, p) in zip(turned, slopes, strict=True)
        ]
    )


@pytest.mark.parametrize("mean", [None, 0.4])
def test_all_earlier_rows_give_the_dense_information(mean):
    data = wave(60)
    data = Data(data.X, data.y, torch.where(torch.arange(60) % 3 == 0, 2.0, 1.0).to(DTYPE))
    model = model_of(SparseInverseCholesky(n_neighbors=59), mean=None if mean is None else constant_mean(mean))
    expected = dense_information(model, data)
    np.testing.assert_allclose(information(model, data), expected, rtol=1e-8, atol=1e-8 * expected.max())


def test_few_neighbours_come_close():
    data = wave(60)
    exact = dense_information(model_of(None), data)
    found = information(model_of(SparseInverseCholesky(n_neighbors=15)), data)
    size = np.sqrt(np.diag(exact))
    error = np.abs(found - exact) / np.outer(size, size)
    assert 1e-6 < error.max() < 0.05


def test_columns_of_disjoint_rows_add_up_and_outputs_count_each():
    data = wave(60)
    model = model_of(SparseInverseCholesky(n_neighbors=8))
    whole = information(model, data)
    parts = [information(model, data, rows) * len(rows) / 60 for rows in torch.randperm(60).split(25)]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-9)
    three = Data(data.X, data.y.expand(3, -1).clone(), data.weight)
    np.testing.assert_allclose(information(model, three), 3 * whole, rtol=1e-9)


def test_a_missing_target_tells_nothing():
    data = wave(60)
    family = SparseInverseCholesky(n_neighbors=59)
    holes = Data(data.X, data.y.masked_fill(torch.arange(60) < 7, torch.nan), data.weight)
    kept = data.rows(torch.arange(7, 60))
    expected = dense_information(model_of(None), kept)
    np.testing.assert_allclose(information(model_of(family), holes), expected, rtol=1e-6, atol=1e-6 * expected.max())


def test_theta_is_left_where_it_was():
    data, model = wave(60), model_of(SparseInverseCholesky(n_neighbors=8))
    before = ThetaVector(model).read()
    information(model, data)
    np.testing.assert_array_equal(ThetaVector(model).read(), before)


# ---- learning in stages of columns


@pytest.mark.parametrize("form", ["response", "latent"])
def test_learning_finds_the_optimum_of_the_exact_evidence_with_all_neighbours(form):
    data = wave(50)
    family = SparseInverseCholesky(n_neighbors=49, form=form)
    learned, exact = fit(model_of(family), data), fit(model_of(Exact()), data)
    assert learned.value == pytest.approx(exact.value, abs=NATS)


def test_columns_first_then_all_and_the_report_says_so(monkeypatch):
    monkeypatch.setattr("mercer.inference.hyper._SUBSET_COLUMNS", 30)
    data = wave(400)
    seen = []
    evaluate = Evidence._evaluate

    def watched(self, theta, gradient):
        seen.append(None if self.plan.rows is None else len(self.plan.rows))
        return evaluate(self, theta, gradient)

    monkeypatch.setattr(Evidence, "_evaluate", watched)
    model = model_of(SparseInverseCholesky(n_neighbors=12))
    learned = fit(model, data)
    assert seen == sorted(seen, key=lambda size: size or 400) and set(seen) == {50, None}
    assert any("50 of 400 columns" in note for note in learned.notes)
    plain = evidence_of(model_of(SparseInverseCholesky(n_neighbors=12)), data)
    best = plain.maximise(plain.vector.read(), 100)
    assert learned.value >= best.value - 0.5  # plans differ with the lengthscales that they were made at


def test_the_plan_follows_lengthscales(monkeypatch):
    """Learning starts far from the lengthscales that it finds: neighbours are looked for again."""
    plans = []
    plan = SparseInverseCholesky.plan_some

    def watched(self, prior, X, policy, rows):
        plans.append(plan(self, prior, X, policy, rows))
        return plans[-1]

    monkeypatch.setattr(SparseInverseCholesky, "plan_some", watched)
    model = model_of(SparseInverseCholesky(n_neighbors=6), Matern52([0.3, 0.3], outputscale=1.0))
    learned = fit(model, wave(150))
    assert 2 <= len(plans) <= 6
    assert plans[0].stale(model.prior) and not plans[-1].stale(model.prior)
    assert learned.plan is plans[-1]
    assert len(learned.trace) == learned.n_iter


def test_a_newton_step_is_taken_first():
    """In directions of the curvature one iteration goes most of the way, however far that is."""
    data = wave(400)
    model = model_of(SparseInverseCholesky(n_neighbors=12))
    best = fit(model, data)
    plan = model.family.plan(model.prior, data.X, POLICY)
    evidence = Evidence(model, plan, data)
    steps = evidence.inverse_root(fisher_information(model, plan, data), best.theta)
    away = best.theta + steps @ np.array([4.0, -3.0, 3.0, 4.0])
    value = evidence(away)[0]
    top = evidence(best.theta)[0]
    learned = evidence.maximise(away, max_iter=1, steps=steps)
    assert top - learned.value < 0.25 * (top - value) and top - value > 10
