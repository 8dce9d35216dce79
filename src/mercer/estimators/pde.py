"""Differential equations: an equation and its conditions in, a posterior of the solution out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor
from tqdm.auto import tqdm

from mercer.estimators._pde_inputs import (
    check_conditions,
    check_counts,
    check_observations,
    check_points,
    check_steps,
)
from mercer.kernels import Functional
from mercer.linalg.threads import lapack_first
from mercer.pde.conditions import Condition, field_number
from mercer.pde.equation import PDE
from mercer.pde.rows import derivative as functional_of
from mercer.pde.solve import solve


class GPPDESolver(BaseEstimator):
    """Gaussian-process solver of differential equations.

    u ~ GP(0, k), conditioned on N[u] = f at collocation nodes, on boundary and initial conditions, and on noisy
    observations. One solve for a linear equation; Gauss–Newton around it for others. Frequencies of the prior are read
    off the equation's data.

    Parameters
    ----------
    pde : PDE
        The equation, with its domain and unknown coefficients.
    conditions : condition of `mercer.pde`, such as a Dirichlet or an Initial, or a sequence of them, default=()
    kernel : {"gm", "stm"} or gpytorch Kernel, default="gm"
        ``"gm"`` and ``"stm"`` are mixtures of Gaussian and Student-t lines at the frequencies that are found; any other
        kernel is taken as it is, for each field.
    method : {"auto", "features", "dense", "grid", "sylvester"}, default="auto"
        ``"features"`` conditions trigonometric features by QR, ``"dense"`` any kernel by Cholesky; ``"grid"`` and
        ``"sylvester"`` return the mean only. ``fit_report_`` says which ran and why.
    n_collocation : int or sequence of int, default=None
        Nodes along each axis; None takes as many as the frequencies need. Features use fewer rows than nodes where
        that is enough.
    nugget : float, default=None
        Variance of the residual of exact rows, relative to their prior variance. None is 1e-20 for features, 1e-10 for
        the dense method (raised where the factorisation needs it) and where there are observations.
    optimizer : {"lbfgs", None}, default="lbfgs"
        None keeps hyperparameters as they are initialised where nothing unknown has to be learned.
    max_steps : int, default=20
        Most Gauss–Newton steps.
    extrapolate : bool, default=False
        Let `predict` and `sample` leave the domain.
    compat : bool or dict, default=False
        With ``method="grid"``, train as published (Fang et al., 2024): 10⁵ steps of Adam on a penalty. A dict gives
        ``max_iter``, ``seconds``, ``frequency_scale`` (cycles per unit of X), ``n_components``, ``boundary_weight``,
        and ``change_point``, the part of the training after which a smooth correction is trained instead.
    verbose : int, default=0
        Show a progress bar: conditionings so far, and how well the last solution meets the equation.
    dtype : {"float64"}, default="float64"
        Other precisions are refused: fourth derivatives of fast waves leave float32 no correct digit.
    device : str or torch.device, default=None

    Attributes
    ----------
    pde_ : PDE
        The equation of the last fit, which is the one that predictions solve.
    posterior_ : Posterior
        Answers for any Functional of the solution.
    coefficients_ : dict of str to Coefficient
        ``value``, ``std``, ``identified`` and ``drop`` of each unknown coefficient.
    kernels_ : list of gpytorch Kernel
        Prior of each field, in the units of X.
    lines_ : Lines
        Frequencies that were found, in cycles per unit of X, and their amplitudes.
    fit_report_ : Report
        Method and reason, nugget, ŝ², residual at shifted nodes, boundary error, nodes per shortest wavelength,
        linearisation steps, status.
    n_features_in_ : int

    See Also
    --------
    mercer.pde : domains, conditions and equations

    References
    ----------
    Särkkä (2011), Linear operators and stochastic partial differential equations in Gaussian process regression. Fang,
    Cooley, Long, Li, Kirby and Zhe (2024), Solving high frequency and multi-scale PDEs with Gaussian processes.

    Examples
    --------
    >>> import torch
    >>> from mercer.estimators import GPPDESolver
    >>> from mercer.pde import PDE, Box, Dirichlet
    >>> pde = PDE(lambda p, u, d, c: d("xx"), Box(x=(0, 1)), rhs=lambda x: -400 * torch.sin(20 * x))
    >>> solver = GPPDESolver(pde, [Dirichlet("boundary", lambda x: torch.sin(20 * x))]).fit()
    >>> mean, std = solver.predict([[0.3]], return_std=True)
    >>> bool(abs(mean[0] - torch.sin(torch.tensor(6.0))) < 1e-6)
    True
    """

    def __init__(
        self,
        pde: Any = None,
        conditions: Any = (),
        *,
        kernel: Any = "gm",
        method: str = "auto",
        n_collocation: Any = None,
        nugget: float | None = None,
        optimizer: str | None = "lbfgs",
        max_steps: int = 20,
        extrapolate: bool = False,
        compat: bool | dict[str, Any] = False,
        verbose: int = 0,
        dtype: str = "float64",
        device: Any = None,
    ):
        self.pde = pde
        self.conditions = conditions
        self.kernel = kernel
        self.method = method
        self.n_collocation = n_collocation
        self.nugget = nugget
        self.optimizer = optimizer
        self.max_steps = max_steps
        self.extrapolate = extrapolate
        self.compat = compat
        self.verbose = verbose
        self.dtype = dtype
        self.device = device

    def fit(self, observations: Any = None) -> GPPDESolver:
        """Condition on the equation, its conditions and the observations.

        Parameters
        ----------
        observations : (X, y), (X, y, noise), Sensors, or a sequence of these, default=None
            X (n, d), y (n,), and the standard deviation of the noise in units of y: a number, (n,), or None, the
            default, to learn it from two or more readings. Columns of a DataFrame X are found by the names of the axes.

        Returns
        -------
        self

        Raises
        ------
        TypeError
            float32, or something that is no PDE or condition.
        ValueError
            Observations off the domain, a number that is out of its range, or a method that does not fit.
        UnderresolvedError
            Fewer than 2.1 nodes per shortest wavelength: raise ``n_collocation``. A ValueError too.
        """
        conditions, counts = self._check_parameters()
        pde: PDE = self.pde
        sensors = check_observations(observations, pde.domain, self._device())
        with self._threads(), tqdm(desc="conditionings", disable=not self.verbose) as bar:

            def tell(text: str) -> None:
                bar.update(not text)
                if text:
                    bar.set_postfix_str(text)

            tell("looking for frequencies")
            solved = solve(
                pde,
                conditions,
                sensors,
                kernel=self.kernel,
                method=self.method,
                n_collocation=counts,
                nugget=self.nugget,
                optimizer=self.optimizer,
                max_steps=self.max_steps,
                device=self._device(),
                compat=self.compat,
                tell=tell,
            )
        self.pde_ = pde
        self.posterior_ = solved.posterior
        self.kernels_ = solved.kernels
        self.coefficients_ = solved.coefficients
        self.lines_ = solved.lines
        self.fit_report_ = solved.report
        self.n_features_in_ = pde.domain.d
        return self

    def predict(
        self,
        X: Any,
        return_std: bool = False,
        return_cov: bool = False,
        *,
        derivative: str = "",
        field: str | None = None,
    ) -> Any:
        """Predict the solution or one of its derivatives.

        Parameters
        ----------
        X : array-like, DataFrame or tensor of shape (n, d)
            A tensor gives tensors back; columns of a DataFrame are found by the names of the axes.
        return_std : bool, default=False
            Also return the standard deviation, in units of the prediction.
        return_cov : bool, default=False
            Also return the covariance; not with ``return_std``.
        derivative : str, default=""
            Such as "x" or "xt"; the solution itself by default.
        field : str, default=None
            Which unknown function; the first by default.

        Returns
        -------
        mean : (n,)
        std : (n,), if ``return_std``
        cov : (n, n), if ``return_cov``

        Raises
        ------
        ValueError
            Points off the domain without ``extrapolate=True``, or the wrong number of columns.
        NotImplementedError
            A standard deviation or covariance of a method that has none.
        """
        check_is_fitted(self, "posterior_")
        if return_std and return_cov:
            raise ValueError("return_std and return_cov cannot both be True; the covariance has the variances.")
        L, tensors = self._functional(X, derivative, field)
        with self._threads():
            if return_cov:
                return _wrapped(self.posterior_.joint(L), tensors)
            if not return_std:
                return _wrapped((self.posterior_.mean(L),), tensors)[0]
            mean, variance = self.posterior_.marginals(L)
        return _wrapped((mean, variance.sqrt()), tensors)

    def sample(
        self,
        X: Any,
        n_samples: int = 1,
        random_state: Any = 0,
        *,
        derivative: str = "",
        field: str | None = None,
    ) -> Any:
        """Draw solutions from the posterior and evaluate them at X.

        Parameters
        ----------
        X, derivative, field
            As in `predict`.
        n_samples : int, default=1
        random_state : int, RandomState or None, default=0
            With features, equal seeds give the same functions wherever they are evaluated.

        Returns
        -------
        (n, n_samples)
        """
        check_is_fitted(self, "posterior_")
        L, tensors = self._functional(X, derivative, field)
        seed = int(check_random_state(random_state).randint(2**31 - 1))
        generator = torch.Generator().manual_seed(seed)
        with self._threads():
            return _wrapped((self.posterior_.sample(L, n_samples, generator),), tensors)[0]

    def residual(self, X: Any) -> Any:
        """Return N[u] − f of the posterior mean at X (n, d): (n,), or (E, n) for a system."""
        check_is_fitted(self, "posterior_")
        points, tensors = self._points(X)
        pde = self.pde_
        values = [self.posterior_.mean(functional_of(points, index, number)) for number, index in pde.requests]
        learned = {name: torch.tensor(c.value, dtype=torch.float64) for name, c in self.coefficients_.items()}
        found = (pde.evaluate(points, values, learned or None) - pde.target(points)).detach()
        return _wrapped((found[0] if pde.n_equations == 1 else found,), tensors)[0]

    def _functional(self, X: Any, letters: str, field: str | None) -> tuple[Functional, bool]:
        points, tensors = self._points(X)
        pde = self.pde_
        number = 0 if field is None else field_number(field, pde.fields)
        return functional_of(points, pde.domain.order(letters), number), tensors

    def _points(self, X: Any) -> tuple[Tensor, bool]:
        """Return X as a float64 tensor inside the domain, and whether it was a tensor."""
        return check_points(X, self.pde_.domain, self._device(), self.extrapolate), isinstance(X, Tensor)

    def _check_parameters(self) -> tuple[list[Condition], int | tuple[int, ...] | None]:
        """Return conditions and nodes as `solve` takes them."""
        if not isinstance(self.pde, PDE):
            raise TypeError(f"pde must be a mercer.pde.PDE, got {type(self.pde).__name__}.")
        if self.dtype not in ("float64", torch.float64):
            raise TypeError(
                f"dtype={self.dtype!r} cannot solve equations: fourth derivatives of fast waves leave it no correct "
                "digit. Use dtype='float64'."
            )
        if isinstance(self.kernel, str) and self.kernel not in ("gm", "stm"):
            raise ValueError(f"kernel must be 'gm', 'stm' or a gpytorch kernel, got {self.kernel!r}.")
        if self.optimizer not in ("lbfgs", None):
            raise ValueError(f"optimizer must be 'lbfgs' or None, got {self.optimizer!r}.")
        check_steps(self.nugget, self.max_steps)
        return check_conditions(self.conditions), check_counts(self.n_collocation, self.pde.domain)

    def _threads(self) -> AbstractContextManager:
        """Keep small operations on one thread: most are done before a second one has woken up."""
        return lapack_first(1, self._device() or torch.device("cpu"))

    def _device(self) -> torch.device | None:
        return None if self.device is None else torch.device(self.device)


def _wrapped(values: Sequence[Tensor], tensors: bool) -> tuple[Any, ...]:
    return tuple(value if tensors else value.cpu().numpy() for value in values)
