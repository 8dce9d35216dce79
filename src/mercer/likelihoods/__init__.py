"""Likelihoods p(y | f): one contract, one file per kind of target, and a table of names.

======================  =================================  ============================
name                    class                              targets
======================  =================================  ============================
``gaussian``            ``Gaussian``                       real
``student_t``           ``StudentT``                       real, with outliers
``bernoulli, probit``   ``Bernoulli("probit")``            0, 1
``logit``               ``Bernoulli("logit")``             0, 1
``softmax``             ``Softmax(n_classes)``             0, …, C − 1
``ordinal``             ``Ordinal(n_classes)``             0 < … < C − 1
``poisson``             ``Poisson``                        counts
``negative_binomial``   ``NegativeBinomial``               over-dispersed counts
======================  =================================  ============================
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from mercer.likelihoods.adapt import adapt
from mercer.likelihoods.base import ExpectedLogProb, Likelihood, LogProbDerivatives, Predictive
from mercer.likelihoods.categorical import Bernoulli, Softmax
from mercer.likelihoods.count import NegativeBinomial, Poisson
from mercer.likelihoods.gaussian import Gaussian
from mercer.likelihoods.ordinal import Ordinal
from mercer.likelihoods.robust import StudentT

__all__ = [
    "Bernoulli",
    "ExpectedLogProb",
    "Gaussian",
    "Likelihood",
    "LogProbDerivatives",
    "NegativeBinomial",
    "Ordinal",
    "Poisson",
    "Predictive",
    "Softmax",
    "StudentT",
    "adapt",
    "get_likelihood",
]

_BY_NAME: dict[str, tuple[Callable[..., Likelihood], tuple[str, ...]]] = {
    "gaussian": (Gaussian, ()),
    "student_t": (StudentT, ()),
    "bernoulli": (partial(Bernoulli, "probit"), ()),
    "probit": (partial(Bernoulli, "probit"), ()),
    "logit": (partial(Bernoulli, "logit"), ()),
    "softmax": (Softmax, ("n_classes",)),
    "poisson": (Poisson, ()),
    "negative_binomial": (NegativeBinomial, ()),
    "ordinal": (Ordinal, ("n_classes",)),
}


def get_likelihood(likelihood: str | Likelihood | Any, **context: Any) -> Likelihood:
    """Return the likelihood that a name or an object stands for.

    Parameters
    ----------
    likelihood : str, Likelihood or gpytorch likelihood
        A name of the table above; our own objects are returned as they are, gpytorch's are adapted (copied).
    **context
        What the data say, of which each name takes what it needs: ``n_classes`` for ``softmax`` and
        ``ordinal``.

    Raises
    ------
    ValueError
        Unknown name, or the context lacks what the name needs.
    TypeError
        Neither a name nor a likelihood object.
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    if isinstance(likelihood, str):
        if likelihood not in _BY_NAME:
            raise ValueError(f"likelihood={likelihood!r} is unknown; choose one of {', '.join(_BY_NAME)}.")
        build, needs = _BY_NAME[likelihood]
        missing = [name for name in needs if name not in context]
        if missing:
            raise ValueError(f"likelihood={likelihood!r} needs {', '.join(missing)}; pass a likelihood object.")
        return build(**{name: context[name] for name in needs})
    if isinstance(likelihood, torch.nn.Module):
        return adapt(likelihood)
    raise TypeError(f"likelihood must be a name or a likelihood object, got {type(likelihood).__name__}.")
