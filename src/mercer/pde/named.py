"""What the function of an equation is handed: coordinates, coefficients and unknown functions by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor


class Named:
    """Tensors by name, as attributes, items, or in their order."""

    def __init__(self, values: Mapping[str, Any]):
        self._values = dict(values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._values:
            known = ", ".join(self.__dict__.get("_values", {})) or "none"
            raise AttributeError(f"there is no {name!r} here; known: {known}.")
        return self._values[name]

    def __getitem__(self, key: str | int) -> Any:
        return self._values[key] if isinstance(key, str) else list(self._values.values())[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values.values())


class Fields(Named):
    """Values of unknown functions by name, evaluated only when they are asked for."""

    def __init__(self, fields: Sequence[str], value: Callable[[int], Tensor]):
        super().__init__({name: None for name in fields})
        self._value = value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._values:
            raise AttributeError(f"there is no field {name!r}; the equation has {', '.join(self._values)}.")
        return self._value(list(self._values).index(name))

    def __getitem__(self, key: str | int) -> Any:
        return getattr(self, key) if isinstance(key, str) else self._value(range(len(self._values))[key])

    def __iter__(self) -> Iterator[Any]:
        return (self._value(number) for number in range(len(self._values)))

    def only(self) -> Any:
        """Return the only one."""
        return self._value(0)
