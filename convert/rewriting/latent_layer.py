"""One layer's attention as multi-head latent attention: the arithmetic, in float64."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .components import (
    KeyComponents,
    WeightedValues,
    complex_pairs,
    energy,
    key_components,
    meeting,
    principal,
    weighted_values,
)

REACH = 1024
"""Distances up to this count when it is decided which keys keep their rotation."""
FIRMNESS = 32768.0
"""How much larger the constant is than the rest of the latent, whose own length then moves the norm by half of the
inverse square of this at most."""


@dataclass(frozen=True)
class LatentSizes:
    """How many numbers what has.

    Attributes:
        query: query heads.
        kv: key/value heads of the source.
        dim: numbers of a head.
        kept: `[pairs]` key components of each frequency that stay rotary.
        rank: numbers of the latent that keys and values are made of.
        constant: whether one more number holds the norm of the latent.
        interleaved: whether the two numbers of a rotary pair stand side by side, instead of in two halves.
    """

    query: int
    kv: int
    dim: int
    kept: Tensor
    rank: int
    constant: bool
    interleaved: bool

    @property
    def rotary(self) -> int:
        """Numbers of the key that are rotated."""
        return 2 * int(self.kept.sum())

    @property
    def latent(self) -> int:
        """Numbers of the latent, the constant one included."""
        return self.rank + self.constant

    @property
    def whole(self) -> bool:
        """Whether nothing is left out: all keys are rotary, and all values latent."""
        return self.rotary == self.rank == self.kv * self.dim and bool((self.kept == self.kv).all())


def rotary_components(energies: Tensor, frequencies: Tensor, pairs: int) -> Tensor:
    """`[pairs]`: how many components of each frequency to keep rotary, those that would lose most without.

    Args:
        energies: `[layers, pairs, heads]`, see `KeyComponents`.
        frequencies: `[pairs]`, radians for each position.
        pairs: how many components there shall be in all.
    """
    distances = torch.logspace(0, math.log10(REACH), 400, dtype=torch.float64)
    # The mean square of what a unit vector moves by when it is turned.
    moved = (2 - 2 * torch.cos(frequencies[:, None] * distances)).mean(1)
    share = (energies / energies.sum((1, 2), keepdim=True)).mean(0) * moved[:, None]
    chosen = torch.zeros(share.numel(), dtype=torch.bool)
    chosen[share.flatten().argsort(descending=True, stable=True)[:pairs]] = True
    return chosen.view_as(share).sum(1)


def layer_components(query: Tensor, key: Tensor, heads: tuple[int, int], second: Tensor) -> KeyComponents:
    """The key components of a layer, from its two projections and the numbers of query and key heads."""
    return key_components(complex_pairs(query, heads[0]), complex_pairs(key, heads[1]), second)


def latent_layer(
    weights: tuple[Tensor, Tensor, Tensor, Tensor], second: Tensor, sizes: LatentSizes, key_weight: float
) -> dict[str, Tensor]:
    """The tensors of one layer, by the rest of their names.

    Args:
        weights: the projections q, k, v and o.
        second: `[hidden, hidden]`, the second moment of the layer's inputs.
        sizes: how many numbers what has.
        key_weight: how much heavier an error in keys weighs than one in values.
    """
    query, key, value, output = (weight.double() for weight in weights)
    if sizes.whole:
        turned, kept = _copied(query, key, value, sizes)
        return _tensors(query, turned, kept, _length(value, second), sizes)
    found = layer_components(query, key, (sizes.query, sizes.kv), second)
    stays = torch.arange(sizes.kv)[None] < sizes.kept[:, None]
    rotary_key, rotary_query = _rotary(query, found, stays, sizes)
    frequency, component = (~stays).nonzero(as_tuple=True)
    left = found.maps[frequency, component]
    left = torch.cat([left.real, left.imag])
    values = weighted_values(value, output, sizes.kv)
    weight = (key_weight * energy(values.maps, second).sum() / energy(left, second).sum().clamp_min(1e-12)).sqrt()
    both = torch.cat([weight * left, values.maps])
    basis = principal(both, second, sizes.rank)
    latent = basis.T @ both
    expansion = _expansion(found, (frequency, component), values, basis, float(weight), sizes)
    scale = meeting(expansion.square().mean((0, 1)), latent.square().mean(1))
    latent, expansion = latent * scale[:, None], expansion / scale
    return _tensors(query, (rotary_key, rotary_query), (latent, expansion), _length(latent, second), sizes)


def _copied(
    query: Tensor, key: Tensor, value: Tensor, sizes: LatentSizes
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What `_rotary` and `_expansion` make, of the projections' own rows where nothing is left out.

    Every product with a row is then the one that it was, and the others are with zeros, so nothing is rounded twice.
    """
    own = torch.eye(sizes.kv, dtype=torch.float64).repeat_interleave(sizes.query // sizes.kv, 0)
    keys = complex_pairs(key, sizes.kv).transpose(0, 1).flatten(0, 1)
    queries = (complex_pairs(query, sizes.query)[:, :, None] * own[:, None, :, None]).flatten(1, 2)
    values = torch.kron(own[:, None], torch.eye(sizes.dim, dtype=torch.float64))
    rotary_key, rotary_query = (_as_rotary(each, sizes) for each in (keys, queries))
    expansion = torch.cat([torch.zeros_like(values), values], 1)
    return (rotary_key, rotary_query), (value, expansion)


def _length(latent: Tensor, second: Tensor) -> float:
    """The root of the latent's mean square."""
    return float(energy(latent, second).sum().sqrt())


def _tensors(
    query: Tensor, rotary: tuple[Tensor, Tensor], latent: tuple[Tensor, Tensor], length: float, sizes: LatentSizes
) -> dict[str, Tensor]:
    """The layer, of its rotary key and the queries that meet it, and of its latent and what each head makes of it."""
    rotary_key, rotary_query = rotary
    down, bias, norm = _held(latent[0], length, sizes)
    nope = query.view(sizes.query, sizes.dim, -1)
    # The class divides by the root of how many numbers a query has, of which there are more now.
    longer = math.sqrt((sizes.dim + sizes.rotary) / sizes.dim)
    tensors = {
        "q_proj.weight": torch.cat([nope, rotary_query], 1).flatten(0, 1) * longer,
        "kv_a_proj_with_mqa.weight": torch.cat([down, rotary_key]),
        "kv_a_layernorm.weight": norm,
        "kv_b_proj.weight": torch.nn.functional.pad(latent[1], (int(sizes.constant), 0)).flatten(0, 1),
    }
    if sizes.constant:
        tensors["kv_a_proj_with_mqa.bias"] = torch.nn.functional.pad(bias, (0, sizes.rotary))
    return tensors


def _rotary(query: Tensor, found: KeyComponents, stays: Tensor, sizes: LatentSizes) -> tuple[Tensor, Tensor]:
    """The rotary key `[rotary, hidden]`, and the queries that meet it, `[query_heads, rotary, hidden]`."""
    group = sizes.query // sizes.kv
    pairs = complex_pairs(query, sizes.query)
    key = found.maps[stays]
    queries = torch.stack([found.queries(pairs[head], head // group)[stays] for head in range(sizes.query)])
    scale = meeting(queries.abs().square().mean((0, 2)), key.abs().square().mean(1))[:, None]
    key, queries = key * scale, queries / scale
    return _as_rotary(key, sizes), _as_rotary(queries, sizes)


def _as_rotary(pairs: Tensor, sizes: LatentSizes) -> Tensor:
    """`[..., pairs, hidden]` complex as `[..., rotary, hidden]`, in the order that the class rotates."""
    # `[..., pairs, 2, hidden]` beside each other, or `[..., 2, pairs, hidden]` in halves.
    return torch.stack([pairs.real, pairs.imag], -2 if sizes.interleaved else -3).flatten(-3, -2)


def _expansion(
    found: KeyComponents,
    left: tuple[Tensor, Tensor],
    values: WeightedValues,
    basis: Tensor,
    weight: float,
    sizes: LatentSizes,
) -> Tensor:
    """`[query_heads, 2 * head_dim, rank]`: each head's unrotated key and value from the latent."""
    frequency, component = left
    count = len(frequency)
    recovered = values.recovered(basis[2 * count :])
    numbers = torch.arange(count)
    heads = []
    for head in range(sizes.kv):
        # A component's share of this head's key is the conjugate of its share of the queries.
        share = found.factors[head, frequency, component].conj()
        turn = torch.zeros(2, sizes.dim // 2, 2, count, dtype=torch.float64)
        turn[0, frequency, 0, numbers], turn[0, frequency, 1, numbers] = share.real, -share.imag
        turn[1, frequency, 0, numbers], turn[1, frequency, 1, numbers] = share.imag, share.real
        key = turn.reshape(sizes.dim, 2 * count) @ basis[: 2 * count] / weight
        heads.append(torch.cat([key, recovered[head]]))
    return torch.stack(heads).repeat_interleave(sizes.query // sizes.kv, 0)


def _held(latent: Tensor, length: float, sizes: LatentSizes) -> tuple[Tensor, Tensor, Tensor]:
    """The latent with its constant, its bias and the weight of its norm, which undoes what the norm does.

    Without a constant that is true for latents of mean length only.
    """
    if not sizes.constant:
        norm = torch.full((sizes.rank,), length / math.sqrt(sizes.rank), dtype=torch.float64)
        return latent, torch.zeros(0), norm
    # A power of two, which rounds nothing.
    gain = 2.0 ** math.ceil(math.log2(max(length, 1e-6) * FIRMNESS / math.sqrt(sizes.latent)))
    norm = torch.full((sizes.latent,), gain, dtype=torch.float64)
    # Else the constant would multiply the first step of a training.
    norm[0] = 0
    bias = torch.zeros(sizes.latent, dtype=torch.float64)
    bias[0] = _constant(gain, sizes.latent)
    return torch.nn.functional.pad(latent, (0, 0, 1, 0)), bias, norm


def _constant(gain: float, count: int) -> float:
    """What the norm of `count` numbers, computed in float32, has to find for it to divide by just `gain`."""
    nearest = torch.tensor(gain * math.sqrt(count))
    candidates = [nearest, *(nearest.nextafter(torch.tensor(end)) for end in (math.inf, 0.0))]
    return float(min(candidates, key=lambda found: abs(float((found.square() / count).rsqrt()) * gain - 1)))
