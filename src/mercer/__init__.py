"""Gaussian processes behind scikit-learn estimators."""
