"""Estimators on inducing points: against the exact family and the formulas, and what a user does with them."""

import pickle

import numpy as np
import pytest
import torch
from oracles import inducing as oracle
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV

from mercer import GPClassifier, GPCountRegressor, GPRegressor, load
from mercer.families import Inducing
from mercer.kernels import RBF, Matern52
from mercer.likelihoods import Gaussian

rng = np.random.default_rng(0)
N = 120
X, X_NEW = rng.uniform(size=(N, 2)), rng.uniform(size=(40, 2))
# few iterations are enough to see what is asked here
pytestmark = pytest.mark.filterwarnings("ignore:.*(did not converge|carry only)")


def signal(rows):
    return np.sin(6 * rows[:, 0]) + np.cos(5 * rows[:, 1])


Y = signal(X) + 0.1 * rng.normal(size=N)
COUNTS = rng.poisson(np.exp(1 + signal(X)))
NAMES = np.array(["ash", "elm", "oak"])[np.digitize(signal(X), [-0.5, 0.7])]
FITS = {
    "regression": lambda family, **rest: GPRegressor(family=family, random_state=0, **rest).fit(X, Y),
    "classes": lambda family, **rest: GPClassifier(family=family, random_state=0, **rest).fit(X, NAMES == "elm"),
    "three classes": lambda family, **rest: GPClassifier(family=family, random_state=0, **rest).fit(X, NAMES),
    "counts": lambda family, **rest: GPCountRegressor(family=family, random_state=0, **rest).fit(X, COUNTS),
}


def numbers(model):
    """Everything about new rows and the evidence."""
    if isinstance(model, GPClassifier):
        found = [model.predict_proba(X_NEW)]
    else:
        found = [*model.predict(X_NEW, return_std=True), model.sample_y(X_NEW[:5], 2, random_state=1)]
    return [*found, *model.log_marginal_likelihood(model.theta_, eval_gradient=True)]


def assert_close(one, other, tolerance):
    for found, expected in zip(one, other, strict=True):
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


# ---- as many places as rows


@pytest.mark.parametrize("name", ["regression", "classes", "counts"])
def test_places_at_all_rows_give_what_the_exact_family_gives(name):
    found, expected = (FITS[name](family, optimizer=None) for family in (Inducing(N), "exact"))
    if name == "classes":
        assert_close([found.predict_proba(X_NEW)], [expected.predict_proba(X_NEW)], 1e-7)
    else:
        assert_close(found.predict(X_NEW, return_std=True), expected.predict(X_NEW, return_std=True), 1e-6)
    values = [model.log_marginal_likelihood_value_ for model in (found, expected)]
    assert values[0] == pytest.approx(values[1], abs=1e-4) and values[0] < values[1] + 1e-9


def test_hyperparameters_learned_at_all_rows_are_those_of_the_exact_family():
    found, expected = FITS["regression"](Inducing(N)), FITS["regression"]("exact")
    np.testing.assert_allclose(found.theta_, expected.theta_, atol=1e-3)
    assert_close(found.predict(X_NEW, return_std=True), expected.predict(X_NEW, return_std=True), 1e-4)
    assert not found.posterior_.plan.learned


# ---- fewer


def test_learned_places_carry_more_than_fixed_ones_and_less_than_all_rows():
    fits = {where: FITS["regression"](Inducing(12, locations=where)) for where in ("fixed", "learned")}
    exact = FITS["regression"]("exact")
    values = {where: model.log_marginal_likelihood_value_ for where, model in fits.items()}
    assert values["fixed"] + 20.0 < values["learned"] < exact.log_marginal_likelihood_value_
    off = {where: np.sqrt(np.mean((model.predict(X_NEW) - signal(X_NEW)) ** 2)) for where, model in fits.items()}
    assert off["learned"] < 0.75 * off["fixed"] and off["learned"] < 0.1
    # the bound at the same θ is below the evidence
    learned = fits["learned"]
    assert learned.log_marginal_likelihood_value_ < exact.log_marginal_likelihood(learned.theta_)
    trace = learned.fit_report_.evidence_trace
    assert trace[-1] == pytest.approx(learned.log_marginal_likelihood_value_, abs=1e-6) and trace[0] < trace[-1]


def test_the_report_says_what_ran_and_how_much_the_places_carry():
    report = FITS["regression"](Inducing(12)).fit_report_
    assert (report.family, report.engine, report.converged, report.jitter) == ("inducing", "conjugate", True, 0.0)
    assert "lower bound" in report.evidence and "12 inducing points carry" in str(report) and not report.warnings
    with pytest.warns(UserWarning, match="carry only .* raise n_inducing"):
        kernel = Matern52([0.02, 0.02], outputscale=1.0)
        poor = GPRegressor(kernel, family=Inducing(3), optimizer=None).fit(X, Y).fit_report_
    assert "raise n_inducing" in poor.warnings[0]
    assert FITS["regression"]("inducing", optimizer=None).fit_report_.family == "inducing"


