"""The invariant matrix: every method times everything that must hold for it.

A new method joins by adding rows to `ROWS`; `test_every_method_has_a_row` fails until it does.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from attnconv.attention_modules import AttentionModule, Geometry, available, create


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


@pytest.fixture(params=[True, False], ids=["grad", "no-grad"])
def grad_mode(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.set_grad_enabled(request.param):
        yield


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


def directed(geometry: Geometry, causal: bool) -> Geometry:
    return replace(geometry, causal=causal)


def test_every_method_has_a_row() -> None:
    assert {row.method for row in ROWS} == set(available())
    assert all(row.degenerate is not None or row.no_degenerate_because for row in ROWS)


@pytest.mark.parametrize("row", [row for row in ROWS if not row.bidirectional], ids=lambda row: row.id)
def test_a_method_that_runs_from_left_to_right_refuses_to_look_both_ways(row: Row) -> None:
    with pytest.raises(ValueError, match="bidirectional"):
        build(row, directed(BASE, False))


@pytest.mark.parametrize("row", [row for row in ROWS if not row.causal], ids=lambda row: row.id)
def test_a_method_that_needs_the_whole_sequence_refuses_to_run_from_left_to_right(row: Row) -> None:
    with pytest.raises(ValueError, match="cannot serve a causal layer"):
        build(row)


@rows_and_directions
@pytest.mark.parametrize("length", [*LENGTHS, 200])
def test_oracle_forward_and_gradients(row: Row, causal: bool, length: int) -> None:
    compare_gradients(row, directed(BASE, causal), tokens(length))


@in_all_directions([row for row in ROWS if row.method != "softmax"])
def test_oracle_over_several_segments(row: Row, causal: bool) -> None:
    """Longer than what is handled at a time."""
    compare_gradients(row, directed(BASE, causal), tokens(1100, batch=1))


def compare_gradients(row: Row, geometry: Geometry, drawn: dict[str, torch.Tensor]) -> None:
    results = []
    for implementation in ("naive", "torch"):
        module = build(row, geometry, implementation=implementation)
        inputs = {name: t.clone().requires_grad_() for name, t in drawn.items()}
        out = attend(module, inputs)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        # The naive form multiplies by zero where the blocked one skips a term.
        leaves = {**inputs, **dict(module.named_parameters())}
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in leaves.items()}
        results.append({"out": out, **grads})
    for name, expected in results[0].items():
        close(results[1][name], expected, 1e-8)


@rows_and_directions
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_oracle_in_low_precision(row: Row, causal: bool, dtype: torch.dtype, tolerance: float) -> None:
    geometry = directed(BASE, causal)
    inputs = {name: t.to(dtype) for name, t in tokens(1100 if row.method != "softmax" else 123).items()}
    expected = attend(build(row, geometry, implementation="naive"), {name: t.double() for name, t in inputs.items()})
    actual = attend(build(row, geometry).float(), inputs)
    assert actual.dtype == dtype
    error = (actual.double() - expected).abs().max() / expected.abs().max()
    assert error < tolerance


@causal_rows
def test_causal_and_prefix_invariant(row: Row) -> None:
    inputs, module = tokens(100), build(row)
    whole = attend(module, inputs)
    changed = {name: t.clone() for name, t in inputs.items()}
    for t in changed.values():
        t[:, :, 60:] += 3
    close(attend(module, changed)[:, :, :60], whole[:, :, :60], 1e-12)
    for length in (1, 5, 9, 64, 65):
        close(attend(module, part(inputs, 0, length)), whole[:, :, :length])


@with_and_without_gradients
@causal_rows
@pytest.mark.parametrize("implementation", ["naive", "torch"])
@pytest.mark.parametrize("cuts", [[1] * 90, [7] * 13, [63, 1, 26], [90]], ids=["tokens", "sevens", "mixed", "one"])
def test_prefill_chunks_and_decode_agree(row: Row, implementation: str, cuts: list[int]) -> None:
    inputs = tokens(90)
    module = build(row, implementation=implementation)
    state, outs, start = module.new_state(), [], 0
    for cut in cuts:
        outs.append(attend(module, part(inputs, start, start + cut), state=state))
        start += cut
    close(torch.cat(outs, 2), attend(module, inputs))
    assert state.seen == 90


@rows_and_directions
@pytest.mark.parametrize("implementation", ["naive", "torch"])
def test_padding_is_absent(row: Row, causal: bool, implementation: str) -> None:
    """Left, right and inner padding, in a batch of mixed lengths: each row as if it were alone."""
    length, module = 70, build(row, directed(BASE, causal), implementation=implementation)
    masks = torch.ones(5, length, dtype=torch.bool)
    masks[0, :31] = False
    masks[1, 40:] = False
    masks[2, 20:33] = False
    masks[3, 1:] = False
    inputs = tokens(length, batch=5)
    for t in inputs.values():
        t.masked_fill_(~masks[:, None, :, None], 1e4)
    outs = attend(module, inputs, padding_mask=masks)
    for b, mask in enumerate(masks):
        alone = {name: t[b : b + 1, :, mask] for name, t in inputs.items()}
        close(outs[b : b + 1, :, mask], attend(module, alone))
        assert (outs[b, :, ~mask] == 0).all()


@with_and_without_gradients
@causal_rows
def test_padding_is_absent_with_a_state(row: Row) -> None:
    """Turns of a batched conversation: padding left of, behind and between the turns, then decoding."""
    module, turns = build(row), [(12, [5, 12, 9]), (20, [20, 3, 11]), (1, [1, 1, 1]), (1, [1, 1, 1]), (9, [2, 9, 0])]
    state, outs, masks, all_inputs = module.new_state(), [], [], []
    for turn, (length, lengths) in enumerate(turns):
        mask = torch.stack([torch.arange(length) >= length - n for n in lengths])
        if turn == 1:
            mask = mask.flip(1)
        inputs = tokens(length, batch=3, seed=turn)
        outs.append(attend(module, inputs, padding_mask=mask, state=state))
        masks.append(mask)
        all_inputs.append(inputs)
    mask, out = torch.cat(masks, 1), torch.cat(outs, 2)
    joined = {name: torch.cat([i[name] for i in all_inputs], 2) for name in all_inputs[0]}
    for b in range(3):
        alone = {name: t[b : b + 1, :, mask[b]] for name, t in joined.items()}
        close(out[b : b + 1, :, mask[b]], attend(module, alone))


@in_all_directions([row for row in ROWS if row.degenerate is not None])
@pytest.mark.parametrize("implementation", ["naive", "torch"])
def test_degenerate_setting_is_softmax(row: Row, causal: bool, implementation: str) -> None:
    inputs = tokens(65)
    module = build(row, directed(BASE, causal), implementation=implementation, **(row.degenerate or {}))
    close(attend(module, inputs), sdpa(inputs, causal=causal))


@rows_and_directions
@pytest.mark.parametrize(
    "geometry", GEOMETRIES, ids=lambda g: f"{g.num_heads}h{g.num_kv_heads}x{g.head_dim}-{g.value_dim}"
)
def test_geometries(row: Row, causal: bool, geometry: Geometry) -> None:
    geometry = replace(geometry, hidden_size=HIDDEN_SIZE, causal=causal)
    inputs = tokens(37, geometry)
    expected = attend(build(row, geometry, implementation="naive"), inputs)
    close(attend(build(row, geometry), inputs), expected)
    assert expected.shape == (2, geometry.num_heads, 37, geometry.value_dim)


@with_and_without_gradients
@causal_rows
def test_state_reorder_repeat_reset(row: Row) -> None:
    module, inputs = build(row), tokens(50)
    whole = attend(module, inputs)
    state = module.new_state()
    attend(module, part(inputs, 0, 40), state=state)
    state.reorder(torch.tensor([1, 0, 1]))
    state.repeat(2)
    rest = {name: t[[1, 1, 0, 0, 1, 1]] for name, t in part(inputs, 40, 50).items()}
    close(attend(module, rest, state=state), whole[[1, 1, 0, 0, 1, 1], :, 40:])
    state.reset()
    assert state.seen == 0
    assert state.nbytes == 0
    close(attend(module, inputs, state=state), whole)


@with_and_without_gradients
@causal_rows
def test_state_crop_is_exact(row: Row) -> None:
    """Drafted tokens are taken back, as assisted decoding does."""
    module, inputs, drafts = build(row), tokens(60), tokens(9, seed=5)
    whole = attend(module, inputs)
    state = module.new_state()
    state.record_past = True
    attend(module, part(inputs, 0, 20), state=state)
    for start in range(20, 60, 4):
        attend(module, drafts, state=state)
        state.crop(9)
        close(attend(module, part(inputs, start, start + 4), state=state), whole[:, :, start : start + 4])
    assert state.seen == 60


@causal_rows
def test_state_crop_refuses_what_is_folded(row: Row) -> None:
    module, state = build(row), build(row).new_state()
    attend(module, tokens(100), state=state)
    if module.tail_tokens is None:
        state.crop(99)
        assert state.seen == 1
    else:
        with pytest.raises(ValueError, match="record_past"):
            state.crop(99)


@causal_rows
def test_state_size(row: Row) -> None:
    module = build(row).float()
    sizes = []
    for length in (200, 400):
        state = module.new_state()
        attend(module, {name: t.float() for name, t in tokens(length, batch=1).items()}, state=state)
        sizes.append(state.nbytes)
        expected = module.state_bytes(1, length, torch.float32)
        # The validity and position of each token held are the only extra.
        assert expected <= state.nbytes <= expected + 9 * state.tail_length + 16
    assert (sizes[0] == sizes[1]) == module.is_recurrent
    state.map(lambda t: t.to("meta"))
    assert state.nbytes == sizes[1]


@rows_and_directions
@pytest.mark.parametrize("implementation", ["naive", "torch"])
def test_finite(row: Row, causal: bool, implementation: str) -> None:
    module = build(row, directed(BASE, causal), implementation=implementation).float()
    inputs = {name: t.float() for name, t in tokens(80).items()}
    padded = torch.ones(2, 80, dtype=torch.bool)
    padded[0] = False
    padded[1, :5] = False
    huge = {name: t.clone() for name, t in inputs.items()}
    huge["key"][1, :, :5] = 1e30
    huge["hidden_states"][1, :, :5] = float("nan")
    constant = {name: torch.ones_like(t) for name, t in inputs.items()}
    large = {name: (t * 1e4).bfloat16().requires_grad_() for name, t in inputs.items()}
    assert attend(module, huge, padding_mask=padded).isfinite().all()
    assert attend(module, constant).isfinite().all()
    out = attend(module, large)
    out.float().sum().backward()
    assert out.isfinite().all()
    read = [t for name, t in large.items() if name != "hidden_states" or module.reads_hidden_states]
    assert all(t.grad is not None and t.grad.isfinite().all() for t in read)


@rows_and_directions
def test_fresh_parameters_and_options_round_trip(row: Row, causal: bool) -> None:
    geometry = directed(BASE, causal)
    module = create(row.method, geometry, **row.options)
    torch.manual_seed(7)
    again = create(row.method, geometry, **module.options.model_dump(mode="json"))
    assert again.options == module.options
    for parameter in module.parameters():
        parameter.data.fill_(float("nan"))
    torch.manual_seed(7)
    module.reset_parameters()
    for name, tensor in again.state_dict().items():
        assert tensor.isfinite().all()
        assert torch.equal(module.state_dict()[name], tensor)


@with_and_without_gradients
@causal_rows
def test_bfloat16_weights_keep_an_fp32_state(row: Row) -> None:
    """2,048 decoded tokens do not drift away from the prefill."""
    geometry = Geometry(2, 1, 16, 16, hidden_size=HIDDEN_SIZE)
    module = build(row, geometry).bfloat16()
    inputs = {name: t.bfloat16() for name, t in tokens(2048, geometry, batch=1).items()}
    state, outs = module.new_state(), []
    attend(module, part(inputs, 0, 2000), state=state)
    for t in range(2000, 2048):
        outs.append(attend(module, part(inputs, t, t + 1), state=state))
    assert all(tensor.dtype in (torch.float32, torch.bool) or tensor.ndim == 4 for tensor in state.memory.values())
    expected = attend(module, inputs)[:, :, 2000:]
    assert (torch.cat(outs, 2).float() - expected.float()).abs().max() < 2e-2
