"""The methods and options that the invariants are tested on, and what those tests draw and compare."""

import sys
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from attnconv.attention_modules import AttentionModule, Geometry, create


@dataclass(frozen=True)
class Row:
    """One method with one set of options.

    `degenerate` holds the options under which the method is softmax attention (None: there are none, with the reason).
    A row that is not `bidirectional` is refused for layers that look both ways, one that is not `causal` for others.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    degenerate: dict[str, Any] | None = None
    no_degenerate_because: str = ""
    bidirectional: bool = True
    causal: bool = True

    @property
    def directions(self) -> list[bool]:
        """Whether a layer is causal, as far as the method can serve it."""
        return [causal for causal in (True, False) if (self.causal if causal else self.bidirectional)]

    @property
    def id(self) -> str:
        return "-".join([self.method, *(f"{k}={v}" for k, v in self.options.items())])


PURE = "a linear method has no setting in which it is softmax"
AGENTS = "weights are a product of two softmaxes, whatever the number of agents"
WIDE = {"window": 4096}
ROWS = [
    Row("softmax", degenerate={}),
    Row("sliding_window", {"window": 5, "num_sinks": 0}, degenerate=WIDE),
    Row("sliding_window", {"window": 7, "num_sinks": 3}, degenerate=WIDE),
    Row("sliding_window", {"window": 80, "num_sinks": 4}, degenerate=WIDE),
    Row("hedgehog", no_degenerate_because=PURE),
    Row("hedgehog", {"feature_map": "hedgehog_fla", "state_per": "kv_head"}, no_degenerate_because=PURE),
    Row("lolcats", {"window": 5}, degenerate=WIDE),
    Row("lolcats", {"window": 64, "state_per": "kv_head", "mixing": 0.5}, degenerate=WIDE),
    Row("lolcats", {"window": 1, "feature_map": "hedgehog_fla"}, degenerate=WIDE),
    Row("lolcats", {"window": 9, "feature_map": "t2r", "feature_dim": 24}, degenerate=WIDE),
    Row("lolcats", {"window": 9, "feature_map": "elu", "initialization": "kaiming"}, degenerate=WIDE),
    Row("lolcats", {"window": 9, "feature_map": "exp", "state_per": "kv_head"}, degenerate=WIDE),
    Row("lolcats", {"window": 9, "feature_map": "taylor", "feature_dim": 5}, degenerate=WIDE),
    Row("lolcats", {"window": 9, "window_terms": "absolute", "mixing": 0.01}, degenerate=WIDE),
    Row("lolcats", {"window": 5, "num_sinks": 3}, degenerate=WIDE),
    Row("lolcats", {"window": 9, "num_sinks": 2, "window_terms": "absolute", "state_per": "kv_head"}, degenerate=WIDE),
    Row("lola", {"window": 5, "cache_size": 3}, degenerate=WIDE, bidirectional=False),
    Row(
        "lola",
        {"window": 40, "cache_size": 9, "feature_map": "elu", "state_per": "kv_head", "mixing": 0.5},
        degenerate=WIDE,
        bidirectional=False,
    ),
    Row("lola", {"window": 1, "cache_size": 40, "window_terms": "absolute"}, degenerate=WIDE, bidirectional=False),
    Row("linear", no_degenerate_because=PURE),
    Row("linear", {"feature_map": "elu", "projection": "none"}, no_degenerate_because=PURE),
    Row("linear", {"feature_map": "relu", "normalizer": False, "state_per": "kv_head"}, no_degenerate_because=PURE),
    Row("linear", {"feature_map": "dpfp", "state_per": "kv_head"}, no_degenerate_because=PURE),
    Row("linear", {"feature_map": "taylor", "feature_dim": 7}, no_degenerate_because=PURE),
    Row("agent", {"num_agents": 6}, no_degenerate_because=AGENTS, causal=False),
    Row("agent", {"num_agents": 80, "kernel_size": 0}, no_degenerate_because=AGENTS, causal=False),
    Row("agent", {"num_agents": 1, "kernel_size": 7}, no_degenerate_because=AGENTS, causal=False),
    Row("lightning", no_degenerate_because=PURE, bidirectional=False),
    Row(
        "lightning",
        {"decay": "learned", "activation": "none", "state_per": "kv_head", "output_gate": False},
        no_degenerate_because=PURE,
        bidirectional=False,
    ),
    Row("gated", no_degenerate_because=PURE, bidirectional=False),
    Row(
        "gated",
        {"gate": "scalar", "activation": "softmax", "normalizer": True, "state_per": "kv_head"},
        no_degenerate_because=PURE,
        bidirectional=False,
    ),
    Row(
        "gated",
        {"gate_from": "keys", "gate": "vector", "activation": "softmax", "normalizer": True, "output_gate": False},
        no_degenerate_because=PURE,
        bidirectional=False,
    ),
    Row(
        "gated",
        {"gate_from": "keys", "gate": "scalar", "gate_temperature": 1.0, "activation": "silu", "output_gate_rank": 3},
        no_degenerate_because=PURE,
        bidirectional=False,
    ),
    Row("gated_delta", no_degenerate_because=PURE, bidirectional=False),
    Row(
        "gated_delta",
        {"activation": "none", "output_norm": False, "output_gate": False, "state_per": "kv_head"},
        no_degenerate_because=PURE,
        bidirectional=False,
    ),
]
HIDDEN_SIZE = 12
GEOMETRIES = [
    Geometry(1, 1, 16, 16),
    Geometry(4, 2, 16, 24),
    Geometry(9, 3, 64, 64),
    Geometry(8, 2, 80, 80),
    Geometry(7, 1, 96, 32),
    Geometry(8, 1, 128, 128),
    Geometry(2, 1, 256, 256),
]
# The first row of each method is drawn longer than two whole segments, unless its oracle walks from token to token; all
# others are drawn shorter, with segments that are as much shorter.
WALKS = {"lola", "gated", "gated_delta"}
FIRST_ROWS = {row.method: row for row in reversed(ROWS) if row.method not in WALKS}
LONG, SHORTER = 1100, 300
BASE = Geometry(4, 2, 16, 24, hidden_size=HIDDEN_SIZE)
LENGTHS = [1, 7, 63, 123]

causal_rows = pytest.mark.parametrize("row", [row for row in ROWS if row.causal], ids=lambda row: row.id)


def in_all_directions(rows: list[Row]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("row", "causal"),
        [(row, causal) for row in rows for causal in row.directions],
        ids=lambda value: value.id if isinstance(value, Row) else "causal" if value else "bidirectional",
    )


rows_and_directions = in_all_directions(ROWS)
# Without gradients some methods decode in place.
with_and_without_gradients = pytest.mark.usefixtures("grad_mode")


def build(row: Row, geometry: Geometry = BASE, *, implementation: str = "torch", **options: Any) -> AttentionModule:
    torch.manual_seed(1)
    module = create(row.method, geometry, implementation=implementation, **{**row.options, **options})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.double()


def tokens(length: int, geometry: Geometry = BASE, batch: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int, dim: int) -> torch.Tensor:
        return torch.randn(batch, heads, length, dim, generator=generator, dtype=torch.float64)

    return {
        "query": draw(geometry.num_heads, geometry.head_dim),
        "key": draw(geometry.num_kv_heads, geometry.head_dim),
        "value": draw(geometry.num_kv_heads, geometry.value_dim),
        # With an axis of heads like the others, so that all are cut, padded and changed alike.
        "hidden_states": draw(1, HIDDEN_SIZE),
    }


def attend(module: AttentionModule, inputs: dict[str, torch.Tensor], **kwargs: Any) -> torch.Tensor:
    heads = {name: t for name, t in inputs.items() if name != "hidden_states"}
    hidden_states = inputs["hidden_states"].squeeze(1)
    scaling = module.geometry.head_dim**-0.5
    out: torch.Tensor = module(**heads, scaling=scaling, hidden_states=hidden_states, **kwargs)
    return out


def part(inputs: dict[str, torch.Tensor], start: int, stop: int) -> dict[str, torch.Tensor]:
    return {name: t[:, :, start:stop] for name, t in inputs.items()}


def sdpa(inputs: dict[str, torch.Tensor], *, causal: bool = True) -> torch.Tensor:
    query, key, value = (inputs[name] for name in ("query", "key", "value"))
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def long_length(row: Row, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tokens that are more than what a method handles at a time."""
    if FIRST_ROWS.get(row.method) is row:
        return LONG
    for name, module in list(sys.modules.items()):
        if name.startswith("attnconv.attention_modules.linear.") and hasattr(module, "SEGMENT"):
            assert 2 * module.SEGMENT < LONG
            monkeypatch.setattr(module, "SEGMENT", 128)
    return SHORTER


def directed(geometry: Geometry, causal: bool) -> Geometry:
    return replace(geometry, causal=causal)
