"""Pictures are drawn without a screen and closed after each test."""

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def close_figures():
    """Close what a test drew."""
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


@pytest.fixture
def wave():
    """One column, a sine with noise of known size."""
    generator = np.random.default_rng(0)
    X = np.sort(generator.uniform(0, 6, 30))[:, None]
    return X, np.sin(X[:, 0]) + 0.1 * generator.standard_normal(30)


@pytest.fixture
def quadrants():
    """Two columns, classes by the sign of their product."""
    X = np.random.default_rng(1).standard_normal((40, 2))
    return X, np.where(X[:, 0] * X[:, 1] > 0, "same", "other")
