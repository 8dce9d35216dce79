"""Spectral mixtures: kernels that know at which frequencies a function lives.

Each component is a line in the spectrum, of Gaussian or Student-t shape, at a frequency of its own in every column.
Weights, lengthscales and frequencies are positive and learned in logarithms, so that small weights stay small and can
be pruned; a frequency given as exactly 0 stays 0.

References
----------
Wilson and Adams (2013), Gaussian process kernels for pattern discovery and extrapolation. Fang, Cooley, Long, Li, Kirby
and Zhe (2024), Solving high frequency and multi-scale PDEs with Gaussian processes, for the Student-t lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from numbers import Integral
from typing import Any

import torch
from gpytorch.constraints import Positive
from gpytorch.kernels import Kernel
from torch import Tensor

from mercer.kernels.mixture_gram import mixture_gram, toeplitz_gram
from mercer.kernels.params import assign, is_unset, parameter_value, read_param, write_param

SPECTRA = ("gaussian", "student")
_N_COMPONENTS = 4


class MixtureKernel(Kernel):
    """The kernel k(x, x′) = Σ_q w_q Π_j g(d_j; ℓ_qj) cos(2π μ_qj d_j) with d = x − x′.

    Parameters
    ----------
    n_components : int, optional
        Q; None takes it from the values given, or 4.
    weight : float or (Q,), optional
        Prior variance of each component, in units of y², > 0.
    lengthscale : float, (Q,) or (Q, d), optional
        How far a wave keeps its phase, in units of X, > 0.
    frequency : (Q,) for one column or (Q, d), optional
        Cycles per unit of X, ≥ 0. An entry that is exactly 0 is not learned: what it describes has no wave.
    spectrum : {"gaussian", "student"}
        g(d) = exp(−d²/2ℓ²), whose lines in the spectrum are Gaussian, or (1 + a + a²/3) e⁻ᵃ with a = √5 |d|/ℓ, whose
        lines are Student-t with 5 degrees of freedom: heavier tails, and two derivatives.
    active_dims : sequence of int or str, optional
        Columns that the kernel looks at, by position or by DataFrame name. None: all.

    Raises
    ------
    ValueError
        Shapes that do not agree, or values that are not positive.

    Notes
    -----
    What is None starts from the data at fit, and the number of columns is then that of X. Parameters are float64.

    Examples
    --------
    >>> import torch
    >>> kernel = MixtureKernel(weight=[1.0, 0.1], lengthscale=2.0, frequency=[0.0, 3.0])
    >>> kernel(torch.tensor([[0.0]]).double(), torch.tensor([[0.5]]).double()).to_dense().shape
    torch.Size([1, 1])
    """

    is_stationary = True
    moving: Tensor  # (Q, d), which frequencies are learned

    def __init__(
        self,
        n_components: int | None = None,
        *,
        weight: Any = None,
        lengthscale: Any = None,
        frequency: Any = None,
        spectrum: str = "gaussian",
        active_dims: Sequence[int] | Sequence[str] | None = None,
    ):
        if spectrum not in SPECTRA:
            raise ValueError(f"spectrum must be one of {SPECTRA}, got {spectrum!r}.")
        named = active_dims is not None and any(isinstance(column, str) for column in active_dims)
        dims = None if active_dims is None or named else tuple(int(column) for column in active_dims)
        super().__init__(active_dims=dims)
        if active_dims is not None and named:
            self.active_columns = tuple(active_dims)
        self.spectrum = spectrum
        values = {"weight": weight, "lengthscale": lengthscale, "frequency": frequency}
        given = {k: torch.as_tensor(v, dtype=torch.float64).detach() for k, v in values.items() if v is not None}
        q, d = _sizes(n_components, given, None if active_dims is None else len(active_dims))
        self.ard_num_dims = d
        self.ard_deferred = d is None
        self.register_buffer("moving", torch.ones(q, d or 1, dtype=torch.bool))
        for name, shape in (("weight", (q,)), ("lengthscale", (q, d or 1)), ("frequency", (q * (d or 1),))):
            self.register_parameter(f"raw_{name}", torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)))
            self.register_constraint(f"raw_{name}", Positive())
        for name, value in given.items():
            setattr(self, name, value)

    @property
    def n_components(self) -> int:
        """Number of components, Q."""
        return len(self.raw_weight)

    @property
    def short_name(self) -> str:
        """Name of the function that makes such a kernel."""
        return f"{self.spectrum.title()}Mixture"

    @property
    def weight(self) -> Tensor:
        """Variances of the components (Q,), in units of f²."""
        return self.raw_weight_constraint.transform(self.raw_weight)

    @weight.setter
    def weight(self, value: Any) -> None:
        assign(self, "raw_weight", torch.as_tensor(value, dtype=self.raw_weight.dtype))

    @property
    def lengthscale(self) -> Tensor:
        """Lengths of the windows (Q, d), in units of X."""
        return self.raw_lengthscale_constraint.transform(self.raw_lengthscale)

    @lengthscale.setter
    def lengthscale(self, value: Any) -> None:
        assign(self, "raw_lengthscale", self._of_components("lengthscale", value))

    @property
    def frequency(self) -> Tensor:
        """Frequencies (Q, d), in cycles per unit of X."""
        free = self.raw_frequency_constraint.transform(self.raw_frequency)
        return free.new_zeros(self.moving.shape).masked_scatter(self.moving, free)

    @frequency.setter
    def frequency(self, value: Any) -> None:
        """Set all frequencies; from now on those that are not zero are learned."""
        value = self._of_components("frequency", value)
        free = value[value != 0]
        before, learned = self.raw_frequency.data, self.raw_frequency.requires_grad or self.raw_frequency.numel() == 0
        self.raw_frequency.data = free.new_zeros(free.shape)
        try:
            if free.numel():
                assign(self, "raw_frequency", free)
        except ValueError:
            self.raw_frequency.data = before
            raise
        self.raw_frequency.requires_grad_(learned and free.numel() > 0)
        self.moving = value != 0

    def _of_components(self, name: str, value: Any) -> Tensor:
        """Return one number, (Q,) or (Q, d) as (Q, d); the last says how many columns there are if nothing has yet."""
        value = torch.as_tensor(value, dtype=self.raw_weight.dtype, device=self.raw_weight.device).detach()
        if self.ard_deferred and value.dim() == 2 and value.shape[1] > 1 and value.shape[0] in (1, self.n_components):
            self.resize(value.shape[1])
        try:
            return (value[:, None] if value.dim() == 1 else value).expand_as(self.moving)
        except RuntimeError as error:
            q, d = self.moving.shape
            raise ValueError(
                f"{name} of {self.short_name} must be one number, ({q},) with one per component or ({q}, {d}) with one "
                f"per column too, got {tuple(value.shape)}."
            ) from error

    def forget_frequency(self) -> None:
        """Leave all frequencies to the data, those of zero too."""
        self.moving = torch.ones_like(self.moving)
        self.raw_frequency.data = self.raw_frequency.new_zeros(self.moving.numel())
        self.raw_frequency.requires_grad_(True)

    def resize(self, n_columns: int) -> None:
        """Give every column what the only one had, for a kernel that did not know its columns before."""
        frequency, unset = self.frequency.detach(), is_unset(self.raw_frequency)
        self.moving = self.moving.expand(-1, n_columns).clone()
        self.raw_lengthscale.data = self.raw_lengthscale.data.expand(-1, n_columns).clone()
        self.raw_frequency.data = self.raw_frequency.new_zeros(int(self.moving.sum()))
        self.ard_num_dims, self.ard_deferred = n_columns, False
        if not unset:
            self.frequency = frequency.expand(-1, n_columns)

    def keep(self, components: Tensor) -> None:
        """Drop all components but those of the mask or index ``components``."""
        frequency = self.frequency.detach()[components]
        self.raw_weight.data = self.raw_weight.data[components].clone()
        self.raw_lengthscale.data = self.raw_lengthscale.data[components].clone()
        self.moving = self.moving[components]
        self.frequency = frequency

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        """Evaluate on rows (*b, n, d): (*b, n1, n2), or with ``diag`` k(x1[i], x2[i]), (*b, n)."""
        if diag:
            return self.orders_gram(x1.unsqueeze(-2), x2.unsqueeze(-2), (0,) * x1.shape[-1])[..., 0, 0]
        return self.orders_gram(x1, x2, (0,) * x1.shape[-1])

    def orders_gram(self, x1: Tensor, x2: Tensor, orders: Sequence[int]) -> Tensor:
        """Return the derivative of the given order in each column's lag, (*b, n1, n2); see `mixture_gram`."""
        known, seen = self.moving.shape[1], x1.shape[-1]
        if known not in (1, seen) or (known != seen and not self.ard_deferred):
            raise ValueError(
                f"kernel {type(self).__name__} has frequencies for {known} column(s) but sees {seen} columns of X; "
                "give one row of d frequencies per component, or choose the columns with active_dims."
            )
        shape = (-1, seen)
        ell = self.lengthscale.to(x1).expand(*shape)
        frequency = self.frequency.to(x1).expand(*shape) if self.raw_frequency.numel() else None
        parameters = (self.weight.to(x1), ell, frequency)
        grid = toeplitz_gram(self.spectrum, x1, *parameters, orders=orders) if x1 is x2 else None
        return mixture_gram(self.spectrum, x1, x2, *parameters, orders) if grid is None else grid


