"""Differential equations as data: a process conditioned on what an equation and its conditions say of it."""

from mercer.pde.conditions import Dirichlet, Initial, Neumann, NormalDerivative, Periodic, Robin
from mercer.pde.domain import Box
from mercer.pde.equation import PDE
from mercer.pde.problem import Sensors
from mercer.pde.solve import UnderresolvedError
from mercer.pde.unknowns import Positive, Real

__all__ = [
    "PDE",
    "Box",
    "Dirichlet",
    "Initial",
    "Neumann",
    "NormalDerivative",
    "Periodic",
    "Positive",
    "Real",
    "Robin",
    "Sensors",
    "UnderresolvedError",
]
