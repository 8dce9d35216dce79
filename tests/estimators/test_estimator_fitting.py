"""The fit itself: resuming, interrupting, watching and repeating."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.callback import ProgressBar, ScoringMonitor
from sklearn.exceptions import ConvergenceWarning
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mercer import GPClassifier, GPCountRegressor, GPRegressor

rng = np.random.default_rng(0)
N = 60
X = rng.normal(size=(N, 2))
Y = np.sin(2 * X[:, 0]) + 0.1 * rng.normal(size=N)
TARGETS = {
    GPRegressor: Y,
    GPClassifier: (Y + 0.2 * rng.normal(size=N) > 0).astype(int),
    GPCountRegressor: rng.poisson(np.exp(1 + Y)),
}
TASKS = pytest.mark.parametrize("task", TARGETS)
unconverged = pytest.mark.filterwarnings("ignore:.*did not converge")


class Watch:
    """A callback that writes down its hooks and may stop, or interrupt, after an iteration."""

    def __init__(self, stop=None, interrupt=None):
        self.stop, self.interrupt, self.events, self.values = stop, interrupt, [], []

    def setup(self, estimator, context):
        self.events.append("setup")

    def teardown(self, estimator, context):
        self.events.append("teardown")

    def on_fit_task_begin(self, estimator, context, *, X, y):
        self.events.append(("begin", context.task_name, context.task_id))

    def on_fit_task_end(self, estimator, context, *, X, y, fitted_estimator):
        self.events.append(("end", context.task_name, context.task_id))
        if fitted_estimator is not None:
            fitted_estimator.predict(X)
            self.values.append(fitted_estimator.log_marginal_likelihood_value_)
        if (context.task_name, context.task_id) == ("iteration", self.interrupt):
            raise KeyboardInterrupt
        return (context.task_name, context.task_id) == ("iteration", self.stop)


# ------------------------------------------------------------------ resuming


@TASKS
def test_a_warm_start_resumes_where_the_last_fit_ended(task):
    model = task(warm_start=True)
    first = model.fit(X, TARGETS[task]).n_iter_
    theta, value = model.theta_, model.log_marginal_likelihood_value_
    model.fit(X, TARGETS[task])
    assert model.n_iter_ < first
    assert model.log_marginal_likelihood_value_ >= value - 1e-6
    # the optimiser ends when an iteration gains less than 0.01 nats, so that θ moves little
    np.testing.assert_allclose(model.theta_, theta, atol=0.5)


@unconverged
def test_a_warm_start_starts_at_the_old_hyperparameters_in_the_new_units():
    model = GPRegressor(warm_start=True, max_iter=8).fit(X, Y)
    theta, names = model.theta_, model.theta_names_
    model.set_params(optimizer=None).fit(1000 * X, 7 * Y)
    np.testing.assert_allclose(model.theta_, theta, rtol=1e-9)
    # θ is in units of the data: the same lengthscale in other units is another function
    assert model.theta_names_ == names
    cold = GPRegressor(optimizer=None).fit(1000 * X, 7 * Y)
    assert np.abs(cold.theta_ - theta).max() > 1


@unconverged
def test_a_warm_start_of_another_model_starts_afresh():
    model = GPRegressor("rbf", warm_start=True, max_iter=3).fit(X, Y)
    model.set_params(kernel="matern52 + linear").fit(X, Y)
    cold = GPRegressor("matern52 + linear", max_iter=3).fit(X, Y)
    np.testing.assert_array_equal(model.theta_, cold.theta_)
    model.set_params(warm_start=False, kernel="rbf").fit(X, Y)
    np.testing.assert_array_equal(model.theta_, GPRegressor("rbf", max_iter=3).fit(X, Y).theta_)


@TASKS
def test_an_interrupt_keeps_the_best_and_a_warm_start_resumes(task):
    model = task(warm_start=True)
    full = task().fit(X, TARGETS[task])
    watch = Watch(interrupt=0)
    with pytest.raises(KeyboardInterrupt, match="best hyperparameters so far are kept, and warm_start=True resumes"):
        model.set_callbacks(watch).fit(X, TARGETS[task])
    assert watch.events[-1] == "teardown"
    assert not model.converged_ and "interrupted by the user" in str(model.fit_report_)
    assert np.isfinite(model.predict(X)).all()
    start = task(optimizer=None).fit(X, TARGETS[task]).log_marginal_likelihood_value_
    assert start < model.log_marginal_likelihood_value_ < full.log_marginal_likelihood_value_
    model.set_callbacks().fit(X, TARGETS[task])
    assert model.converged_
    assert model.log_marginal_likelihood_value_ == pytest.approx(full.log_marginal_likelihood_value_, abs=0.05)


def test_an_interrupt_before_anything_is_learned_leaves_the_model_as_it_was():
    class Impatient(Watch):
        def on_fit_task_begin(self, estimator, context, *, X, y):
            raise KeyboardInterrupt

    model = GPRegressor(optimizer=None).fit(X, Y)
    before = dict(model.__dict__)
    with pytest.raises(KeyboardInterrupt):
        model.set_callbacks(Impatient()).fit(2 * X, Y)
    model.set_callbacks()
    assert model.__dict__.keys() == before.keys()
    assert all(model.__dict__[name] is value for name, value in before.items())


# ------------------------------------------------------------------ watching


@TASKS
def test_callbacks_see_every_iteration_begin_and_end(task):
    watch = Watch()
    model = task().set_callbacks(watch).fit(X, TARGETS[task])
    iterations = [e for e in watch.events if e[1] == "iteration"]
    assert watch.events[:2] == ["setup", ("begin", "fit", 0)]
    assert watch.events[-2:] == [("end", "fit", 0), "teardown"]
    # the task begun last never runs: the optimiser decides only then that it is done
    assert iterations == [(what, "iteration", i) for i in range(model.n_iter_ + 1) for what in ("begin", "end")]
    assert len(watch.values) == model.n_iter_ + 1
    trace = model.fit_report_.evidence_trace
    # sites on the way converge to a share of the 0.01 nats that end the search
    np.testing.assert_allclose(watch.values[:-1], trace, rtol=1e-5, atol=5e-3)
    assert watch.values[-1] == model.log_marginal_likelihood_value_


def test_a_callback_can_stop_the_fit():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = GPRegressor().set_callbacks(Watch(stop=1)).fit(X, Y)
    assert model.n_iter_ == 2
    assert not model.converged_
    assert model.fit_report_.status == "stopped by a callback"
    assert [finding.code for finding in model.diagnose()] == ["not_converged"]


@TASKS
def test_scikit_learns_monitor_scores_every_iteration(task):
    monitor = ScoringMonitor(scoring="accuracy" if task is GPClassifier else "r2")
    model = task().set_callbacks(monitor).fit(X, TARGETS[task])
    scores = monitor.get_logs().data_as_pandas
    assert len(scores) == model.n_iter_ + 1
    assert scores.iloc[:, -1].max() > 0.5


def test_the_bar_of_a_pipeline_shows_our_fit(capsys):
    pytest.importorskip("rich")
    pipeline = make_pipeline(StandardScaler(), GPRegressor())
    pipeline.set_callbacks(ProgressBar(max_propagation_depth=2)).fit(X, Y)
    assert "GPRegressor" in capsys.readouterr().out


@unconverged
def test_callbacks_count_the_iterations_of_all_restarts():
    watch = Watch()
    GPRegressor(n_restarts=3, max_iter=2, random_state=0).set_callbacks(watch).fit(X, Y)
    assert sum(event[:2] == ("end", "iteration") for event in watch.events) > 4


@unconverged
def test_verbose_shows_a_bar_and_silence_is_the_default(capsys):
    GPRegressor(max_iter=3, verbose=1).fit(X, Y)
    shown = capsys.readouterr().err
    assert "GPRegressor" in shown and "evidence=" in shown and "/3" in shown
    GPRegressor(max_iter=3).fit(X, Y)
    out, err = capsys.readouterr()
    assert "GPRegressor" not in out + err


def test_warnings_point_to_the_line_that_called_fit():
    with pytest.warns(
        ConvergenceWarning, match="GPRegressor: hyperparameters did not converge .*raise max_iter=1"
    ) as seen:
        GPRegressor(max_iter=1).fit(X, Y)
    assert seen[0].filename == __file__


# ------------------------------------------------------------------ repeating


@TASKS
@unconverged
def test_the_same_seed_gives_the_same_bits(task):
    one, other = (task(n_restarts=2, max_iter=3, random_state=5).fit(X, TARGETS[task]) for _ in range(2))
    np.testing.assert_array_equal(one.theta_, other.theta_)
    np.testing.assert_array_equal(one.predict(X), other.predict(X))
    restarted = task(n_restarts=2, max_iter=3, random_state=6).fit(X, TARGETS[task])
    assert one.fit_report_.optima != restarted.fit_report_.optima


@unconverged
def test_fits_leave_global_random_states_alone():
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    model = GPClassifier(n_restarts=1, max_iter=2, random_state=0).fit(X, np.arange(N) % 3)
    model.sample_y(X, 2, latent=False)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)


@pytest.mark.parametrize(("task", "n"), [*((task, N) for task in TARGETS), (GPRegressor, 900)])
@unconverged
def test_the_order_of_rows_changes_nothing(task, n):
    """Also where hyperparameters are learned on a random subset first."""
    rows = np.random.default_rng(1).normal(size=(n, 2))
    y = np.sin(rows[:, 0]) if n > N else TARGETS[task]
    weight, order = np.random.default_rng(2).uniform(0.5, 2, size=n), np.random.default_rng(3).permutation(n)
    model = task(max_iter=3, random_state=0)
    theta = model.fit(rows, y, sample_weight=weight).theta_
    predicted = model.predict(rows)
    model.fit(rows[order], y[order], sample_weight=weight[order])
    np.testing.assert_array_equal(model.theta_, theta)
    np.testing.assert_array_equal(model.predict(rows), predicted)


def wave():
    """A periodic signal whose period the default start misses."""
    x = np.linspace(0, 10, 50)[:, None]
    return x, np.sin(2 * np.pi * x[:, 0] / 1.7) + 0.1 * np.random.default_rng(0).normal(size=50)


def test_restarts_find_a_better_optimum():
    x, y = wave()
    missed = GPRegressor("periodic").fit(x, y)
    found = GPRegressor("periodic", n_restarts=8, random_state=0).fit(x, y)
    assert missed.kernel_.base_kernel.period_length.item() > 3
    # one of its divisors would do as well, were it not for the lengthscale
    assert found.kernel_.base_kernel.period_length.item() == pytest.approx(1.7, rel=0.01)
    assert found.log_marginal_likelihood_value_ > missed.log_marginal_likelihood_value_ + 20
    assert len(found.fit_report_.optima) == 9
    assert max(found.fit_report_.optima) == 0.0
