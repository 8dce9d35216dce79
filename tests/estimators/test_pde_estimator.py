"""GPPDESolver behind scikit-learn's contract: parameters, containers, reports, and what is refused."""

import math
import pickle
import re
import warnings
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from mercer import GPPDESolver
from mercer.estimators._pde_inputs import check_observations
from mercer.estimators.persistence import save
from mercer.kernels import RBF, GaussianMixture
from mercer.pde import PDE, Box, Dirichlet, Initial, Neumann, Periodic, Positive, Sensors
from mercer.pde.grid import solve_grid

D = torch.float64


def u(x):
    return torch.sin(20 * x)


def residual(p, v, d, c):
    return d("xx")


def forcing(x):
    return -400 * u(x)


def equation(**more):
    return PDE(residual, Box(x=(0, 1)), rhs=forcing, **more)


CONDITIONS = (Dirichlet("boundary", u),)


@pytest.fixture(scope="module")
def fitted():
    return GPPDESolver(equation(), CONDITIONS, n_collocation=64).fit()


def test_init_stores_and_does_nothing_else():
    solver = GPPDESolver("no equation", "no conditions", kernel=3, n_collocation="many")
    assert solver.get_params()["kernel"] == 3 and solver.pde == "no equation"
    assert not any(name.endswith("_") for name in vars(solver))
    pde = equation()
    copy = clone(GPPDESolver(pde, CONDITIONS, max_steps=7))
    assert copy.max_steps == 7 and copy.conditions == CONDITIONS
    assert copy.set_params(method="dense").method == "dense"
    with pytest.raises(NotFittedError):
        copy.predict([[0.5]])


def test_fit_returns_itself_and_does_not_change_parameters(fitted):
    solver = GPPDESolver(equation(), CONDITIONS, kernel=RBF(0.05), n_collocation=30, optimizer="lbfgs")
    before = solver.kernel.lengthscale.item()
    assert solver.fit() is solver and solver.kernel.lengthscale.item() == before
    assert fitted.n_features_in_ == 1


def test_predictions_in_the_container_of_x(fitted):
    X = np.linspace(0, 1, 50)[:, None]
    mean, std = fitted.predict(X, return_std=True)
    assert isinstance(mean, np.ndarray) and mean.shape == std.shape == (50,)
    np.testing.assert_allclose(mean, np.sin(20 * X[:, 0]), atol=1e-9)
    assert (np.abs(mean - np.sin(20 * X[:, 0])) < 2 * std).mean() >= 0.95
    tensor = fitted.predict(torch.as_tensor(X))
    assert isinstance(tensor, torch.Tensor)
    np.testing.assert_array_equal(tensor.numpy(), mean)
    np.testing.assert_array_equal(fitted.predict(X.tolist()), mean)


def test_derivatives_covariances_and_residuals(fitted):
    X = np.linspace(0, 1, 20)[:, None]
    slope, std = fitted.predict(X, return_std=True, derivative="x")
    np.testing.assert_allclose(slope, 20 * np.cos(20 * X[:, 0]), atol=1e-7)
    mean, covariance = fitted.predict(X, return_cov=True, derivative="x")
    np.testing.assert_allclose(np.sqrt(np.diag(covariance)), std, rtol=1e-6)
    np.testing.assert_allclose(mean, slope, rtol=1e-9)
    np.testing.assert_allclose(fitted.predict(X, derivative="xx"), -400 * np.sin(20 * X[:, 0]), atol=1e-5)
    assert np.abs(fitted.residual(X)).max() < 1e-5
    with pytest.raises(ValueError, match="cannot both"):
        fitted.predict(X, return_std=True, return_cov=True)
    with pytest.raises(ValueError, match="axes x"):
        fitted.predict(X, derivative="t")
    with pytest.raises(ValueError, match="fields u"):
        fitted.predict(X, field="v")


