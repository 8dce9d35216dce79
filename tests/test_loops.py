"""Compiled loops share the processor as torch was told to."""

import numba
import numpy as np
import pytest
import torch

from mercer import _loops


@pytest.mark.parametrize("threads", [1, 2])
def test_loops_run_on_torchs_threads_and_leave_them(threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        X = np.random.default_rng(0).uniform(size=(50, 2))
        _loops.earlier_nearest(X, np.arange(50), 3)
        assert torch.get_num_threads() == threads
        assert numba.get_num_threads() == min(threads, numba.config.NUMBA_NUM_THREADS)
    finally:
        torch.set_num_threads(before)
