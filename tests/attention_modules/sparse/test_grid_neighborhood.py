"""Neighborhood attention on a grid of patches: windows written out, whole models, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTModel,
)

from attnconv.attention_modules import AttentionModule, Geometry, create
from attnconv.convert import convert_model
from attnconv.errors import PlanError
from attnconv.recipes import Recipe
from attnconv.runs import embedded_model_path, run_conversion

SCALING = 0.25
BOTH = Geometry(4, 2, 16, 24, causal=False)


def image(implementation: str = "torch", **options: Any) -> AttentionModule:
    return create("neighborhood", BOTH, implementation=implementation, layout="image", **options).double()


def tokens(length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = (4, 16), (2, 16), (2, 24)
    return [torch.randn(2, heads, length, dim, generator=generator, dtype=torch.float64) for heads, dim in shapes]


def near(at: int, side: int, window: int, dilation: int) -> list[int]:
    """The places along an axis that one sees: its row's middle ones, or as many at the end."""
    row = list(range(at % dilation, side, dilation))
    start = min(max(row.index(at) - window // 2, 0), len(row) - window)
    return row[start : start + window]


def by_hand(inputs: list[torch.Tensor], grid: tuple[int, int], prefix: int, window: int, dilation: int) -> torch.Tensor:
    query, key, value = inputs
    key, value = (t.repeat_interleave(2, 1) for t in (key, value))
    out = torch.empty(*query.shape[:3], value.shape[-1], dtype=torch.float64)
    for token in range(query.shape[2]):
        seen = list(range(query.shape[2]))
        if token >= prefix:
            row, column = divmod(token - prefix, grid[1])
            rows, columns = near(row, grid[0], window, dilation), near(column, grid[1], window, dilation)
            seen = [*range(prefix), *(prefix + r * grid[1] + c for r in rows for c in columns)]
            assert len(seen) == prefix + window**2
        weights = (SCALING * query[:, :, token, None] @ key[:, :, seen].transpose(-1, -2)).softmax(-1)
        out[:, :, token] = (weights @ value[:, :, seen])[:, :, 0]
    return out


@pytest.mark.parametrize("implementation", ["naive", "torch"])
@pytest.mark.parametrize(
    ("grid", "prefix", "window", "dilation"),
    [((6, 6), 0, 3, 1), ((5, 5), 3, 5, 1), ((11, 9), 1, 3, 1), ((7, 10), 2, 3, 2), ((4, 20), 1, 1, 3)],
)
def test_each_patch_sees_the_square_around_it_or_at_the_border(
    implementation: str, grid: tuple[int, int], prefix: int, window: int, dilation: int
) -> None:
    inputs = tokens(prefix + grid[0] * grid[1])
    expected = by_hand(inputs, grid, prefix, window, dilation)
    shape = {} if grid[0] == grid[1] else {"grid": grid}
    module = image(implementation, window=window, dilation=dilation, prefix_tokens=prefix, **shape)
    torch.testing.assert_close(module(*inputs, scaling=SCALING), expected)


def test_gradients_and_counts_are_those_of_the_mask() -> None:
    options = {"window": 3, "dilation": 2, "grid": (9, 12), "prefix_tokens": 1}
    grads, modules = [], [image(one, **options) for one in ("naive", "torch")]
    for module in modules:
        inputs = [t.requires_grad_() for t in tokens(109)]
        out = module(*inputs, scaling=SCALING)
        grads.append(torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum(), inputs))
    for first, second in zip(*grads, strict=True):
        torch.testing.assert_close(first, second)
    query, key, _ = tokens(109)
    seen = (modules[1].attention_weights(query, key, scaling=SCALING)[0, 0] > 0).sum(-1)
    rank = torch.arange(1, 110)[None]
    assert torch.equal(modules[1].tokens_attended(rank, rank[:, -1:])[0], seen)


def test_a_window_of_the_whole_image_is_softmax() -> None:
    inputs = tokens(26)
    whole = image(window=5, dilation=1, prefix_tokens=1)(*inputs, scaling=SCALING)
    softmax = torch.nn.functional.scaled_dot_product_attention(*inputs, scale=SCALING, enable_gqa=True)
    torch.testing.assert_close(whole, softmax)


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.mark.parametrize(
    ("model", "height", "width", "options"),
    [
        (
            Dinov2WithRegistersModel(
                Dinov2WithRegistersConfig(**SIZES, image_size=24, patch_size=4, num_register_tokens=2)
            ),
            24,
            24,
            {"window": 3, "dilation": 2, "prefix_tokens": 3},
        ),
        (
            ViTModel(ViTConfig(**SIZES, image_size=[20, 28], patch_size=4), add_pooling_layer=False),
            20,
            28,
            {"window": 3, "dilation": 1, "prefix_tokens": 1, "grid": [5, 7]},
        ),
    ],
    ids=["registers", "rectangle"],
)
def test_a_vision_model_is_converted_saved_and_loaded_again(
    model: Any, height: int, width: int, options: dict[str, Any], tmp_path: Path
) -> None:
    options = {"layout": "image", **options}
    model.eval().save_pretrained(tmp_path / "base")
    rules = [{"layers": "all", "method": "neighborhood", "options": options}]
    recipe = Recipe(name="tiny", attention=rules, data=None, stages=[])
    pixels = torch.randn(2, 3, height, width)
    out = run_conversion(str(tmp_path / "base"), recipe, tmp_path / "out", device="cpu").output
    loaded = AutoModel.from_pretrained(out, trust_remote_code=True).eval()
    with torch.no_grad():
        before = model(pixel_values=pixels).last_hidden_state
        after = convert_model(model, "neighborhood", **options)(pixel_values=pixels).last_hidden_state
        assert (after - before).abs().max() > 1e-4
        torch.testing.assert_close(loaded(pixel_values=pixels).last_hidden_state, after, atol=1e-5, rtol=1e-5)


def test_what_is_no_such_image_is_one_sentence() -> None:
    with pytest.raises(ValueError, match="window must be odd for images, so that a patch is in the middle; it is 4"):
        image(window=4)
    with pytest.raises(ValueError, match="26 tokens without 0 first ones are no square image: set prefix_tokens"):
        image(window=3)(*tokens(26), scaling=SCALING)
    with pytest.raises(ValueError, match="26 tokens without 1 first ones are no grid of 4 rows and 6 columns"):
        image(window=3, grid=(4, 6), prefix_tokens=1)(*tokens(26), scaling=SCALING)
    with pytest.raises(ValueError, match="window=3 at dilation=2 spans 6 patches, but the image has 5 rows"):
        image(window=3, dilation=2, prefix_tokens=1)(*tokens(26), scaling=SCALING)
    mask = torch.arange(26)[None] < torch.tensor([[26], [20]])
    with pytest.raises(ValueError, match="an image has no padding"):
        image(window=3, dilation=1, prefix_tokens=1)(*tokens(26), scaling=SCALING, padding_mask=mask)
    text = AutoModelForCausalLM.from_pretrained(embedded_model_path())
    with pytest.raises(PlanError, match="layout: image looks both ways, so it cannot serve a causal layer"):
        convert_model(text, "neighborhood", layout="image", window=3)