def test_samples_are_consistent_functions(fitted):
    X = np.linspace(0, 1, 10)[:, None]
    draws = fitted.sample(X, 5, random_state=1)
    assert draws.shape == (10, 5)
    np.testing.assert_allclose(draws[3:], fitted.sample(X[3:], 5, random_state=1), atol=1e-10)
    assert not np.array_equal(draws, fitted.sample(X, 5, random_state=2))
    np.testing.assert_allclose(draws, np.sin(20 * X) * np.ones(5), atol=1e-6)


def test_off_the_domain_only_on_request(fitted):
    with pytest.raises(ValueError, match="extrapolate=True"):
        fitted.predict([[1.01]])
    with pytest.raises(ValueError, match="extrapolate=True"):
        fitted.sample([[-0.01]])
    bold = clone(fitted).set_params(extrapolate=True).fit()
    assert abs(bold.predict([[1.01]])[0] - math.sin(20.2)) < 1e-6


def test_report_confesses(fitted):
    report = fitted.fit_report_
    assert report.method == "features" and report.n_nodes == (64,) and report.seconds > 0
    assert report.residual < 1e-9 and report.boundary_error < 1e-9 and report.scale < 10
    assert abs(report.points_per_wavelength - 64 * 2 * math.pi / 20) < 0.1
    for word in ("method", "residual", "nugget", "evidence", "step(s), linear"):
        assert word in str(report)


def test_observations_and_coefficients():
    pde = PDE(
        lambda p, v, d, c: d("xx") + c.kappa * v,
        Box(x=(0, 1)),
        rhs=lambda x: -350 * u(x),
        unknowns={"kappa": Positive(20.0)},
    )
    generator = np.random.default_rng(0)
    X = generator.uniform(0, 1, (15, 1))
    y = np.sin(20 * X[:, 0]) + 1e-3 * generator.standard_normal(15)
    solver = GPPDESolver(pde, n_collocation=60).fit((X, y, 1e-3))
    kappa = solver.coefficients_["kappa"]
    assert kappa.identified and abs(kappa.value - 50) < max(3 * kappa.std, 0.2)
    again = GPPDESolver(pde, n_collocation=60).fit(Sensors(torch.as_tensor(X), torch.as_tensor(y), 1e-3))
    assert again.coefficients_["kappa"].value == kappa.value
    assert np.abs(solver.residual(X)).max() < 1.0


def test_fields_by_name():
    pde = PDE(lambda p, w, d, c: (d("t", "u") - w.v, d("t", "v") + w.u), Box(t=(0, 3)), fields=("u", "v"))
    solver = GPPDESolver(pde, [Dirichlet("t=0", 0.0), Dirichlet("t=0", 1.0, field="v")], n_collocation=40).fit()
    T = np.linspace(0, 3, 20)[:, None]
    np.testing.assert_allclose(solver.predict(T, field="v"), np.cos(T[:, 0]), atol=1e-6)
    np.testing.assert_allclose(solver.predict(T), np.sin(T[:, 0]), atol=1e-6)
    assert solver.residual(T).shape == (2, 20)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pde": None}, TypeError, "must be a mercer.pde.PDE"),
        ({"dtype": "float32"}, TypeError, "float64"),
        ({"dtype": torch.float32}, TypeError, "float64"),
        ({"conditions": ["x=0"]}, TypeError, "conditions must be one condition"),
        ({"kernel": "matern"}, ValueError, "kernel must be"),
        ({"optimizer": "adam"}, ValueError, "optimizer must be"),
        ({"method": "magic"}, ValueError, "method must be one of"),
        ({"n_collocation": 5}, ValueError, "nodes per shortest wavelength"),
        ({"n_collocation": (20, 20)}, ValueError, "n_collocation must be .* 1 of them"),
        ({"n_collocation": 100.0}, ValueError, "n_collocation must be an integer"),
        ({"n_collocation": 1}, ValueError, "at least 2"),
        ({"n_collocation": "many"}, ValueError, "n_collocation must be an integer"),
        ({"nugget": 0.0}, ValueError, "nugget must be a positive number"),
        ({"nugget": -1e-8}, ValueError, "nugget must be a positive number"),
        ({"max_steps": 0}, ValueError, "max_steps must be"),
        ({"max_steps": 2.5}, ValueError, "max_steps must be"),
        ({"conditions": "x=0"}, TypeError, "conditions must be one condition"),
    ],
)
def test_parameters_are_checked_in_fit(change, error, message):
    solver = GPPDESolver(equation(), CONDITIONS, n_collocation=64).set_params(**change)
    with pytest.raises(error, match=message):
        solver.fit()
    assert not hasattr(solver, "posterior_")


