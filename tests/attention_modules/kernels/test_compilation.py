"""The kernels compile for GPUs that this machine need not have, spill nothing and fit into their shared memory."""

import json
from pathlib import Path

import fresh_process
import pytest

pytest.importorskip("triton")


FORMS = {"linear": 5, "hybrid": 3, "fused": 2, "decode": 1}
GATES = {"packed": 5, "vector": 6, "delta": 7}
BLOCKS = {"blocks": 3, "blocks-decode": 2}
POOLS = {"pooled-largest": 1, "pooled-mass": 1, "pooled-each": 1}


# Compiling takes seconds a kernel: some of them for one target here, all for all of them and wider in the long tests.
@pytest.mark.parametrize(
    ("head_dim", "targets", "operators"),
    [
        (64, [90], {"hybrid": 3, "decode": 1}),
        (64, [90], GATES),
        pytest.param(64, [90], FORMS, marks=pytest.mark.slow),
        pytest.param(64, [90], BLOCKS, marks=pytest.mark.slow),
        pytest.param(64, [80, 100], FORMS, marks=pytest.mark.slow),
        pytest.param(64, [80, 100], GATES, marks=pytest.mark.slow),
        pytest.param(128, [90], {"hybrid": 3, "fused": 2}, marks=pytest.mark.slow),
        pytest.param(128, [80, 90, 100], GATES, marks=pytest.mark.slow),
        pytest.param(64, [80, 100], BLOCKS, marks=pytest.mark.slow),
        pytest.param(128, [80, 90, 100], BLOCKS, marks=pytest.mark.slow),
        pytest.param(64, [90], POOLS, marks=pytest.mark.slow),
        pytest.param(128, [80, 90, 100], POOLS, marks=pytest.mark.slow),
        pytest.param(256, [90], {"fused": 2, "decode": 1}, marks=pytest.mark.slow),
        pytest.param(256, [80, 100], {"decode": 1}, marks=pytest.mark.slow),
    ],
    ids=[
        "64-hybrid",
        "64-gates",
        "64",
        "64-blocks",
        "64-all",
        "64-gates-all",
        "128",
        "128-gates",
        "64-blocks-all",
        "128-blocks",
        "64-pools",
        "128-pools",
        "256",
        "256-decode",
    ],
)
def test_compiled_for_every_target(
    repository: Path, head_dim: int, targets: list[int], operators: dict[str, int]
) -> None:
    command = [repository / "benchmarks" / "kernels_static.py", "--check", "--dtypes", "bfloat16"]
    command += ["--head-dims", str(head_dim), "--operators", *operators, "--targets", *map(str, targets)]
    done = fresh_process.run(*command)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {(row["target"], row["head_dim"]) for row in rows} == {(f"sm_{target}", head_dim) for target in targets}
    assert len(rows) == sum(operators.values()) * len(targets)
    assert [row for row in rows if row["spilled_bytes"]] == []
    assert [row for row in rows if row["shared_bytes"] > row["shared_limit"]] == []
    assert all(0 < row["registers"] <= 255 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, "float32"), (128, "float16")], ids=["64-fp32", "128-fp16"])
def test_maps_inside_the_kernels_in_other_dtypes(repository: Path, head_dim: int, dtype: str) -> None:
    command = [repository / "benchmarks" / "kernels_static.py", "--check", "--operators", "fused"]
    command += ["--dtypes", dtype, "--head-dims", str(head_dim), "--targets", "80"]
    done = fresh_process.run(*command)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["spilled_bytes"], row["shared_bytes"] < row["shared_limit"]) for row in rows] == [(0, True)] * 2
