"""All columns of a group from one Cholesky factor: those of L⁻ᵀ for K_CC = L Lᵀ, C the union of their rows.

Column k of L⁻ᵀ is zero below k, and is the column that `mercer.linalg.sic.column_factors` finds for the rows of C up
to k. These are more than the pattern asked for, which only lowers the KL divergence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mercer.linalg.cholesky import NotPositiveDefiniteError


def supernode_factors(tiles: Tensor, rows: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """Return the columns of all members of some groups.

    Parameters
    ----------
    tiles : (*b, g, w, w)
        K_CC of each group. What stands in padded rows and columns does not matter.
    rows : (g, w) int tensor
        C, ascending, −1 for padding first.
    members : (g, w) boolean
        Which columns to return.

    Returns
    -------
    columns : (k, w) int64 tensor
        As `mercer.linalg.sic.Pattern` has them: own row last, −1 for padding.
    val : (*b, k, w)
        U there, zero at the padding; differentiable in ``tiles``.

    Raises
    ------
    NotPositiveDefiniteError
        Some tile is not positive definite.

    References
    ----------
    Schäfer, Katzfuss and Owhadi (2021), section 4.2.
    """
    w = rows.shape[-1]
    padding = rows < 0
    eye = torch.eye(w, dtype=tiles.dtype, device=tiles.device)
    L, info = torch.linalg.cholesky_ex(torch.where(padding.unsqueeze(-1) | padding.unsqueeze(-2), eye, tiles))
    if bool(info.any()):
        raise NotPositiveDefiniteError(
            "The covariance matrix of a supernode is not positive definite: some of its points are (nearly) the same. "
            "A larger nugget or noise variance cures it."
        )
    inverse = torch.linalg.solve_triangular(L, eye, upper=False)  # row k is column k of L⁻ᵀ
    group, place = members.nonzero(as_tuple=True)
    # shift each column to the right until its own row is last
    source = torch.arange(w, device=rows.device) - (w - 1 - place).unsqueeze(-1)
    outside = (source < 0) | rows[group].gather(-1, source.clamp_min(0)).lt(0)
    columns = rows[group].gather(-1, source.clamp_min(0)).masked_fill(outside, -1)
    val = inverse[..., group, place, :]
    val = val.gather(-1, source.clamp_min(0).expand(val.shape)).masked_fill(outside, 0.0)
    return columns, val
