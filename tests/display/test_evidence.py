"""EvidenceTraceDisplay: the trace of the report, and a view that survives a wild first step."""

import numpy as np
import pytest

from mercer import GPRegressor
from mercer.display import EvidenceTraceDisplay


def test_trace_of_a_fit_is_drawn(wave):
    model = GPRegressor("rbf").fit(*wave)
    display = EvidenceTraceDisplay.from_estimator(model)
    np.testing.assert_array_equal(display.trace, model.fit_report_.evidence_trace)
    assert "nats" in display.ax_.get_ylabel()


def test_best_so_far_never_falls_and_skips_failures():
    display = EvidenceTraceDisplay.from_predictions([-10.0, np.nan, -3.0, -5.0, -2.0], converged=True)
    best = display.ax_.get_lines()[1].get_ydata()
    np.testing.assert_array_equal(best, [-10.0, -10.0, -3.0, -3.0, -2.0])
    assert display.ax_.get_title(loc="left") == "converged"


def test_a_wild_start_does_not_flatten_the_rest():
    display = EvidenceTraceDisplay.from_predictions([-1e6, -12.0, -11.0, -10.5, -10.0])
    low, high = display.ax_.get_ylim()
    assert low > -1e3
    assert high > -10.0


def test_a_fit_without_optimiser_has_no_trace(wave):
    model = GPRegressor("rbf", optimizer=None).fit(*wave)
    with pytest.raises(ValueError, match="optimizer=None"):
        EvidenceTraceDisplay.from_predictions(model.fit_report_.evidence_trace)