X1 = np.array([[0.5]])


@pytest.mark.parametrize(
    ("observations", "error", "message"),
    [
        ((X1.astype(np.float32), np.ones(1), 0.1), TypeError, "float64"),
        ((X1, np.ones(1, dtype=np.float32), 0.1), TypeError, "float64"),
        ((X1 + 1, np.ones(1), 0.1), ValueError, "off the domain"),
        ((X1, np.ones(2), 0.1), ValueError, "one per row"),
        ((X1, np.full(1, np.nan), 0.1), ValueError, "finite"),
        ((X1, np.ones(1), -0.1), ValueError, "positive standard deviations"),
        ((X1, np.ones(1), np.inf), ValueError, "positive standard deviations"),
        ((X1, np.ones(1), 0.0), ValueError, "positive standard deviations"),
        ((X1, np.ones(1)), ValueError, "two readings that differ; give noise="),
        ((np.array([[0.3], [0.4]]), np.ones(2), None), ValueError, "give noise="),
        ((X1[:0], np.ones(0), 0.1), ValueError, "no rows"),
        ([], ValueError, "observations are empty"),
        ((X1,), ValueError, r"\(X, y, noise\), Sensors, or a sequence of these; got a tuple of 1"),
        ([Sensors(X1, np.ones(1), 0.1), 3.0], ValueError, "sequence of these; got a list of 2"),
        (X1, TypeError, "sequence of these; got ndarray"),
        ((np.ones((1, 2)), np.ones(1), 0.1), ValueError, "one column per axis"),
    ],
)
def test_observations_are_checked(observations, error, message):
    with pytest.raises(error, match=message):
        GPPDESolver(equation(), CONDITIONS, n_collocation=64).fit(observations)


def test_observations_in_all_their_forms():
    X, y = np.array([[0.3], [0.7]]), np.sin([6.0, 14.0])
    first, second = Sensors(X[:1], y[:1], 0.1), Sensors(X[1:], y[1:], 0.1)
    nested = ((0.3,), (0.7,))  # rows as tuples are an X and no sequence of readings
    forms = [(X, y, 0.1), [X, y, 0.1], (nested, tuple(y), 0.1), [(X[:1], y[:1], 0.1), (X[1:], y[1:], 0.1)]]
    forms += [((X[:1], y[:1], 0.1), (X[1:], y[1:], 0.1)), [first, (X[1:], y[1:], 0.1)], (first, second)]
    for form in forms:
        found = check_observations(form, Box(x=(0, 1)), None)
        np.testing.assert_array_equal(np.concatenate([sensor.y for sensor in found]), y)
        np.testing.assert_array_equal(np.concatenate([sensor.X for sensor in found]), X)
        assert all(float(sensor.noise) == 0.1 for sensor in found)


def test_one_condition_needs_no_list_and_counts_may_be_numpys(fitted):
    alone = GPPDESolver(equation(), CONDITIONS[0], n_collocation=np.int64(64)).fit()
    np.testing.assert_array_equal(alone.predict([[0.3]]), fitted.predict([[0.3]]))
    assert GPPDESolver(equation(), CONDITIONS, n_collocation=np.array([64])).fit().fit_report_.n_nodes == (64,)


