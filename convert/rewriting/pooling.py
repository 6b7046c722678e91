"""Fewer key/value heads, each standing for several."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...errors import PlanError
from .components import complex_pairs, key_components, meeting, principal, real_rows, weighted_values
from .moments import LayerMoments, Moments
from .projections import AttentionStep, floating, with_heads
from .tensors import Target, made

How = Literal["pca", "mean", "select"]


class PoolHeads(AttentionStep):
    """Make one key/value head of several neighbouring ones.

    With `pca` the one head has the numbers in which most of all of them is kept, and each query and output projection
    is turned to read them; `mean` takes the heads' mean; `select` keeps the one whose query heads add most.

    Args:
        kv_heads: how many there shall be.
        how: how they are made; `pca` and `select` have to be settled.
    """

    kind = "pool_heads"

    def __init__(self, *, kv_heads: int, how: How = "pca") -> None:
        super().__init__()
        self.kv_heads = kv_heads
        self.how = how
        self._moments: Moments | None = None
        self._made: tuple[int, dict[str, Tensor]] | None = None

    @property
    def summary(self) -> str:
        how = {"pca": "principal components of", "mean": "the mean of", "select": "one of"}[self.how]
        return f"key/value heads pooled to {self.kv_heads}, each {how} several"

    @property
    def inexact(self) -> str:
        return "keys and values of several heads pooled into one"

    def check(self, config: Mapping[str, Any]) -> None:
        super().check(config)
        if self.kv_heads >= self.heads.kv or self.heads.kv % self.kv_heads:
            fitting = [count for count in range(1, self.heads.kv) if self.heads.kv % count == 0]
            raise PlanError(
                f"pool_heads cannot make {self.kv_heads} key/value heads of {self.heads.kv}: "
                + (f"kv_heads can be {' or '.join(map(str, fitting))}" if fitting else "there is but one")
            )
        if self.how == "pca":
            check_rotary(self, config)

    def settle(self, moments: Moments) -> None:
        self._moments = moments

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The source's with fewer key/value heads."""
        return with_heads(config, self.kind, self.heads.query, self.kv_heads)

    def layer(self, index: int, tensors: Mapping[str, Target]) -> Iterable[Target]:
        names = tuple(part for part in tensors if not part.endswith("_norm.weight") and part != "o_proj.bias")
        of = tuple(tensors[part] for part in names)
        self._made = None
        for part, tensor in tensors.items():
            if part not in names:
                yield tensor
                continue
            shape = list(tensor.shape)
            if part.startswith(("k_proj", "v_proj")):
                shape[0] = self.kv_heads * self.heads.dim
            yield made(
                tensor.name, tuple(shape), floating(tensor, self.kind), of, self._function(index, names, part, tensor)
            )

    def _function(self, index: int, names: tuple[str, ...], part: str, tensor: Target) -> Callable[..., Tensor]:
        dtype = floating(tensor, self.kind)

        def make(*whole: Tensor) -> Tensor:
            # All tensors of a layer are made at once, and asked for one after another.
            if self._made is None or self._made[0] != index:
                self._made = index, self._pooled(index, Projections.of(dict(zip(names, whole, strict=True))))
            return self._made[1][part].to(dtype)

        return make

    def _pooled(self, index: int, source: "Projections") -> dict[str, Tensor]:
        """The tensors of a layer."""
        moments = None if self._moments is None else self._moments[index]
        parts = [self._pool(part, moments, number) for number, part in enumerate(source.split(self.kv_heads))]
        return Projections.joined(parts).tensors()

    def _pool(self, source: "Projections", moments: LayerMoments | None, number: int) -> "Projections":
        """One key/value head of several, with the query heads that share them."""
        several = self.heads.kv // self.kv_heads
        if self.how == "mean":
            key, value = (each.view(several, self.heads.dim, -1).mean(0) for each in (source.key, source.value))
            return Projections(source.query, key, value, source.output, source.biased)
        if moments is None:
            raise PlanError(f"pool_heads needs to know how large keys and values are for {self.how}: give calibrate")
        if self.how == "select":
            added = moments.contributions.view(self.kv_heads, several, -1)[number].sum(1)
            best = slice(int(added.argmax()) * self.heads.dim, (int(added.argmax()) + 1) * self.heads.dim)
            return Projections(source.query, source.key[best], source.value[best], source.output, source.biased)
        return _principal_head(source, several, moments.with_one if source.biased else moments.second)


