"""One public class per task, behind scikit-learn's contract."""

from mercer.estimators.classifier import GPClassifier
from mercer.estimators.count import GPCountRegressor
from mercer.estimators.pde import GPPDESolver
from mercer.estimators.persistence import load
from mercer.estimators.regressor import GPRegressor

__all__ = ["GPClassifier", "GPCountRegressor", "GPPDESolver", "GPRegressor", "load"]
