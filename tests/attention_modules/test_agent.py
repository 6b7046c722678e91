"""Agent attention: its formula by hand, on text and on images, and what it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from attnconv.attention_modules import AttentionModule, Geometry, create
from attnconv.attention_modules.paths import leaving_out
from attnconv.convert import convert_model
from attnconv.errors import PlanError
from attnconv.runs import embedded_model_path

SCALING = 0.25
IMAGE = {"layout": "image", "num_agents": 4, "prefix_tokens": 3}


def core(groups: int = 1, **options: Any) -> AttentionModule:
    torch.manual_seed(1)
    module = create("agent", Geometry(2 * groups, 2, 16, 24, causal=False), **options).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def tokens(length: int, groups: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2 * groups, 16), (2, 16), (2, 24))
    return [torch.randn(2, heads, length, dim, generator=generator, dtype=torch.float64) for heads, dim in shapes]


def by_hand(query: Tensor, key: Tensor, value: Tensor, parts: list[list[int]]) -> Tensor:
    agents = torch.stack([query[:, :, part].mean(2) for part in parts], 2)
    seen = (SCALING * agents @ key.transpose(-1, -2)).softmax(-1) @ value
    return (SCALING * query @ agents.transpose(-1, -2)).softmax(-1) @ seen


@pytest.mark.parametrize("implementation", ["naive", "torch"])
@pytest.mark.parametrize(
    ("length", "number", "parts"),
    [
        (6, 3, [[0, 1], [2, 3], [4, 5]]),
        (5, 2, [[0, 1, 2], [3, 4]]),
        (3, 7, [[0], [1], [2]]),
        (4, 4, [[0], [1], [2], [3]]),
    ],
)
def test_a_sequence_is_pooled_in_equal_runs(
    implementation: str, length: int, number: int, parts: list[list[int]]
) -> None:
    module = core(num_agents=number, kernel_size=0, implementation=implementation)
    inputs = tokens(length)
    torch.testing.assert_close(module(*inputs, scaling=SCALING), by_hand(*inputs, parts))


@pytest.mark.parametrize("implementation", ["naive", "torch"])
def test_patches_are_pooled_in_tiles_and_the_first_tokens_in_none(implementation: str) -> None:
    """Three first tokens, then five by five patches in two by two tiles."""
    module, inputs = core(**IMAGE, kernel_size=0, implementation=implementation), tokens(3 + 25)
    tiles = [[3 + 5 * row + column for row in rows for column in columns] for rows, columns in TILES]
    torch.testing.assert_close(module(*inputs, scaling=SCALING), by_hand(*inputs, tiles))


NEAR, FAR = range(3), range(3, 5)
TILES = [(NEAR, NEAR), (NEAR, FAR), (FAR, NEAR), (FAR, FAR)]


@pytest.mark.parametrize("implementation", ["naive", "torch"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("layout", ["sequence", "image"])
def test_the_convolution_is_that_of_torch_over_the_patches_alone(implementation: str, groups: int, layout: str) -> None:
    options = IMAGE if layout == "image" else {"num_agents": 4}
    module, inputs = core(groups, **options, implementation=implementation), tokens(28, groups)
    first = 3 if layout == "image" else 0
    value = inputs[2].repeat_interleave(groups, 1)[:, :, first:].transpose(-1, -2).flatten(1, 2)
    shape = (5, 5) if layout == "image" else (28,)
    layer = (torch.nn.Conv2d if layout == "image" else torch.nn.Conv1d)(
        len(value[0]), len(value[0]), 3, padding=1, groups=len(value[0]), bias=False
    )
    layer.weight = torch.nn.Parameter(module.kernel.flatten(0, 1)[:, None])
    convolved = layer(value.unflatten(-1, shape)).flatten(2).unflatten(1, (-1, 24)).transpose(-1, -2)
    with leaving_out(module, "convolution"):
        rest = module(*inputs, scaling=SCALING)
    difference = module(*inputs, scaling=SCALING) - rest
    torch.testing.assert_close(difference[:, :, first:], convolved)
    assert (difference[:, :, :first] == 0).all()
    with leaving_out(module, "agents"):
        torch.testing.assert_close(module(*inputs, scaling=SCALING), difference)


def test_weights_are_those_without_the_convolution() -> None:
    module, (query, key, value) = core(num_agents=5), tokens(28)
    weights = module.attention_weights(query, key, scaling=SCALING)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 28).double())
    with leaving_out(module, "convolution"):
        torch.testing.assert_close(weights @ value, module(query, key, value, scaling=SCALING))
    fresh = create("agent", Geometry(2, 2, 16, 24, causal=False)).double()
    expected = fresh.attention_weights(query, key, scaling=SCALING) @ value
    torch.testing.assert_close(fresh(query, key, value, scaling=SCALING), expected)


def test_what_has_no_such_layout_is_refused() -> None:
    geometry = Geometry(2, 2, 16, 24, causal=False)
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        create("agent", geometry, kernel_size=4)
    with pytest.raises(ValueError, match="must be a square number for images, such as 49; it is 50"):
        create("agent", geometry, layout="image", num_agents=50)
    with pytest.raises(ValueError, match="no square image: set prefix_tokens"):
        core(**IMAGE)(*tokens(27), scaling=SCALING)
    mask = torch.arange(28)[None] < torch.tensor([[28], [20]])
    with pytest.raises(ValueError, match="an image has no padding"):
        core(**IMAGE)(*tokens(28), scaling=SCALING, padding_mask=mask)
    mask = torch.ones(2, 28, dtype=torch.bool)
    whole = core(**IMAGE)(*tokens(28), scaling=SCALING)
    torch.testing.assert_close(core(**IMAGE)(*tokens(28), scaling=SCALING, padding_mask=mask), whole)


def test_a_vision_model_with_registers_runs_and_a_causal_one_is_refused() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 20, "patch_size": 4}
    model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, num_register_tokens=2)).eval()
    pixels = torch.randn(2, 3, 20, 20)
    before = model(pixel_values=pixels).last_hidden_state
    out = convert_model(model, "agent", **IMAGE)(pixel_values=pixels).last_hidden_state
    assert out.shape == before.shape == (2, 3 + 25, 32)
    assert (out - before).abs().max() > 1e-4
    with pytest.raises(PlanError, match="cannot serve a causal layer, which must not look ahead"):
        convert_model(AutoModelForCausalLM.from_pretrained(embedded_model_path()), "agent")
