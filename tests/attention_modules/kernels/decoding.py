"""Conversations whose states go through everything that may happen to them, against each row by itself in float64.

A process of its own, for triton reads TRITON_INTERPRET once. Prints `{case: error}`.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import quick_triton  # noqa: F401
import torch
from torch import Tensor

from attnconv.attention_modules import AttentionModule, AttentionState, Geometry, create

GEOMETRY = Geometry(2, 1, 16, 24)
# Three heads in a group, which no power of two holds. Every head costs as much again when a kernel is interpreted.
ODD = Geometry(3, 1, 16, 24)
# Of the widest vectors, a state's columns are handled in parts.
WIDE = Geometry(1, 1, 256, 250)
# A call's tokens by row: 1 = real, 0 = padding.
Mask = list[list[int]]


def pair(
    method: str, implementation: str, options: dict[str, Any], geometry: Geometry
) -> tuple[AttentionModule, AttentionModule]:
    """The module, and the oracle with the same weights."""
    modules = []
    for kind in (implementation, "naive"):
        torch.manual_seed(1)
        module = create(method, geometry, implementation=kind, **options)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        modules.append(module)
    return modules[0], modules[1].double()


@dataclass
class Conversation:
    """A state, and beside it what each row's real tokens were."""

    module: AttentionModule
    oracle: AttentionModule
    state: AttentionState
    # For each row its tokens: the column they came in, and query, key, value.
    rows: list[list[tuple[int, list[Tensor]]]] = field(default_factory=lambda: [[], []])
    worst: float = 0.0
    seed: int = 0

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Heads and dimensions of query, key and value."""
        g = self.module.geometry
        return [(g.num_heads, g.head_dim), (g.num_kv_heads, g.head_dim), (g.num_kv_heads, g.value_dim)]

    def say(self, mask: Mask | None, length: int = 1) -> None:
        """New tokens of every row go in, and every real token's output is compared."""
        self.seed += 1
        generator, batch = torch.Generator().manual_seed(self.seed), len(self.rows)
        new = [torch.randn(batch, h, length, d, generator=generator) for h, d in self.sizes]
        valid = None if mask is None else torch.tensor(mask, dtype=torch.bool)
        seen = self.state.seen
        out = self.module(*new, scaling=0.3, padding_mask=valid, state=self.state)
        for b, row in enumerate(self.rows):
            real = torch.ones(length, dtype=torch.bool) if valid is None else valid[b]
            row += [(seen + t, [x[b : b + 1, :, t : t + 1].double() for x in new]) for t in range(length) if real[t]]
            assert (out[b, :, ~real] == 0).all()
            if real.any():
                whole = self.oracle(*(torch.cat(x, 2) for x in zip(*(x for _, x in row), strict=True)), scaling=0.3)
                error = (out[b, :, real] - whole[0, :, -int(real.sum()) :]).abs().max() / whole.abs().max()
                self.worst = max(self.worst, float(error.detach()))

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self.say(None)

    def take_back(self, tokens: int) -> None:
        self.state.crop(tokens)
        self.rows = [[(at, x) for at, x in row if at < self.state.seen] for row in self.rows]

    def reorder(self, index: list[int]) -> None:
        self.state.reorder(torch.tensor(index))
        self.rows = [list(self.rows[i]) for i in index]

    def held(self) -> list[int]:
        """Where everything that a token changes lies in memory."""
        assert self.state._ring is not None
        return [t.data_ptr() for t in (*self.state._ring.tensors, *self.state.memory.values())]


def from_nothing(talk: Conversation) -> None:
    """The first tokens of all come one by one."""
    talk.decode(6)


def in_place(talk: Conversation) -> None:
    """Prefill in two parts, then tokens, none of which allocates anything."""
    talk.say(None, 4)
    talk.say(None, 5)
    talk.decode(1)
    before, size = talk.held(), talk.state.nbytes
    talk.decode(6)
    assert talk.held() == before
    assert talk.state.nbytes == size
    talk.say(None, 3)
    talk.decode(2)


def mixed_lengths(talk: Conversation) -> None:
    """Left padding, rows that pause while others go on, and a turn in between."""
    talk.say([[0, 0, 0, 0, 1, 1], [1] * 6], 6)
    for mask in ([[1], [1]], [[0], [1]], [[1], [0]], [[1], [1]], [[0], [0]], [[1], [1]]):
        talk.say(mask)
    talk.say([[1, 1, 0, 0], [0, 0, 0, 0]], 4)
    for mask in ([[1], [1]], [[1], [0]], [[0], [1]]):
        talk.say(mask)
    talk.decode(3)


