"""Forecast atmospheric CO₂ at Mauna Loa ten years ahead: the library from end to end on real data.

Trend, season and short-term weather are three terms of one kernel; the last ten years are held out and
judged.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HELD_OUT_YEARS = 10.0
UNIT = "CO₂ (ppm)"
DAYS_PER_YEAR = 365.25


@dataclass(frozen=True)
class Series:
    """A series cut in two: times (n, 1) in decimal years, values (n,) in ppm; ``label`` names the rows."""

    label: str
    t: np.ndarray
    y: np.ndarray
    t_test: np.ndarray
    y_test: np.ndarray


@dataclass(frozen=True)
class Forecast:
    """A fitted model, its predictions over the held-out years (ppm) and how good they are.

    ``scores`` holds rmse (ppm), nlpd (nats per month), and coverage of the central 50 % and 95 % intervals.
    """

    series: Series
    model: Any
    mean: np.ndarray
    std: np.ndarray
    scores: dict[str, float]


def load_co2(months: int = 1) -> Series:
    """Load the weekly record bundled with statsmodels as means over ``months`` months.

    Parameters
    ----------
    months : int
        Months per mean; weeks without a measurement are left out, empty months too.

    Returns
    -------
    Series
        1958 to 2001; the last ten years are the test part.
    """
    from statsmodels.datasets import co2

    weekly = co2.load_pandas().data["co2"].dropna()
    years = weekly.index.year + (weekly.index.day_of_year - 1) / DAYS_PER_YEAR
    block = (weekly.index.year * 12 + weekly.index.month - 1) // months
    means = weekly.to_frame("y").assign(t=years).groupby(block).mean()
    # The time of a mean is the mean of its weeks' times, so that months with gaps are not out of phase.
    t, y = means["t"].to_numpy(), means["y"].to_numpy()
    train = t <= t[-1] - HELD_OUT_YEARS
    label = {1: "monthly means", 3: "quarterly means"}.get(months, f"means over {months} months")
    return Series(label, t[train, None], y[train], t[~train, None], y[~train])


def co2_kernel() -> Any:
    """Return trend + season + short-term kernel; length scales in years, output scales in ppm².

    The values are starting points of the right size, except the period: it is known to be a year and kept.
    """
    from mercer.kernels import RBF, Linear, Matern12, Matern52, Periodic, ScaleKernel

    year = Periodic(period=1.0)
    year.raw_period_length.requires_grad_(False)
    season = ScaleKernel(year * RBF(lengthscale=100.0)).double()
    season.outputscale = 10.0
    trend = Matern52(lengthscale=50.0, outputscale=1000.0) + Linear()
    return trend + season + Matern12(lengthscale=1.0, outputscale=1.0)


def forecast_co2(series: Series) -> Forecast:
    """Fit on the training part, predict the held-out part and score it.

    Parameters
    ----------
    series : Series
        From :func:`load_co2`.

    Returns
    -------
    Forecast
        The model and its scores.
    """
    from mercer import GPRegressor

    model = GPRegressor(co2_kernel(), random_state=0).fit(series.t, series.y)
    mean, std = model.predict(series.t_test, return_std=True)
    error = np.abs(series.y_test - mean) / std
    scores = {
        "rmse": float(np.sqrt(np.mean((series.y_test - mean) ** 2))),
        "nlpd": float(-np.mean(model.log_predictive_density(series.t_test, series.y_test))),
        "coverage_50": float(np.mean(error <= 0.6745)),
        "coverage_95": float(np.mean(error <= 1.96)),
    }
    return Forecast(series, model, mean, std, scores)


def draw(forecast: Forecast, path: Path) -> None:
    """Save one picture: the whole record with its forecast, the held-out years closer, and the calibration.

    Parameters
    ----------
    forecast : Forecast
        From :func:`forecast_co2`.
    path : Path
        Where to write; the suffix says the format.
    """
    from mercer.display import CalibrationDisplay
    from mercer.display._style import GREY, VERMILLION, pyplot
    from mercer.display.predictive import PredictiveDisplay

    series, model = forecast.series, forecast.model
    cut, end = float(series.t[-1, 0]), float(series.t_test[-1, 0])
    figure = pyplot().figure(figsize=(11.5, 7.6), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=(1.1, 1.0))
    whole, zoom = figure.add_subplot(grid[0, :]), figure.add_subplot(grid[1, :2])
    calibration = figure.add_subplot(grid[1, 2])
    for ax, start in ((whole, float(series.t[0, 0])), (zoom, cut - 3.0)):
        t = np.linspace(start, end + (3.0 if ax is whole else 0.0), 900)
        mean, std = model.predict(t[:, None], return_std=True)
        seen = series.t[:, 0] >= start
        PredictiveDisplay.from_predictions(
            t, mean, std, X=series.t[seen], y=series.y[seen], name="year", target_name=UNIT, ax=ax
        )
        ax.plot(series.t_test[:, 0], series.y_test, "o", color=VERMILLION, markersize=2.6, label="held out")
        ax.axvline(cut, color=GREY, linewidth=1.0, linestyle=":")
        ax.legend(frameon=False, fontsize="small", loc=("upper left", "lower right")[ax is zoom], ncols=2)
    scores = forecast.scores
    title = f"Mauna Loa CO₂: {len(series.y)} {series.label} to {cut:.1f}, then a forecast"
    whole.set_title(title, loc="left")
    whole.set_xlim(float(series.t[0, 0]) - 0.5, end + 3.0)
    title = f"held-out years: RMSE {scores['rmse']:.2f} ppm, NLPD {scores['nlpd']:.2f} nats"
    zoom.set_title(title, loc="left")
    CalibrationDisplay.from_predictions(
        series.y_test, mean=forecast.mean, std=forecast.std, kind="coverage", ax=calibration
    )
    calibration.set_title("calibration of the forecast", loc="left")
    figure.savefig(path, dpi=150)
    pyplot().close(figure)