@read_param.register
def _(owner: MixtureKernel, leaf: str) -> Any:
    if is_unset(getattr(owner, leaf)) and not (leaf == "raw_frequency" and not owner.raw_frequency.numel()):
        return None
    value = getattr(owner, leaf.removeprefix("raw_")).detach()
    if value.numel() == 1:
        return value.item()
    return (value.squeeze(1) if value.dim() == 2 and value.shape[1] == 1 else value).tolist()


@write_param.register
def _(owner: MixtureKernel, leaf: str, value: Any) -> None:
    if value is not None:
        setattr(owner, leaf.removeprefix("raw_"), value)
    elif leaf == "raw_frequency":
        owner.forget_frequency()
    else:
        getattr(owner, leaf).data.zero_()


def GaussianMixture(n_components: int | None = None, **values: Any) -> MixtureKernel:
    """Return a mixture of Gaussian lines, exp(−d²/2ℓ²) cos(2πμd) each; see `MixtureKernel`.

    Examples
    --------
    >>> GaussianMixture(frequency=[0.0, 2.5]).n_components
    2
    """
    return MixtureKernel(n_components, spectrum="gaussian", **values)


def StudentMixture(n_components: int | None = None, **values: Any) -> MixtureKernel:
    """Return a mixture of Student-t lines, a Matérn-5/2 window times cos(2πμd) each; see `MixtureKernel`."""
    return MixtureKernel(n_components, spectrum="student", **values)


