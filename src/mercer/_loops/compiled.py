"""How loops are compiled: the files of this folder alone know numba."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
import torch
from numba import njit

compiled = njit(cache=True, nogil=True)
# sums may be reordered, so that they use the width of the processor
reordered = njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})


def parallel(function: Callable) -> Callable:
    """Compile, run on as many threads as torch has, and leave torch those that it had.

    numba and torch may share one OpenMP, where the number of threads that one sets holds for the other too.
    """
    loop = njit(cache=True, nogil=True, parallel=True)(function)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        threads = torch.get_num_threads()
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        try:
            return loop(*arguments)
        finally:
            torch.set_num_threads(threads)

    return call
