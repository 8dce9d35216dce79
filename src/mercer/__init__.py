"""Gaussian processes behind scikit-learn estimators: prior × likelihood × family × engine."""

from mercer.estimators import GPClassifier, GPCountRegressor, GPPDESolver, GPRegressor, load

__version__ = "0.1.0"

__all__ = ["GPClassifier", "GPCountRegressor", "GPPDESolver", "GPRegressor", "__version__", "load"]
