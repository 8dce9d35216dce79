"""ContinualDisplay and StreamDisplay: lines, heat map and running mean are the numbers that were given."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from mercer.display import ContinualDisplay, StreamDisplay
from mercer.estimators._prequential import StreamScore
from mercer.interop.continual import ContinualScore

MATRIX = np.array([[1.0, 0.2, 0.0], [0.8, 0.9, 0.1], [0.5, 0.7, 0.6]])


def test_each_task_has_a_line_and_the_mean_of_those_seen_is_drawn():
    display = ContinualDisplay.from_matrix(MATRIX, ["a", "b", "c"], kind="lines")
    lines = {line.get_label(): line for line in display.ax_.get_lines()}
    np.testing.assert_array_equal(lines["b"].get_ydata(), [0.9, 0.7])
    np.testing.assert_array_equal(lines["b"].get_xdata(), [2, 3])
    np.testing.assert_allclose(lines["mean of those seen"].get_ydata(), [1.0, 0.85, 0.6])
    assert display.figure_ is display.ax_.figure


def test_tasks_to_come_are_dotted():
    display = ContinualDisplay.from_matrix(MATRIX, kind="lines")
    dotted = [line for line in display.ax_.get_lines() if line.get_linestyle() == ":"]
    np.testing.assert_array_equal([line.get_ydata()[0] for line in dotted], [0.2, 0.0])


def test_heat_map_tells_every_number():
    display = ContinualDisplay.from_matrix(MATRIX, ["a", "b", "c"], kind="matrix", label="R²")
    np.testing.assert_array_equal(display.ax_.images[0].get_array(), MATRIX)
    assert [text.get_text() for text in display.ax_.texts] == [f"{value:.2f}" for value in MATRIX.ravel()]
    assert [text.get_text() for text in display.ax_.get_xticklabels()] == ["a", "b", "c"]
    assert display.ax_.images[0].get_clim() == (0.0, 1.0)


def test_a_run_that_is_not_finished_and_scores_that_are_no_shares_are_drawn():
    partial = ContinualDisplay.from_matrix(np.array([[-0.5, -2.0, np.nan], [-0.8, -0.4, -3.0]]))
    assert partial.ax_.shape == (2,)
    assert partial.ax_[1].images[0].get_clim() == (-3.0, -0.4)
    assert partial.ax_[1].texts[2].get_text() == ""
    many = ContinualDisplay.from_matrix(np.full((13, 13), np.nan), kind="matrix")
    assert len(many.ax_.texts) == 0


def test_a_continual_score_is_drawn_with_its_names():
    score = ContinualScore(MATRIX, names=["zero, one", "two", "three"])
    display = ContinualDisplay.from_score(score, ax=plt.subplots(1, 2)[1])
    assert display.names == score.names
    np.testing.assert_array_equal(display.matrix, MATRIX)


def test_running_mean_is_weighted_by_rows_and_skips_the_first_batch():
    score = StreamScore(n_rows=[10, 10, 30], log_score=[np.nan, -2.0, -1.0], seconds=[0.1, 0.2, 0.3])
    display = StreamDisplay.from_score(score)
    batch, running = display.ax_[0].get_lines()
    np.testing.assert_array_equal(batch.get_ydata(), score.log_score)
    np.testing.assert_allclose(running.get_ydata(), [np.nan, -2.0, -1.25])
    assert -running.get_ydata()[-1] == pytest.approx(score.nlpd)
    np.testing.assert_allclose([bar.get_height() for bar in display.ax_[1].patches], score.seconds)
    assert "nats" in display.ax_[0].get_ylabel()


def test_one_panel_is_drawn_on_given_axes():
    ax = plt.subplots()[1]
    assert StreamDisplay.from_predictions([-1.0, -0.5], [0.1, 0.1], kind="score", ax=ax).ax_ is ax


def test_wrong_requests_are_named():
    with pytest.raises(ValueError, match="matrix must be"):
        ContinualDisplay.from_matrix(np.ones((3, 2)))
    with pytest.raises(ValueError, match="names must be 3"):
        ContinualDisplay.from_matrix(MATRIX, ["a"])
    with pytest.raises(ValueError, match="kind must be one of"):
        ContinualDisplay.from_matrix(MATRIX, kind="bars")
    with pytest.raises(ValueError, match="needs 2 axes"):
        ContinualDisplay.from_matrix(MATRIX, ax=plt.subplots()[1])
    with pytest.raises(ValueError, match="an entry for each batch"):
        StreamDisplay.from_predictions([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="an entry for each batch"):
        StreamDisplay.from_predictions([], [])
