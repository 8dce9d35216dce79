"""Pictures of solutions: what is drawn are the solver's own numbers, on the part of the domain that was asked for."""

import math
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from sklearn.exceptions import NotFittedError

from mercer import GPPDESolver, GPRegressor
from mercer.display import ErrorDisplay, ResidualDisplay, SolutionDisplay, SpectrumDisplay
from mercer.display._domain import domain_slice
from mercer.display._style import INK
from mercer.kernels import RBF, GaussianMixture
from mercer.pde import PDE, Box, Dirichlet, Initial, Sensors
from mercer.pde.report import Report
from mercer.pde.spectrum import Lines


def wave(x):
    return torch.sin(40 * x)


def travelling(x, t):
    return torch.sin(3 * (x - 2 * t))


@pytest.fixture(scope="module")
def poisson():
    pde = PDE(lambda p, u, d, c: d("xx"), Box(x=(0, 1)), rhs=lambda x: -1600 * wave(x))
    return GPPDESolver(pde, [Dirichlet("boundary", wave)], n_collocation=40).fit()


@pytest.fixture(scope="module")
def advection():
    pde = PDE(lambda p, u, d, c: d("t") + 2 * d("x"), Box(x=(0, 1), t=(0, 0.5)))
    conditions = [Initial(lambda x: torch.sin(3 * x)), Dirichlet("x=0", lambda t: torch.sin(-6 * t))]
    return GPPDESolver(pde, conditions, n_collocation=16).fit()


@pytest.fixture(scope="module")
def mean_only():
    """A method without a posterior."""
    pde = PDE(lambda p, u, d, c: d("xx") + d("yy"), Box(x=(0, 1), y=(0, 2)), rhs=2.0)
    return GPPDESolver(pde, [Dirichlet("boundary", lambda x, y: x**2)], method="sylvester", n_collocation=12).fit()


def stub(box, *frequency, nodes=1000, amplitude=None):
    """A solver that knows its domain and the lines of its data, and has solved nothing."""
    solver = GPPDESolver()
    solver.pde_ = PDE(lambda p, u, d, c: u, box)
    solver.posterior_, solver.kernels_ = None, []
    solver.fit_report_ = Report(n_nodes=(nodes,) * box.d)
    mu = torch.tensor(frequency, dtype=torch.float64).reshape(-1, box.d)
    size = torch.ones(len(mu), dtype=torch.float64) if amplitude is None else torch.tensor(amplitude)
    solver.lines_ = Lines(mu, torch.zeros_like(mu), size)
    return solver


def lines_of(ax):
    return {line.get_label(): line for line in ax.get_lines()}


def test_a_line_shows_mean_band_and_the_known_solution(poisson):
    display = SolutionDisplay.from_estimator(poisson, wave, n_samples=2, kind="solution", resolution=51)
    x = np.linspace(0, 1, 51)
    mean, std = poisson.predict(x[:, None], return_std=True)
    drawn = lines_of(display.ax_)
    np.testing.assert_array_equal(drawn["mean"].get_ydata(), mean)
    np.testing.assert_array_equal(drawn["exact"].get_ydata(), np.sin(40 * x))
    assert "2 draws" in drawn and display.samples.shape == (51, 2)
    band = display.ax_.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx((mean + 2 * std).max(), abs=0)


def test_the_deviation_has_a_panel_of_its_own(poisson):
    display = SolutionDisplay.from_estimator(poisson, resolution=31)
    assert display.ax_.shape == (2,) and display.ax_[1].get_yscale() == "log"
    np.testing.assert_array_equal(display.ax_[1].get_lines()[0].get_ydata(), display.std)
    ax = plt.subplots()[1]
    assert display.plot(ax, kind="std").ax_ is ax


def test_a_plane_has_its_second_axis_upwards(advection):
    display = SolutionDisplay.from_estimator(advection, resolution=9)
    assert display.mean.shape == display.std.shape == (9, 9)
    at = advection.predict([[display.axes[0][2], display.axes[1][7]]])
    assert display.mean[7, 2] == pytest.approx(at[0], abs=1e-12)
    mesh = display.ax_[0].collections[0]
    np.testing.assert_array_equal(np.asarray(mesh.get_array()).reshape(9, 9), display.mean)
    assert (display.ax_[0].get_xlabel(), display.ax_[0].get_ylabel()) == ("x", "t")


