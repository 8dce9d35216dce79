"""Engines: how sites and hyperparameters move."""

from mercer.inference.base import Engine, Inference, run
from mercer.inference.conjugate import Conjugate
from mercer.inference.dual import Dual
from mercer.inference.freeform import Freeform
from mercer.inference.laplace import Laplace
from mercer.inference.moment import PowerEP

__all__ = ["Conjugate", "Dual", "Engine", "Freeform", "Inference", "Laplace", "PowerEP", "run"]
