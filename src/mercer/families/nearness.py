"""Which rows are near one another under a kernel: in lengthscales where it has such, else in correlation."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mercer.geometry import neighbours, neighbours_torch, ordering
from mercer.kernels import Kernel
from mercer.kernels.evaluate import diag, gram, scaled_inputs
from mercer.policy import NumericalPolicy

_SEED = 20230131  # of the random part of an order of many rows
_MOST_CORRELATIONS = 20_000  # rows whose n² correlations are worth looking at


class Nearness:
    """Distance under a kernel, for orders and neighbours.

    The distance of one (scaled) stationary kernel is Euclidean in inputs over lengthscales. Any other kernel has
    √(1 − |ρ|) of its correlation ρ, which needs all pairs: beyond 20 000 rows the inputs are taken as they are.

    Parameters
    ----------
    kernel : gpytorch Kernel
        Its present hyperparameters count.
    X : (n, d)
        The rows that are ordered; their number decides.
    policy : NumericalPolicy

    Attributes
    ----------
    note : str or None
        What a user should know of the distance taken.
    """

    def __init__(self, kernel: Kernel, X: Tensor, policy: NumericalPolicy):
        self.kernel, self.policy = kernel, policy
        no_scale = scaled_inputs(kernel, X[:1]) is None
        self.by_correlation = no_scale and len(X) <= _MOST_CORRELATIONS
        self._searched: Tensor | None = None  # the rows that the last search was made for
        self.note: str | None = None
        if no_scale and not self.by_correlation:
            self.note = (
                "neighbours were found in the inputs as they are: the kernel has no single set of lengthscales, and "
                f"{len(X)} rows are too many for correlations"
            )

    def maximin(self, X: Tensor, lengths: bool = True) -> ordering.Ordering:
        """Return the maximin order of the rows of X (n, d), with NaN for costly distances unless these are wanted."""
        if not self.by_correlation:
            return ordering.maximin(self._coordinates(X), np.random.default_rng(_SEED), lengths=lengths)
        return ordering.maximin_by(lambda i: self.squared(X[i : i + 1], X)[0].cpu().numpy(), len(X))

    def nearest_earlier(self, X: Tensor, m: int, rows: np.ndarray | None = None) -> np.ndarray:
        """Return the m nearest earlier rows of every row of X, or of ``rows``, as `mercer.geometry.neighbours` does."""
        if not self.by_correlation and not X.is_cuda:
            return neighbours.nearest_earlier(self._coordinates(X), m, rows)
        if self.by_correlation:
            found = self._correlated(X, X, m, earlier=True)[0][:, ::-1].copy()
        else:
            found = neighbours_torch.nearest_earlier(self._scaled(X), m, self.policy.chunk_elements).cpu().numpy()
        return found if rows is None else found[rows]

    def within_radius(self, X: Tensor, distance: np.ndarray, rho: float, largest: int) -> np.ndarray:
        """Return the earlier rows within ρ maximin distances, at most ``largest``."""
        if not self.by_correlation:
            return neighbours.within_radius(self._coordinates(X), distance, rho, largest)
        found, squared = self._correlated(X, X, largest, earlier=True)
        outside = squared > (rho * distance[:, None] * (1 + 1e-12)) ** 2
        return np.where(outside, -1, found)[:, ::-1].copy()

    def nearest(self, X: Tensor, X_new: Tensor, m: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the min(m, n) nearest rows of X for every row of X_new and their squared distances, nearest first."""
        if not self.by_correlation and X.is_cuda:
            left, right = self._scaled(X), self._scaled(X_new)
            found, squared = neighbours_torch.nearest(left, right, m, self.policy.chunk_elements)
            return found.cpu().numpy(), squared.cpu().numpy()
        if not self.by_correlation:
            if self._searched is not X:
                self._searched, self._nearest = X, neighbours.Nearest(self._coordinates(X))
            return self._nearest(self._coordinates(X_new), m)
        return self._correlated(X, X_new, min(m, len(X)), earlier=False)

    @torch.no_grad()
    def squared(self, A: Tensor, B: Tensor) -> Tensor:
        """Return the squared distance of every row of A to every row of B."""
        if not self.by_correlation:
            left, right = (torch.as_tensor(self._coordinates(each)) for each in (A, B))
            return torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist").square().to(A.device)
        product = diag(self.kernel, A).unsqueeze(-1) * diag(self.kernel, B).unsqueeze(-2)
        # a row without prior variance, such as the origin of a linear kernel, is correlated with nothing
        scale = product.clamp_min(torch.finfo(product.dtype).tiny).rsqrt()
        return (1.0 - (gram(self.kernel, A, B, policy=self.policy) * scale).abs()).clamp_min(0.0)

    @torch.no_grad()
    def squared_of(self, X: Tensor, pairs: Tensor) -> Tensor:
        """Return the squared distance of every row i of X to its rows pairs[i], (n, m)."""
        others = X[pairs.clamp_min(0)]
        if not self.by_correlation:
            left, right = (torch.as_tensor(self._coordinates(each), device=X.device) for each in (X, others))
            return (left.unsqueeze(-2) - right).square().sum(-1)
        return self.squared(X.unsqueeze(-2), others).squeeze(-2)

    def _coordinates(self, X: Tensor) -> np.ndarray:
        return self._scaled(X).double().cpu().numpy()

    @torch.no_grad()
    def _scaled(self, X: Tensor) -> Tensor:
        scaled = scaled_inputs(self.kernel, X)
        return (X if scaled is None else scaled).detach()

    def _correlated(self, X: Tensor, X_new: Tensor, m: int, earlier: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return the nearest rows, nearest first and −1 for none, and their squared distances, ∞ for none."""
        rows = torch.arange(len(X_new), device=X.device).split(self.policy.chunk_rows(2 * len(X)))
        found, squared = [], []
        for chunk in rows:
            away = self.squared(X_new[chunk], X)
            if earlier:
                away[torch.arange(len(X), device=X.device) >= chunk.unsqueeze(-1)] = torch.inf
            values, index = away.sort(dim=-1, stable=True)
            found.append(index[:, :m].masked_fill(values[:, :m].isinf(), -1).cpu().numpy())
            squared.append(values[:, :m].cpu().numpy())
        return np.concatenate(found), np.concatenate(squared)