def test_windows_zoom_and_hold(advection):
    part = domain_slice(advection, {"x": (0.2, 0.4), "t": 0.25}, 5)
    assert part.names == ("x",) and part.note == "t = 0.25"
    np.testing.assert_allclose(part.X, np.column_stack([np.linspace(0.2, 0.4, 5), np.full(5, 0.25)]))
    display = SolutionDisplay.from_estimator(advection, window={"x": 0.5}, kind="solution", derivative="t")
    assert display.names == ("t",) and display.label == "∂t u" and display.ax_.get_title("left") == "x = 0.5"
    np.testing.assert_allclose(display.mean, -6 * np.cos(3 * (0.5 - 2 * display.axes[0])), atol=1e-4)


def test_axes_beyond_the_second_are_held_at_their_middle():
    solver = stub(Box(x=(0, 1), y=(0, 2), t=(1, 3)), nodes=8)
    part = domain_slice(solver, resolution=3)
    assert part.names == ("x", "y") and part.note == "t = 2" and set(part.X[:, 2]) == {2.0}
    assert domain_slice(solver, {"x": 1.0}, 3).names == ("y", "t")


def test_fast_waves_get_more_points():
    assert len(domain_slice(stub(Box(x=(0, 1)))).axes[0]) == 401
    assert len(domain_slice(stub(Box(x=(0, 1)), [200.0])).axes[0]) == 2000
    assert len(domain_slice(stub(Box(x=(0, 1)), [200.0]), {"x": (0, 0.5)}).axes[0]) == 1000
    assert len(domain_slice(stub(Box(x=(0, 1)), [500.0])).axes[0]) == 4001
    # what is too faint to be seen needs no points
    assert len(domain_slice(stub(Box(x=(0, 1)), [9.0], [900.0], amplitude=[1.0, 1e-6])).axes[0]) == 401


@pytest.mark.parametrize("shifted", [False, True])
def test_waves_too_fast_for_a_map_are_shown_in_part(shifted):
    solver = stub(Box(x=(0, 1), y=(0, 2)), [100.0, 1.0], nodes=400)
    with pytest.warns(UserWarning, match=r"x is shown from 0 to 0.5 only: 100 waves on 201 points.*window="):
        part = domain_slice(solver, shifted=shifted)
    assert part.axes[0].max() == pytest.approx(0.5, abs=1 / 400) and part.axes[1].max() == pytest.approx(2, abs=1 / 200)
    assert np.diff(part.axes[0]).max() <= 1 / 399 + 1e-12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        narrow = domain_slice(solver, {"x": (0.3, 0.6), "y": (0, 0.5)}, shifted=shifted)
    assert narrow.axes[0].min() == pytest.approx(0.3, abs=1 / 400)


def test_errors_of_fast_waves_are_told_of_the_whole_domain():
    k = 400 * math.pi  # 200 waves, of which the map's points see none

    def exact(x, y):
        return torch.sin(k * x) * torch.cos(math.pi * y)

    class Wrong(GPPDESolver):
        def predict(self, X, return_std=False, derivative="", field=None):
            mean = 0.9 * exact(*torch.as_tensor(X).unbind(1)).numpy()
            return (mean, np.full(len(X), 0.01)) if return_std else mean

    solver = Wrong()
    vars(solver).update(vars(stub(Box(x=(0, 1), y=(0, 1)), [200.0, 0.5])))
    with pytest.warns(UserWarning, match="x is shown from 0 to 0.25 only"):
        display = ErrorDisplay.from_estimator(solver, exact)
    assert display.relative_error == pytest.approx(0.1, abs=1e-9)
    # |0.1 sin cos| ≤ 0.02 for about two fifths of the domain
    assert 0.2 < display.coverage < 0.5
    assert np.abs(display.exact).max() > 0.9


