"""Softmax over gathered blocks against float64 oracles, interpreted on the CPU; and what is said without kernels."""

import logging
from pathlib import Path

import pytest
import torch
from interpreted_cases import cases_of, check
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from attnconv.attention_modules import Call, Geometry, Tokens, create
from attnconv.attention_modules.kernels import selection
from attnconv.attention_modules.kernels.block_gather.gather import block_gather
from attnconv.attention_modules.kernels.block_gather.index import reach, readers_of

SCRIPT = Path(__file__).with_name("interpreted_blocks.py")


@pytest.mark.parametrize("case", cases_of(SCRIPT))
def test_outputs_and_gradients(case: str) -> None:
    check(SCRIPT, case)


def test_who_chose_a_block_stands_side_by_side_and_in_order() -> None:
    indices = torch.tensor([[[[0, -1, -1], [1, -1, 0], [2, 0, 2]], [[-1, -1, -1], [1, 1, -1], [0, 7, -1]]]])
    readers, offsets = readers_of(indices, 3)
    lists = [readers[offsets[n] : offsets[n + 1]].tolist() for n in range(6)]
    assert lists == [[0, 1, 2], [1], [2, 2], [2], [1, 1], []]
    assert reach(indices).tolist() == [[[1, 3, 3], [0, 2, 2]]]


def test_choices_of_too_few_blocks_of_queries_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = torch.zeros(2, 2, 33, 16), torch.zeros(2, 1, 40, 16)
    with pytest.raises(ValueError, match="cannot gather blocks: 'cpu' is not a CUDA device"):
        block_gather(query, key, key, torch.zeros(2, 1, 3, 1), scaling=1.0, block=16)
    monkeypatch.setattr(selection, "is_interpreted", lambda: True)
    with pytest.raises(ValueError, match=r"\(2, 1, 2, 1\), but 2 rows of 1 heads with 33 queries need .* 3 blocks"):
        block_gather(query, key, key, torch.zeros(2, 1, 2, 1), scaling=1.0, block=16)
    with pytest.raises(ValueError, match="a block has 24 tokens, and the kernels take multiples of 16"):
        block_gather(query, key, key, torch.zeros(2, 1, 3, 1), scaling=1.0, block=24)


def test_operators_have_shapes_without_values() -> None:
    with FakeTensorMode():
        query, key, value = torch.rand(2, 4, 9, 16), torch.rand(2, 2, 9, 16), torch.rand(2, 2, 9, 8)
        given = query, key, value, torch.zeros(2, 2, 1, 1, dtype=torch.int32), None
        out, level = torch.ops.attnconv.block_gather(*given, 1.0, 16)
        gradients = torch.ops.attnconv.block_gather_gradients(*given, level, out, level, 1.0, 16)
        one = torch.ops.attnconv.decode_blocks(query[:, :, :1], *given[1:], 1.0, 16)
    assert [tuple(t.shape) for t in (out, level, one)] == [(2, 4, 9, 8), (2, 4, 9), (2, 4, 1, 8)]
    assert [t.shape for t in gradients] == [query.shape, key.shape, value.shape]


@pytest.mark.parametrize(
    ("method", "head_dim", "block", "reason"),
    [
        ("quest", 16, 16, "with 'quest' each token chooses for itself, and the kernels gather for blocks of queries"),
        ("xattention", 512, 64, "a vector has 512 numbers, and the kernels take at most 256"),
        ("strided", 16, 8, "a block has 8 tokens, and the kernels take multiples of 16"),
    ],
    ids=["token", "width", "block"],
)
def test_why_torch_serves_is_said_once_on_a_gpu_and_raised_where_kernels_were_asked_for(
    method: str,
    head_dim: int,
    block: int,
    reason: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(selection, "_said", set())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    geometry = Geometry(2, 1, head_dim, head_dim)
    # Tensors without numbers may be on a device that is not there.
    with FakeTensorMode():
        query, key, value = (torch.empty(1, heads, 3, head_dim, device="cuda") for heads in (2, 1, 1))
    call = Call(query, Tokens(key, value), 0.3)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert create(method, geometry, block=block).attend_triton(call, {}) is None
    assert [record.message for record in caplog.records] == [f"attention falls back to torch: {reason}"]
    with pytest.raises(ValueError, match=f"is not possible here: {reason}"):
        create(method, geometry, block=block, implementation="triton").attend_triton(call, {})
    dense = create(method, geometry, block=block, prefill="dense", implementation="triton")
    assert dense.attend_triton(call, {}) is None


def test_what_no_kernel_decodes_is_left_to_others_before_the_state_changes(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "_said", set())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with FakeTensorMode():
        query, key, value = (torch.empty(1, heads, 1, 300, device="cuda") for heads in (2, 1, 1))
    call = Call(query, Tokens(key, value), 0.3)
    for implementation in ("auto", "triton"):
        module = create("quest", Geometry(2, 1, 300, 300), implementation=implementation)
        state = module.new_state()
        with caplog.at_level(logging.WARNING):
            assert module.decode_triton(call, state) is None
        assert state.seen == 0
    reason = "a vector has 300 numbers, and the kernels take at most 256"
    assert [record.message for record in caplog.records] == [f"attention falls back to torch: {reason}"]
