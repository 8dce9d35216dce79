"""Derivatives predicted and observed, in the user's units: against dense NumPy, finite differences and each other."""

import numpy as np
import pandas as pd
import pytest
import torch
from gpytorch.means import ConstantMean, LinearMean

from mercer import GPRegressor, load
from mercer.kernels import RBF, GaussianMixture, Linear, Matern12, Matern32, Matern52, Periodic, StudentMixture

RNG = np.random.default_rng(3)
ELL, SCALE, NOISE = np.array([0.8, 30.0]), 9.0, 0.01
X = RNG.uniform(0, 1, (25, 2)) * [4.0, 100.0] + [10.0, -50.0]
NEW = RNG.uniform(0, 1, (6, 2)) * [4.0, 100.0] + [10.0, -50.0]
ORDERS = RNG.integers(0, 2, (25, 2)) * (np.arange(25) % 2)[:, None]


def f(x):
    return 3 * np.sin(1.3 * x[:, 0]) + 0.02 * x[:, 1] + 5


def slope(x, column):
    return 3.9 * np.cos(1.3 * x[:, 0]) if column == 0 else np.full(len(x), 0.02)


def hermite(n, u):
    return [1.0, u, u**2 - 1, u**3 - 3 * u, u**4 - 6 * u**2 + 3][n]


def covariance(x, y, a, b):
    """∂^a in x and ∂^b in y of s Π exp(−(x − y)²/2ℓ²), one pair."""
    total = SCALE
    for j in range(2):
        u, n = (x[j] - y[j]) / ELL[j], int(a[j] + b[j])
        total *= (-1) ** n * hermite(n, u) * np.exp(-(u**2) / 2) / ELL[j] ** n * (-1) ** int(b[j])
    return total


def matrix(X1, O1, X2, O2):
    return np.array(
        [[covariance(x, y, a, b) for y, b in zip(X2, O2, strict=True)] for x, a in zip(X1, O1, strict=True)]
    )


def oracle(X, y, orders, noise, center, order):
    """Condition on y − center (of values only) and predict ∂^order f, mean and variance."""
    values = ~orders.any(axis=1)
    residual = y - center * values
    K = matrix(X, orders, X, orders) + np.diag(noise)
    at = np.tile(order, (len(NEW), 1))
    cross = matrix(NEW, at, X, orders)
    mean = cross @ np.linalg.solve(K, residual) + center * (not any(order))
    joint = matrix(NEW, at, NEW, at) - cross @ np.linalg.solve(K, cross.T)
    logdet = np.linalg.slogdet(K)[1]
    evidence = -0.5 * residual @ np.linalg.solve(K, residual) - 0.5 * logdet - 0.5 * len(y) * np.log(2 * np.pi)
    return mean, joint, evidence


