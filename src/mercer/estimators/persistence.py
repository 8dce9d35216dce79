"""Save a fitted estimator to one file and read it back, without executing anything that the file says.

The file is in the safetensors format: arrays as tensors, and in its metadata one JSON document of tagged nodes.
Loading builds objects of the classes listed here and of no others; `pickle` remains for everything else.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import gpytorch
import numpy as np
import safetensors
import safetensors.torch
import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

import mercer.families
import mercer.inference
import mercer.kernels
import mercer.likelihoods
from mercer._typing import Sites
from mercer.estimators._base import _CALLBACK_STATE, BaseGP
from mercer.estimators._report import FitReport
from mercer.estimators._rows import Rows, Units
from mercer.estimators.classifier import GPClassifier
from mercer.estimators.count import GPCountRegressor
from mercer.estimators.regressor import GPRegressor
from mercer.families.base import Prior
from mercer.families.exact import Exact, ExactPlan, ExactPosterior
from mercer.likelihoods.base import Likelihood
from mercer.linalg.conditioning import SiteFactor
from mercer.model import Model
from mercer.policy import NumericalPolicy

FORMAT = "mercer-estimator"
VERSION = 1
_TAG = "$"


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _public(module: Any, base: type) -> list[type]:
    return [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, base)]


_ESTIMATORS: tuple[type, ...] = (GPRegressor, GPClassifier, GPCountRegressor)
_CLASSES: dict[str, type] = {
    _name(c): c
    for c in (
        *_ESTIMATORS,
        *(FitReport, Rows, Units, Sites, Prior, Model, NumericalPolicy),
        *(Exact, ExactPlan, ExactPosterior, SiteFactor),
        *(mercer.inference.Conjugate, mercer.inference.Dual, mercer.inference.Laplace, mercer.inference.PowerEP),
        *_public(gpytorch.kernels, gpytorch.kernels.Kernel),
        *_public(mercer.kernels, gpytorch.kernels.Kernel),
        *_public(gpytorch.means, gpytorch.means.Mean),
        *_public(gpytorch.constraints, gpytorch.constraints.Interval),
        *_public(mercer.likelihoods, Likelihood),
        *(nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict),
    )
}
_FUNCTIONS: dict[str, Any] = {
    f"{f.__module__}.{f.__name__}": f
    for f in (
        torch.nn.functional.softplus,
        torch.exp,
        torch.log,
        torch.sigmoid,
        gpytorch.utils.transforms.inv_softplus,
        gpytorch.utils.transforms.inv_sigmoid,
    )
}


def save(estimator: BaseGP, path: str | os.PathLike[str]) -> None:
    """Write a fitted estimator to ``path``.

    Parameters
    ----------
    estimator : GPRegressor, GPClassifier or GPCountRegressor
        Fitted. Callbacks are not saved.
    path : path-like
        The file is complete or absent: it is written beside its place and moved there.

    Raises
    ------
    NotFittedError
        The estimator is not fitted.
    TypeError
        It holds an object that this format does not know, such as a kernel of your own.
    """
    check_is_fitted(estimator)
    if type(estimator) not in _ESTIMATORS:
        raise TypeError(f"save knows {[c.__name__ for c in _ESTIMATORS]}, not {type(estimator).__name__}; use pickle.")
    writer = _Writer()
    document = {"format": FORMAT, "version": VERSION, "estimator": writer.encode(estimator, "estimator")}
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.resolve().parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        safetensors.torch.save_file(writer.tensors, temporary, metadata={"mercer": json.dumps(document)})
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(path: str | os.PathLike[str], device: Any = None) -> BaseGP:
    """Read an estimator that `save` wrote; no code in the file is executed.

    Parameters
    ----------
    path : path-like
    device : str or torch.device, default=None
        Where the tensors go; None is the CPU.

    Returns
    -------
    estimator
        Its predictions on the same device are those of the saved one, bit for bit.

    Raises
    ------
    OSError
        There is no such file.
    ValueError
        The file is damaged, was not written by mercer, or is of a newer version.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {os.fspath(path)!r}.")
    target = torch.device("cpu" if device is None else device)
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt") as opened:
            text = (opened.metadata() or {}).get("mercer")
            tensors = {key: opened.get_tensor(key).to(target) for key in opened.keys()}  # noqa: SIM118
        document = json.loads(text) if text else None
    except (safetensors.SafetensorError, json.JSONDecodeError) as failure:
        raise ValueError(f"{os.fspath(path)!r} is damaged or not a model that mercer saved: {failure}.") from failure
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{os.fspath(path)!r} is not a model that mercer saved.")
    if document.get("version") != VERSION:
        raise ValueError(
            f"{os.fspath(path)!r} has format version {document.get('version')!r} and this mercer reads {VERSION}; "
            "install the version that wrote it, or save it again."
        )
    try:
        estimator = _Reader(tensors, target).decode(document["estimator"])
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError) as failure:
        raise ValueError(f"{os.fspath(path)!r} is damaged: {failure!r}.") from failure
    if type(estimator) not in _ESTIMATORS:
        raise ValueError(f"{os.fspath(path)!r} does not hold an estimator.")
    return estimator