@pytest.mark.parametrize("name", ["classes", "three classes", "counts"])
def test_other_tasks_learn_and_predict(name):
    model = FITS[name](Inducing(20), max_iter=5)
    trace = model.fit_report_.evidence_trace
    assert model.fit_report_.engine == "dual" and trace[-1] > trace[0]
    if name == "counts":
        rate = np.exp(1 + signal(X_NEW))
        assert np.corrcoef(np.log(model.predict(X_NEW)), np.log(rate))[0, 1] > 0.9
    else:
        labels = NAMES if name == "three classes" else NAMES == "elm"
        assert model.score(X, labels) > 0.85


def test_laplace_takes_inducing_points_as_well():
    model = FITS["classes"](Inducing(20), engine="laplace", max_iter=5)
    assert model.fit_report_.engine == "laplace" and model.score(X, NAMES == "elm") > 0.85


def test_a_subset_is_fitted_first_where_there_are_sixteen_rows_for_each_place():
    for n_inducing in (7, 8):
        report = str(FITS["regression"](Inducing(n_inducing)).fit_report_)
        assert (f"hyperparameters fitted first on {N // 4} of {N} rows" in report) == (16 * n_inducing <= N)


# ---- formulas


def collapsed(model, y, weight=1.0, noise=0.04):
    """Titsias's bound of one output of a model with standardize=False, at its own places."""
    rows, places = torch.as_tensor(X), model.posterior_.plan.Z
    ell = torch.tensor([0.4, 0.7], dtype=torch.float64)
    kernel = lambda A, B: oracle.rbf(A, B, ell, 1.5)  # noqa: E731
    covariances = oracle.covariances(kernel, places, rows)
    seen = torch.as_tensor(~np.isnan(y))
    Kuf, Kff = covariances[1][:, seen], covariances[2][seen][:, seen]
    weight = torch.as_tensor(np.broadcast_to(weight, N).copy())[seen]
    centred = torch.as_tensor(y)[seen]
    more = -0.5 * ((weight - 1) * np.log(2 * np.pi * noise) + weight.log()).sum()
    R = torch.diag(noise / weight)
    q = oracle.optimal_q(covariances[0], Kuf, centred, R)
    new = torch.as_tensor(X_NEW)
    mean, covariance = oracle.predict(covariances[0], kernel(places, new), kernel(new, new), *q)
    bound = oracle.collapsed_bound(covariances[0], Kuf, Kff, centred, R) + more
    return float(bound), mean.numpy(), covariance.diagonal().sqrt().numpy()


def fixed(y, family=None, **rest):
    kernel = RBF([0.4, 0.7], outputscale=1.5)
    options = {"likelihood": Gaussian(0.04), "optimizer": None, "standardize": False}
    return GPRegressor(kernel, family=family or Inducing(9), **options).fit(X, y, **rest)


def test_weights_divide_the_noise_and_count_rows_in_the_bound():
    weight = np.random.default_rng(1).uniform(0.3, 2.5, size=N)
    y = Y - np.average(Y, weights=weight)
    model = fixed(y, sample_weight=weight)
    bound, mean, std = collapsed(model, y, weight)
    assert model.log_marginal_likelihood_value_ == pytest.approx(bound, rel=1e-8)
    assert_close(model.predict(X_NEW, return_std=True, latent=True), (mean, std), 1e-7)


def test_outputs_with_missing_targets_are_bounds_of_their_own():
    y = np.column_stack([Y, np.cos(4 * X[:, 0]), -Y])
    y[10:40, 0] = y[30:50, 1] = np.nan
    y = y - np.nanmean(y, 0)
    model = fixed(y)
    mean, std = model.predict(X_NEW, return_std=True, latent=True)
    total = 0.0
    for j in range(3):
        bound, expected, deviation = collapsed(model, y[:, j])
        total += bound
        assert_close((mean[:, j], std[:, j]), (expected, deviation), 1e-7)
    assert model.log_marginal_likelihood_value_ == pytest.approx(total, rel=1e-8)


@pytest.mark.parametrize("name", ["regression", "classes", "counts"])
def test_the_bound_and_its_gradient_at_any_theta(name):
    """At the places that were learned."""
    model = FITS[name](Inducing(12), max_iter=5)
    assert model.log_marginal_likelihood(model.theta_) == pytest.approx(model.log_marginal_likelihood_value_, rel=1e-9)
    point, step = model.theta_ + 0.1, 1e-3
    value, gradient = model.log_marginal_likelihood(point, eval_gradient=True)
    assert value == pytest.approx(model.log_marginal_likelihood(point), rel=1e-9)
    for k, direction in enumerate(step * np.eye(len(point))):
        values = [model.log_marginal_likelihood(point + j * direction) for j in (-2, -1, 1, 2)]
        slope = (8 * (values[2] - values[1]) - (values[3] - values[0])) / (12 * step)
        assert gradient[k] == pytest.approx(slope, rel=1e-5, abs=1e-5)