def test_columns_of_a_frame_are_found_by_the_names_of_the_axes():
    plane = PDE(lambda p, v, d, c: d("xx") + d("yy"), Box(x=(0, 1), y=(0, 2)))
    solver = GPPDESolver(plane, Dirichlet("boundary", lambda x, y: x), n_collocation=10).fit()
    frame = pd.DataFrame({"y": [0.2, 0.4], "x": [0.9, 0.1]})
    np.testing.assert_allclose(solver.predict(frame), [0.9, 0.1], atol=1e-3)
    np.testing.assert_array_equal(solver.predict(frame), solver.predict(frame[["x", "y"]]))
    np.testing.assert_array_equal(solver.predict(frame), solver.predict(frame[["x", "y"]].to_numpy()))
    unnamed = pd.DataFrame(frame[["x", "y"]].to_numpy())
    np.testing.assert_array_equal(solver.predict(frame), solver.predict(unnamed))
    (sensor,) = check_observations((frame, pd.Series([0.9, 0.1]), 0.1), plane.domain, None)
    np.testing.assert_array_equal(sensor.X, frame[["x", "y"]])
    for wrong in (frame.rename(columns={"y": "z"}), frame.assign(z=0.0), frame[["x"]]):
        with pytest.raises(ValueError, match="the axes are x, y: rename"):
            solver.predict(wrong)


def test_arrays_that_must_not_be_written_to_are_copied(fitted):
    X = np.array([[0.3], [0.4]])
    X.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted.predict(X)
        check_observations((X, X[:, 0], X[:, 0]), Box(x=(0, 1)), None)


def test_parameters_set_after_fit_do_not_change_predictions(fitted):
    solver = GPPDESolver(equation(), CONDITIONS, n_collocation=64).fit()
    X = [[0.3]]
    before = solver.predict(X), solver.residual(X)
    solver.set_params(pde=PDE(lambda p, v, d, c: d("y") - v, Box(x=(0, 9), y=(0, 9))))
    assert (solver.predict(X), solver.residual(X)) == before
    solver.set_params(pde=None)
    assert solver.predict(X, derivative="x").shape == (1,)


def test_a_pickle_of_module_level_functions_says_the_same_to_the_bit(fitted, tmp_path):
    copy = pickle.loads(pickle.dumps(fitted))
    X = np.linspace(0, 1, 20)[:, None]
    for now, then in zip(copy.predict(X, return_std=True), fitted.predict(X, return_std=True), strict=True):
        np.testing.assert_array_equal(now, then)
    np.testing.assert_array_equal(copy.sample(X, 2), fitted.sample(X, 2))
    np.testing.assert_array_equal(copy.residual(X), fitted.residual(X))
    with pytest.raises(TypeError, match=r"Python function.*use pickle.*top of a module"):
        save(fitted, tmp_path / "solver.mercer")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("X", [np.zeros((2, 1), dtype=np.float32), torch.zeros(2, 1)])
def test_single_precision_points_are_refused(fitted, X):
    with pytest.raises(TypeError, match="float64 only"):
        fitted.predict(X)


def test_grid_method_has_no_sd():
    solver = GPPDESolver(equation(), CONDITIONS, method="grid", n_collocation=100).fit()
    np.testing.assert_allclose(solver.predict([[0.3]]), [math.sin(6.0)], atol=1e-3)
    with pytest.raises(NotImplementedError, match="features"):
        solver.predict([[0.3]], return_std=True)