class _Writer:
    """Turn objects into tagged JSON nodes; tensors are set aside under keys. Shared objects stay shared."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # an id is only unique while its object lives

    def _store(self, value: Tensor) -> str:
        key = f"t{len(self.tensors)}"
        self.tensors[key] = value.detach().cpu().contiguous().clone()
        return key

    def encode(self, value: Any, where: str) -> Any:
        """Return the node of ``value``; ``where`` is its path, for errors."""
        if value is None or isinstance(value, (bool, str)) or type(value) is int:
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {_TAG: "float", "value": repr(value)}
        if isinstance(value, list):
            return [self.encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
        if isinstance(value, torch.Size):
            return {_TAG: "size", "items": list(value)}
        if type(value) is tuple:
            return {_TAG: "tuple", "items": [self.encode(item, f"{where}[{i}]") for i, item in enumerate(value)]}
        if isinstance(value, dict):
            pairs = [[self.encode(k, where), self.encode(v, f"{where}.{k}")] for k, v in value.items()]
            return {_TAG: "dict", "items": pairs}
        if isinstance(value, (set, frozenset)):
            return {_TAG: "set", "items": sorted(self.encode(item, where) for item in value)}
        if isinstance(value, torch.dtype):
            return {_TAG: "dtype", "value": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {_TAG: "device"}
        if isinstance(value, np.generic):
            return {_TAG: "scalar", "array": self._array(np.asarray(value), where)}
        if isinstance(value, np.ndarray):
            return self._array(value, where)
        for name, function in _FUNCTIONS.items():
            if value is function:
                return {_TAG: "function", "name": name}
        return self._shared(value, where)

    def _array(self, value: np.ndarray, where: str) -> dict[str, Any]:
        if value.dtype.kind in "biuf":
            return {_TAG: "array", "key": self._store(torch.from_numpy(np.array(value)))}
        if value.dtype.kind in "UO" and all(isinstance(item, (str, int, float, bool)) for item in value.reshape(-1)):
            kind = "O" if value.dtype.kind == "O" else "U"
            return {_TAG: "labels", "kind": kind, "shape": list(value.shape), "items": value.reshape(-1).tolist()}
        raise TypeError(f"{where} is an array of {value.dtype}, which cannot be saved; use pickle.")

    def _shared(self, value: Any, where: str) -> dict[str, Any]:
        if id(value) in self._seen:
            return {_TAG: "again", "id": self._seen[id(value)]}
        self._alive.append(value)
        self._seen[id(value)] = number = len(self._seen)
        if isinstance(value, Tensor):
            parameter = isinstance(value, nn.Parameter)
            key = self._store(value)
            return {_TAG: "tensor", "id": number, "key": key, "parameter": parameter, "grad": value.requires_grad}
        name = _name(type(value))
        if _CLASSES.get(name) is not type(value):
            raise TypeError(
                f"{where} is a {name}, which cannot be saved without executing code on load; "
                "use pickle, or one of mercer's and gpytorch's own parts."
            )
        node = {_TAG: "object", "id": number, "class": name}
        if isinstance(value, tuple):  # a NamedTuple
            return {**node, "items": [self.encode(item, f"{where}[{i}]") for i, item in enumerate(value)]}
        state = {k: v for k, v in value.__getstate__().items() if not k.startswith(_CALLBACK_STATE)}
        return {**node, "state": [[k, self.encode(v, f"{where}.{k}")] for k, v in state.items() if _kept(value, k)]}


def _kept(owner: Any, name: str) -> bool:
    """Leave out the version stamp that scikit-learn adds to a state."""
    return not (isinstance(owner, BaseGP) and name == "_sklearn_version")


class _Reader:
    """Turn nodes back into objects of the listed classes."""

    def __init__(self, tensors: dict[str, Tensor], device: torch.device):
        self.tensors, self.device = tensors, device
        self._made: dict[int, Any] = {}

    def decode(self, node: Any) -> Any:
        """Return the value of a node."""
        if isinstance(node, list):
            return [self.decode(item) for item in node]
        if not isinstance(node, dict):
            return node
        tag = node[_TAG]
        reader = getattr(self, f"_read_{tag}", None) if isinstance(tag, str) else None
        if reader is None:
            raise ValueError(f"The file holds a node {tag!r} that this version of mercer does not know.")
        return reader(node)

    def _read_float(self, node: dict[str, Any]) -> float:
        return float(node["value"])

    def _read_size(self, node: dict[str, Any]) -> torch.Size:
        return torch.Size(node["items"])

    def _read_tuple(self, node: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(self.decode(item) for item in node["items"])

    def _read_dict(self, node: dict[str, Any]) -> dict[Any, Any]:
        return {self.decode(key): self.decode(value) for key, value in node["items"]}

    def _read_set(self, node: dict[str, Any]) -> set[Any]:
        return {self.decode(item) for item in node["items"]}

    def _read_dtype(self, node: dict[str, Any]) -> torch.dtype:
        return {"float64": torch.float64, "float32": torch.float32}[node["value"]]

    def _read_device(self, node: dict[str, Any]) -> torch.device:
        return self.device

    def _read_scalar(self, node: dict[str, Any]) -> Any:
        return self.decode(node["array"])[()]

    def _read_array(self, node: dict[str, Any]) -> np.ndarray:
        return self.tensors[node["key"]].cpu().numpy()

    def _read_labels(self, node: dict[str, Any]) -> np.ndarray:
        items = node["items"]
        return np.array(items, dtype=object if node["kind"] == "O" else str).reshape(node["shape"])

    def _read_function(self, node: dict[str, Any]) -> Any:
        return _FUNCTIONS[node["name"]]

    def _read_again(self, node: dict[str, Any]) -> Any:
        return self._made[node["id"]]

    def _read_tensor(self, node: dict[str, Any]) -> Tensor:
        value = self.tensors[node["key"]]
        if node["parameter"]:
            value = nn.Parameter(value, requires_grad=bool(node["grad"]))
        self._made[node["id"]] = value
        return value

    def _read_object(self, node: dict[str, Any]) -> Any:
        cls = _CLASSES.get(node["class"])
        if cls is None:
            raise ValueError(f"The file names the class {node['class']!r}, which mercer does not load.")
        if "items" in node:
            made = cls(*(self.decode(item) for item in node["items"]))
            self._made[node["id"]] = made
            return made
        made = cls.__new__(cls)
        self._made[node["id"]] = made
        # straight into the dictionary: neither constructors nor attribute hooks run
        made.__dict__.update({name: self.decode(value) for name, value in node["state"]})
        return made
