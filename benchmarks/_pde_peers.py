"""The peers of pde.py: finite differences and Chebyshev collocation by SciPy, and a small physics-informed network.

All get the equation as data, its forcing, the values at the sides and the nodes of the reference. The two classical
solvers use as many nodes as those; the network draws points of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import scipy.sparse as sparse
import torch
from _pde_suite import Case
from scipy.interpolate import CubicSpline, RectBivariateSpline
from scipy.linalg import eig, lu_factor, lu_solve, solve_sylvester
from scipy.sparse.linalg import LinearOperator, gmres, splu
from torch import Tensor

_STEPS, _SETTLED = 30, 1e-10  # of Newton's method
_WIDTH, _DEPTH, _RATE = 64, 4, 1e-3
_BATCH = 1024  # points of a step of the network's training, and a quarter of that on each side
_SIDE_WEIGHT = 100.0


def finite_differences(case: Case) -> np.ndarray:
    """Solve with second-order differences on the uniform nodes, and interpolate by cubic splines.

    Laplace's operator has three points per axis. Advection is solved by the box scheme, which is of second order in
    both axes. Newton's method factors each Jacobian.

    Returns
    -------
    (n_test,) * d
    """
    axes = [np.linspace(*ends, n) for ends, n in zip(case.bounds.values(), case.nodes, strict=True)]
    U = _box_scheme(case, axes) if "t" in case.bounds else _sparse_newton(case, axes)
    new = [axis.numpy() for axis in case.test_axes()]
    if len(axes) == 1:
        return CubicSpline(axes[0], U)(new[0])
    return RectBivariateSpline(*axes, U)(*new)


def chebyshev(case: Case) -> np.ndarray:
    """Solve by collocation at Chebyshev points, dense along each axis, and interpolate with the same polynomial.

    Two axes are Sylvester's equation by eigenvectors; where the equation is not linear, that is the preconditioner of
    Newton's method with minimal residuals.
    """
    bounds = list(case.bounds.values())
    points, D = zip(*(_chebyshev(n, *ends) for n, ends in zip(case.nodes, bounds, strict=True)), strict=True)
    if "t" in case.bounds:
        U = _chebyshev_march(case, points, D)
    elif len(points) == 1:
        U = _dense_newton(case, points[0], D[0])
    else:
        U = _krylov_newton(case, points, D)
    for j, (x, axis) in enumerate(zip(points, case.test_axes(), strict=True)):
        U = np.moveaxis(np.tensordot(_barycentric(x, axis.numpy()), U, (1, j)), 0, j)
    return U


def _grid(case: Case, axes: tuple[np.ndarray, ...] | list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return forcing, exact values (of which only the sides may be used) and the mask of inner nodes."""
    coordinates = [torch.as_tensor(x) for x in np.meshgrid(*axes, indexing="ij")]
    shape = coordinates[0].shape
    flat = [x.reshape(-1) for x in coordinates]
    f = case.forcing(*flat) if case.forced else torch.zeros(flat[0].shape, dtype=torch.float64)
    inside = np.zeros(shape, dtype=bool)
    inside[(slice(1, -1),) * len(axes)] = True
    sides = np.where(inside, 0.0, case.exact(*flat).reshape(shape).numpy())
    return f.reshape(shape).numpy(), sides, inside


def _sparse_newton(case: Case, axes: list[np.ndarray]) -> np.ndarray:
    f, U, inside = _grid(case, axes)
    whole = sparse.csr_matrix((f.size, f.size))
    for j, x in enumerate(axes):
        n, h = len(x), x[1] - x[0]
        second = sparse.diags([1.0, -2.0, 1.0], [-1, 0, 1], shape=(n, n)) / h**2
        left, right = np.prod(f.shape[:j], dtype=int), np.prod(f.shape[j + 1 :], dtype=int)
        whole = whole + sparse.kron(sparse.kron(sparse.eye(left), second), sparse.eye(right), format="csr")
    mask = inside.reshape(-1)
    rows = whole[mask]
    A, edge = rows[:, mask].tocsc(), rows[:, ~mask] @ U.reshape(-1)[~mask]
    target = f.reshape(-1)[mask] - edge
    u = np.zeros(A.shape[0])
    for _ in range(_STEPS if case.cubic else 1):
        slope, value = (3 * u**2 - 1, u**3 - u) if case.cubic else (0 * u, 0 * u)
        step = splu((A + sparse.diags(slope)).tocsc()).solve(target - A @ u - value)
        u = u + step
        if np.linalg.norm(step) <= _SETTLED * np.linalg.norm(u):
            break
    U.reshape(-1)[mask] = u
    return U


