"""The invariant matrix: every method times everything that must hold for it.

A new method joins by a file with its rows in `tests/support/method_rows`; `test_every_method_has_a_row` fails until it
does. What must hold for states is in `test_state_invariants.py`.

The suite has to grow by less than three seconds of one core for each method. What a row costs is that of its oracle, so
one that goes from token to token says that it `walks`: it is drawn at fewer lengths and never long. Rows beyond the
first are for options that take another path through the code, not for every value of them.
"""

from dataclasses import replace

import pytest
import torch
from invariants import (
    BASE,
    HIDDEN_SIZE,
    LONG,
    ROWS,
    SHORTER,
    Row,
    attend,
    build,
    causal_rows,
    close,
    directed,
    geometries_of,
    in_all_directions,
    is_first,
    lengths_of,
    part,
    rows_and_directions,
    sdpa,
    tokens,
)

from attnconv.attention_modules import Geometry, available, create


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


@pytest.mark.parametrize(
    ("row", "causal", "length"),
    [(row, causal, length) for row in ROWS for causal in row.directions for length in lengths_of(row)],
    ids=lambda value: value.id if isinstance(value, Row) else None,
)
def test_oracle_forward_and_gradients(row: Row, causal: bool, length: int) -> None:
    compare_gradients(row, directed(BASE, causal), tokens(length))


@in_all_directions([row for row in ROWS if row.method != "softmax"])
@pytest.mark.usefixtures("short_segments")
def test_oracle_over_several_segments(row: Row, causal: bool) -> None:
    """Longer than what is handled at a time."""
    compare_gradients(row, directed(BASE, causal), tokens(SHORTER, batch=1))


first_rows = pytest.mark.parametrize("row", [row for row in ROWS if row.causal and is_first(row)], ids=lambda r: r.id)


@pytest.mark.slow
@first_rows
def test_oracle_over_whole_segments(row: Row) -> None:
    compare_gradients(row, BASE, tokens(LONG, batch=1))


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


def name_of(g: Geometry) -> str:
    return f"{g.num_heads}h{g.num_kv_heads}x{g.head_dim}-{g.value_dim}"


low_precision = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)


@rows_and_directions
@low_precision
@pytest.mark.usefixtures("short_segments")
def test_oracle_in_low_precision(row: Row, causal: bool, dtype: torch.dtype, tolerance: float) -> None:
    compare_precision(row, directed(BASE, causal), SHORTER, dtype, tolerance)


@pytest.mark.slow
@first_rows
@low_precision
def test_whole_segments_in_low_precision(row: Row, dtype: torch.dtype, tolerance: float) -> None:
    compare_precision(row, BASE, LONG, dtype, tolerance)


def compare_precision(row: Row, geometry: Geometry, length: int, dtype: torch.dtype, tolerance: float) -> None:
    inputs = {name: t.to(dtype) for name, t in tokens(length, batch=1).items()}
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


@rows_and_directions
@pytest.mark.parametrize("implementation", ["naive", "torch"])
def test_no_tokens_have_no_output(row: Row, causal: bool, implementation: str) -> None:
    """As with `scaled_dot_product_attention`."""
    module = build(row, directed(BASE, causal), implementation=implementation)
    nothing = tokens(0)
    nothing["query"].requires_grad_()
    for mask in (None, torch.ones(2, 0, dtype=torch.bool)):
        out = attend(module, nothing, padding_mask=mask)
        assert out.shape == sdpa(nothing, causal=causal).shape == (2, 4, 0, 24)
        out.sum().backward()
    if causal:
        inputs, state = tokens(9), module.new_state()
        outs = [attend(module, part(inputs, *cut), state=state) for cut in ((0, 0), (0, 5), (5, 5), (5, 9))]
        close(torch.cat(outs, 2), attend(module, inputs))
        assert state.seen == 9


@in_all_directions([row for row in ROWS if row.degenerate is not None])
@pytest.mark.parametrize("implementation", ["naive", "torch"])
def test_degenerate_setting_is_softmax(row: Row, causal: bool, implementation: str) -> None:
    inputs = tokens(65)
    module = build(row, directed(BASE, causal), implementation=implementation, **(row.degenerate or {}))
    close(attend(module, inputs), sdpa(inputs, causal=causal))


@pytest.mark.parametrize(
    ("row", "causal", "geometry"),
    [(row, causal, geometry) for row in ROWS for causal in row.directions for geometry in geometries_of(row)],
    ids=lambda value: value.id if isinstance(value, Row) else name_of(value) if isinstance(value, Geometry) else None,
)
def test_geometries(row: Row, causal: bool, geometry: Geometry) -> None:
    geometry = row.widen(replace(geometry, hidden_size=HIDDEN_SIZE, causal=causal))
    inputs = tokens(37, geometry)
    expected = attend(build(row, geometry, implementation="naive"), inputs)
    close(attend(build(row, geometry), inputs), expected)
    assert expected.shape == (2, geometry.num_heads, 37, geometry.value_dim)


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
