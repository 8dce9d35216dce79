"""Objects as JSON nodes and tensors, and back: what a saved file may contain.

A node is plain JSON, or a dictionary whose ``"$"`` says how to read it. Objects are of the classes listed here and of
no others, and no constructor, function or attribute of the file's choosing runs when they are made. Of a torch module
only its own parts are written. What torch and gpytorch keep inside each module is made anew by their base
constructors, so that a file can be read under another version of torch.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import gpytorch
import numpy as np
import torch
from gpytorch import priors
from torch import Tensor, nn

import mercer.inference
import mercer.kernels
import mercer.likelihoods
from mercer._typing import Data, Sites
from mercer.estimators._base import _CALLBACK_STATE
from mercer.estimators._report import FitReport
from mercer.estimators._rows import Rows, Units
from mercer.estimators.classifier import GPClassifier
from mercer.estimators.count import GPCountRegressor
from mercer.estimators.regressor import GPRegressor
from mercer.families.base import Prior
from mercer.families.dklgp import DoubleKL, FreeParameters, FreePlan, FreePosterior
from mercer.families.exact import Exact, ExactPlan, ExactPosterior
from mercer.families.hybrid_plan import HybridPlan, Points, Residual
from mercer.families.hybrid_posterior import HybridPosterior, Known
from mercer.families.inducing import Inducing
from mercer.families.inducing_plan import InducingPlan
from mercer.families.inducing_posterior import InducingPosterior, WhitenedState
from mercer.families.inducing_vecchia import InducingVecchia
from mercer.families.sic import SicPosterior, SparseInverseCholesky
from mercer.families.sic_plan import Nugget, SicPlan
from mercer.families.tied import GaussianStatistics, TiedSites
from mercer.inference.streaming import ConjugateStream
from mercer.kernels.derivative_rows import DerivativeRowsMean
from mercer.likelihoods.adapt import Adapted
from mercer.likelihoods.base import Likelihood
from mercer.linalg.conditioning import SiteFactor
from mercer.linalg.sic import Pattern
from mercer.linalg.sic_posterior import PosteriorPrecision
from mercer.model import Model
from mercer.policy import NumericalPolicy
from mercer.sequential import memory as memories
from mercer.sequential.options import Stream
from mercer.sequential.state import Memory, StreamState

ESTIMATORS: tuple[type, ...] = (GPRegressor, GPClassifier, GPCountRegressor)
_TAG = "$"


def _named(prefix: str, classes: Iterable[Any], base: type = object) -> dict[str, type]:
    """Return the classes below ``base`` under the names that files use; these do not say where the code lives."""
    return {f"{prefix}.{c.__name__}": c for c in classes if inspect.isclass(c) and issubclass(c, base)}


# gpytorch's priors are written as the arguments of their constructors, which are the attributes named here
_PRIORS: dict[type, tuple[str, ...]] = {
    priors.GammaPrior: ("concentration", "rate"),
    priors.HalfCauchyPrior: ("scale",),
    priors.HalfNormalPrior: ("scale",),
    priors.HorseshoePrior: ("scale",),
    priors.LogNormalPrior: ("loc", "scale"),
    priors.NormalPrior: ("loc", "scale"),
    priors.SmoothedBoxPrior: ("a", "b", "sigma"),
    priors.UniformPrior: ("low", "high"),
}
_CLASSES: dict[str, type] = {
    **_named("mercer", (*ESTIMATORS, FitReport, Rows, Units, Data, Sites, Prior, Model, NumericalPolicy, SiteFactor)),
    **_named("mercer.families", (Exact, ExactPlan, ExactPosterior)),
    **_named("mercer.families", (SparseInverseCholesky, SicPlan, SicPosterior, Nugget)),
    **_named("mercer.families", (Inducing, InducingPlan, InducingPosterior, WhitenedState)),
    **_named("mercer.families", (TiedSites, GaussianStatistics)),
    **_named("mercer.families", (InducingVecchia, HybridPlan, HybridPosterior, Known, Residual, Points)),
    **_named("mercer.families", (DoubleKL, FreePlan, FreePosterior, FreeParameters)),
    **_named("mercer.linalg", (Pattern, PosteriorPrecision)),
    **_named("mercer.inference", (ConjugateStream,)),
    **_named("mercer.sequential", (Stream, StreamState, Memory, memories.LeverageSample, memories.LeverageTop)),
    **_named("mercer.sequential", (memories.Uniform, memories.ClassBalanced)),
    **_named("mercer.inference", vars(mercer.inference).values()),
    **_named("mercer.likelihoods", (Adapted, *vars(mercer.likelihoods).values()), Likelihood),
    **_named("mercer.kernels", vars(mercer.kernels).values(), gpytorch.kernels.Kernel),
    **_named("gpytorch.kernels", vars(gpytorch.kernels).values(), gpytorch.kernels.Kernel),
    **_named("mercer.kernels", (DerivativeRowsMean,)),
    **_named("gpytorch.means", vars(gpytorch.means).values(), gpytorch.means.Mean),
    **_named("gpytorch.likelihoods", vars(gpytorch.likelihoods).values(), gpytorch.likelihoods.Likelihood),
    **_named("gpytorch.likelihoods", (gpytorch.likelihoods.noise_models.HomoskedasticNoise,)),
    **_named("gpytorch.constraints", vars(gpytorch.constraints).values(), gpytorch.constraints.Interval),
    **_named("gpytorch.priors", _PRIORS),
    **_named("gpytorch.utils", (gpytorch.utils.quadrature.GaussHermiteQuadrature1D,)),
    **_named("torch.nn", (nn.ModuleList, nn.Softplus)),
}
_NAMES = {cls: name for name, cls in _CLASSES.items()}
_FUNCTIONS: dict[str, Any] = {
    "torch.exp": torch.exp,
    "torch.log": torch.log,
    "torch.sigmoid": torch.sigmoid,
    "torch.nn.functional.softplus": nn.functional.softplus,
    "gpytorch.inv_sigmoid": gpytorch.utils.transforms.inv_sigmoid,
    "gpytorch.inv_softplus": gpytorch.utils.transforms.inv_softplus,
}
# what the base constructors make; of it only this flag is a choice of the module
_MADE_BY_BASE = vars(gpytorch.Module()).keys() - {"training"}


@dataclass(frozen=True)
class _Get:
    """The closure of a prior on an attribute of its module."""

    attribute: str

    def __call__(self, module: gpytorch.Module) -> Tensor:
        return getattr(module, self.attribute)


@dataclass(frozen=True)
class _Set:
    """The closure that sets what `_Get` reads."""

    attribute: str

    def __call__(self, module: gpytorch.Module, value: Tensor) -> None:
        module.initialize(**{self.attribute: value})


def _may_be_set(cls: type, name: str) -> bool:
    """Whether ``name`` may be a plain attribute: nothing that is Python's, torch's or code of the class."""
    known = inspect.getattr_static(cls, name, None)
    code = callable(known) or isinstance(known, (property, classmethod, staticmethod))
    return not (code or name.startswith("__") or name in _MADE_BY_BASE)


class Writer:
    """Turn objects into nodes; tensors are set aside under keys. Shared objects stay shared."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # an id is only unique while its object lives

    def encode(self, value: Any, where: str) -> Any:
        """Return the node of ``value``; ``where`` is its path, for the TypeError that unknown things raise."""
        if value is None or isinstance(value, (bool, str)) or type(value) is int:
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {_TAG: "float", "value": repr(value)}
        if isinstance(value, list):
            return [self.encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
        if type(value) in (tuple, torch.Size):
            tag = "tuple" if type(value) is tuple else "size"
            return {_TAG: tag, "items": self.encode(list(value), where)}
        if isinstance(value, dict):
            return {_TAG: "dict", "items": [[self.encode(k, where), v] for k, v in self._each(value, where)]}
        if isinstance(value, torch.dtype):
            return {_TAG: "dtype", "value": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {_TAG: "device"}
        if isinstance(value, np.generic):
            return {_TAG: "scalar", "array": self._array(np.asarray(value), where)}
        if isinstance(value, np.ndarray):
            return self._array(value, where)
        if inspect.ismethod(value) and type(value.__self__) in _PRIORS and value.__name__ == "log_prob":
            return {_TAG: "log_prob", "prior": self.encode(value.__self__, where)}
        for name, function in _FUNCTIONS.items():
            if value is function:
                return {_TAG: "function", "name": name}
        if id(value) in self._seen:
            return {_TAG: "again", "id": self._seen[id(value)]}
        self._alive.append(value)
        number = self._seen[id(value)] = len(self._seen)
        return {"id": number, **(self._tensor(value) if isinstance(value, Tensor) else self._object(value, where))}

    def _each(self, values: dict[Any, Any], where: str) -> list[list[Any]]:
        return [[key, self.encode(value, f"{where}.{key}")] for key, value in values.items()]

    def _store(self, value: Tensor) -> str:
        key = f"t{len(self.tensors)}"
        self.tensors[key] = value.contiguous().clone()
        return key

    def _array(self, value: np.ndarray, where: str) -> dict[str, Any]:
        if value.dtype.kind in "biuf":
            return {_TAG: "array", "key": self._store(torch.from_numpy(np.array(value)))}
        if value.dtype.kind in "UO" and all(isinstance(item, (str, int, float, bool)) for item in value.flat):
            kind = "O" if value.dtype.kind == "O" else "U"
            return {_TAG: "labels", "kind": kind, "shape": list(value.shape), "items": value.reshape(-1).tolist()}
        raise TypeError(f"{where} is an array of {value.dtype}, which cannot be saved; use pickle.")

    def _tensor(self, value: Tensor) -> dict[str, Any]:
        plain = value.detach().cpu()
        # factors come from LAPACK column by column, and the bits of a product depend on the layout
        transposed = plain.dim() > 1 and not plain.is_contiguous() and plain.mT.is_contiguous()
        node: dict[str, Any] = {_TAG: "tensor", "key": self._store(plain.mT if transposed else plain)}
        parameter = {"parameter": value.requires_grad} if isinstance(value, nn.Parameter) else {}
        return {**node, "transposed": transposed, **parameter}

    def _object(self, value: Any, where: str) -> dict[str, Any]:
        cls = type(value)
        if cls not in _NAMES:
            raise TypeError(
                f"{where} is a {cls.__module__}.{cls.__qualname__}, which cannot be saved without executing code on "
                "load; use pickle, or one of mercer's and gpytorch's own parts."
            )
        node = {_TAG: "object", "class": _NAMES[cls]}
        if cls in _PRIORS:
            arguments = [self.encode(getattr(value, name), where) for name in _PRIORS[cls]]
            return {**node, "arguments": arguments, "transform": self.encode(value._transform, f"{where}.transform")}
        if isinstance(value, tuple):  # a NamedTuple
            return {**node, "items": self.encode(list(value), where)}
        if isinstance(value, nn.Module):
            state = {name: item for name, item in vars(value).items() if name not in _MADE_BY_BASE}
            node |= self._module(value, where)
        else:
            held = value.__getstate__() or {}  # None of an object without state
            state = {k: v for k, v in held.items() if not k.startswith(_CALLBACK_STATE)}
            state.pop("_sklearn_version", None)
        for name in state:
            if not _may_be_set(cls, name):
                raise TypeError(f"{where}.{name} replaces a part of {cls.__name__}, which cannot be saved; use pickle.")
        return {**node, "state": self._each(state, where)}

    def _module(self, module: nn.Module, where: str) -> dict[str, Any]:
        if module._forward_hooks or module._forward_pre_hooks:
            raise TypeError(f"{where} has forward hooks, which are code and cannot be saved; use pickle.")
        parts = {
            "parameters": self._each(module._parameters, where),
            "buffers": self._each(module._buffers, where),
            "modules": self._each(module._modules, where),
        }
        if isinstance(module, gpytorch.Module):
            parts["constraints"] = list(module._constraints)
            parts["priors"] = [[name, _attribute(module, name, where)] for name in module._priors]
        return parts


def _attribute(module: gpytorch.Module, name: str, where: str) -> str:
    """Return the attribute that the prior ``name`` applies to."""
    closure = module._priors[name][1]
    if isinstance(closure, _Get):
        return closure.attribute
    if closure.__module__.startswith("gpytorch."):
        # register_prior holds the attribute's name as ``param``; gpytorch's classes have methods called _<name>_param,
        # or a lambda and the prior named after the attribute
        named = inspect.getclosurevars(closure).nonlocals.get("param", "")
        for attribute in (named, closure.__name__[1:].removesuffix("_param"), name.removesuffix("_prior")):
            value = getattr(module, attribute, None)
            if isinstance(value, Tensor) and torch.equal(closure(module), value):
                return attribute
    raise TypeError(
        f"{where}.{name} is a prior on a function, which cannot be saved without executing code on load; "
        "register it on an attribute by name, or use pickle."
    )


class Reader:
    """Turn nodes back into objects; ValueError for what is not known here, other errors for damage."""

    def __init__(self, tensors: dict[str, Tensor], device: torch.device):
        self.tensors, self.device = tensors, device
        self._made: dict[int, Any] = {}

    def decode(self, node: Any) -> Any:
        """Return the value of a node."""
        if isinstance(node, list):
            return [self.decode(item) for item in node]
        if not isinstance(node, dict):
            return node
        match node[_TAG]:
            case "float":
                return float(node["value"])
            case "tuple":
                return tuple(self.decode(node["items"]))
            case "size":
                return torch.Size(node["items"])
            case "dict":
                return {self.decode(key): self.decode(value) for key, value in node["items"]}
            case "dtype":
                return {"float64": torch.float64, "float32": torch.float32}[node["value"]]
            case "device":
                return self.device
            case "scalar":
                return self.decode(node["array"])[()]
            case "array":
                return self.tensors[node["key"]].cpu().numpy()
            case "labels":
                return np.array(node["items"], dtype=object if node["kind"] == "O" else str).reshape(node["shape"])
            case "log_prob":
                return self.decode(node["prior"]).log_prob
            case "function":
                return _FUNCTIONS[node["name"]]
            case "again":
                return self._made[node["id"]]
            case "tensor":
                return self._tensor(node)
            case "object":
                return self._object(node)
        raise ValueError(f"the tag {node[_TAG]!r} is unknown")

    def _tensor(self, node: dict[str, Any]) -> Tensor:
        value = self.tensors[node["key"]]
        value = value.mT if node["transposed"] else value
        if "parameter" in node:
            value = nn.Parameter(value, requires_grad=node["parameter"])
        self._made[node["id"]] = value
        return value

    def _object(self, node: dict[str, Any]) -> Any:
        cls = _CLASSES.get(node["class"])
        if cls is None:
            raise ValueError(f"the class {node['class']!r} is not one that mercer loads")
        made: Any
        if cls in _PRIORS:
            made = cls(*self.decode(node["arguments"]), transform=self.decode(node["transform"]))
        elif issubclass(cls, tuple):
            made = cls(*self.decode(node["items"]))
        else:
            made = cls.__new__(cls)
            self._made[node["id"]] = made  # before its parts, which may refer to it
            if isinstance(made, nn.Module):
                self._fill(made, node)
            for name, value in node["state"]:
                if not _may_be_set(cls, name):
                    raise ValueError(f"the attribute {name!r} of {cls.__name__} is not one that a file may set")
                vars(made)[name] = self.decode(value)  # attribute hooks do not run
        self._made[node["id"]] = made
        return made

    def _fill(self, made: nn.Module, node: dict[str, Any]) -> None:
        """Give a bare module its parts; torch refuses names that its class has already."""
        base = gpytorch.Module if isinstance(made, gpytorch.Module) else nn.Module
        base.__init__(made)
        for name, value in node["parameters"]:
            made.register_parameter(name, self.decode(value))
        for name, value in node["buffers"]:
            made.register_buffer(name, self.decode(value))
        for name, value in node["modules"]:
            made.add_module(name, self.decode(value))
        if isinstance(made, gpytorch.Module):
            made._constraints = {name: made._modules[name] for name in node["constraints"]}
            for name, attribute in node["priors"]:
                if attribute not in made._parameters and not isinstance(getattr(type(made), attribute, None), property):
                    raise ValueError(f"the prior {name!r} is on {attribute!r}, which {type(made).__name__} lacks")
                made._priors[name] = (made._modules[name], _Get(attribute), _Set(attribute))
