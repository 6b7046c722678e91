"""Memory of the blocked path, in training too."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import fresh_process
import pytest

SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
from attnconv.attention_modules import Geometry, create

torch.set_num_threads(1)
geometry = Geometry(4, 2, 32, 32, hidden_size=64)

def peak():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)

def step(module, length):
    # Starts the high-water mark again from what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    start = peak()
    shapes = [(1, 4, length, 32), (1, 2, length, 32), (1, 2, length, 32)]
    query, key, value = (torch.randn(shape, requires_grad=True) for shape in shapes)
    hidden = torch.randn(1, length, 64)
    module(query, key, value, scaling=32**-0.5, hidden_states=hidden).sum().backward()
    return peak() - start

for method, options in json.loads(sys.argv[1]):
    # Each in a child, whose memory nothing was taken from yet.
    if os.fork() == 0:
        module = create(method, geometry, **options)
        step(module, 64)
        print(json.dumps([step(module, length) for length in (3072, 12288)]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""
CASES: list[tuple[str, dict[str, Any]]] = [
    ("gated", {"gate": "vector", "state_per": "kv_head"}),
    ("gated", {"gate": "scalar"}),
    ("gated_delta", {}),
    ("hedgehog", {}),
    ("lightning", {}),
    ("lolcats", {"window": 64}),
    ("lolcats", {"window": 64, "num_sinks": 1}),
    ("sliding_window", {"window": 64, "num_sinks": 4}),
]


@cache
def measured() -> list[list[int]]:
    """For each case the kilobytes that a training step takes, of a short sequence and of one four times as long."""
    run = fresh_process.run("-c", SCRIPT, json.dumps(CASES), check=True)
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's resettable high-water mark")
@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(map(str, [m, *o.values()])) for m, o in CASES])
def test_training_memory_is_linear_in_length(case: int) -> None:
    short, long = measured()[case]
    assert short > 1_000
    # Four times the length: a quadratic form would take sixteen times the memory, and 2.25 GiB for one L x L tensor
    # of these heads.
    assert long < 4.6 * short + 20_000
    assert long < 1_500_000
