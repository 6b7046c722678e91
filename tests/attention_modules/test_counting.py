"""What is counted while modules run is what their weights show."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnconv.attention_modules import AttentionModule, Geometry, create
from attnconv.attention_modules.counting import Counts, counting, current_counter
from attnconv.attention_modules.paths import leaving_out

SCALING = 0.25
HEADS, HEAD_DIM, VALUE_DIM = 4, 16, 24
WINDOWED: list[tuple[str, dict[str, Any]]] = [
    ("softmax", {}),
    ("sliding_window", {"window": 5, "num_sinks": 0}),
    ("sliding_window", {"window": 5, "num_sinks": 2}),
    ("sliding_window", {"window": 50, "num_sinks": 2}),
    ("lolcats", {"window": 5}),
    ("lolcats", {"window": 5, "num_sinks": 2}),
    ("lola", {"window": 5, "cache_size": 3}),
]
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("hedgehog", {}),
    ("linear", {"feature_map": "elu", "state_per": "kv_head"}),
    ("lightning", {}),
    ("gated", {}),
    ("gated_delta", {}),
]
MASKS = {
    "full": lambda: None,
    "left": lambda: torch.arange(20) >= torch.tensor([[0], [7]]),
    "right": lambda: torch.arange(20) < torch.tensor([[20], [11]]),
    "between": lambda: torch.arange(20) % torch.tensor([[3], [1000]]) != 1,
}


def core(method: str, *, causal: bool = True, **options: Any) -> AttentionModule:
    torch.manual_seed(1)
    module = create(method, Geometry(HEADS, 2, HEAD_DIM, VALUE_DIM, causal, hidden_size=12), **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.double()


def inputs(length: int = 20) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"query": (HEADS, HEAD_DIM), "key": (2, HEAD_DIM), "value": (2, VALUE_DIM)}
    drawn = {
        name: torch.randn(2, heads, length, dim, generator=generator).double() for name, (heads, dim) in sizes.items()
    }
    return {**drawn, "hidden_states": torch.randn(2, length, 12, generator=generator).double()}


def run(module: AttentionModule, mask: Tensor | None, cuts: tuple[int, ...] = ()) -> Counts:
    """The counts of one call, or of several with a state."""
    tensors = inputs()
    with torch.no_grad(), counting(module) as counter:
        if not cuts:
            module(**tensors, scaling=SCALING, padding_mask=mask)
        state = module.new_state()
        for start, stop in zip((0, *cuts), cuts, strict=False):
            part = {name: t[..., start:stop, :] for name, t in tensors.items()}
            now = None if mask is None else mask[:, start:stop]
            module(**part, scaling=SCALING, padding_mask=now, state=state)
    return counter.total


def pairs_by_hand(module: AttentionModule, mask: Tensor | None) -> int:
    """Pairs with a weight of the token's own, read off the weights of all pairs."""
    tensors = inputs()
    value = {"value": tensors["value"]} if module.name == "lola" else {}
    arguments = {"scaling": SCALING, "padding_mask": mask, **value}
    if "linear" in module.paths:
        with leaving_out(module, "linear"):
            weights = module.attention_weights(tensors["query"], tensors["key"], **arguments)
    else:
        weights = module.attention_weights(tensors["query"], tensors["key"], **arguments)
    return int((weights[:, 0] != 0).sum())