def prune(kernel: Kernel, tol: float = 1e-8) -> tuple[Kernel, int]:
    """Drop the components of mixtures whose weight is nothing beside the others.

    Parameters
    ----------
    kernel : gpytorch Kernel
        Any expression; left untouched.
    tol : float, default=1e-8
        Least share of the sum of weights, in each mixture.

    Returns
    -------
    kernel : gpytorch Kernel
        A copy. A weight that was never set is kept.
    n_dropped : int
        Number of components that are gone.
    """
    if not 0 <= tol < 1:
        raise ValueError(f"tol must be at least 0 and less than 1, got {tol}.")
    kernel, dropped = deepcopy(kernel), 0
    for part in kernel.modules():
        if isinstance(part, MixtureKernel) and not is_unset(part.raw_weight):
            weight = parameter_value(part, "raw_weight")
            kept = weight >= tol * weight.sum()
            dropped += int((~kept).sum())
            part.keep(kept)
    return kernel, dropped


def _sizes(n_components: int | None, given: dict[str, Tensor], active: int | None) -> tuple[int, int | None]:
    """Return Q and d from the shapes of what is given; d is None where nothing says it."""
    if n_components is not None and (isinstance(n_components, bool) or not isinstance(n_components, Integral)):
        raise ValueError(f"n_components must be a whole number, got {n_components!r}.")
    for name, value in given.items():
        if value.dim() > (1 if name == "weight" else 2):
            shapes = "(Q,)" if name == "weight" else "(Q,) or (Q, d)"
            raise ValueError(f"{name} must be one number, {shapes}, got {tuple(value.shape)}.")
    counts = {name: len(value) for name, value in given.items() if value.dim()}
    if n_components is not None:
        counts = {"n_components": int(n_components), **counts}
    widths = {name: value.shape[1] for name, value in given.items() if value.dim() == 2}
    if "frequency" in given and given["frequency"].dim() == 1:
        widths["frequency"] = 1
    if active is not None:
        widths = {"active_dims": active, **widths}
    for what, found in (("components", counts), ("columns", widths)):
        if len(set(found.values())) > 1:
            raise ValueError(f"the number of {what} differs: {', '.join(f'{k} has {v}' for k, v in found.items())}.")
    if min([*counts.values(), *widths.values()], default=1) < 1:
        raise ValueError("a mixture has at least one component and one column.")
    return next(iter(counts.values()), _N_COMPONENTS), next(iter(widths.values()), None)