@pytest.mark.parametrize("n", [12, 34])  # by least squares, and by Newton's method
def test_grids_end_in_the_words_of_the_other_methods(n):
    domain = Box(x=(0, 1), y=(0, 1))
    waves = GaussianMixture(weight=[1.0], lengthscale=[0.4], frequency=[0.0])

    def status(residual, conditions, **more):
        options = {"method": "grid", "kernel": waves, "n_collocation": n} | more
        return GPPDESolver(PDE(residual, domain, rhs=1.0), conditions, **options).fit().fit_report_

    sides, slopes = [Dirichlet("boundary")], [Neumann("boundary")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few nodes
        for method in ("grid", "sylvester"):
            assert status(lambda p, v, d, c: d("xx") + d("yy"), sides, method=method).status == "linear"
        assert status(lambda p, v, d, c: d("xx") + d("yy") - v**3, sides).status == "converged"
        report = status(lambda p, v, d, c: d("xx") + d("yy"), slopes, method="sylvester")
        assert report.status == "nearly singular" and "Add a Dirichlet" in str(report)
        for options, ended in (({"max_iter": 2}, "2 steps"), ({"seconds": 1e-9}, "1e-09 seconds")):
            report = status(lambda p, v, d, c: d("xx"), sides, kernel="gm", compat=options)
            assert report.status == f"stopped after {ended}"


def test_the_published_training_is_behind_the_estimator():
    options = {"max_iter": 30, "frequency_scale": 5.0, "n_components": 4}
    solver = GPPDESolver(equation(), CONDITIONS, method="grid", compat=options, n_collocation=40)
    with pytest.warns(UserWarning, match="not resolved"):
        solver.fit()
    same = solve_grid(equation(), CONDITIONS, None, 40, compat=True, spectrum="gaussian", **options)
    X = np.linspace(0, 1, 7)[:, None]
    np.testing.assert_array_equal(solver.predict(X), same.mean(torch.as_tensor(X)).numpy())
    assert solver.fit_report_.n_steps == 30 and "published" in str(solver.fit_report_)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compat": True}, "method='grid'"),
        ({"compat": True, "method": "grid", "kernel": RBF(0.1)}, "kernel='gm'"),
        ({"compat": {"rate": 1}, "method": "grid"}, "not rate"),
    ],
)
def test_what_the_published_training_cannot_do(options, message):
    with pytest.raises(ValueError, match=message):
        GPPDESolver(equation(), CONDITIONS, n_collocation=40, **options).fit()


def test_components_that_learning_leaves_without_weight_are_pruned_and_confessed():
    kernel = GaussianMixture(weight=[1.0, 1.0, 1.0], lengthscale=0.2, frequency=[0.0, 20 / (2 * math.pi), 30.0])
    learned, held = (
        GPPDESolver(equation(), CONDITIONS, kernel=kernel, n_collocation=80, optimizer=how).fit()
        for how in ("lbfgs", None)
    )
    assert learned.kernels_[0].n_components < 3 and held.kernels_[0].n_components == kernel.n_components == 3
    assert "pruned" in str(learned.fit_report_) and "pruned" not in str(held.fit_report_)
    assert learned.fit_report_.residual < held.fit_report_.residual


@pytest.mark.parametrize(
    ("residual", "conditions", "lacking"),
    [
        (lambda p, v, d, c: 3 * d("x") + d("t"), [Initial(torch.sin)], "along x .0 of 1."),
        (lambda p, v, d, c: d("t") - d("xx"), [Initial(0.0), Dirichlet("x=0")], "along x .1 of 2."),
        (
            lambda p, v, d, c: d("tt") - d("xx"),
            [Initial(lambda x: x * (1 - x)), Dirichlet("boundary")],
            "along t .1 of 2.",
        ),
        (lambda p, v, d, c: 3 * d("x") + d("t"), [Initial(torch.sin), Periodic("x", 1)], None),
        (lambda p, v, d, c: d("xt") - 1, [Initial(0.0), Dirichlet("x=0")], None),
    ],
)
def test_axes_without_enough_conditions_are_named(residual, conditions, lacking):
    solver = GPPDESolver(PDE(residual, Box(x=(0, 1), t=(0, 1))), conditions, n_collocation=12)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solver.fit()
    found = [str(w.message) for w in caught if "fewer conditions" in str(w.message)]
    assert bool(found) == bool(lacking) and all(re.search(lacking, message) for message in found)
    assert solver.fit_report_.warnings[: len(found)] == found or not found


def test_progress_is_shown_on_request(capfd):
    GPPDESolver(equation(), CONDITIONS, n_collocation=40, verbose=1).fit()
    assert "equation met to" in capfd.readouterr().err
    GPPDESolver(equation(), CONDITIONS, n_collocation=40).fit()
    assert capfd.readouterr().err == ""


def test_an_interrupted_fit_leaves_the_solver_as_it_was(monkeypatch):
    solver = GPPDESolver(equation(), CONDITIONS, n_collocation=40).fit()
    before, report = solver.predict([[0.3]]), solver.fit_report_
    monkeypatch.setattr("mercer.pde.priors.FeaturePosterior", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        solver.fit()
    assert solver.predict([[0.3]]) == before and solver.fit_report_ is report
