"""Single tokens into a state that changes in place, by the kernel and by torch: all that holds for any state holds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from attnconv.attention_modules import AttentionState, Geometry, create

SCRIPT = Path(__file__).with_name("decoding.py")


def test_every_row_as_if_alone_whatever_happens_to_the_state() -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    errors: dict[str, float] = json.loads(done.stdout)
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
