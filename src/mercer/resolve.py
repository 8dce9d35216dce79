"""Turn strings and "auto" into a Model, by rules that can be read, and say why.

``FAMILY_RULES`` and ``ENGINE_RULES`` are the whole of "auto": the first rule that applies wins, and its reason is
repeated in the fit report. Pairs that do not fit are refused with the nearest pair that does.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from mercer.families.base import Family, Prior
from mercer.families.dklgp import DoubleKL
from mercer.families.exact import Exact
from mercer.families.inducing import Inducing
from mercer.families.inducing_vecchia import InducingVecchia
from mercer.families.sic import SparseInverseCholesky
from mercer.inference.conjugate import Conjugate
from mercer.inference.dual import Dual
from mercer.inference.freeform import Freeform
from mercer.inference.laplace import Laplace
from mercer.inference.moment import PowerEP
from mercer.likelihoods.base import Likelihood
from mercer.model import Model
from mercer.policy import NumericalPolicy

_EXACT_MATRICES = 4  # n × n matrices alive at the peak of one evidence-and-gradient evaluation
_FINAL_MATRICES = 3  # and at the peak of conditioning, which is in float64 whatever the policy
_EXACT_ROWS = 6000  # n³ operations per evaluation: a fit of so many rows takes minutes on a few cores


@dataclass(frozen=True)
class Problem:
    """What the rules look at: n rows, d columns, the likelihood, the numerical policy, and for engines the family."""

    n_rows: int
    n_features: int
    likelihood: Likelihood
    policy: NumericalPolicy
    family: str = ""

    @property
    def exact_bytes(self) -> int:
        """Peak memory of the exact family, in bytes."""
        itemsize = torch.finfo(self.policy.dtype).bits // 8
        per_pair = max(_EXACT_MATRICES * itemsize, _FINAL_MATRICES * 8)
        return per_pair * self.likelihood.n_latents * self.n_rows**2

    @property
    def exact_fits(self) -> bool:
        """Whether the exact family has the memory, and a fit the time that people wait."""
        soon = self.likelihood.n_latents * self.n_rows**3 <= _EXACT_ROWS**3
        return soon and self.exact_bytes <= _memory(self.policy.device)


@dataclass(frozen=True)
class Rule:
    """One row of an "auto" table."""

    name: str
    applies: Callable[[Problem], bool]
    make: Callable[[], Any]
    reason: Callable[[Problem], str]


FAMILY_RULES: tuple[Rule, ...] = (
    Rule(
        "exact",
        lambda p: p.exact_fits,
        Exact,
        lambda p: f"n = {p.n_rows}: the exact posterior needs {_size(p.exact_bytes)} and has no approximation error",
    ),
    Rule(
        "sic",
        lambda p: True,
        SparseInverseCholesky,
        lambda p: (
            f"n = {p.n_rows}: the exact posterior would need {_size(p.exact_bytes)} and n³ operations; "
            "each row is given its nearest neighbours instead"
        ),
    ),
)

ENGINE_RULES: tuple[Rule, ...] = (
    Rule("freeform", lambda p: p.family == "dklgp", Freeform, lambda p: "free parameters: trained by Adam on batches"),
    Rule("conjugate", lambda p: p.likelihood.conjugate, Conjugate, lambda p: "Gaussian noise: closed form"),
    Rule("dual", lambda p: True, Dual, lambda p: "non-Gaussian likelihood: natural-gradient variational sites"),
)

FAMILIES: dict[str, Callable[[], Any]] = {
    "exact": Exact,
    "inducing": Inducing,
    "sic": SparseInverseCholesky,
    "inducing_vecchia": InducingVecchia,
    "dklgp": DoubleKL,
}
ENGINES: dict[str, Callable[[], Any]] = {
    "conjugate": Conjugate,
    "dual": Dual,
    "laplace": Laplace,
    "power_ep": PowerEP,
    "freeform": Freeform,
}


def resolve(
    prior: Prior, likelihood: Likelihood, family: Any, engine: Any, n_rows: int, policy: NumericalPolicy, d: int
) -> tuple[Model, dict[str, str]]:
    """Return the model and, per choice, the reason for it.

    Parameters
    ----------
    prior : Prior
    likelihood : Likelihood
    family : str or Family
        "auto", a key of ``FAMILIES``, or an object with ``plan`` and ``condition``.
    engine : str or Engine
        "auto", a key of ``ENGINES``, or an object with ``init``, ``step`` and ``objective``.
    n_rows, d : int
    policy : NumericalPolicy

    Raises
    ------
    ValueError
        Unknown name, a pair that does not fit, or a problem too large for the family.
    """
    problem = Problem(n_rows, d, likelihood, policy)
    family, family_reason = _choose("family", family, FAMILY_RULES, FAMILIES, Family, problem)
    if isinstance(family, SparseInverseCholesky) and family.variational == "free":
        family = DoubleKL(n_neighbors=family.n_neighbors, rho=family.rho if family.pattern == "ball" else None)
    problem = replace(problem, family=family.name)
    engine, engine_reason = _choose("engine", engine, ENGINE_RULES, ENGINES, None, problem)
    _check_pair(family, engine, likelihood)
    return Model(prior, likelihood, family, engine, policy), {"family": family_reason, "engine": engine_reason}


def _choose(
    parameter: str, choice: Any, rules: tuple[Rule, ...], table: dict[str, Any], kind: Any, problem: Problem
) -> tuple[Any, str]:
    if isinstance(choice, str):
        if choice == "auto":
            for rule in rules:
                if rule.applies(problem):
                    return rule.make(), rule.reason(problem)
            raise AssertionError("the last rule applies to every problem")
        if choice not in table:
            raise ValueError(f"{parameter}={choice!r} is unknown; choose one of {['auto', *table]} or pass an object.")
        return table[choice](), "chosen by the user"
    if isinstance(choice, type) or not (hasattr(choice, "name") and (kind is None or isinstance(choice, kind))):
        raise TypeError(
            f"{parameter} must be 'auto', one of {list(table)}, or an instance with that interface; got {choice!r}."
        )
    return choice, "chosen by the user"


def _check_pair(family: Any, engine: Any, likelihood: Likelihood) -> None:
    """Refuse an engine that cannot serve the family or the likelihood, naming the nearest pair that works."""
    name = type(likelihood).__name__
    if (family.name == "dklgp") != (engine.name == "freeform"):
        raise ValueError(
            f"family={family.name!r} and engine={engine.name!r} do not go together: free parameters need "
            "family='dklgp' with engine='freeform'; use family='sic' with any other engine."
        )
    if engine.name == "power_ep" and family.name == "inducing":
        raise ValueError(
            "engine='power_ep' needs a posterior of every row, and inducing points give one of their own values: use "
            "engine='dual', or family='exact' or 'sic' with power EP."
        )
    if engine.name == "conjugate" and not likelihood.conjugate:
        raise ValueError(f"engine='conjugate' needs a Gaussian likelihood, not {name}; use engine='dual'.")
    if engine.name in ("laplace", "power_ep", "moment", "freeform") and likelihood.n_latents > 1:
        raise ValueError(
            f"engine={engine.name!r} handles one latent function and {name} has {likelihood.n_latents}; "
            "use engine='dual'."
        )
    if isinstance(engine, Dual) and family.name != "inducing":
        if engine.batch_size is not None:
            option, default = f"batch_size={engine.batch_size}", "batch_size=None"
        elif engine.positivity == "riemann":
            option, default = "positivity='riemann'", "positivity='allow'"
        else:
            return
        raise ValueError(
            f"Dual({option}) needs a family with inducing points, not family={family.name!r}; use family='inducing', "
            f"or Dual({default})."
        )


def _memory(device: torch.device) -> int:
    """Return the memory of the device, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2g} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.2g} MB"
