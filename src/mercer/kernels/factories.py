"""Short names for common kernels, and kernels from strings.

Each function returns a plain gpytorch kernel in float64. What can be known only when the data are seen
travels as two plain attributes, which :func:`mercer.kernels.adapt.prepare` resolves at fit:

- ``ard_deferred``: one lengthscale (or linear variance) per column, number of columns still unknown;
- ``active_columns``: names of DataFrame columns.

A parameter left at None keeps gpytorch's exact zero raw value, the sign that it was never set.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpytorch.kernels import (
    ConstantKernel,
    Kernel,
    LinearKernel,
    MaternKernel,
    PeriodicKernel,
    RBFKernel,
    RQKernel,
    ScaleKernel,
)

from mercer.kernels.mixture import GaussianMixture, StudentMixture
from mercer.kernels.params import assign

Number = float | Sequence[float]
Columns = Sequence[int] | Sequence[str]


def RBF(
    lengthscale: Number | None = None,
    *,
    ard: bool = True,
    active_dims: Columns | None = None,
    outputscale: float | None = None,
) -> Kernel:
    """Return the squared-exponential kernel s·exp(−d²/2), d the distance in lengthscales.

    Parameters
    ----------
    lengthscale : float or sequence of float, optional
        In units of the columns of X, > 0; one number, or one per active column. None: chosen at fit.
    ard : bool, default=True
        Whether each active column gets its own lengthscale; a scalar ``lengthscale`` is then its first value.
    active_dims : sequence of int or str, optional
        Columns that the kernel looks at, by position or by DataFrame name. None: all.
    outputscale : float, optional
        Prior variance s in units of y², > 0. None: no scale here, one is added at fit where needed.

    Returns
    -------
    gpytorch Kernel
        ``RBFKernel``, inside a ``ScaleKernel`` if ``outputscale`` is given.

    Raises
    ------
    ValueError
        A value is not positive, or there are more lengthscales than active columns.

    References
    ----------
    Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, eq. 4.9.

    Examples
    --------
    >>> RBF(active_dims=["temp", "wind"]).active_columns
    ('temp', 'wind')
    """
    return _finish(RBFKernel, {"lengthscale": lengthscale}, ard, active_dims, outputscale)


def Matern12(
    lengthscale: Number | None = None,
    *,
    ard: bool = True,
    active_dims: Columns | None = None,
    outputscale: float | None = None,
) -> Kernel:
    """Return the Matérn kernel with ν = 1/2, s·exp(−d); parameters as in :func:`RBF`."""
    return _finish(MaternKernel, {"lengthscale": lengthscale}, ard, active_dims, outputscale, nu=0.5)


def Matern32(
    lengthscale: Number | None = None,
    *,
    ard: bool = True,
    active_dims: Columns | None = None,
    outputscale: float | None = None,
) -> Kernel:
    """Return the Matérn kernel with ν = 3/2, s·(1 + a)·exp(−a), a = √3 d; parameters as in :func:`RBF`."""
    return _finish(MaternKernel, {"lengthscale": lengthscale}, ard, active_dims, outputscale, nu=1.5)


def Matern52(
    lengthscale: Number | None = None,
    *,
    ard: bool = True,
    active_dims: Columns | None = None,
    outputscale: float | None = None,
) -> Kernel:
    """Return the Matérn kernel with ν = 5/2, s·(1 + a + a²/3)·exp(−a), a = √5 d; see :func:`RBF`."""
    return _finish(MaternKernel, {"lengthscale": lengthscale}, ard, active_dims, outputscale, nu=2.5)


def RationalQuadratic(
    lengthscale: Number | None = None,
    alpha: float | None = None,
    *,
    ard: bool = True,
    active_dims: Columns | None = None,
    outputscale: float | None = None,
) -> Kernel:
    """Return the rational quadratic kernel s·(1 + d²/2α)^−α, a gamma mixture of RBF kernels.

    ``alpha`` > 0 is dimensionless; the other parameters are those of :func:`RBF`.
    """
    return _finish(RQKernel, {"lengthscale": lengthscale, "alpha": alpha}, ard, active_dims, outputscale)


def Periodic(
    period: Number | None = None,
    lengthscale: Number | None = None,
    *,
    ard: bool = True,
    active_dims: Columns | None = None,
    outputscale: float | None = None,
) -> Kernel:
    """Return the periodic kernel s·exp(−2 Σᵢ sin²(π Δᵢ/pᵢ)/ℓᵢ).

    ``period`` is in units of the columns of X; ``lengthscale`` is dimensionless and, as in gpytorch, not
    squared. The other parameters are those of :func:`RBF`.
    """
    values = {"lengthscale": lengthscale, "period_length": period}
    return _finish(PeriodicKernel, values, ard, active_dims, outputscale)


def Linear(variance: Number | None = None, *, ard: bool = True, active_dims: Columns | None = None) -> Kernel:
    """Return the linear kernel Σᵢ vᵢ xᵢ x′ᵢ.

    ``variance`` is that of the slopes, in units of y² over those of X²; the other parameters are those of
    :func:`RBF`.
    """
    return _finish(LinearKernel, {"variance": variance}, ard, active_dims, None)


def Constant(constant: float | None = None) -> Kernel:
    """Return the constant kernel: an unknown offset with prior variance ``constant``, in units of y²."""
    kernel = ConstantKernel().double()
    if constant is not None:
        assign(kernel, "raw_constant", torch.as_tensor(constant, dtype=torch.float64))
    return kernel


_SHORTHANDS: dict[str, Callable[[], Kernel]] = {
    "rbf": RBF,
    "matern12": Matern12,
    "matern32": Matern32,
    "matern52": Matern52,
    "rq": RationalQuadratic,
    "periodic": Periodic,
    "linear": Linear,
    "constant": Constant,
    "gaussian_mixture": GaussianMixture,
    "student_mixture": StudentMixture,
}


def get_kernel(kernel: Any) -> Kernel:
    """Turn what a user passes as ``kernel`` into a kernel.

    Parameters
    ----------
    kernel : gpytorch Kernel or str
        A kernel is returned as it is. A string is a shorthand ("rbf", "matern12", "matern32", "matern52",
        "rq", "periodic", "linear", "constant", "gaussian_mixture", "student_mixture") or an expression of them
        with ``+``, ``*`` and parentheses.

    Raises
    ------
    ValueError
        The string is not such an expression.
    TypeError
        Anything else, such as a scikit-learn kernel or a kernel class.

    Examples
    --------
    >>> [type(part).__name__ for part in get_kernel("matern52 + linear").kernels]
    ['MaternKernel', 'LinearKernel']
    """
    if isinstance(kernel, Kernel):
        return kernel
    if isinstance(kernel, str):
        return _Parser(kernel).parse()
    if isinstance(kernel, type) and issubclass(kernel, Kernel):
        name = kernel.__name__
        raise TypeError(f"kernel must be an instance, got the class {name}; write {name}().")
    if any(kernel is function for function in _SHORTHANDS.values()):
        name = kernel.__name__
        raise TypeError(f"kernel must be a kernel, got the function {name}; write {name}().")
    if type(kernel).__module__.startswith("sklearn.gaussian_process"):
        raise TypeError(
            f"kernel is scikit-learn's {type(kernel).__name__}; use the kernels of mercer.kernels (RBF, "
            "Matern52, RationalQuadratic, Periodic, Linear, Constant); noise belongs to the estimator."
        )
    raise TypeError(
        f"kernel must be a gpytorch kernel or one of the strings {_choices()}, got {type(kernel).__name__}."
    )


class _Parser:
    """Recursive descent over ``sum := product ("+" product)*``, ``product := atom ("*" atom)*``."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = re.findall(r"\w+|\S", text)

    def parse(self) -> Kernel:
        kernel = self.sum()
        if self.tokens:
            raise self.error(self.tokens[0])
        return kernel

    def sum(self) -> Kernel:
        kernel = self.product()
        while self.accept("+"):
            kernel = kernel + self.product()
        return kernel

    def product(self) -> Kernel:
        kernel = self.atom()
        while self.accept("*"):
            kernel = kernel * self.atom()
        return kernel

    def atom(self) -> Kernel:
        if self.accept("("):
            kernel = self.sum()
            if not self.accept(")"):
                raise self.error("a missing parenthesis")
            return kernel
        name = self.tokens.pop(0) if self.tokens else "nothing"
        if name.lower() not in _SHORTHANDS:
            raise self.error(name)
        return _SHORTHANDS[name.lower()]()

    def accept(self, token: str) -> bool:
        if self.tokens and self.tokens[0] == token:
            self.tokens.pop(0)
            return True
        return False

    def error(self, found: str) -> ValueError:
        return ValueError(f"kernel={self.text!r} is not understood at {found!r}; use {_choices()}, joined by + and *.")