def _box_scheme(case: Case, axes: list[np.ndarray]) -> np.ndarray:
    """Solve βu_x + u_t = 0 from the start and the inflow: both derivatives at the centre of each cell."""
    _, exact, _ = _grid(case, axes)
    (x, t), n = axes, [len(axis) for axis in axes]
    steps = [sparse.diags([-1.0, 1.0], [0, 1], shape=(k - 1, k)) for k in n]
    means = [sparse.diags([0.5, 0.5], [0, 1], shape=(k - 1, k)) for k in n]
    by_x = sparse.kron(steps[0] / (x[1] - x[0]), means[1]) * case.terms["x"]
    by_t = sparse.kron(means[0], steps[1] / (t[1] - t[0])) * case.terms["t"]
    known = np.zeros(exact.shape, dtype=bool)
    known[0], known[:, 0] = True, True
    mask, A = ~known.reshape(-1), (by_x + by_t).tocsc()
    U = np.where(known, exact, 0.0)
    U.reshape(-1)[mask] = splu(A[:, mask].tocsc()).solve(-A[:, ~mask] @ U.reshape(-1)[~mask])
    return U


def _dense_newton(case: Case, x: np.ndarray, D: np.ndarray) -> np.ndarray:
    f, U, _ = _grid(case, [x])
    second = D @ D
    A, target = second[1:-1, 1:-1], f[1:-1] - second[1:-1, [0, -1]] @ U[[0, -1]]
    u = np.zeros(len(x) - 2)
    for _ in range(_STEPS if case.cubic else 1):
        slope, value = (3 * u**2 - 1, u**3 - u) if case.cubic else (0 * u, 0 * u)
        step = lu_solve(lu_factor(A + np.diag(slope)), target - A @ u - value)
        u = u + step
        if np.linalg.norm(step) <= _SETTLED * np.linalg.norm(u):
            break
    U[1:-1] = u
    return U


def _krylov_newton(case: Case, points: tuple[np.ndarray, ...], D: tuple[np.ndarray, ...]) -> np.ndarray:
    f, U, _ = _grid(case, points)
    inner = (slice(1, -1), slice(1, -1))
    A, B = (each @ each for each in D)
    target = f[inner] - (A @ U + U @ B.T)[inner]
    A, B = A[1:-1, 1:-1], B[1:-1, 1:-1]
    solve = _sylvester(A, B)
    u = solve(target)
    for _ in range(_STEPS if case.cubic else 0):
        slope = 3 * u**2 - 1
        residual = target - (A @ u + u @ B.T) - (u**3 - u)

        def product(v: np.ndarray, slope: np.ndarray = slope) -> np.ndarray:
            moved = solve(v.reshape(slope.shape))
            return v + (slope * moved).reshape(-1)

        operator = LinearOperator((u.size, u.size), matvec=product, dtype=np.float64)
        found, _ = gmres(operator, residual.reshape(-1), rtol=1e-8, atol=0.0, restart=40, maxiter=2)
        step = solve(found.reshape(u.shape))
        u = u + step
        if np.linalg.norm(step) <= _SETTLED * np.linalg.norm(u):
            break
    U[inner] = u
    return U


def _chebyshev_march(case: Case, points: tuple[np.ndarray, ...], D: tuple[np.ndarray, ...]) -> np.ndarray:
    """Solve βu_x + u_t = 0 at all points but those of the start and of the inflow, which are the first of each axis."""
    _, exact, _ = _grid(case, points)
    U = np.zeros_like(exact)
    U[0], U[:, 0] = exact[0], exact[:, 0]
    A, B = case.terms["x"] * D[0], case.terms["t"] * D[1]
    target = -(A @ U + U @ B.T)[1:, 1:]
    # first-order matrices have no eigenvectors worth the name; Schur vectors do
    U[1:, 1:] = solve_sylvester(A[1:, 1:], B[1:, 1:].T, target)
    return U