@dataclass(frozen=True)
class Projections:
    """The four projections of a layer, or of some of its heads, in float64.

    Attributes:
        query: `[heads * head_dim, inputs]`.
        key: as many rows as key/value heads have numbers.
        value: likewise.
        output: `[hidden, heads * head_dim]`.
        biased: whether the last column of query, key and value stands for a bias.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    biased: bool

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Projections":
        """A layer's, by the names of its tensors."""
        biased = "q_proj.bias" in tensors
        query, key, value = (
            torch.cat(
                [tensors[f"{name}.weight"].double(), *([tensors[f"{name}.bias"].double()[:, None]] if biased else [])],
                1,
            )
            for name in ("q_proj", "k_proj", "v_proj")
        )
        return cls(query, key, value, tensors["o_proj.weight"].double(), biased)

    def split(self, parts: int) -> "list[Projections]":
        """Neighbouring key/value heads apart, with their query heads."""
        queries, keys, values = (each.chunk(parts) for each in (self.query, self.key, self.value))
        outputs = self.output.chunk(parts, 1)
        return [Projections(queries[i], keys[i], values[i], outputs[i], self.biased) for i in range(parts)]

    @classmethod
    def joined(cls, parts: "list[Projections]") -> "Projections":
        """What `split` took apart."""
        query, key, value = (torch.cat([getattr(part, name) for part in parts]) for name in ("query", "key", "value"))
        return cls(query, key, value, torch.cat([part.output for part in parts], 1), parts[0].biased)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by the names that `of` takes."""
        found = {"o_proj.weight": self.output}
        for name, rows in (("q_proj", self.query), ("k_proj", self.key), ("v_proj", self.value)):
            found[f"{name}.weight"] = rows[:, :-1] if self.biased else rows
            if self.biased:
                found[f"{name}.bias"] = rows[:, -1]
        return found


def check_rotary(step: AttentionStep, config: Mapping[str, Any]) -> None:
    """Refuse attention in which heads cannot be mixed frequency by frequency.

    Raises:
        PlanError: says why.
    """
    row = step.row
    if row.head_norms:
        raise PlanError(
            f"{step.kind} cannot mix heads of a {row.model_type} model: its queries and keys are normalised head by "
            "head behind the projections"
        )
    if not row.plain_rope:
        raise PlanError(
            f"{step.kind} cannot mix heads of a {row.model_type} model: some of its layers have no rotary embedding"
        )
    rope = (config.get("rope_parameters") or {}).get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if rope not in (None, 1, 1.0):
        raise PlanError(f"{step.kind} cannot mix heads that are rotated in part only (partial_rotary_factor: {rope})")


def _principal_head(source: Projections, several: int, second: Tensor) -> Projections:
    """Keys and values in the numbers of one head that keep most, with queries and outputs turned to them."""
    dim = source.key.shape[0] // several
    heads = source.query.shape[0] // dim
    group = heads // several
    queries, keys = complex_pairs(source.query, heads), complex_pairs(source.key, several)
    found = key_components(queries, keys, second)
    key = found.maps[:, 0]
    query = torch.stack([found.queries(queries[head], head // group)[:, 0] for head in range(heads)])
    size = meeting(query.abs().square().mean((0, 2)), key.abs().square().mean(1))[:, None]
    values = weighted_values(source.value, source.output, several)
    basis = principal(values.maps, second, dim)
    value, back = basis.T @ values.maps, values.recovered(basis)
    split = source.output.view(-1, several, group, dim)
    output = torch.einsum("dhqa,hab->dhqb", split, back).reshape(-1, heads, dim)
    scale = meeting(output.square().mean((0, 1)), value.square().mean(1))
    return Projections(
        real_rows(query / size),
        real_rows((key * size)[None]),
        value * scale[:, None],
        (output / scale).flatten(1),
        source.biased,
    )