def test_sensors_are_drawn_where_they_are(advection):
    X, y = np.array([[0.1, 0.2], [0.6, 0.4]]), np.array([0.3, -0.5])
    plane = SolutionDisplay.from_estimator(advection, observations=(X, y), resolution=5, kind="solution")
    mesh, points = plane.ax_.collections
    np.testing.assert_array_equal(points.get_offsets(), X)
    # a sensor that reads what the map shows cannot be told from it
    np.testing.assert_array_equal(points.get_array(), y)
    assert points.norm is mesh.norm and points.cmap is mesh.cmap
    assert [text.get_text() for text in plane.ax_.get_legend().get_texts()] == ["sensors"]
    assert to_hex(plane.ax_.get_legend().legend_handles[0].get_facecolor()[0]) == INK
    line = SolutionDisplay.from_estimator(
        advection, observations=(X, y), window={"t": 0.3}, resolution=5, kind="solution"
    )
    np.testing.assert_array_equal(lines_of(line.ax_)["sensors"].get_xydata(), np.column_stack([X[:, 0], y]))


def test_only_sensors_of_the_shown_quantity_are_drawn(poisson):
    X = np.array([[0.1], [0.6]])
    of_u, of_slope = Sensors(X, np.array([1.0, 2.0]), 0.1), Sensors(X, np.array([3.0, 4.0]), 0.1, derivative="x")
    shown = SolutionDisplay.from_estimator(poisson, observations=[of_u, of_slope, (X, X[:, 0], 0.1)])
    np.testing.assert_array_equal(shown.y, [1.0, 2.0, 0.1, 0.6])
    slope = SolutionDisplay.from_estimator(poisson, observations=[of_u, of_slope], derivative="x")
    np.testing.assert_array_equal(slope.y, [3.0, 4.0])
    none = SolutionDisplay.from_estimator(poisson, observations=(X, X[:, 0]), derivative="x", kind="solution")
    assert none.X is None and "sensors" not in lines_of(none.ax_)
    assert SolutionDisplay.from_estimator(poisson, observations=of_u).X.shape == (2, 1)
    with pytest.raises(ValueError, match="fields u, not 'v'"):
        SolutionDisplay.from_estimator(poisson, observations=Sensors(X, X[:, 0], 0.1, field="v"))


def test_a_method_without_posterior_shows_its_mean(mean_only):
    display = SolutionDisplay.from_estimator(mean_only, resolution=7)
    assert display.std is None and not isinstance(display.ax_, np.ndarray)
    with pytest.raises(ValueError, match="this method has none"):
        display.plot(kind="both")
    error = ErrorDisplay.from_estimator(mean_only, lambda x, y: x**2, resolution=7)
    assert error.coverage is None and "within" not in error.ax_.get_title("left")
    assert error.relative_error < 1e-4


def test_a_solver_on_a_grid_shows_the_lines_of_its_data(mean_only):
    display = SpectrumDisplay.from_estimator(mean_only)
    np.testing.assert_array_equal(display.frequency, mean_only.lines_.frequency)
    np.testing.assert_array_equal(display.weight, mean_only.lines_.amplitude**2)
    assert "in the data" in display.ax_[0].get_ylabel()
    with pytest.raises(ValueError, match="no line was found"):
        SpectrumDisplay.from_estimator(stub(Box(x=(0, 1))))


def test_error_is_told_with_its_coverage(poisson):
    display = ErrorDisplay.from_estimator(poisson, wave, resolution=101)
    x = display.axes[0]
    mean, std = poisson.predict(x[:, None], return_std=True)
    error = mean - np.sin(40 * x)
    assert display.relative_error < 1e-6 and display.coverage >= 0.95
    drawn = lines_of(display.ax_)
    np.testing.assert_allclose(drawn["|error|"].get_ydata(), np.abs(error), rtol=0, atol=1e-15)
    np.testing.assert_array_equal(drawn["2 sd"].get_ydata(), 2 * std)
    assert f"{display.relative_error:.1e}" in display.ax_.get_title("left")


@pytest.mark.parametrize("size", [1e-6, 1e-12])
def test_an_error_far_below_the_deviation_stays_in_the_picture(size):
    x = np.linspace(0, 1, 50)
    display = ErrorDisplay.from_predictions(x, size * (1 + x), np.zeros(50), np.where(x < 0.1, 0.0, 1e-4), names="x")
    assert 0 < display.ax_.get_ylim()[0] < 1.5 * size


