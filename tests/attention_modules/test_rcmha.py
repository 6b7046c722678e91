"""Relative convolutional attention: its formula, and its start."""

from typing import Any

import torch
import torch.nn.functional as F

from attnconv.attention_modules import Geometry, create
from attnconv.attention_modules.tokens import Rotation, Surroundings

GEOMETRY = Geometry(4, 2, 8, 6)
SCALING, DISTANCES = 0.3, 5


def run(core: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    ones = torch.ones(2, query.shape[2], 1, dtype=query.dtype)
    rotation = Rotation(ones, ones, lambda query, key, cos, sin: (query, key))
    around = Surroundings(unrotated=(query, key), rotation=rotation)
    out: torch.Tensor = core(query, key, value, scaling=SCALING, around=around)
    return out


def inputs(length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 8), (2, 8), (2, 6)
    return [torch.randn(2, heads, length, dim, generator=generator, dtype=torch.float64) for heads, dim in shapes]


def test_the_formula_token_by_token() -> None:
    torch.manual_seed(1)
    core: Any = create("rcmha", GEOMETRY, distances=DISTANCES).double()
    for parameter in core.parameters():
        torch.nn.init.normal_(parameter)
    length = 9
    tensors = inputs(length)
    kernels = core.query_kernel, core.key_kernel, core.value_kernel
    made = []
    for tensor, kernel in zip(tensors, kernels, strict=True):
        taps = kernel[:, 0].view(tensor.shape[1], tensor.shape[3], 3)
        padded = F.pad(tensor, (0, 0, 2, 0))
        made.append(sum(taps[..., tap][:, None] * padded[:, :, tap : tap + length] for tap in range(3)))
    query, key, value = made[0], *(t.repeat_interleave(2, 1) for t in made[1:])
    wanted = torch.zeros(2, 4, length, 6, dtype=torch.float64)
    for i in range(length):
        scores = []
        for j in range(i + 1):
            far = core.distance[:, min(i - j, DISTANCES - 1)]
            content = ((query[:, :, i] + core.content_bias) * key[:, :, j]).sum(-1)
            scores.append(SCALING * (content + ((query[:, :, i] + core.distance_bias) * far).sum(-1)))
        weights = torch.stack(scores, -1).softmax(-1)
        wanted[:, :, i] = (weights[..., None] * value[:, :, : i + 1]).sum(2)
    with torch.no_grad():
        torch.testing.assert_close(run(core, *tensors), wanted)


def test_the_start_is_softmax() -> None:
    tensors = inputs(140)
    wanted = F.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True, scale=SCALING)
    torch.testing.assert_close(run(create("rcmha", GEOMETRY).double(), *tensors), wanted)