def fixed(**options):
    return GPRegressor(RBF(ELL, outputscale=SCALE), optimizer=None, **options)


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("order", [(0, 0), (1, 0), (0, 1), (2, 0), (1, 1)])
@pytest.mark.filterwarnings("ignore:GPRegressor. standardize=False")
def test_derivatives_of_a_fit_to_values_are_those_of_dense_algebra(order, standardize):
    y = f(X)
    model = fixed(standardize=standardize).fit(X, y, noise_variance=NOISE)
    center = y.mean() if standardize else 0.0
    mean, joint, evidence = oracle(X, y, np.zeros((25, 2), int), np.full(25, NOISE), center, order)
    found, std = model.predict(NEW, return_std=True, derivative=order)
    np.testing.assert_allclose(found, mean, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(std, np.sqrt(np.diag(joint)), rtol=1e-7)
    np.testing.assert_allclose(model.predict(NEW, derivative=order), mean, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(model.predict(NEW, return_cov=True, derivative=order)[1], joint, rtol=1e-6, atol=1e-9)
    assert model.log_marginal_likelihood_value_ == pytest.approx(evidence, rel=1e-9)


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("order", [(0, 0), (1, 0), (0, 2)])
@pytest.mark.filterwarnings("ignore:GPRegressor. standardize=False")
def test_a_fit_to_values_and_slopes_is_dense_algebra(order, standardize):
    y = np.where(ORDERS.any(1), RNG.normal(size=25), f(X))
    noise = RNG.uniform(0.5, 2, 25) * NOISE
    model = fixed(standardize=standardize).fit(X, y, noise_variance=noise, derivative=ORDERS)
    center = y[~ORDERS.any(1)].mean() if standardize else 0.0
    mean, joint, evidence = oracle(X, y, ORDERS, noise, center, order)
    found, std = model.predict(NEW, return_std=True, derivative=order)
    np.testing.assert_allclose(found, mean, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(std, np.sqrt(np.diag(joint)), rtol=1e-6)
    if not any(order):
        latent, std = model.predict(NEW, return_std=True, latent=True)
        np.testing.assert_allclose(latent, mean, rtol=1e-7)
        np.testing.assert_allclose(std, np.sqrt(np.diag(joint)), rtol=1e-6)
        np.testing.assert_allclose(model.predict(NEW, return_cov=True, latent=True)[1], joint, rtol=1e-5, atol=1e-8)
    assert model.log_marginal_likelihood_value_ == pytest.approx(evidence, rel=1e-9)


@pytest.mark.parametrize("kernel", ["matern52", GaussianMixture(2), RBF() + Linear(), Matern52(ard=False)])
def test_predicted_slope_is_the_difference_quotient_of_predictions(kernel):
    model = GPRegressor(kernel, max_iter=20).fit(X, f(X) + 0.1 * RNG.normal(size=25))
    for column, step in ((0, 1e-5), (1, 1e-3)):
        shift = step * np.eye(2)[column]
        quotient = (model.predict(NEW + shift) - model.predict(NEW - shift)) / (2 * step)
        np.testing.assert_allclose(model.predict(NEW, derivative=column), quotient, rtol=1e-5, atol=1e-7)


def test_std_of_a_slope_is_the_limit_of_joint_covariances():
    model = GPRegressor("matern52", max_iter=20).fit(X, f(X) + 0.1 * RNG.normal(size=25))
    step = np.array([1e-4, 0.0])
    _, cov = model.predict(np.concatenate([NEW[:1] - step, NEW[:1] + step]), return_cov=True, latent=True)
    variance = np.array([-1, 1]) @ cov @ np.array([-1, 1]) / (2e-4) ** 2
    assert model.predict(NEW[:1], return_std=True, derivative=0)[1][0] ** 2 == pytest.approx(variance, rel=1e-4)


def test_a_column_is_named_or_numbered():
    frame, new = pd.DataFrame(X, columns=["temp", "wind"]), pd.DataFrame(NEW, columns=["temp", "wind"])
    model = fixed().fit(frame, f(X), noise_variance=NOISE)
    expected = model.predict(new, derivative=(0, 1))
    for same in ("wind", 1, -1, ["wind"], [0, 1], np.array([0, 1])):
        np.testing.assert_array_equal(model.predict(new, derivative=same), expected)
    second = model.predict(new, derivative=("temp", "temp"))
    np.testing.assert_array_equal(second, model.predict(new, derivative=(2, 0)))


def test_slopes_alone_give_the_function_up_to_a_constant():
    x = np.linspace(0, 5, 30)[:, None] * [1.0, 20.0] + RNG.normal(size=(30, 2)) * [0.3, 9.0]
    orders = np.tile([[1, 0], [0, 1]], (15, 1))
    y = np.where(orders[:, 0], slope(x, 0), slope(x, 1))
    model = GPRegressor(RBF(), max_iter=60).fit(x, y, derivative=orders)
    inside = x[5:25]
    error = model.predict(inside) - f(inside)
    assert np.ptp(error) < 0.05 * np.ptp(f(inside))


def test_a_mixture_starts_from_the_waves_of_slopes_where_there_are_no_values():
    X = np.linspace(0, 3, 80)[:, None]
    slopes = 2 * np.pi * 4.3 * np.cos(2 * np.pi * 4.3 * X[:, 0])
    model = GPRegressor(GaussianMixture(2), optimizer=None).fit(X, slopes, derivative=np.ones(80, dtype=int))
    assert np.abs(model.kernel_.frequency.detach().numpy() - 4.3).min() < 0.01


def test_slopes_make_predictions_better_and_hyperparameters_are_learned_from_them():
    few = X[:12]
    both, values = np.concatenate([few, few, few]), np.concatenate([f(few), slope(few, 0), slope(few, 1)])
    orders = np.repeat([[0, 0], [1, 0], [0, 1]], 12, axis=0)
    alone = GPRegressor(RBF()).fit(few, f(few))
    model = GPRegressor(RBF()).fit(both, values, derivative=orders)
    assert np.abs(model.predict(NEW) - f(NEW)).max() < 0.5 * np.abs(alone.predict(NEW) - f(NEW)).max()
    assert model.theta_names_ == alone.theta_names_ and "wrapped" not in str(model.kernel_)


def test_the_evidence_of_values_and_slopes_has_its_gradient():
    y = np.where(ORDERS.any(1), slope(X, 0), f(X)) + 0.3 * RNG.normal(size=25)
    model = GPRegressor(RBF()).fit(X, y, derivative=ORDERS)
    value, gradient = model.log_marginal_likelihood(model.theta_, eval_gradient=True)
    assert value == pytest.approx(model.log_marginal_likelihood_value_, abs=1e-6)
    for i in range(len(gradient)):
        step = 1e-5 * np.eye(len(gradient))[i]
        up, down = (model.log_marginal_likelihood(model.theta_ + sign * step) for sign in (1, -1))
        assert gradient[i] == pytest.approx((up - down) / 2e-5, rel=1e-5, abs=1e-5)


def test_outputs_have_units_of_their_own():
    y = np.column_stack([f(X), 1e3 * f(X) - 7])
    y[np.arange(25) % 2 == 1] = RNG.normal(size=(12, 1)) * [1.0, 1e3]
    model = GPRegressor(RBF(), max_iter=5).fit(X, y, derivative=ORDERS)
    mean, std = model.predict(NEW, return_std=True, derivative=0)
    np.testing.assert_allclose(mean[:, 1], 1e3 * mean[:, 0], rtol=1e-2)
    np.testing.assert_allclose(std[:, 1], 1e3 * std[:, 0], rtol=1e-1)
    assert model.predict(NEW, return_cov=True, derivative=0)[1].shape == (6, 6, 2)


def test_a_prior_mean_has_slopes_too():
    y = np.concatenate([f(X), slope(X, 0)])
    orders = np.repeat([[0, 0], [1, 0]], 25, axis=0)
    flat = fixed(mean=ConstantMean().double()).fit(np.tile(X, (2, 1)), y, noise_variance=NOISE, derivative=orders)
    none = fixed().fit(np.tile(X, (2, 1)), y, noise_variance=NOISE, derivative=orders)
    np.testing.assert_allclose(flat.predict(NEW, derivative=0), none.predict(NEW, derivative=0), rtol=1e-9)
    line = LinearMean(2).double()
    line.weights.data = torch.tensor([[2.0], [-1.0]]).double()
    model = fixed(mean=line, standardize=True).fit(X, f(X), noise_variance=NOISE)
    far = NEW + np.array([1e3, 0.0])
    expected = [2.0 * model._units.y_scale / model._units.x_scale[0], -model._units.y_scale / model._units.x_scale[1]]
    for column in range(2):
        np.testing.assert_allclose(model.predict(far, derivative=column), expected[column], rtol=1e-9)


def test_rows_are_merged_only_with_those_that_observe_the_same():
    twice = np.tile(X[:10], (2, 1))
    orders = np.repeat([[0, 0], [1, 0]], 10, axis=0)
    y = np.concatenate([np.ones(10), np.ones(10)]) + np.tile(np.arange(10), 2)
    model = fixed().fit(twice, y, noise_variance=NOISE, derivative=orders)
    assert model.fit_report_.n_rows == 20
    assert fixed().fit(twice, y, noise_variance=NOISE, derivative=0 * orders).fit_report_.n_rows == 10
    assert not [finding for finding in model.diagnose() if finding.code == "duplicates"]


def test_tensors_give_tensors_with_gradients():
    model = fixed().fit(X, f(X), noise_variance=NOISE)
    new = torch.as_tensor(NEW).requires_grad_()
    mean = model.predict(new, derivative=0)
    (curvature,) = torch.autograd.grad(mean.sum(), new)
    np.testing.assert_allclose(curvature[:, 0], model.predict(NEW, derivative=(2, 0)), rtol=1e-7)


def test_saved_with_slopes(tmp_path):
    mean = ConstantMean().double()
    y = np.where(ORDERS.any(1), 0.1, f(X))
    model = fixed(mean=mean).fit(X, y, noise_variance=NOISE, derivative=ORDERS)
    model.save(tmp_path / "slopes.mercer")
    loaded = load(tmp_path / "slopes.mercer")
    for options in ({}, {"derivative": 1}):
        np.testing.assert_array_equal(loaded.predict(NEW, **options), model.predict(NEW, **options))


def test_draws_know_the_slopes():
    x = np.linspace(0, 3, 8)[:, None]
    y = np.concatenate([np.sin(2 * x[:, 0]), 2 * np.cos(2 * x[:, 0])])
    model = GPRegressor(RBF([1.0], outputscale=1.0), optimizer=None)
    model.fit(np.tile(x, (2, 1)), y, noise_variance=1e-6, derivative=np.repeat([0, 1], 8))
    new = np.linspace(0, 3, 20)[:, None]
    with pytest.warns(UserWarning, match="joint draws"):
        draws = model.sample_y(new, 3)
    np.testing.assert_allclose(draws, np.sin(2 * new) + np.zeros(3), atol=0.02)


@pytest.mark.parametrize(
    ("derivative", "error", "message"),
    [
        ("rain", ValueError, "no column 'rain'; fit had no column names"),
        (2, ValueError, "no column 2"),
        ((1,), ValueError, "one order ≥ 0 for each of the 2 columns"),
        ((-1, 0), ValueError, "one order ≥ 0"),
        (0.5, TypeError, "derivative must be"),
        ((0.5, 0), TypeError, "derivative must be"),
        (True, TypeError, "derivative must be"),
    ],
)
def test_what_names_no_derivative_is_refused(derivative, error, message):
    model = fixed().fit(X, f(X), noise_variance=NOISE)
    with pytest.raises(error, match=message):
        model.predict(NEW, derivative=derivative)


def test_kernels_and_families_without_derivatives_are_refused():
    with pytest.raises(ValueError, match=r"Matérn-1/2 has derivatives up to order 0.*smoother"):
        GPRegressor(Matern12(), max_iter=2).fit(X, f(X)).predict(NEW, derivative=0)
    with pytest.raises(TypeError, match="PeriodicKernel has no rule"):
        GPRegressor(Periodic(), max_iter=2).fit(X, f(X)).predict(NEW, derivative=0)
    with pytest.raises(ValueError, match="fit with family='exact'"):
        GPRegressor(family="sic", max_iter=2).fit(X, f(X)).predict(NEW, derivative=0)
    with pytest.raises(ValueError, match="need family='exact', not 'inducing'"):
        GPRegressor(family="inducing", max_iter=2).fit(X, f(X), derivative=ORDERS)
    with pytest.raises(ValueError, match="leave noise_variance out"):
        fixed().fit(X, f(X), noise_variance=NOISE).predict(NEW, derivative=0, noise_variance=1.0)


@pytest.mark.parametrize("derivative", [np.zeros((25, 3)), np.full((25, 2), 0.5), -np.ones((25, 2)), np.zeros(25), "x"])
def test_orders_that_do_not_fit_are_refused(derivative):
    with pytest.raises(ValueError, match=r"derivative must be \(25, 2\)"):
        fixed().fit(X, f(X), derivative=derivative)


def test_what_knows_values_only_says_so():
    model = fixed().fit(X, f(X), noise_variance=NOISE, derivative=ORDERS)
    with pytest.raises(ValueError, match="loo_predict knows values"):
        model.loo_predict()
    with pytest.raises(ValueError, match="partial_fit takes values"):
        model.partial_fit(X, f(X), noise_variance=NOISE)
    with pytest.raises(ValueError, match="to_botorch knows values"):
        model.to_botorch()


@pytest.mark.parametrize("noise", [NOISE, None])
def test_slopes_alone_say_nothing_of_the_noise_of_values(noise):
    orders = np.tile([1, 0], (25, 1))
    model = fixed().fit(X, slope(X, 0), noise_variance=noise, derivative=orders)
    for options in ({"return_std": True}, {"return_cov": True}):
        with pytest.raises(ValueError, match="derivatives only, whose noise"):
            model.predict(NEW, **options)
        assert len(model.predict(NEW, latent=True, **options)) == 2
    with pytest.raises(ValueError, match="noise_variance must be given"):
        model.log_predictive_density(NEW, f(NEW))
    latent = model.predict(NEW, return_std=True, latent=True)[1]
    std = model.predict(NEW, return_std=True, noise_variance=0.25)[1]
    np.testing.assert_allclose(std**2, latent**2 + 0.25, rtol=1e-8)
    assert model.noise_variance_ is None
    orders[0] = 0
    assert fixed().fit(X, f(X), derivative=orders).noise_variance_ > 0


@pytest.mark.parametrize(
    ("kernel", "known"),
    [(Matern32(), 1), (Matern52(), 2), (StudentMixture(2), 2), (Matern52() * RBF(), 2), (RBF(), 6)],
)
def test_no_derivative_is_predicted_that_f_does_not_have(kernel, known):
    x = np.linspace(0, 3, 12)[:, None]
    model = GPRegressor(kernel, optimizer=None).fit(x, np.sin(x[:, 0]))
    assert np.isfinite(model.predict(x, derivative=(known,))).all()
    for order in range(known + 1, 6):
        with pytest.raises(ValueError, match=f"f has derivatives up to order {known}"):
            model.predict(x, derivative=(order,))
        with pytest.raises(ValueError, match=f"f has derivatives up to order {known}"):
            model.predict(x, return_std=True, derivative=(order,))


def test_orders_in_a_frame_go_by_the_names_of_columns():
    frame = pd.DataFrame(X, columns=["temp", "wind"])
    orders = pd.DataFrame(ORDERS, columns=["temp", "wind"])
    y = np.where(ORDERS.any(1), 0.1, f(X))
    new = pd.DataFrame(NEW, columns=["temp", "wind"])
    expected = fixed().fit(frame, y, noise_variance=NOISE, derivative=ORDERS).predict(new)
    for same in (orders, orders[["wind", "temp"]]):
        np.testing.assert_array_equal(
            fixed().fit(frame, y, noise_variance=NOISE, derivative=same).predict(new), expected
        )
    np.testing.assert_array_equal(fixed().fit(X, y, noise_variance=NOISE, derivative=orders).predict(NEW), expected)
    for other in (orders.rename(columns={"wind": "rain"}), orders[["wind"]], orders.assign(rain=0)):
        with pytest.raises(ValueError, match=r"derivative has the columns .* and X has \['temp', 'wind'\]"):
            fixed().fit(frame, y, derivative=other)
