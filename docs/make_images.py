"""Draw the pictures of docs/pictures.md into docs/images; the same files each time with the same library versions.

Each function fits a small model, draws one picture and returns its figure.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from mercer import GPClassifier, GPCountRegressor, GPPDESolver, GPRegressor
from mercer.display import (
    CalibrationDisplay,
    ErrorDisplay,
    EvidenceTraceDisplay,
    PredictiveDisplay,
    RelevanceDisplay,
    ResidualDisplay,
    SolutionDisplay,
    SpectrumDisplay,
)
from mercer.pde import PDE, Box, Dirichlet, Initial, Positive

DPI = 80


def wave(n: int, seed: int) -> tuple[pd.DataFrame, np.ndarray]:
    """Return n noisy observations of a wave, with a gap in the middle."""
    rng = np.random.default_rng(seed)
    x = np.concatenate([rng.uniform(0, 4, n // 2), rng.uniform(6.5, 10, n - n // 2)])
    return pd.DataFrame({"distance (km)": x}), 3 * np.sin(x) + 0.4 * x + 0.4 * rng.normal(size=n)


def blobs(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return three overlapping classes in two columns."""
    rng = np.random.default_rng(seed)
    centres = np.array([[-1.2, 0.0], [1.2, 0.2], [0.0, 1.9]])
    label = rng.integers(0, 3, n)
    return centres[label] + 0.75 * rng.normal(size=(n, 2)), np.array(["ash", "oak", "elm"])[label]


def predictive_band() -> Any:
    X, y = wave(40, 0)
    model = GPRegressor(random_state=0).fit(X, y)
    return PredictiveDisplay.from_estimator(model, X, y, n_samples=3, target_name="height (m)").figure_


def predictive_step() -> Any:
    rng = np.random.default_rng(1)
    hour = rng.uniform(0, 24, size=80)
    X = pd.DataFrame({"hour of the day": hour})
    y = rng.poisson(np.exp(1.2 + np.sin(hour / 3)))
    model = GPCountRegressor(random_state=0).fit(X, y)
    return PredictiveDisplay.from_estimator(model, X, y, resolution=73, target_name="calls per hour").figure_


def predictive_curve() -> Any:
    rng = np.random.default_rng(2)
    X = rng.uniform(-3, 3, size=(80, 1))
    y = np.where(rng.random(80) < 1 / (1 + np.exp(-4 * np.sin(1.5 * X[:, 0]))), "yes", "no")
    model = GPClassifier(random_state=0).fit(X, y)
    return PredictiveDisplay.from_estimator(model, X, y, target_name="answer").figure_


def predictive_plane() -> Any:
    X, y = blobs(90, 3)
    model = GPClassifier(kernel="rbf", random_state=0).fit(X, y)
    return PredictiveDisplay.from_estimator(model, X, y, target_name="tree").figure_


def calibration() -> Any:
    X, y = wave(500, 4)
    model = GPRegressor(random_state=0).fit(X[::2], y[::2])
    return CalibrationDisplay.from_estimator(model, X[1::2], y[1::2]).figure_


def reliability() -> Any:
    X, y = blobs(1600, 5)
    tree = np.where(y == "oak", "oak", "other")
    model = GPClassifier(kernel="rbf", random_state=0).fit(X[::8], tree[::8])
    held = np.arange(len(y)) % 8 > 0
    return CalibrationDisplay.from_estimator(model, X[held], tree[held], n_bins=8).figure_


def evidence_trace() -> Any:
    rng = np.random.default_rng(6)
    X = rng.normal(size=(120, 6))
    y = np.sin(2 * X[:, 0]) + 0.5 * X[:, 1] ** 2 + 0.1 * rng.normal(size=120)
    return EvidenceTraceDisplay.from_estimator(GPRegressor(random_state=0).fit(X, y)).figure_


def relevance() -> Any:
    from sklearn.datasets import load_diabetes

    data = load_diabetes(as_frame=True)
    X, y = data.data, data.target
    return RelevanceDisplay.from_estimator(GPRegressor(kernel="rbf", random_state=0).fit(X, y), X).figure_


def fast_wave(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(500 * x) - 2 * (x - 0.5) ** 2


@cache
def poisson() -> GPPDESolver:
    """Solve u″ = f, where u is a fast wave on a parabola."""
    pde = PDE(lambda p, u, d, c: d("xx"), Box(x=(0, 1)), rhs=lambda x: -250_000 * torch.sin(500 * x) - 4)
    return GPPDESolver(pde, [Dirichlet("boundary", fast_wave)]).fit()


@cache
def burgers() -> GPPDESolver:
    """Solve Burgers' equation from a sine."""
    pde = PDE(lambda p, u, d, c: d("t") + u * d("x") - 0.05 * d("xx"), Box(x=(0, 1), t=(0, 0.5)))
    return GPPDESolver(pde, [Initial(lambda x: torch.sin(np.pi * x)), Dirichlet("x=0"), Dirichlet("x=1")]).fit()


def pde_solution() -> Any:
    return SolutionDisplay.from_estimator(poisson(), fast_wave, window={"x": (0, 0.1)}).figure_


def pde_error() -> Any:
    return ErrorDisplay.from_estimator(poisson(), fast_wave).figure_


def pde_plane() -> Any:
    return SolutionDisplay.from_estimator(burgers(), resolution=101).figure_


def pde_residual() -> Any:
    return ResidualDisplay.from_estimator(burgers()).figure_


def pde_spectrum() -> Any:
    pde = PDE(lambda p, u, d, c: d("t") + 200 * d("x"), Box(x=(0, 1), t=(0, 1)))
    inflow = Dirichlet("x=0", lambda t: torch.sin(-200 * t))
    return SpectrumDisplay.from_estimator(GPPDESolver(pde, [Initial(torch.sin), inflow]).fit()).figure_


def pde_heat() -> Any:
    rng = np.random.default_rng(0)
    X = rng.uniform(size=(30, 2))
    y = np.exp(-0.05 * np.pi**2 * X[:, 1]) * np.sin(np.pi * X[:, 0]) + 0.01 * rng.normal(size=30)
    domain, unknowns = Box(x=(0, 1), t=(0, 1)), {"kappa": Positive(0.2)}
    pde = PDE(lambda p, u, d, c: d("t") - c.kappa * d("xx"), domain, unknowns=unknowns)
    conditions = [Initial(lambda x: torch.sin(np.pi * x)), Dirichlet("x=0"), Dirichlet("x=1")]
    solver = GPPDESolver(pde, conditions, n_collocation=16).fit((X, y, 0.01))
    return SolutionDisplay.from_estimator(solver, observations=(X, y)).figure_


PICTURES = (
    predictive_band,
    predictive_step,
    predictive_curve,
    predictive_plane,
    calibration,
    reliability,
    evidence_trace,
    relevance,
    pde_solution,
    pde_error,
    pde_plane,
    pde_residual,
    pde_spectrum,
    pde_heat,
)


def main() -> int:
    folder = Path(__file__).resolve().parent / "images"
    folder.mkdir(exist_ok=True)
    for draw in PICTURES:
        path = folder / f"{draw.__name__}.png"
        figure = draw()
        # without the writer's version in the file, the bytes depend on the pixels alone
        figure.savefig(path, dpi=DPI, metadata={"Software": None})
        plt.close(figure)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
