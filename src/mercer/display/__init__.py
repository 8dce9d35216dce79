"""Pictures of fitted models, in scikit-learn's Display manner.

Every class has ``from_estimator`` (compute, then draw), ``from_predictions`` where numbers alone suffice, and
``plot(ax=None)`` to draw the stored numbers again; ``ax_`` and ``figure_`` hold what was drawn. matplotlib is
imported at the first plot, never at import: ``pip install matplotlib``.
"""

from mercer.display.calibration import CalibrationDisplay
from mercer.display.continual import ContinualDisplay, StreamDisplay
from mercer.display.evidence import EvidenceTraceDisplay
from mercer.display.pde import ErrorDisplay, ResidualDisplay
from mercer.display.predictive import PredictiveDisplay
from mercer.display.relevance import RelevanceDisplay
from mercer.display.solution import SolutionDisplay
from mercer.display.spectrum import SpectrumDisplay

__all__ = [
    "CalibrationDisplay",
    "ContinualDisplay",
    "ErrorDisplay",
    "EvidenceTraceDisplay",
    "PredictiveDisplay",
    "RelevanceDisplay",
    "ResidualDisplay",
    "SolutionDisplay",
    "SpectrumDisplay",
    "StreamDisplay",
]