def rows_move(talk: Conversation) -> None:
    """Beams change places, are repeated and dropped between tokens."""
    talk.say([[0, 0, 1, 1], [1] * 4], 4)
    talk.decode(3)
    talk.reorder([1, 1, 0])
    talk.decode(3)
    talk.state.repeat(2)
    talk.rows = [list(row) for row in talk.rows for _ in range(2)]
    talk.decode(2)
    talk.reorder([4, 1])
    talk.state.map(torch.clone)
    talk.decode(2)


def drafts(talk: Conversation) -> None:
    """Tokens are recorded, taken back, and decoding goes on."""
    talk.say([[0, 1, 1, 1, 1, 1, 1], [1] * 7], 7)
    talk.decode(3)
    talk.state.record_past = True
    talk.decode(5)
    talk.say([[1, 1, 0], [1, 1, 1]], 3)
    talk.take_back(6)
    talk.decode(1)
    talk.take_back(1)
    talk.state.record_past = False
    talk.decode(4)
    talk.say(None, 2)


def starts_again(talk: Conversation) -> None:
    """A reset, and modes that tensors are marked with."""
    talk.decode(3)
    talk.state.reset()
    assert talk.state.nbytes == talk.state.seen == 0
    talk.rows = [[], []]
    with torch.inference_mode():
        talk.say(None, 6)
        talk.decode(2)
    talk.decode(2)
    with torch.enable_grad():
        talk.decode(1)
    talk.decode(1)


def in_bf16(talk: Conversation) -> None:
    """Tokens and weights in bf16 into a state that began in fp32: nothing held gets less precise."""
    talk.module.bfloat16().float()
    talk.oracle.bfloat16().double()
    talk.say(None, 6)
    talk.module.bfloat16()
    for _ in range(3):
        new = [torch.randn(2, heads, 1, size).bfloat16() for heads, size in talk.sizes]
        assert talk.module(*new, scaling=0.3, state=talk.state).dtype == torch.bfloat16
        for row, *parts in zip(talk.rows, *new, strict=True):
            row.append((talk.state.seen - 1, [x[None].double() for x in parts]))
    assert talk.state._ring is not None
    assert talk.state._ring.keys.dtype == torch.float32
    assert {t.dtype for t in talk.state.memory.values()} == {torch.float32}
    talk.module.float()
    talk.decode(2)


SCENES = [from_nothing, in_place, mixed_lengths, rows_move, drafts, starts_again, in_bf16]
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "window-5": ("lolcats", {"window": 5, "feature_dim": 20}),
    "window-1": ("lolcats", {"window": 1, "state_per": "kv_head"}),
    "window-4-absolute": ("lolcats", {"window": 4, "window_terms": "absolute"}),
    "window-64": ("lolcats", {"window": 64}),
    "window-3-wide": ("lolcats", {"window": 3, "feature_dim": 200}),
    "elu": ("lolcats", {"window": 3, "feature_map": "elu"}),
    "hedgehog": ("hedgehog", {}),
    "linear": ("linear", {"normalizer": False}),
}
# Interpreted kernels take seconds.
INTERPRETED = {"window-5": SCENES[1:], "window-64": [from_nothing], "window-3-wide": [from_nothing]}
# No kernel decodes with this map: those that take chunks serve.
INTERPRETED |= {"elu": [from_nothing]}
INTERPRETED |= {setting: [mixed_lengths] for setting in ("window-1", "window-4-absolute")}
CASES: dict[str, tuple[Callable[[Conversation], None], str, str]] = {
    f"{scene.__name__}-{setting}-{implementation}": (scene, setting, implementation)
    for scene in SCENES
    for setting in SETTINGS
    for implementation in ("triton", "torch")
    if implementation == "torch" or scene in INTERPRETED.get(setting, [])
}


def run(case: str) -> float:
    scene, setting, implementation = CASES[case]
    method, options = SETTINGS[setting]
    geometry = {"window-3-wide": WIDE, "window-1": ODD}.get(setting, GEOMETRY)
    module, oracle = pair(method, implementation, options, geometry)
    talk = Conversation(module, oracle, module.new_state())
    with torch.no_grad():
        scene(talk)
    return talk.worst


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump({case: run(case) for case in sys.argv[1:] or CASES}, sys.stdout)