# ---- files, precision, parameters


@pytest.mark.parametrize("way", ["pickle", "file"])
@pytest.mark.parametrize("name", FITS)
def test_a_model_is_read_back_to_the_bit(name, way, tmp_path):
    model = FITS[name](Inducing(10), max_iter=2)
    if way == "file":
        model.save(tmp_path / "model")
        again = load(tmp_path / "model")
    else:
        again = pickle.loads(pickle.dumps(model))
    for one, other in zip(numbers(again), numbers(model), strict=True):
        np.testing.assert_array_equal(one, other)
    assert again.family == model.family and str(again.fit_report_) == str(model.fit_report_)


def test_places_learned_in_float32_serve_a_posterior_in_float64():
    single, double = (FITS["regression"](Inducing(12), dtype=dtype) for dtype in ("float32", "float64"))
    assert single.posterior_.plan.Z.dtype == single.posterior_.L.dtype == torch.float64
    assert single.log_marginal_likelihood_value_ == pytest.approx(double.log_marginal_likelihood_value_, abs=0.5)
    fixed = FITS["regression"](Inducing(12, locations="fixed"))
    assert single.log_marginal_likelihood_value_ > fixed.log_marginal_likelihood_value_ + 20.0
    assert "learned in float32" in str(single.fit_report_)


def test_learning_goes_on_where_it_was():
    """The places are put anew, by the lengthscales learned before."""
    model = GPRegressor(family=Inducing(12), warm_start=True, random_state=0).fit(X, Y)
    value, theta = model.log_marginal_likelihood_value_, model.theta_
    model.fit(X, Y)
    assert model.log_marginal_likelihood_value_ == pytest.approx(value, abs=0.5)
    np.testing.assert_allclose(model.theta_, theta, atol=0.5)
    cold = GPRegressor(family=Inducing(12), random_state=0, optimizer=None).fit(X, Y).theta_
    assert np.abs(cold - theta).max() > 1.0
    np.testing.assert_allclose(model.set_params(max_iter=1).fit(X, Y).theta_, theta, atol=0.5)


def test_parameters_of_the_family_have_nested_names():
    model = GPRegressor(family=Inducing(12, locations="fixed"))
    params = model.get_params()
    assert (params["family__n_inducing"], params["family__locations"]) == (12, "fixed")
    other = clone(model).set_params(family__n_inducing=7, family__seed=3)
    assert other.family == Inducing(7, "fixed", seed=3) and model.family == Inducing(12, "fixed")
    with pytest.raises(ValueError, match="family__neighbours"):
        model.set_params(family__neighbours=3)
    with pytest.raises(ValueError, match="n_inducing must be at least 1"):
        model.set_params(family__n_inducing=0)


def test_the_number_of_places_can_be_searched():
    model = GPRegressor(RBF(0.3, outputscale=1.0), family=Inducing(4), likelihood=Gaussian(0.01), optimizer=None)
    search = GridSearchCV(model, {"family__n_inducing": [2, 25]}, cv=3).fit(X, Y)
    assert search.best_params_ == {"family__n_inducing": 25}
    assert len(search.best_estimator_.posterior_.plan.Z) == 25


def test_predictions_are_differentiable_in_tensors():
    model = GPRegressor(family=Inducing(12), optimizer=None).fit(torch.as_tensor(X), torch.as_tensor(Y))
    rows = torch.as_tensor(X_NEW[:3]).requires_grad_()

    def value(rows):
        mean, std = model.predict(rows, return_std=True)
        return (mean * torch.tensor([1.0, -0.5, 2.0], dtype=mean.dtype)).sum() + std.square().sum()

    (slope,) = torch.autograd.grad(value(rows), rows)
    direction = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0), dtype=rows.dtype)
    with torch.no_grad():
        expected = float(value(rows + 1e-6 * direction) - value(rows - 1e-6 * direction)) / 2e-6
    assert float((slope * direction).sum()) == pytest.approx(expected, rel=1e-5)


def test_leave_one_out_is_that_of_the_exact_family_where_places_suffice():
    """Where they do not, a row's variance given u is not in its site, and stays."""
    found, expected = (fixed(Y - Y.mean(), family=family) for family in (Inducing(30), "exact"))
    (mean, std), (other, deviation) = (model.loo_predict(return_std=True) for model in (found, expected))
    assert np.abs(mean - other).max() < 0.1 and np.abs(std / deviation - 1).max() < 0.1
    # nine places leave some rows more than their noise
    assert np.all(fixed(Y - Y.mean()).loo_predict(return_std=True)[1] < 2 * deviation)


def test_a_single_row_is_its_own_place():
    mean, std = GPRegressor(family=Inducing(1), optimizer=None).fit([[1.0]], [2.0]).predict([[1.0]], return_std=True)
    assert mean[0] == pytest.approx(2.0) and np.isfinite(std).all()
