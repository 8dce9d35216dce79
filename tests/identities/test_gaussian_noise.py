"""With Gaussian noise every engine is exact: variational, Laplace and EP all give the conjugate answer."""

import pytest
import torch
from toys import X_NEW, normal, problem

from mercer._typing import Sites
from mercer.inference import Conjugate, Dual, Laplace, PowerEP, run
from mercer.inference.evidence import Evidence
from mercer.inference.objective import evidence_lower_bound


def exact():
    model, plan, data = problem("gaussian", Conjugate())
    state = run(model, plan, data).state
    return state.posterior, float(model.engine.objective(model, plan, state, data))


@pytest.mark.parametrize("seed", range(5))
def test_one_dual_step_from_any_start_is_exact(seed):
    model, plan, data = problem("gaussian")
    start = Sites(5.0 * normal(9, seed=seed), 10.0 * normal(9, seed=seed + 50).square())
    with torch.no_grad():
        state = model.engine.init(model, plan, data, start if seed else None)
        state, info = model.engine.step(model, plan, state, data)
        posterior, evidence = exact()
        assert info["halvings"] == 0
        for found, expected in zip(state.posterior.joint(X_NEW), posterior.joint(X_NEW), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        assert state.value == pytest.approx(evidence, rel=1e-9)
        # and the next step has nothing left to do
        assert model.engine.step(model, plan, state, data)[1]["converged"]


@pytest.mark.parametrize("engine", [Dual(), Laplace(), PowerEP(), PowerEP(power=0.3)], ids=repr)
def test_every_engine_gives_the_exact_evidence_and_gradient(engine):
    values = []
    for choice in (Conjugate(), engine):
        model, plan, data = problem("gaussian", choice)
        evidence = Evidence(model, plan, data)
        values.append(evidence(evidence.vector.read()))
    assert values[1][0] == pytest.approx(values[0][0], rel=1e-8)
    assert values[1][1] == pytest.approx(values[0][1], rel=1e-6, abs=1e-6)


def test_the_bound_at_wrong_sites_is_below_the_evidence_by_the_divergence():
    """log p(y) − ELBO(q) = KL[q ‖ p(f | y)], for any q."""
    model, plan, data = problem("gaussian")
    posterior, evidence = exact()
    with torch.no_grad():
        q = model.family.condition(model.prior, plan, Sites(normal(9, seed=1), normal(9, seed=2).square()))
        (m, V), (mean, S) = posterior.joint(data.X), q.joint(data.X)
        gap = torch.linalg.solve(V, S + (mean - m).outer(mean - m)).trace() - len(m)
        gap = 0.5 * (gap + torch.linalg.slogdet(V)[1] - torch.linalg.slogdet(S)[1])
        bound = evidence_lower_bound(model, q, data)
    assert gap > 0.1 and float(evidence - bound) == pytest.approx(float(gap), rel=1e-8)
