"""torch and LAPACK take turns with the threads, and everything is put back."""

import pytest
import torch
from threadpoolctl import threadpool_limits

from mercer.linalg.threads import _blas, lapack_first, lapack_threads

CPU = torch.device("cpu")


@pytest.fixture
def two_threads():
    """Let torch and every BLAS have two threads, as on a small machine; the tests' own single thread comes back."""
    before = torch.get_num_threads()
    with threadpool_limits(2, user_api="blas"):
        torch.set_num_threads(2)
        yield
        torch.set_num_threads(before)


def blas_threads():
    # libraries that were loaded later, such as faiss's, are none of SciPy's LAPACK
    return {pool["num_threads"] for pool in _blas().info() if pool["user_api"] == "blas"}


def test_small_matrices_leave_torch_one_thread_and_lapack_the_rest(two_threads):
    with lapack_first(1000, CPU):
        assert torch.get_num_threads() == 1
        with lapack_threads(1000):
            assert blas_threads() == {2}
        with lapack_threads(100):  # not worth waking a second one
            assert blas_threads() == {1}
    assert torch.get_num_threads() == 2
    assert blas_threads() == {2}


def test_large_matrices_are_shared(two_threads):
    with lapack_first(5000, CPU):
        assert torch.get_num_threads() == 2
        with lapack_threads(5000):
            assert blas_threads() == {2}
        with lapack_threads(1000):
            assert blas_threads() == {1}


def test_nesting_and_errors_give_the_threads_back(two_threads):
    def fail():
        with lapack_first(1000, CPU), lapack_first(700, CPU), lapack_threads(700):
            assert torch.get_num_threads() == 1 and blas_threads() == {2}
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert torch.get_num_threads() == 2
    with lapack_threads(700):  # nothing is lent any more
        assert blas_threads() == {1}


def test_who_asks_torch_for_one_thread_has_one_everywhere():
    assert torch.get_num_threads() == 1  # as the tests are run
    for n in (1000, 5000):
        with lapack_first(n, CPU), lapack_threads(n):
            assert torch.get_num_threads() == 1 and blas_threads() == {1}


def test_a_gpu_leaves_the_threads_alone(two_threads):
    with lapack_first(1000, torch.device("cuda")):
        assert torch.get_num_threads() == 2
