"""Conformance suites for one's own parts: plain assertions that name the property that fails.

=======================  ========================================================
``check_kernel``         a gpytorch kernel that ``gram`` and ``diag`` evaluate
``check_likelihood``     densities, expectations and predictions of a likelihood
``check_family``         a Gaussian structure, against a dense twin
``check_engine``         an engine that moves sites, against itself
``check_operator``       a ``LinearOperator``, against ``to_dense()``
``check_botorch_model``  a model in BoTorch's terms; needs ``mercer[bo]``
=======================  ========================================================
"""

from typing import Any

from mercer.testing.engine import check_engine
from mercer.testing.family import check_family
from mercer.testing.kernel import check_kernel
from mercer.testing.likelihood import check_likelihood
from mercer.testing.operator import check_operator

__all__ = [
    "check_botorch_model",
    "check_engine",
    "check_family",
    "check_kernel",
    "check_likelihood",
    "check_operator",
]


def __getattr__(name: str) -> Any:
    if name == "check_botorch_model":  # optional, and it takes seconds to import
        from mercer.testing.botorch import check_botorch_model

        return check_botorch_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
