"""What the GPU benchmark counts and says, without a GPU."""

import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import fresh_process
import pytest
import torch
from interpreted_cases import interpreted


@pytest.fixture
def modules(repository: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    monkeypatch.syspath_prepend(repository / "benchmarks")
    return importlib.import_module("kernels_check"), importlib.import_module("kernels")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_says_so(repository: Path) -> None:
    done = fresh_process.run(repository / "benchmarks" / "kernels.py", "--lengths", "1024")
    assert done.returncode == 1
    assert done.stderr == "This benchmark needs an NVIDIA GPU, and torch sees none here.\n"
    assert done.stdout == ""


def test_arguments(modules: tuple[ModuleType, ModuleType]) -> None:
    _, kernels = modules
    arguments = kernels.parser().parse_args([])
    assert (arguments.lengths[0], arguments.lengths[-1]) == (1024, 131072)
    assert arguments.decode_batches == [1, 32, 256]
    chosen = kernels.parser().parse_args(["--lengths", "2048", "--decode-batches", "--skip-verify"])
    assert (chosen.lengths, chosen.decode_batches, chosen.skip_verify) == ([2048], [], True)


def test_work_by_hand(modules: tuple[ModuleType, ModuleType]) -> None:
    work, _ = modules
    shape = work.Shape(batch=2, length=100, heads=4, kv_heads=2, head_dim=8, window=16, itemsize=2)
    # Query and output have 4 heads, key and value 2.
    assert shape.read_and_written == 2 * 100 * (4 + 4 + 2 + 2) * 8 * 2
    assert shape.state_bytes == 2 * 4 * (16 * 8 + 16) * 4
    assert shape.ring_bytes == 2 * 2 * 16 * (8 + 8) * 2
    # 2 products of 2 operations for each of head_dim numbers, over half of all pairs.
    assert work.softmax_work(shape).flops == 2 * 4 * 100 * 100 / 2 * 8 * 2 * 2
    assert work.softmax_work(shape, backward=True).flops == 3.5 * work.softmax_work(shape).flops
    # 16 window tokens twice, two maps of 8 x 8, and 16 x 8 sums added to and read.
    assert work.hybrid_work(shape).flops == 2 * 4 * 100 * 2 * (2 * 16 * 8 + 2 * 8 * 8 + 2 * 16 * 8)
    assert work.linear_work(shape).flops == 2 * 4 * 100 * 2 * 2 * 8 * 8
    # 4,000 tokens are 63 blocks; each attends 6, its own by half, or all before it.
    long = work.Shape(batch=2, length=4000, heads=4, kv_heads=2, head_dim=8)
    blocks = 0.5 + 1.5 + 2.5 + 3.5 + 4.5 + 58 * 5.5
    assert work.gather_work(long).flops == 2 * 4 * blocks * 64 * 64 * 8 * 2 * 2
    assert work.softmax_decode_work(shape).num_bytes == 2 * 2 * 100 * (8 + 8) * 2
    longer = work.Shape(batch=2, length=1000, heads=4, kv_heads=2, head_dim=8, window=16, itemsize=2)
    assert work.hybrid_decode_work(longer) == work.hybrid_decode_work(shape)
    assert work.softmax_decode_work(longer).num_bytes == 10 * work.softmax_decode_work(shape).num_bytes


def test_roofs(modules: tuple[ModuleType, ModuleType]) -> None:
    work, _ = modules
    roofs = work.Roofs(flops_per_second=100e12, bytes_per_second=1e12)
    assert work.Work(2e12, 1e9).seconds(roofs) == pytest.approx(0.02)
    assert work.Work(1e9, 2e12).seconds(roofs) == pytest.approx(2.0)
    row = work.row("x", work.Shape(1, 10), work.Work(1e12, 2e9), roofs, (20.0, 19.0, 22.0))
    assert row["tflops_per_second"] == pytest.approx(50)
    assert row["gigabytes_per_second"] == pytest.approx(100)
    assert row["share_of_roof"] == pytest.approx(0.5)
    assert (row["ms"], row["ms_20"], row["ms_80"]) == (20.0, 19.0, 22.0)


def test_what_time_and_memory_leave_out_is_said(modules: tuple[ModuleType, ModuleType]) -> None:
    work, kernels = modules
    roofs, shape = work.Roofs(1e12, 1e12), work.Shape(1, 8, heads=2, kv_heads=1, head_dim=4)

    def cases() -> Iterator[Any]:
        yield "fits", shape, work.linear_work(shape), lambda: lambda: None
        yield "too large", shape, work.linear_work(shape), exhaust

    def exhaust() -> None:
        raise torch.cuda.OutOfMemoryError

    deadline = math.inf
    rows = kernels.time_cases(cases(), roofs, deadline, lambda function: (1.0, 0.9, 1.1))
    assert [row.get("left_out") for row in rows] == [None, "out of memory"]
    late = kernels.time_cases(cases(), roofs, -math.inf, lambda function: (1.0, 0.9, 1.1))
    assert [row["left_out"] for row in late] == ["time limit"] * 2
    json.dumps([*rows, *late])


def test_cases_of_a_length(modules: tuple[ModuleType, ModuleType]) -> None:
    work, kernels = modules
    shape, device = work.Shape(1, 8, heads=2, kv_heads=1, head_dim=4), torch.device("cpu")
    names = [case[0] for case in kernels.sequence_cases(shape, device, has_fla=False)]
    both = ("forward", "forward and backward")
    timed = ("sdpa", "lolcats", "block gather, 10% of blocks", "gated linear")
    assert names == [f"{name}, {passes}" for passes in both for name in timed]
    with_fla = [case[0] for case in kernels.sequence_cases(shape, device, has_fla=True)]
    assert set(with_fla) - set(names) == {f"fla simple_gla, {passes}" for passes in both}
    assert [case[0] for case in kernels.decode_cases(shape, device)] == ["sdpa, decode", "lolcats, decode"]


def test_blocks_by_chance_are_before_their_queries_and_never_twice(modules: tuple[ModuleType, ModuleType]) -> None:
    work, kernels = modules
    found = kernels.blocks_by_chance(work.Shape(1, 2000, heads=2, kv_heads=2, head_dim=4), torch.device("cpu"))
    assert found.shape == (1, 2, 32, 3)
    assert torch.equal(found[0, 0, :, 0], torch.arange(32))
    for row, chosen in enumerate(found[0, 1].tolist()):
        real = [number for number in chosen if number >= 0]
        assert len(set(real)) == len(real) == min(3, row + 1)
        assert max(real) == row


CHECK = """
import json, sys
import quick_triton
sys.path.insert(0, sys.argv[1])
import kernels_check
cases = [("lolcats", "float32"), ("hedgehog", "bfloat16"), ("strided, small blocks", "float32")]
rows = [kernels_check.check(variant, dtype, 16, 5, "cpu") for variant, dtype in cases]
from attnconv.attention_modules.linear import lolcats
right = lolcats.decode_step
lolcats.decode_step = lambda *tensors, **kwargs: 1.1 * right(*tensors, **kwargs)
print(json.dumps([*rows, kernels_check.check("lolcats", "float32", 16, 5, "cpu")]))
"""


@pytest.mark.slow
def test_checks_pass_for_what_is_right_and_fail_for_what_is_wrong(repository: Path) -> None:
    pytest.importorskip("triton")
    rows = json.loads(interpreted("-c", CHECK, repository / "benchmarks"))
    assert [row["passed"] for row in rows] == [True, True, True, False]
    assert rows[-1]["worst"] == "decoded"
