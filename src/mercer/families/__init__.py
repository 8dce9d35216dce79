"""Families: what p̂ is in q(f) ∝ p̂(f) ∏ sites."""

from mercer.families.base import Family, Posterior, Prior
from mercer.families.exact import Exact
from mercer.families.inducing import Inducing
from mercer.families.inducing_vecchia import InducingVecchia
from mercer.families.sic import SparseInverseCholesky

__all__ = ["Exact", "Family", "Inducing", "InducingVecchia", "Posterior", "Prior", "SparseInverseCholesky"]
