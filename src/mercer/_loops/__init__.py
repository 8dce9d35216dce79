"""Sequential loops over points, compiled: what no batched operation expresses.

Everything takes and returns NumPy arrays, lets go of the interpreter lock, and is cached on disk after the first call.
Indices are int64 and −1 marks padding.
"""

from mercer._loops.columns import column_factors, column_factors_adjoint
from mercer._loops.incomplete import incomplete_cholesky, incomplete_logdet_slope, sic_precision, sic_precision_adjoint
from mercer._loops.points import earlier_nearest, farthest_points, lower_keys, take_until
from mercer._loops.sweeps import levels, sic_map, sic_quadratic_forms

__all__ = [
    "column_factors",
    "column_factors_adjoint",
    "earlier_nearest",
    "farthest_points",
    "incomplete_cholesky",
    "incomplete_logdet_slope",
    "levels",
    "lower_keys",
    "sic_map",
    "sic_precision",
    "sic_precision_adjoint",
    "sic_quadratic_forms",
    "take_until",
]