def _choices() -> str:
    return ", ".join(repr(name) for name in _SHORTHANDS)


def _finish(
    build: Callable[..., Kernel],
    values: dict[str, Number | None],
    ard: bool,
    active_dims: Columns | None,
    outputscale: float | None,
    **options: Any,
) -> Kernel:
    """Build a leaf, set its values, note what is deferred and add the scale."""
    named = active_dims is not None and any(isinstance(column, str) for column in active_dims)
    if active_dims is not None and not named:
        options["active_dims"] = [int(column) for column in active_dims]
    kernel = build(**options).double()
    if named:
        kernel.active_columns = tuple(active_dims or ())
    for name, value in values.items():
        if value is None:
            continue
        tensor = torch.as_tensor(value, dtype=torch.float64)
        if active_dims is not None and tensor.dim() and tensor.numel() not in (1, len(active_dims)):
            raise ValueError(f"{name} has {tensor.numel()} entries for {len(active_dims)} active_dims.")
        assign(kernel, f"raw_{name}", tensor)
    if ard and kernel.ard_num_dims is None:
        kernel.ard_deferred = True
    if outputscale is None:
        return kernel
    scaled = ScaleKernel(kernel).double()
    assign(scaled, "raw_outputscale", torch.as_tensor(outputscale, dtype=torch.float64))
    return scaled
