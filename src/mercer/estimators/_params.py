"""Nested parameters: ``kernel__lengthscale`` and ``engine__step_size`` through get_params and set_params.

Kernels are gpytorch modules and families and engines frozen dataclasses; neither knows scikit-learn's protocol,
so the estimator speaks it for them.
"""

from __future__ import annotations

import copy
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import nn

from mercer.kernels.params import kernel_params, set_kernel_param


class NestedKernelParams:
    """Mixin that extends scikit-learn's deep parameters to kernels, families and engines."""

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the parameters of the estimator and, if ``deep``, of its kernel, family and engine.

        Parameters
        ----------
        deep : bool, default=True

        Returns
        -------
        dict
            Nested names use ``__``: ``kernel__base_kernel__lengthscale``, in the user's units.
        """
        params = super().get_params(deep=deep)  # type: ignore[misc]
        if deep:
            for owner, value in list(params.items()):
                for name, nested in _nested(value).items():
                    params[f"{owner}__{name}"] = nested
        return params

    def set_params(self, **params: Any) -> Any:
        """Set parameters, nested ones included; a nested value changes a copy of the object that holds it.

        Raises
        ------
        ValueError
            Unknown name, or a nested name where the parameter holds no object (``kernel=None`` or a string).
        """
        own = {name: value for name, value in params.items() if "__" not in name}
        super().set_params(**own)  # type: ignore[misc]
        copied: set[str] = set()
        for path, value in params.items():
            owner, _, name = path.partition("__")
            if not name:
                continue
            if owner not in super().get_params(deep=False):  # type: ignore[misc]
                super().set_params(**{path: value})  # type: ignore[misc]  # raises with scikit-learn's message
            target = getattr(self, owner)
            if isinstance(target, nn.Module):
                if owner not in copied:  # objects may be shared between estimators
                    setattr(self, owner, copy.deepcopy(target))
                    copied.add(owner)
                set_kernel_param(getattr(self, owner), name, value)
            elif is_dataclass(target) and not isinstance(target, type) and name in {f.name for f in fields(target)}:
                setattr(self, owner, replace(target, **{name: value}))
            else:
                raise ValueError(
                    f"Invalid parameter {path!r}: {owner}={target!r} has no parameter {name!r}. "
                    f"Pass an object, for instance {owner}=Matern52(), to set its parameters by name."
                    if target is None or isinstance(target, str)
                    else f"Invalid parameter {path!r}: {type(target).__name__} has {sorted(_nested(target))}."
                )
        return self


def _nested(value: Any) -> dict[str, Any]:
    """Return the parameters inside a kernel or a frozen dataclass."""
    if isinstance(value, type):
        return {}
    if isinstance(value, nn.Module) and hasattr(value, "active_dims"):
        return kernel_params(value)
    if is_dataclass(value):
        return {f.name: getattr(value, f.name) for f in fields(value)}
    return {}