def test_what_is_zero_everywhere_is_drawn_and_within():
    x, zero = np.linspace(0, 1, 5), np.zeros(5)
    error = ErrorDisplay.from_predictions(x, zero, zero, zero)
    assert error.coverage == 1.0 and error.relative_error == 0.0 and error.ax_.get_yscale() == "linear"
    assert SolutionDisplay.from_predictions(x, zero, zero).ax_[1].get_yscale() == "linear"
    both = SolutionDisplay.from_predictions([x, x], np.zeros((5, 5)), np.zeros((5, 5)))
    assert not both.ax_[1].collections[0].get_array().any()


def test_labels_around_zero_do_not_overlap():
    x = np.linspace(0, 1, 5)
    display = ErrorDisplay.from_predictions([x, x], np.full((5, 5), 3e-7), np.zeros((5, 5)))
    bar = display.ax_.collections[0].colorbar
    np.testing.assert_allclose(bar.get_ticks(), [-1e-7, -1e-8, 0, 1e-8, 1e-7], atol=1e-20)


def test_cells_end_where_the_axes_end():
    axes = [np.linspace(0, 1, 5), np.linspace(0, 2, 3)]
    mesh = SolutionDisplay.from_predictions(axes, np.ones((3, 5))).ax_.collections[0]
    corners = np.asarray(mesh.get_coordinates()).reshape(-1, 2)
    np.testing.assert_array_equal([corners.min(0), corners.max(0)], [[0, 0], [1, 2]])


def test_error_over_a_plane_is_even_around_zero(advection):
    display = ErrorDisplay.from_estimator(advection, travelling, resolution=9)
    mesh = display.ax_.collections[0]
    low, high = mesh.get_clim()
    assert low == -high == -np.abs(display.error).max()


def test_errors_beyond_the_band_are_outlined():
    axes = (np.linspace(0, 1, 5), np.linspace(0, 1, 4))
    exact, mean = np.ones((4, 5)), np.ones((4, 5))
    mean[1, 2] = 2.0
    display = ErrorDisplay.from_predictions(axes, mean, exact, np.full((4, 5), 0.1))
    assert display.coverage == 19 / 20 and display.relative_error == pytest.approx(1 / 20**0.5)
    assert len(display.ax_.collections) == 2
    inside = ErrorDisplay.from_predictions(axes, exact, exact, np.full((4, 5), 0.1))
    assert inside.coverage == 1.0 and len(inside.ax_.collections) == 1


def test_residual_is_shown_between_the_nodes(poisson, advection):
    display = ResidualDisplay.from_estimator(poisson)
    np.testing.assert_allclose(display.axes[0], poisson.pde.domain.midpoints(40)[:, 0].numpy(), atol=1e-15)
    np.testing.assert_array_equal(display.residual, poisson.residual(display.axes[0][:, None]))
    assert f"{display.rms:.1e}" in display.ax_.get_title("left")
    plane = ResidualDisplay.from_estimator(advection, resolution=5)
    assert plane.residual.shape == (5, 5)
    at = advection.residual([[plane.axes[0][4], plane.axes[1][1]]])
    assert plane.residual[1, 4] == pytest.approx(at[0], abs=1e-9)
    few = ResidualDisplay.from_estimator(poisson, window={"x": (0.5, 1.0)}, resolution=15)
    assert len(few.axes[0]) == 15 and few.axes[0].min() >= 0.5


def test_fields_and_equations_of_a_system_are_told_apart():
    pde = PDE(lambda p, u, d, c: (d("x", "u") - 10 * u.v, d("x", "v") + 10 * u.u), Box(x=(0, 1)), fields=("u", "v"))
    solver = GPPDESolver(pde, [Dirichlet("x=0", 0.0), Dirichlet("x=0", 1.0, field="v")], n_collocation=30).fit()
    second = ResidualDisplay.from_estimator(solver, equation=1)
    np.testing.assert_array_equal(second.residual, solver.residual(second.axes[0][:, None])[1])
    cosine = ErrorDisplay.from_estimator(solver, lambda x: torch.cos(10 * x), field="v")
    assert cosine.relative_error < 1e-6 and cosine.ax_.get_ylabel() == "error of v"
    np.testing.assert_array_equal(
        SpectrumDisplay.from_estimator(solver, field="v").weight, solver.kernels_[1].weight.detach().numpy()
    )


