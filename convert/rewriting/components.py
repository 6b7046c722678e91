"""Keys and values of several heads in fewer numbers: the arithmetic, all in float64.

A rotary embedding turns the two halves of a head against each other, pair by pair, so a pair is one complex number that
is multiplied by a unit number whose angle grows with the position. Only mixing the heads' numbers of one frequency
commutes with that. Keys are therefore taken apart by a complex principal component analysis per frequency, weighted by
how large the queries are that meet them; values, which nothing turns, by one for all heads together, weighted by what
the output projection makes of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST = 1e-10
"""Relative to the largest; directions below it count as having this size, so that they can be divided by."""


@dataclass(frozen=True)
class KeyComponents:
    """Keys of `heads` heads as equally many components for each of `pairs` frequencies.

    Attributes:
        maps: `[pairs, heads, inputs]` complex, from the layer's input to each component, largest first.
        factors: `[heads, pairs, heads]` complex: what a query of a head's is multiplied by to meet each component.
        energies: `[pairs, heads]`, what a component adds to the logits, in the mean square.
    """

    maps: Tensor
    factors: Tensor
    energies: Tensor

    def queries(self, query: Tensor, head: int) -> Tensor:
        """`[pairs, heads, inputs]` complex: from the input to what meets each component.

        Args:
            query: `[pairs, inputs]` complex, from the input to the query.
            head: the key head that it has met.
        """
        return query[:, None] * self.factors[head][:, :, None]


def complex_pairs(weight: Tensor, heads: int) -> Tensor:
    """A projection onto heads as complex numbers, `[heads, head_dim / 2, inputs]`, one for each frequency."""
    halves = weight.double().view(heads, 2, -1, weight.shape[-1])
    return torch.complex(halves[:, 0], halves[:, 1])


def real_rows(pairs: Tensor) -> Tensor:
    """`[heads, pairs, inputs]` complex as the projection `[heads * 2 * pairs, inputs]`."""
    return torch.stack([pairs.real, pairs.imag], 1).flatten(0, 2)


def energy(maps: Tensor, second: Tensor) -> Tensor:
    """The mean square of each of `[..., inputs]` linear functions of inputs with a second moment."""
    moment = second.to(maps.dtype)
    return ((maps @ moment) * maps.conj()).sum(-1).real


def key_components(queries: Tensor, keys: Tensor, second: Tensor) -> KeyComponents:
    """Take keys apart.

    Args:
        queries: `[heads * group, pairs, inputs]` complex; each `group` of them meets one key.
        keys: `[heads, pairs, inputs]` complex.
        second: `[inputs, inputs]`, the second moment of the inputs.
    """
    heads = len(keys)
    met = energy(queries, second).unflatten(0, (heads, -1)).sum(1)
    weight = met.clamp_min(met.max() * SMALLEST).sqrt()
    weighted = (keys * weight[..., None]).transpose(0, 1)
    covariance = (weighted @ second.to(weighted.dtype)) @ weighted.mH
    energies, vectors = torch.linalg.eigh(covariance)
    energies, vectors = energies.flip(-1).clamp_min(0), vectors.flip(-1)
    factors = vectors.conj().transpose(0, 1) / weight[..., None]
    return KeyComponents(vectors.mH @ weighted, factors, energies)


@dataclass(frozen=True)
class WeightedValues:
    """Values of `heads` heads in the metric in which the output projection sees them.

    Attributes:
        maps: `[heads * head_dim, inputs]`, from the layer's input to them.
        back: `[heads, head_dim, head_dim]`, from a head's part of them to its values.
    """

    maps: Tensor
    back: Tensor

    def recovered(self, basis: Tensor) -> Tensor:
        """`[heads, head_dim, rank]`: from numbers along orthonormal directions to each head's values.

        Args:
            basis: `[heads * head_dim, rank]`.
        """
        return self.back @ basis.view(*self.back.shape[:2], -1)


def weighted_values(values: Tensor, output: Tensor, heads: int) -> WeightedValues:
    """Weigh values by what becomes of them.

    Args:
        values: `[heads * head_dim, inputs]`, the value projection.
        output: `[hidden, query_heads * head_dim]`, the output projection.
        heads: key/value heads.
    """
    dim = values.shape[0] // heads
    split = output.double().view(output.shape[0], heads, -1, dim)
    seen = torch.einsum("dhqa,dhqb->hab", split, split)
    size, vectors = torch.linalg.eigh(seen)
    size = size.clamp_min(size.max() * SMALLEST).sqrt()
    root, back = ((vectors * scale[:, None]) @ vectors.mT for scale in (size, 1 / size))
    maps = root @ values.double().view(heads, dim, -1)
    return WeightedValues(maps.flatten(0, 1), back)


def principal(maps: Tensor, second: Tensor, rank: int) -> Tensor:
    """`[rows, rank]`: the orthonormal directions along which `[rows, inputs]` linear functions are largest."""
    vectors: Tensor = torch.linalg.eigh(maps @ second @ maps.mT)[1]
    return vectors.flip(-1)[:, :rank]


def meeting(left: Tensor, right: Tensor) -> Tensor:
    """What to divide one factor of a product by and multiply the other with, so that both have the same size.

    Training takes steps of one size on both, so the product learns best where neither is much larger.

    Args:
        left: `[..., numbers]`, the mean square of the one factor's entries for each number that they share.
        right: as many, of the other.
    """
    return (left / right.clamp_min(torch.finfo(right.dtype).tiny)).clamp_min(SMALLEST).sqrt().sqrt()
