"""Training steps through the operators, interpreted; see `interpreting.py`.

Prints `{case: tensors that every step leaves behind}`.
"""

import gc
import json
import sys

import torch
from interpreting import Inputs
from torch import Tensor

from attnconv.attention_modules import Geometry, create

METHODS: dict[str, tuple[str, dict[str, object]]] = {
    "hedgehog": ("hedgehog", {}),
    "lightning": ("lightning", {}),
    "gated": ("gated", {"gate": "scalar"}),
    "gated-vector": ("gated", {"gate": "vector"}),
    "gated-delta": ("gated_delta", {}),
    "lolcats": ("lolcats", {"window": 4}),
    "xattention": ("xattention", {"block": 16}),
    "lolcats-features": ("lolcats", {"window": 4, "feature_map": "relu"}),
}


def alive() -> int:
    """Tensors that something still refers to; some objects do not like to be asked what they are."""
    gc.collect()
    return sum(issubclass(type(found), Tensor) for found in gc.get_objects())


def left_behind(method: str, options: dict[str, object]) -> int:
    """Tensors of three steps that outlive them; the first step may set up something."""
    module = create(method, Geometry(1, 1, 16, 24, hidden_size=8), implementation="triton", **options)

    def step() -> None:
        module.zero_grad()
        inputs: Inputs = {name: torch.randn(1, 1, 5, 16, requires_grad=True) for name in ("query", "key")}
        inputs |= {"value": torch.randn(1, 1, 5, 24), "hidden_states": torch.randn(1, 5, 8)}
        module(**inputs, scaling=0.3).sum().backward()

    step()
    before = alive()
    for _ in range(3):
        step()
    return alive() - before


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump({case: left_behind(*made) for case, made in METHODS.items()}, sys.stdout)
