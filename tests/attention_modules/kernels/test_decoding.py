"""Single tokens into a state that changes in place, by the kernel and by torch: all that holds for any state holds."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreted_cases import interpreted
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from attnconv.attention_modules import AttentionState, Call, Geometry, Tokens, create
from attnconv.attention_modules.kernels import selection

SCRIPT = Path(__file__).with_name("decoding.py")


def test_every_row_as_if_alone_whatever_happens_to_the_state() -> None:
    errors: dict[str, float] = json.loads(interpreted(SCRIPT))
    assert len(errors) > 40
    assert {case: error for case, error in errors.items() if not error < 1e-5} == {}


@pytest.fixture
def decoded() -> AttentionState:
    module = create("lolcats", Geometry(2, 1, 16, 16), window=8)
    state = module.new_state()
    with torch.no_grad():
        for _ in range(4):
            module(torch.rand(3, 2, 1, 16), *torch.rand(2, 3, 1, 1, 16), scaling=0.3, state=state)
    return state


def test_tokens_that_were_not_recorded_are_not_taken_back(decoded: AttentionState) -> None:
    with pytest.raises(ValueError, match="only 0 can be taken back exactly; set record_past"):
        decoded.crop(1)
    assert decoded.seen == decoded.tail_length == 4


def test_another_number_of_rows_is_refused(decoded: AttentionState) -> None:
    module = create("lolcats", Geometry(2, 1, 16, 16), window=8)
    with torch.no_grad(), pytest.raises(ValueError, match="holds 3 sequences, but 2 came in"):
        module(torch.rand(2, 2, 1, 16), *torch.rand(2, 2, 1, 1, 16), scaling=0.3, state=decoded)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"feature_map": "relu"}, "single tokens are mapped by 'hedgehog' in the kernel, not by 'relu'"),
        ({"feature_dim": 300}, "a vector has 300 numbers, and the kernels take at most 256"),
        ({"num_sinks": 2}, "sinks are kept beside the window"),
    ],
    ids=["map", "width", "sinks"],
)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_why_no_kernel_decodes_is_said_once_on_a_gpu(
    device: str,
    options: dict[str, Any],
    reason: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(selection, "_said", set())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    module = create("lolcats", Geometry(2, 1, 16, 16), window=4, **options)
    # Tensors without numbers may be on a device that is not there.
    with FakeTensorMode():
        query, key, value = (torch.empty(1, heads, 1, 16, device=device) for heads in (2, 1, 1))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert module.decode_triton(Call(query, Tokens(key, value), 0.3), module.new_state()) is None
    expected = [f"attention falls back to torch: {reason}"] if device == "cuda" else []
    assert [record.message for record in caplog.records] == expected
