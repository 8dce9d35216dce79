"""Save a fitted estimator to one file and read it back, without executing anything that the file says.

The file is in the safetensors format: arrays are tensors, and the metadata hold one JSON document. What the document
may contain is decided in `mercer.estimators._nodes`; `pickle` remains for everything else.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

import safetensors
import safetensors.torch
from sklearn.utils.validation import check_is_fitted

import mercer
from mercer.estimators._base import BaseGP
from mercer.estimators._nodes import ESTIMATORS, Reader, Writer
from mercer.estimators._validation import resolve_device
from mercer.estimators.pde import GPPDESolver

FORMAT = "mercer-estimator"
VERSION = 1


def save(estimator: BaseGP, path: str | os.PathLike[str]) -> None:
    """Write a fitted estimator to ``path``.

    Parameters
    ----------
    estimator : GPRegressor, GPClassifier or GPCountRegressor
        Fitted. Callbacks are not saved.
    path : path-like
        The file is complete or unchanged: it is written beside its place and moved there.

    Raises
    ------
    NotFittedError
        The estimator is not fitted.
    TypeError
        It holds an object that this format does not know, such as a kernel of your own, or it is a GPPDESolver, whose
        equation is a function; use pickle.

    Notes
    -----
    Kernels, means, constraints and one-latent likelihoods of gpytorch are saved, and its Gamma, half-Cauchy,
    half-normal, horseshoe, log-normal, normal, smoothed-box and uniform priors. A prior must apply to an attribute
    of its module (``lengthscale_prior=…``, or ``register_prior`` with a name); one on a function of your own, and
    forward hooks, are code and refused.
    """
    check_is_fitted(estimator)
    if isinstance(estimator, GPPDESolver):
        raise TypeError(
            "a GPPDESolver holds its equation, which is a Python function, and files of mercer hold no code: use "
            "pickle, with the functions of the equation and its conditions defined at the top of a module."
        )
    if type(estimator) not in ESTIMATORS:
        raise TypeError(f"save knows {[c.__name__ for c in ESTIMATORS]}, not {type(estimator).__name__}; use pickle.")
    writer = Writer()
    node = writer.encode(estimator, type(estimator).__name__)
    document = {"format": FORMAT, "version": VERSION, "mercer": mercer.__version__, "estimator": node}
    target = Path(path).resolve()
    temporary = target.with_name(f".{target.name}.{uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode
        safetensors.torch.save_file(writer.tensors, temporary, metadata={"mercer": json.dumps(document)})
        os.chmod(temporary, mode)  # safetensors lets only the owner read; the umask decides here
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], device: Any = None) -> BaseGP:
    """Read an estimator that `save` wrote; no code in the file is executed.

    Parameters
    ----------
    path : path-like
    device : str or torch.device, default=None
        Where the tensors go, and where later fits of the estimator run; None puts the tensors on the CPU.

    Returns
    -------
    estimator
        Its predictions on the same device are those of the saved one, bit for bit.

    Raises
    ------
    OSError
        There is no such file.
    ValueError
        The file is damaged, was not written by mercer, or by a newer version of it.
    """
    file = os.fspath(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {file!r}.")
    place = resolve_device("cpu" if device is None else device, None)
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get("mercer", "null")
            # copies: bits may depend on the alignment of memory, and the file may change
            tensors = {key: opened.get_tensor(key).to(place, copy=True) for key in opened.keys()}  # noqa: SIM118
        document = json.loads(text)
    except (safetensors.SafetensorError, json.JSONDecodeError, RecursionError) as failure:
        raise ValueError(f"{file!r} is damaged or not a model that mercer saved: {failure}.") from failure
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{file!r} is not a model that mercer saved.")
    if document.get("version") != VERSION:
        raise ValueError(
            f"{file!r} has format version {document.get('version')!r}, written by mercer {document.get('mercer')!r}; "
            f"this is mercer {mercer.__version__}, which reads version {VERSION}. Install the version that wrote it."
        )
    try:
        estimator = Reader(tensors, place).decode(document["estimator"])
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as failure:
        raise ValueError(f"{file!r} is damaged: {failure!r}.") from failure
    if type(estimator) not in ESTIMATORS:
        raise ValueError(f"{file!r} does not hold an estimator.")
    if device is not None:
        estimator.device = device
    return estimator
