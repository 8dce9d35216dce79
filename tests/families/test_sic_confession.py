"""What a sparse inverse Cholesky posterior says of its own errors, against dense matrices."""

import gpytorch
import pytest
import torch
from toys import DTYPE, normal

from mercer._typing import Sites
from mercer.families import Prior, SparseInverseCholesky
from mercer.families.sic_confession import doubling, effective_dimensions
from mercer.kernels import Matern32, gram
from mercer.policy import NumericalPolicy

N = 120


def posterior(m=6, noise=0.1, form="auto", d=2, lengthscale=0.4, n=N, tight=False):
    X = torch.rand(n, d, generator=torch.Generator().manual_seed(0), dtype=DTYPE)
    if tight:
        X[1] = X[0] + 1e-7
    family, prior = SparseInverseCholesky(n_neighbors=m, form=form), Prior(Matern32([lengthscale] * d, outputscale=1.0))
    y = normal(n)
    sites = Sites(y / noise, torch.full((n,), 1 / noise, dtype=DTYPE))
    return family.condition(prior, family.plan(prior, X, NumericalPolicy(chunk_elements=20_000)), sites)


def divergence(found, m, noise):
    """KL[p ‖ p̂] of the form that predicts, by dense matrices: −Σ log U_ii − ½ log |K|."""
    family = SparseInverseCholesky(n_neighbors=m)
    plan = family.plan(found.prior, found.plan.in_data_order, NumericalPolicy())
    K = gram(found.prior.kernel, plan.X).detach() + noise * torch.eye(N, dtype=DTYPE)
    logs = []
    for i in range(N):
        c = plan.pattern.columns[i]
        c = c[c >= 0]
        e = torch.zeros(len(c), dtype=DTYPE)
        e[-1] = 1.0
        logs.append(0.5 * torch.linalg.solve(K[c][:, c], e)[-1].log())
    return float(-torch.stack(logs).sum() - 0.5 * torch.linalg.slogdet(K)[1])


@pytest.mark.parametrize(("form", "noise"), [("latent", 0.1), ("response", 0.1)])
def test_twice_the_neighbours_save_what_the_dense_divergences_say(form, noise):
    found = posterior(6, noise, form)
    own = 0.0 if form == "latent" else noise
    expected = divergence(found, 6, own) - divergence(found, 12, own)
    assert doubling(found) == pytest.approx(expected, rel=1e-8) and expected > 0.1
    assert doubling(posterior(N - 1, noise, form)) == 0.0


def test_the_report_names_the_form_and_what_is_missing():
    latent, response = posterior(noise=0.1), posterior(noise=1e-4)
    assert latent.latent and not response.latent
    notes = latent.confess().notes
    assert "latent function, 6 neighbours" in notes[0] and "nats nearer" in notes[0]
    assert "incomplete factor is off by" in notes[1] and latent.confess().warnings == ()
    assert "noisy data, 6 neighbours" in response.confess().notes[0] and len(response.confess().notes) == 1


def test_the_error_of_the_factor_is_that_of_its_determinant():
    found = posterior()
    U = torch.zeros(N, N, dtype=DTYPE)
    columns = found.plan.pattern.columns
    for i in range(N):
        for k, j in enumerate(columns[i].tolist()):
            if j >= 0:
                U[j, i] = found.U[i, k].detach()
    exact = torch.linalg.slogdet(U @ U.mT + 10.0 * torch.eye(N, dtype=DTYPE))[1]
    missing = 0.5 * abs(float(exact - found.precision.logdet))
    said, error = (float(each) for each in found.confess().notes[1].split("off by ")[1].split(" nats")[0].split("±"))
    assert abs(said - missing) < 4 * error and error < 0.5


def test_inputs_of_many_directions_are_warned_of():
    assert effective_dimensions(torch.tensor([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3.0)
    assert effective_dimensions(torch.tensor([5.0, 0.1])) == pytest.approx(1.0, abs=1e-3)
    assert effective_dimensions(None) == effective_dimensions(torch.zeros(3)) == 0.0
    (warning,) = posterior(d=10).confess().warnings
    assert "10 directions" in warning and "InducingVecchia" in warning
    assert posterior(d=7).confess().warnings == ()


def test_rows_that_are_nearly_the_same_take_a_nugget_and_it_is_said():
    found = posterior(form="latent", tight=True)
    found.release()
    assert found.jitter > 0.0
    plain = posterior(form="latent")
    plain.release()
    assert plain.jitter == 0.0


def test_a_kernel_for_each_latent_is_refused():
    prior = Prior(gpytorch.kernels.MaternKernel(nu=2.5, batch_shape=torch.Size([2])).double())
    with pytest.raises(ValueError, match="batch shape"):
        SparseInverseCholesky().plan(prior, torch.rand(9, 2, dtype=DTYPE), NumericalPolicy())
