"""Tensors in, tensors out: same numbers as arrays, the caller's dtype and device, and gradients in the inputs."""

import numpy as np
import pytest
import torch

from mercer import GPClassifier, GPCountRegressor, GPRegressor

rng = np.random.default_rng(0)
N = 20
X = rng.normal([5.0, -200.0], [0.3, 60.0], size=(N, 2))
SIGNAL = np.sin(6 * (X[:, 0] - 5)) + X[:, 1] / 200
X_NEW = rng.normal([5.0, -200.0], [0.3, 60.0], size=(4, 2))
FITS = {
    "gaussian": (GPRegressor(optimizer=None), 40 + 7 * SIGNAL),
    "sum": (GPRegressor("rbf + linear", optimizer=None), 40 + 7 * SIGNAL),
    "product": (GPRegressor("matern32 * periodic", optimizer=None), 40 + 7 * SIGNAL),
    "outputs": (GPRegressor(optimizer=None), np.column_stack([SIGNAL, 5 - SIGNAL**2])),
    "student_t": (GPRegressor(likelihood="student_t", optimizer=None), 40 + 7 * SIGNAL + 9 * (np.arange(N) == 3)),
    "logit": (GPClassifier(optimizer=None), (np.median(SIGNAL) < SIGNAL).astype(int)),
    "softmax": (GPClassifier(optimizer=None), np.digitize(SIGNAL, [-1.5, -0.5])),
    "ordinal": (GPClassifier(likelihood="ordinal", optimizer=None), np.digitize(SIGNAL, [-1.5, -0.5])),
    "poisson": (GPCountRegressor(optimizer=None), rng.poisson(np.exp(SIGNAL + 2))),
    "negative_binomial": (
        GPCountRegressor(likelihood="negative_binomial", optimizer=None),
        rng.poisson(np.exp(SIGNAL + 2)),
    ),
}
NAMES = pytest.mark.parametrize("name", FITS)


def answers(model, X):
    """Everything that a model says about rows, as a tuple."""
    if isinstance(model, GPClassifier):
        return model.predict_proba(X), model.predict_log_proba(X), model.sample_y(X, 3)
    found = (model.predict(X), *model.predict(X, return_std=True), *model.predict(X, return_std=True, latent=True))
    if isinstance(model, GPRegressor):
        found += model.predict(X, return_cov=True)
    return *found, model.sample_y(X, 3)


@NAMES
def test_tensors_give_the_numbers_of_arrays(name):
    model, y = FITS[name]
    expected = answers(model.fit(X, y), X_NEW)
    model.fit(torch.as_tensor(X), torch.as_tensor(y))
    assert model.n_features_in_ == 2
    for found, array in zip(answers(model, torch.as_tensor(X_NEW)), expected, strict=True):
        assert isinstance(found, torch.Tensor) and found.dtype == torch.float64 and not found.requires_grad
        np.testing.assert_array_equal(found.numpy(), array)
    density = model.log_predictive_density(torch.as_tensor(X), torch.as_tensor(y))
    np.testing.assert_array_equal(density.numpy(), model.log_predictive_density(X, y))


@NAMES
def test_results_have_the_dtype_of_the_rows(name):
    model, y = FITS[name]
    model.fit(X, y)
    rows = torch.as_tensor(X_NEW, dtype=torch.float32)
    for found, exact in zip(answers(model, rows), answers(model, rows.double()), strict=True):
        assert found.dtype == torch.float32
        np.testing.assert_array_equal(found.numpy(), exact.float().numpy())
    assert answers(model, torch.as_tensor(X_NEW).round().int())[0].dtype == torch.float64


@NAMES
def test_predictions_differentiate_in_the_inputs(name):
    """Against central differences of step 1e-6, whose rounding is about 1e-9 of values near one."""
    model, y = FITS[name]
    model.fit((X - X.mean(0)) / X.std(0), y)

    def told(rows):
        if isinstance(model, GPClassifier):
            return model.predict_proba(rows), model.predict_log_proba(rows)
        return (model.predict(rows), *model.predict(rows, return_std=True), *model.predict(rows, True, latent=True))

    rows = torch.as_tensor((X_NEW - X.mean(0)) / X.std(0)).requires_grad_()
    assert all(value.requires_grad for value in told(rows))
    assert torch.autograd.gradcheck(told, rows, eps=1e-6, atol=1e-6, rtol=1e-5)


def test_the_predictive_covariance_differentiates_in_the_inputs():
    model, y = FITS["gaussian"]
    model.fit((X - X.mean(0)) / X.std(0), y)
    rows = torch.as_tensor((X_NEW - X.mean(0)) / X.std(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda r: model.predict(r, return_cov=True)[1], rows, atol=1e-6, rtol=1e-5)


def test_a_gradient_in_the_inputs_is_in_their_units():
    """Also through float32: the digits are those of the caller's tensor."""
    model, y = FITS["gaussian"]
    model.fit(X, y)
    rows = torch.as_tensor(X_NEW).requires_grad_()
    (slope,) = torch.autograd.grad(model.predict(rows).sum(), rows)
    step = 1e-5 * X.std(0)
    for j in range(2):
        move = step[j] * np.eye(2)[j]
        expected = (model.predict(X_NEW + move) - model.predict(X_NEW - move)) / (2 * step[j])
        np.testing.assert_allclose(slope[:, j], expected, rtol=1e-6)
    single = torch.as_tensor(X_NEW, dtype=torch.float32).requires_grad_()
    (found,) = torch.autograd.grad(model.predict(single).sum(), single)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, slope, rtol=1e-3)


def test_gradients_are_only_made_for_who_asks():
    model, y = FITS["gaussian"]
    model.fit(torch.as_tensor(X).requires_grad_(), torch.as_tensor(y).requires_grad_())
    rows = torch.as_tensor(X_NEW).requires_grad_()
    with torch.no_grad():
        assert not model.predict(rows, return_std=True)[1].requires_grad
    assert not model.predict(rows.detach(), return_std=True)[1].requires_grad
    assert isinstance(model.predict(X_NEW), np.ndarray)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@NAMES
def test_rows_on_a_device_stay_there(name):
    """Tensors choose the device, ``device`` overrules; the CPU gives the same numbers."""
    model, y = FITS[name]
    expected = answers(model.fit(X, y), X_NEW)
    model.fit(torch.as_tensor(X).cuda(), torch.as_tensor(y).cuda())
    assert model.posterior_.plan.X.is_cuda and model.fit_report_.device == "cuda:0"
    for found, array in zip(answers(model, torch.as_tensor(X_NEW).cuda())[:-1], expected[:-1], strict=True):
        assert found.is_cuda
        np.testing.assert_allclose(found.cpu(), array, rtol=1e-7, atol=1e-9)
    assert isinstance(model.predict(X_NEW), np.ndarray)
    assert model.sample_y(X_NEW, 2, latent=False).shape[0] == 4
    on_request = model.set_params(device="cuda").fit(X, y)
    assert on_request.posterior_.plan.X.is_cuda
    model.set_params(device=None)
