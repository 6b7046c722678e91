"""The methods and options that the invariants are tested on, and what those tests draw and compare."""

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from matrix_row import Row

from attnconv.attention_modules import AttentionModule, Geometry, create
from attnconv.attention_modules.tokens import Rotation, Surroundings
from attnconv.files.discovery import import_folder

ROWS: list[Row] = [row for name in import_folder("method_rows") for row in sys.modules[name].ROWS]
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
# What is handled at a time is made shorter, so that a few hundred tokens are several segments; in the long tests the
# first row of each method is drawn longer than two whole ones, unless its oracle walks from token to token. All other
# rows are drawn at fewer lengths and with fewer geometries.
FIRST_ROWS = {row.method: row for row in reversed(ROWS) if not row.walks}
LONG, SHORTER = 1100, 300
BASE = Geometry(4, 2, 16, 24, hidden_size=HIDDEN_SIZE)
LENGTHS = [1, 7, 63, 123, 200]
# Of further options, and of an oracle that walks from token to token and is slow. What lies beyond two chunks is seen
# once, over several segments.
FEWER_LENGTHS = [1, 63, 123]

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
    given = {"scaling": module.geometry.head_dim**-0.5, "hidden_states": hidden_states, "around": around(inputs)}
    out: torch.Tensor = module(**heads, **given, **kwargs)
    return out


def around(inputs: dict[str, torch.Tensor]) -> Surroundings:
    """What a model would tell of these tokens if it had no rotary embedding."""
    ones = inputs["key"].new_ones(inputs["key"].shape[0], inputs["key"].shape[2], 1)
    rotation = Rotation(ones, ones, lambda query, key, cos, sin: (query, key))
    return Surroundings(unrotated=(inputs["query"], inputs["key"]), rotation=rotation, board={})


def part(inputs: dict[str, torch.Tensor], start: int, stop: int) -> dict[str, torch.Tensor]:
    return {name: t[:, :, start:stop] for name, t in inputs.items()}


def sdpa(inputs: dict[str, torch.Tensor], *, causal: bool = True) -> torch.Tensor:
    query, key, value = (inputs[name] for name in ("query", "key", "value"))
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def is_first(row: Row) -> bool:
    """Whether a row is the one that its method is drawn long for."""
    return FIRST_ROWS.get(row.method) is row


def leads(row: Row) -> bool:
    """Whether a row is the first of its method, which has all of its cases in every run."""
    return next(other for other in ROWS if other.method == row.method) is row


def with_segments() -> list[Any]:
    """Modules that name how many tokens they handle at a time."""
    linear = [module for name, module in sys.modules.items() if name.startswith("attnconv.attention_modules.linear.")]
    return [module for module in linear if hasattr(module, "SEGMENT")]


def lengths_of(row: Row) -> list[int]:
    """The lengths at which a row is compared with its oracle, gradients included."""
    return LENGTHS if is_first(row) else FEWER_LENGTHS


def geometries_of(row: Row) -> list[Geometry]:
    """All geometries for the first row of a method; every second one for the others, in turns."""
    if is_first(row):
        return GEOMETRIES
    return GEOMETRIES[ROWS.index(row) % 2 :: 2]


def directed(geometry: Geometry, causal: bool) -> Geometry:
    return replace(geometry, causal=causal)
