"""The kernels of linear attention and of recurrent methods against float64 oracles, interpreted on the CPU."""

from pathlib import Path

import pytest
from interpreted_cases import cases_of, check

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("interpreted_states.py")


@pytest.mark.parametrize("case", cases_of(SCRIPT))
def test_outputs_and_gradients(case: str) -> None:
    check(SCRIPT, case)