def test_spectrum_has_a_panel_for_each_axis(advection):
    display = SpectrumDisplay.from_estimator(advection)
    kernel = advection.kernels_[0]
    np.testing.assert_array_equal(display.frequency, kernel.frequency.detach().numpy())
    assert display.ax_.shape == (2,)
    points = display.ax_[1].get_lines()[0]
    np.testing.assert_array_equal(points.get_xdata(), display.frequency[:, 1])
    np.testing.assert_allclose(points.get_ydata().sum(), 1.0)
    assert display.ax_[1].get_xlabel() == "cycles per unit of t"


def test_width_of_a_line_is_that_of_its_gaussian():
    display = SpectrumDisplay.from_predictions([[3.0]], [2.0], [[0.5]], names=["x"])
    (segment,) = display.ax_.collections[-1].get_segments()
    np.testing.assert_allclose(segment[:, 0], [3.0 - 1 / math.pi, 3.0 + 1 / math.pi])


def test_mixtures_of_ordinary_estimators_are_shown():
    X = np.linspace(0, 1, 30)[:, None]
    kernel = GaussianMixture(weight=[1.0, 0.5], lengthscale=1.0, frequency=[0.0, 3.0])
    model = GPRegressor(kernel, optimizer=None).fit(X, np.sin(6 * np.pi * X[:, 0]))
    display = SpectrumDisplay.from_estimator(model)
    np.testing.assert_allclose(display.frequency, [[0.0], [3.0]])
    with pytest.raises(ValueError, match="no mixture"):
        SpectrumDisplay.from_estimator(GPRegressor(RBF(), optimizer=None).fit(X, X[:, 0]))


def test_numbers_alone_can_be_drawn():
    x = np.linspace(0, 1, 6)
    assert SolutionDisplay.from_predictions(x, x, 0.1 * x, names="x").ax_.shape == (2,)
    both = (x, np.linspace(0, 2, 3))
    assert SolutionDisplay.from_predictions(both, np.ones((3, 6))).names == ("x", "t")
    assert ResidualDisplay.from_predictions(both, np.full((3, 6), 2.0)).rms == 2.0


def test_wrong_requests_are_named(poisson, advection):
    with pytest.raises(ValueError, match="interval within 0 to 1"):
        SolutionDisplay.from_estimator(poisson, window={"x": (0.5, 2.0)})
    with pytest.raises(ValueError, match="not 'y'"):
        SolutionDisplay.from_estimator(poisson, window={"y": 1.0})
    with pytest.raises(ValueError, match="every axis"):
        SolutionDisplay.from_estimator(poisson, window={"x": 0.5})
    with pytest.raises(ValueError, match="one axis only"):
        SolutionDisplay.from_estimator(advection, n_samples=1, resolution=3)
    with pytest.raises(ValueError, match="equation must be 0 to 0"):
        ResidualDisplay.from_estimator(poisson, equation=1)
    with pytest.raises(ValueError, match="no shifted node"):
        ResidualDisplay.from_estimator(poisson, window={"x": (0.0, 0.001)})
    with pytest.raises(ValueError, match="the second axis first"):
        SolutionDisplay.from_predictions((np.arange(3.0), np.arange(2.0)), np.ones((3, 2)))
    with pytest.raises(ValueError, match="a pair of such"):
        SolutionDisplay.from_predictions((np.arange(3.0),) * 3, np.ones((3, 3, 3)))
    with pytest.raises(ValueError, match="field must be one of u"):
        SpectrumDisplay.from_estimator(poisson, field="v")
    with pytest.raises(ValueError, match="frequency and lengthscale"):
        SpectrumDisplay.from_predictions([1.0], [1.0], [1.0])
    with pytest.raises(ValueError, match="names must be 1"):
        SpectrumDisplay.from_predictions([[1.0]], [1.0], [[1.0]], names=["x", "t"])
    with pytest.raises(ValueError, match="kind must be one of"):
        SolutionDisplay.from_estimator(poisson, resolution=31, kind="bars")
    for draw in (SolutionDisplay, ResidualDisplay, SpectrumDisplay):
        with pytest.raises(NotFittedError):
            draw.from_estimator(GPPDESolver(poisson.pde))
