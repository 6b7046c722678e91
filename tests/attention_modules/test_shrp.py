"""Heads by their usage: the formula, the start that changes nothing, and which heads stay."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from attnconv.attention_modules import Geometry, create
from attnconv.attention_modules.heads.gate import HeadUse

GEOMETRY = Geometry(6, 3, 8, 4)


def observed(first: list[float], contribution: list[float]) -> HeadUse:
    return HeadUse(torch.zeros(3, 5), torch.eye(5), torch.tensor(contribution), torch.tensor(first))


def test_each_head_is_refined_and_those_that_are_left_out_are_zero() -> None:
    torch.manual_seed(0)
    core: Any = create("shrp", GEOMETRY, keep=2, expander=5)
    for parameter in core.parameters():
        torch.nn.init.normal_(parameter)
    core.start_from(observed([0.2, 0.5, 0.3], [1.0, 1.0, 1.0]))
    query, key, value = torch.randn(2, 6, 7, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 4)
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    wanted = mixed + F.gelu(mixed @ core.down.T + core.down_bias) @ core.up.T
    wanted[:, :2] = 0
    with torch.no_grad():
        torch.testing.assert_close(core(query, key, value, scaling=8**-0.5), wanted)
    assert core.kept_heads == [1, 2]


def test_with_all_heads_the_start_is_softmax_bit_for_bit() -> None:
    core: Any = create("shrp", replace(GEOMETRY, causal=False), expander=5)
    softmax = create("softmax", core.geometry)
    drawn = torch.randn(2, 6, 7, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 4)
    assert torch.equal(core(*drawn, scaling=0.3), softmax(*drawn, scaling=0.3))


def test_heads_that_are_never_first_go_by_what_they_contribute() -> None:
    core: Any = create("shrp", GEOMETRY, keep=2)
    assert "is not known" in core.tie
    core.start_from(observed([0.0, 1.0, 0.0], [0.1, 0.5, 0.2]))
    assert core.kept_heads == [1, 2]
    assert core.tie is None


def test_no_more_heads_can_stay_than_there_are() -> None:
    with pytest.raises(ValueError, match="keep=4 is more than the 3 KV heads that the layer has"):
        create("shrp", GEOMETRY, keep=4)
