"""Where inducing points go: a few points that stand for all rows.

There are two ways. ``choose_inducing`` looks at distances: points spread as the rows do, wherever that is, and a mean
of rows is a point as good as a row. :func:`mercer.geometry.greedy.greedy_variance` looks at covariances: it takes
rows, works for inputs that have no means, keeps points it is given and says what they leave unexplained, so that it
can also say how many points are enough. The first is for a plan of all rows at once, the second for a stream.
"""

from __future__ import annotations

import numpy as np
from sklearn.cluster import KMeans, MiniBatchKMeans, kmeans_plusplus

_FULL_ROWS = 20_000  # beyond, k-means looks at samples of the rows
_ITERATIONS = 25  # places need not settle to the last digit


def choose_inducing(
    X: np.ndarray, n_inducing: int, coordinates: np.ndarray | None = None, method: str = "kmeans", seed: int = 0
) -> np.ndarray:
    """Return at most ``n_inducing`` inducing points for the rows of X.

    Parameters
    ----------
    X : (n, d) array
    n_inducing : int ≥ 0
        M; fewer points come back where X has fewer distinct rows.
    coordinates : (n, d') array, optional
        What distances are taken in, such as inputs over lengthscales; by default X.
    method : {"kmeans", "kmeans++"}
        "kmeans" takes the mean of each cluster, "kmeans++" rows of X that are drawn far from one another, for inputs
        whose means say nothing.
    seed : int

    Returns
    -------
    (M, d) array
        In the coordinates of X.

    Raises
    ------
    ValueError
        Unknown method, or negative ``n_inducing``.

    Notes
    -----
    O(n M d) operations for each of at most 25 passes; beyond 20 000 rows the passes see samples of the rows.

    References
    ----------
    Arthur and Vassilvitskii (2007), "k-means++: the advantages of careful seeding".
    """
    if n_inducing < 0:
        raise ValueError(f"n_inducing must not be negative, got {n_inducing}.")
    if method not in ("kmeans", "kmeans++"):
        raise ValueError(f"method must be 'kmeans' or 'kmeans++', got {method!r}.")
    if n_inducing == 0:
        return X[:0]
    points = np.ascontiguousarray(X if coordinates is None else coordinates, dtype=np.float64)
    _, distinct = np.unique(points, axis=0, return_index=True)
    if len(distinct) <= n_inducing:
        return X[np.sort(distinct)]
    if method == "kmeans++":
        # copies of a row are drawn once, not in proportion to their number
        _, chosen = kmeans_plusplus(points[distinct], n_inducing, random_state=seed)
        return X[distinct[chosen]]
    how = {"n_init": 1, "max_iter": _ITERATIONS, "random_state": seed}
    means = KMeans(n_inducing, **how) if len(points) <= _FULL_ROWS else MiniBatchKMeans(n_inducing, **how)
    _, label, count = np.unique(means.fit(points).labels_, return_inverse=True, return_counts=True)
    total = np.zeros((len(count), X.shape[1]))
    np.add.at(total, label, X)
    return (total / count[:, None]).astype(X.dtype)
