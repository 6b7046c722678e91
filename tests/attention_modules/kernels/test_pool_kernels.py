"""Attention pooled over blocks against float64 oracles, interpreted on the CPU; and what the kernel does not take."""

from pathlib import Path

import pytest
import torch
from interpreted_cases import cases_of, check
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from attnconv.attention_modules.kernels.pooled_map.pooled import pooled_map

SCRIPT = Path(__file__).with_name("interpreted_pools.py")


@pytest.mark.parametrize("case", cases_of(SCRIPT))
def test_what_blocks_hold(case: str) -> None:
    check(SCRIPT, case)


def test_what_the_kernel_does_not_take_is_said() -> None:
    query, key = torch.zeros(1, 2, 33, 16), torch.zeros(1, 1, 40, 16)
    sizes = {"scaling": 1.0, "first": 0, "largest": True}
    with pytest.raises(ValueError, match="cannot pool attention: 'cpu' is not a CUDA device"):
        pooled_map(query, key, block=16, together=16, **sizes)
    with pytest.raises(ValueError, match="blocks have 8 tokens and rows 16, and the kernel takes multiples of 16"):
        pooled_map(query, key, block=8, together=16, **sizes)


def test_the_operator_has_a_shape_without_values() -> None:
    with FakeTensorMode():
        query, key = torch.rand(2, 4, 40, 16), torch.rand(2, 2, 72, 16)
        assert torch.ops.attnconv.pooled_map(query, key, 1.0, 16, 16, 32, True).shape == (2, 4, 3, 5)
