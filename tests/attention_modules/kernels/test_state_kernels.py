"""The kernels of linear attention and of recurrent methods against float64 oracles, interpreted on the CPU."""

import json
from pathlib import Path

import pytest
from interpreted_cases import cases_of, check, interpreted

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("interpreted_states.py")


# A second or two each.
LONG = {
    "delta-cuts",
    "delta-packed",
    "linear-packed-gates",
    "module-gated-delta",
    "module-gated-vector",
    "vector-packed",
}
LONG |= {"module-liger-vector", "vector-37-padded", "vector-123", "vector-decay-cuts"}
# Settings of modules whose first ones are seen in every run.
LONG |= {"module-lightning-kv-head", "module-gated-normalized", "module-liger-kv-head"}


@pytest.mark.parametrize("case", cases_of(SCRIPT, long=LONG))
def test_outputs_and_gradients(case: str) -> None:
    check(SCRIPT, case)


@pytest.mark.slow
def test_a_training_step_leaves_no_tensor_behind() -> None:
    left: dict[str, int] = json.loads(interpreted(SCRIPT.with_name("leaking.py")))
    assert len(left) > 5
    assert {case: count for case, count in left.items() if count} == {}
