"""Who gets the processor's threads: torch or LAPACK, not both.

Both keep their threads awake for a while after each call, and two sets of them on the same cores slow each other
down: by milliseconds on a quiet machine, many times over on a busy one. Dense linear algebra of small data is
nearly all LAPACK's, so there torch is kept to one thread and SciPy's LAPACK gets those that torch had.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache

import torch
from threadpoolctl import ThreadpoolController

# n³ of a matrix from which both may use all threads, because changing hands costs little beside the work
_WORTH_BOTH = 2e10
_WORTH_TORCH = 5e9  # multiplications of one call that are worth waking torch's threads for
_WORTH_THREADS = 500  # rows; a smaller matrix is done before a second thread has woken up

_lent: ContextVar[int] = ContextVar("threads that torch has lent to LAPACK", default=0)


@contextmanager
def lapack_first(n: int, device: torch.device) -> Iterator[None]:
    """Lend torch's threads to LAPACK while matrices of n rows are worked on; nothing happens off the CPU.

    Who has set ``torch.set_num_threads(1)`` has one thread everywhere.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or n**3 >= _WORTH_BOTH:
        yield
        return
    token = _lent.set(threads)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        _lent.reset(token)


@contextmanager
def torch_again(work: float) -> Iterator[None]:
    """Give torch the threads back that it has lent, for one call of ``work`` multiplications if it is large."""
    lent = _lent.get()
    if not lent or work < _WORTH_TORCH:
        yield
        return
    torch.set_num_threads(lent)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def lapack_threads(n: int) -> AbstractContextManager:
    """Set how many threads SciPy's LAPACK may use on a matrix of n rows."""
    lent = _lent.get()
    if lent and n >= _WORTH_THREADS:
        return _blas().limit(limits=lent, user_api="blas")
    if n**3 >= _WORTH_BOTH and torch.get_num_threads() > 1:
        return nullcontext()
    return _blas().limit(limits=1, user_api="blas")


def torch_alone() -> AbstractContextManager:
    """Keep NumPy's and SciPy's BLAS to one thread, for work that is nearly all torch's."""
    return _blas().limit(limits=1, user_api="blas")


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()
