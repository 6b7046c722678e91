"""Memory of the blocked path, in training too."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from attnconv.attention_modules import Geometry, create

torch.set_num_threads(1)
geometry = Geometry(4, 2, 32, 32, hidden_size=64)
module = create(sys.argv[1], geometry, **json.loads(sys.argv[2]))

def peak():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)

def step(length):
    # Starts the high-water mark again from what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    start = peak()
    shapes = [(1, 4, length, 32), (1, 2, length, 32), (1, 2, length, 32)]
    query, key, value = (torch.randn(shape, requires_grad=True) for shape in shapes)
    hidden = torch.randn(1, length, 64)
    module(query, key, value, scaling=32**-0.5, hidden_states=hidden).sum().backward()
    return peak() - start

step(64)
print(json.dumps([step(length) for length in (4096, 16384)]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's resettable high-water mark")
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("gated", {"gate": "vector", "state_per": "kv_head"}),
        ("gated", {"gate": "scalar"}),
        ("gated_delta", {}),
        ("hedgehog", {}),
        ("lightning", {}),
        ("lolcats", {"window": 64}),
        ("lolcats", {"window": 64, "num_sinks": 1}),
        ("sliding_window", {"window": 64, "num_sinks": 4}),
    ],
)
def test_training_memory_is_linear_in_length(method: str, options: dict[str, int]) -> None:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, method, json.dumps(options)], capture_output=True, text=True, check=True
    )
    short, long = json.loads(run.stdout)
    assert short > 1_000
    # Four times the length: a quadratic form would take sixteen times the memory, and 4 GiB for one L x L tensor of
    # these heads.
    assert long < 4.6 * short + 20_000
    assert long < 1_500_000
