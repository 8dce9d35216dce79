"""The numerical policy: a frozen value with defaults that follow the dtype."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mercer.policy import NumericalPolicy


def test_float64_on_the_cpu_is_the_default():
    policy = NumericalPolicy()
    assert policy.dtype == torch.float64 and policy.device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_ladder_starts_without_jitter_and_climbs(dtype):
    ladder = NumericalPolicy(dtype=dtype).jitter_ladder
    assert ladder[0] == 0.0 and list(ladder) == sorted(set(ladder))
    assert ladder[1] > torch.finfo(dtype).eps  # a smaller jitter would be lost in rounding


def test_float32_has_a_higher_ladder_and_a_higher_noise_floor():
    double, single = NumericalPolicy(), NumericalPolicy(dtype=torch.float32)
    assert single.noise_floor > double.noise_floor > 0
    assert single.jitter_ladder[1] > double.jitter_ladder[1] and single.jitter_ladder[-1] > double.jitter_ladder[-1]


def test_given_values_replace_the_defaults():
    policy = NumericalPolicy(jitter_ladder=(0.0, 1e-3), noise_floor=0.0)
    assert policy.jitter_ladder == (0.0, 1e-3) and policy.noise_floor == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.complex128])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=r"must be torch\.float64 or torch\.float32"):
        NumericalPolicy(dtype=dtype)


def test_a_policy_is_a_value():
    policy = NumericalPolicy()
    assert policy == NumericalPolicy() and hash(policy) == hash(NumericalPolicy())
    assert dataclasses.replace(policy, tol=1e-3) != policy
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.tol = 1.0


@settings(derandomize=True, deadline=None)
@given(elements=st.integers(1, 10**9), row=st.integers(0, 10**9))
def test_chunks_hold_at_least_one_row_and_no_more_than_allowed(elements, row):
    rows = NumericalPolicy(chunk_elements=elements).chunk_rows(row)
    assert rows >= 1 and (rows == 1 or rows * row <= elements)
    assert (rows + 1) * max(row, 1) > elements  # one more would not fit