def dense_by_hand(mask: Tensor | None, causal: bool = True) -> int:
    lengths = [20, 20] if mask is None else mask.sum(1).tolist()
    return sum(n * (n + 1) // 2 if causal else n * n for n in lengths)


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize(("method", "options"), WINDOWED)
def test_pairs_are_those_with_a_weight(method: str, options: dict[str, Any], padding: str) -> None:
    module, mask = core(method, **options), MASKS[padding]()
    counts = run(module, mask)
    assert counts.exact_pairs == pairs_by_hand(module, mask)
    assert counts.dense_pairs == dense_by_hand(mask)
    assert counts.queries == (40 if mask is None else int(mask.sum()))
    rest = counts.dense_pairs - counts.exact_pairs
    assert counts.summarized_pairs == (rest if "linear" in module.paths else 0)
    assert (counts.calls, counts.heads, counts.state_bytes) == (1, HEADS, 0)
    if method == "softmax":
        assert counts.density == 1


@pytest.mark.parametrize("padding", ["full", "left", "right"])
@pytest.mark.parametrize(("method", "options"), [row for row in WINDOWED if row[0] != "lola"])
def test_layers_that_look_both_ways(method: str, options: dict[str, Any], padding: str) -> None:
    module, mask = core(method, causal=False, **options), MASKS[padding]()
    counts = run(module, mask)
    assert counts.exact_pairs == pairs_by_hand(module, mask)
    assert counts.dense_pairs == dense_by_hand(mask, causal=False)


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize(("method", "options"), WINDOWED + OTHERS)
def test_calls_with_a_state_add_up_to_one_call(method: str, options: dict[str, Any], padding: str) -> None:
    module, mask = core(method, **options), MASKS[padding]()
    whole, parts = run(module, mask), run(module, mask, cuts=(9, *range(10, 16), 20))
    for name in ("queries", "exact_pairs", "summarized_pairs", "dense_pairs", "head_queries", "multiply_adds"):
        assert getattr(parts, name) == getattr(whole, name), name
    assert parts.calls == 8
    assert parts.state_bytes > 0


@pytest.mark.parametrize(("method", "options"), OTHERS)
def test_what_goes_through_a_state_is_not_attended_exactly(method: str, options: dict[str, Any]) -> None:
    counts = run(core(method, **options), None)
    assert counts.density == 0
    assert counts.summarized_pairs == counts.dense_pairs == dense_by_hand(None)


def test_multiply_adds_are_those_of_the_definition() -> None:
    assert run(core("softmax"), None).multiply_adds == 2 * 210 * HEADS * (HEAD_DIM + VALUE_DIM)
    # Two softmaxes of each head's features; every query head has a key map of its own.
    sums = 2 * HEAD_DIM * (VALUE_DIM + 1)
    assert run(core("hedgehog"), None).multiply_adds == 40 * 2 * HEADS * sums
    # The window's pairs, and the state of the 15 tokens of each row that have something behind their window.
    near = 2 * (1 + 2 + 3 + 4 + 16 * 5) * HEADS * (HEAD_DIM + VALUE_DIM)
    assert run(core("lolcats", window=5), None).multiply_adds == near + 2 * 15 * 2 * HEADS * sums


def test_state_bytes_are_those_that_are_there() -> None:
    module = core("lolcats", window=5)
    with counting(module) as counter:
        state = module.new_state()
        module(**inputs(), scaling=SCALING, state=state)
    assert counter.total.state_bytes == state.nbytes > 0


def test_a_path_that_is_left_out_does_not_count() -> None:
    module = core("lola", window=5, cache_size=3)
    whole = run(module, None)
    with leaving_out(module, "linear"):
        assert run(module, None).summarized_pairs == 0
    with leaving_out(module, "cache"):
        without_cache = run(module, None).exact_pairs
    with leaving_out(module, "window"):
        assert run(module, None).exact_pairs + without_cache == whole.exact_pairs


def test_agents_stand_for_all_tokens() -> None:
    module = core("agent", causal=False, num_agents=4)
    counts = run(module, None)
    assert (counts.exact_pairs, counts.summarized_pairs) == (0, 800)
    assert counts.multiply_adds == 40 * 2 * 4 * HEADS * (HEAD_DIM + VALUE_DIM)


def test_rows_and_tokens_that_change_keep_their_counts() -> None:
    module, tensors = core("sliding_window", window=5, num_sinks=2), inputs()
    mask = MASKS["left"]()
    with torch.no_grad(), counting(module) as counter:
        state = module.new_state()
        state.record_past = True
        for start, stop in ((0, 12), (12, 15)):
            part = {name: t[..., start:stop, :] for name, t in tensors.items()}
            module(**part, scaling=SCALING, padding_mask=mask[:, start:stop], state=state)
        before = counter.total.dense_pairs
        # The last three tokens go, and so does the row of 12 real tokens: both are the one of 5 then.
        state.crop(3)
        state.reorder(torch.tensor([1, 1]))
        module(**{name: t[..., :1, :] for name, t in tensors.items()}, scaling=SCALING, state=state)
    assert counter.total.dense_pairs - before == 6 + 6


def test_a_padded_state_is_counted_from_its_first_call_or_not_at_all() -> None:
    module, tensors, mask = core("softmax"), inputs(), MASKS["left"]()
    state = module.new_state()
    module(**tensors, scaling=SCALING, padding_mask=mask, state=state)
    with counting(module), pytest.raises(ValueError, match="counted from its first call on"):
        module(**tensors, scaling=SCALING, state=state)
    plain = module.new_state()
    module(**tensors, scaling=SCALING, state=plain)
    with counting(module) as counter:
        module(**{name: t[..., :1, :] for name, t in tensors.items()}, scaling=SCALING, state=plain)
    assert counter.total.dense_pairs == 2 * 21


def test_nothing_is_made_where_nobody_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    module = core("lolcats", window=5)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("counted although nobody asked")

    with counting(module) as counter:
        assert current_counter() is counter
    assert current_counter() is None
    for name in ("Counter", "Counts", "Places"):
        monkeypatch.setattr(f"attnconv.attention_modules.counting.{name}", refuse)
    monkeypatch.setattr("attnconv.attention_modules.state.AttentionState.note_real", refuse)
    state = module.new_state()
    module(**inputs(), scaling=SCALING, padding_mask=MASKS["left"](), state=state)
    assert state._real is None


def test_modules_have_names_and_others_do_not_count() -> None:
    model = nn.ModuleDict({"near": core("sliding_window", window=5), "all": core("softmax")})
    with counting(model) as counter, counting(model["all"]) as inner:
        for module in model.values():
            module(**inputs(), scaling=SCALING)
    assert (inner.total.calls, counter.total.calls) == (1, 0)
    with counting([model]) as counter:
        for module in (*model.values(), core("softmax")):
            module(**inputs(), scaling=SCALING)
            module.attention_weights(inputs()["query"], inputs()["key"], scaling=SCALING)
    assert {name: counts.calls for name, counts in counter.by_module.items()} == {"0.near": 1, "0.all": 1}
    assert counter.by_module["0.all"].density == 1 > counter.by_module["0.near"].density > 0
    assert counter.by_module["0.all"].tokens_per_query == 10.5
    with pytest.raises(ValueError, match="no attention module to count"), counting(nn.Linear(1, 1)):
        pass


def test_it_costs_no_graph_break() -> None:
    module = core("softmax").float()
    tensors = {name: t.float() for name, t in inputs().items()}
    compiled = torch.compile(lambda **given: module(**given, scaling=SCALING), backend="eager", fullgraph=True)
    with counting(module) as counter:
        compiled(**tensors)
    assert counter.total.calls == 0


def test_heads_that_do_not_serve_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    module, mask = core("softmax"), MASKS["left"]()
    whole = run(module, mask)
    monkeypatch.setattr(type(module), "heads_used", lambda self, hidden_states: 1)
    one = run(module, mask)
    assert (one.heads, whole.heads) == (1, HEADS)
    assert (one.multiply_adds * HEADS, one.density) == (whole.multiply_adds, 1)
    assert one.dense_multiply_adds == whole.dense_multiply_adds == whole.multiply_adds
    # Routed token by token, by the layer's input.
    monkeypatch.setattr(type(module), "heads_used", lambda self, hidden: 1 + (hidden[..., 0] > 0).long())
    used = 1 + (inputs()["hidden_states"][..., 0] > 0).long()
    assert run(module, mask).head_queries == int(used[mask].sum())