def _sylvester(A: np.ndarray, B: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return F → U with A U + U Bᵀ = F, by the eigenvectors of both."""
    (a, V), (b, W) = eig(A), eig(B)
    left, right = lu_factor(V), lu_factor(W)
    total = a[:, None] + b

    def solve(F: np.ndarray) -> np.ndarray:
        turned = lu_solve(right, lu_solve(left, F.astype(complex)).T).T
        return (V @ (turned / total) @ W.T).real

    return solve


def _chebyshev(n: int, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Return n Chebyshev points of an interval in rising order, and their differentiation matrix."""
    angle = np.pi * np.arange(n) / (n - 1)
    x = -np.cos(angle)
    # differences of cosines as products of sines keep the digits near the ends
    gap = 2 * np.sin((angle[:, None] + angle) / 2) * np.sin((angle[:, None] - angle) / 2)
    sign = (-1.0) ** np.arange(n)
    sign[[0, -1]] *= 2
    np.fill_diagonal(gap, 1.0)
    D = sign[:, None] / sign / gap
    np.fill_diagonal(D, 0.0)
    np.fill_diagonal(D, -D.sum(1))
    return low + (x + 1) * (high - low) / 2, D * 2 / (high - low)


def _barycentric(nodes: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Return the matrix that takes values at Chebyshev points to those of their polynomial at ``new``."""
    weight = (-1.0) ** np.arange(len(nodes))
    weight[[0, -1]] *= 0.5
    gap = new[:, None] - nodes
    hit = np.abs(gap) < 1e-14 * (nodes[-1] - nodes[0])
    ratio = weight / np.where(hit, 1.0, gap)
    rows = ratio / ratio.sum(1, keepdims=True)
    return np.where(hit.any(1, keepdims=True), hit.astype(float), rows)


class _Network(torch.nn.Module):
    """Tanh layers on coordinates scaled to [−1, 1]."""

    def __init__(self, case: Case):
        super().__init__()
        ends = torch.tensor(list(case.bounds.values()))
        self.register_buffer("low", ends[:, 0])
        self.register_buffer("length", ends[:, 1] - ends[:, 0])
        sizes = [len(ends), *[_WIDTH] * _DEPTH]
        layers: list[torch.nn.Module] = []
        for a, b in pairwise(sizes):
            layers += [torch.nn.Linear(a, b), torch.nn.Tanh()]
        self.layers = torch.nn.Sequential(*layers, torch.nn.Linear(_WIDTH, 1))

    def forward(self, X: Tensor) -> Tensor:
        return self.layers(2 * (X - self.low) / self.length - 1)[:, 0]


def network(case: Case, marks: list[float], seed: int = 0) -> list[tuple[int, np.ndarray]]:
    """Train a physics-informed network; return steps and test values after each of ``marks`` seconds of training.

    Four tanh layers of 64 in single precision, Adam at 1e-3, new points at every step; the residual is divided by the
    rms of the forcing, and the sides weigh 100.
    """
    torch.manual_seed(seed)
    model = _Network(case)
    adam = torch.optim.Adam(model.parameters(), lr=_RATE)
    low, length, names = model.low, model.length, list(case.bounds)
    probe = [(low + length * torch.rand(4096, len(names)))[:, j].double() for j in range(len(names))]
    scale = float(case.forcing(*probe).square().mean().sqrt()) if case.forced else max(case.terms.values())
    ends = [(j, k) for j, name in enumerate(names) for k in (0.0, 1.0) if "t" not in case.bounds or k == 0.0]
    found: list[tuple[int, np.ndarray]] = []
    spent, steps = 0.0, 0
    while len(found) < len(marks):
        began = time.perf_counter()
        X = (low + length * torch.rand(_BATCH, len(names))).requires_grad_()
        u = model(X)

        def derivative(letters: str, u: Tensor = u, X: Tensor = X) -> Tensor:
            value = u
            for letter in letters:
                (slope,) = torch.autograd.grad(value.sum(), X, create_graph=True)
                value = slope[:, names.index(letter)]
            return value

        f = case.forcing(*X.detach().double().unbind(1)).float() if case.forced else 0.0
        residual = (case.residual(None, u, derivative, None) - f) / scale
        gaps = []
        for j, k in ends:
            side = low + length * torch.rand(_BATCH // 4, len(names))
            side[:, j] = low[j] + k * length[j]
            gaps.append((model(side) - case.exact(*side.double().unbind(1)).float()).square().mean())
        loss = residual.square().mean() + _SIDE_WEIGHT * torch.stack(gaps).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        spent, steps = spent + time.perf_counter() - began, steps + 1
        while len(found) < len(marks) and spent >= marks[len(found)]:
            with torch.no_grad():
                values = torch.cat([model(rows) for rows in case.test_points().float().split(8192)])
            found.append((steps, values.double().numpy().reshape((case.n_test,) * len(names))))
    return found
