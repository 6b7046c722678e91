"""Heads left out, and key/value heads repeated: rewrites that only choose which heads' rows go where."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ...errors import PlanError
from .moments import Moments
from .projections import AttentionStep, floating, with_heads
from .tensors import Target, made


class HeadSelection(AttentionStep):
    """Each projection of the result consists of chosen heads of the source's; numbers stay as they are, bit for bit."""

    @property
    @abstractmethod
    def counts(self) -> tuple[int, int]:
        """Query heads and key/value heads of the result; known after `check`."""

    @abstractmethod
    def chosen(self, layer: int) -> tuple[list[int], list[int]]:
        """Which query heads and which key/value heads of a layer the result has, in its order."""

    def layer(self, index: int, tensors: Mapping[str, Target]) -> Iterable[Target]:
        query, kv = self.counts
        for part, tensor in tensors.items():
            projection = part.partition(".")[0]
            if part == "o_proj.bias" or projection.endswith("_norm"):
                yield tensor
            else:
                count = query if projection in ("q_proj", "o_proj") else kv
                yield self._selected(index, projection, tensor, count)

    def _selected(self, layer: int, projection: str, tensor: Target, count: int) -> Target:
        axis = 1 if projection == "o_proj" else 0
        shape = list(tensor.shape)
        shape[axis] = count * self.heads.dim

        def select(whole: Tensor) -> Tensor:
            query, kv = self.chosen(layer)
            heads = query if projection in ("q_proj", "o_proj") else kv
            # Which they are may be known only after a model was measured, how many is known before.
            rows = torch.tensor(heads)[:, None] * self.heads.dim + torch.arange(self.heads.dim)
            return whole.index_select(axis, rows.flatten())

        return made(tensor.name, tuple(shape), floating(tensor, self.kind), (tensor,), select)

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The source's with other numbers of heads."""
        return with_heads(config, self.kind, *self.counts)


class Degroup(HeadSelection):
    """Repeat key/value heads, so that fewer query heads share one; the model computes what it did.

    Args:
        kv_heads: how many there shall be; None = as many as query heads.
    """

    kind = "degroup"

    def __init__(self, kv_heads: int | None = None) -> None:
        super().__init__()
        self.kv_heads = kv_heads

    @property
    def summary(self) -> str:
        many = "as many key/value heads as query heads" if self.kv_heads is None else f"{self.kv_heads} key/value heads"
        return f"each key/value head repeated, for {many}"

    @property
    def counts(self) -> tuple[int, int]:
        return self.heads.query, self.kv_heads or self.heads.query

    def check(self, config: Mapping[str, Any]) -> None:
        super().check(config)
        query, kv = self.counts
        if kv <= self.heads.kv or kv % self.heads.kv or query % kv:
            fitting = [n for n in range(self.heads.kv + 1, query + 1) if n % self.heads.kv == 0 == query % n]
            raise PlanError(
                f"degroup cannot make {kv} key/value heads of {self.heads.kv} that serve {query} query heads: "
                + (f"kv_heads can be {' or '.join(map(str, fitting))}" if fitting else "none are shared")
            )

    def chosen(self, layer: int) -> tuple[list[int], list[int]]:
        query, kv = self.counts
        return list(range(query)), [head * self.heads.kv // kv for head in range(kv)]


class PruneHeads(HeadSelection):
    """Leave heads out; what is left computes what the whole model does where those heads' outputs are zero.

    Args:
        unit: `kv` leaves out key/value heads with all query heads that share them; `query` leaves out query heads,
            equally many of each key/value head's.
        keep: how many of the unit stay in each layer, those whose outputs weigh most, as `settle` is told; or None.
        remove: which are left out, counted from 0; one list for all layers, or one for each; if not `keep`.
        by: what `keep` goes by: how much a head adds on average, or for how many tokens it adds most; of heads that are
            never first those that add most.
    """

    kind = "prune_heads"

    def __init__(
        self,
        *,
        unit: Literal["kv", "query"] = "kv",
        keep: int | None = None,
        remove: Sequence[int] | Sequence[Sequence[int]] = (),
        by: Literal["contribution", "usage"] = "contribution",
    ) -> None:
        super().__init__()
        self.unit = unit
        self.by = by
        self.keep = keep
        self.remove = remove
        self._kept: list[list[int]] | None = None
        self._units = 0

    @property
    def summary(self) -> str:
        what = "key/value heads, with the query heads that share them," if self.unit == "kv" else "query heads"
        most = "used" if self.by == "usage" else "important"
        which = f"all but the {self.keep} most {most}" if self.keep is not None else "chosen"
        return f"{which} {what} left out of each layer"

    @property
    def inexact(self) -> str:
        return "heads left out"

    @property
    def counts(self) -> tuple[int, int]:
        if self.unit == "kv":
            return self._units * self.heads.group, self._units
        return self._units, self.heads.kv

    def check(self, config: Mapping[str, Any]) -> None:
        super().check(config)
        total = self.heads.kv if self.unit == "kv" else self.heads.query
        if self.keep is not None:
            self._units = self.keep
            if not 0 < self.keep < total:
                raise PlanError(
                    f"prune_heads is to keep {self.keep} of {total} {self._unit_name()}: keep can be 1 to {total - 1}"
                )
            if self.unit == "query" and self.keep % self.heads.kv:
                raise PlanError(
                    f"prune_heads cannot keep {self.keep} query heads, for each of the {self.heads.kv} key/value heads "
                    f"needs equally many: keep a multiple of {self.heads.kv}"
                )
        else:
            self._kept = [self._left(total, removed) for removed in self._removed()]
            sizes = sorted({len(kept) for kept in self._kept})
            if len(sizes) > 1:
                raise PlanError(
                    f"prune_heads would leave {sizes[0]} {self._unit_name()} in one layer and {sizes[-1]} in another, "
                    "and the class has the same number in all: remove equally many from each"
                )
            self._units = sizes[0]
        with_heads(config, self.kind, *self.counts)

    def settle(self, moments: Moments) -> None:
        """Choose the heads to keep by what each adds to the hidden states, or how often it adds most."""
        if self.keep is None:
            return
        kept = []
        for layer in range(self.heads.layers):
            scores = moments[layer].contributions
            if self.by == "usage":
                scores = moments[layer].first + 1e-6 * scores / scores.sum()
            if self.unit == "kv":
                kept.append(_largest(scores.view(self.heads.kv, -1).sum(1), self.keep))
            else:
                each = self.keep // self.heads.kv
                groups = [_largest(group, each) for group in scores.view(self.heads.kv, -1)]
                kept.append([self.heads.group * number + head for number, group in enumerate(groups) for head in group])
        self._kept = kept

    def chosen(self, layer: int) -> tuple[list[int], list[int]]:
        if self._kept is None:
            raise PlanError("prune_heads does not know which heads matter: settle it first, in a recipe by calibrate")
        kept = self._kept[layer]
        if self.unit == "query":
            return kept, list(range(self.heads.kv))
        group = self.heads.group
        return [head * group + number for head in kept for number in range(group)], kept

    def _removed(self) -> list[list[int]]:
        """The heads to leave out of each layer."""
        lists = [list(entry) for entry in self.remove if isinstance(entry, Sequence)]
        if not lists:
            flat = [entry for entry in self.remove if isinstance(entry, int)]
            return [flat] * self.heads.layers
        if len(lists) != self.heads.layers:
            raise PlanError(
                f"prune_heads has {len(lists)} lists of heads to remove, and the model has {self.heads.layers} layers: "
                "give one list for each, or one for all"
            )
        return lists

    def _left(self, total: int, removed: Sequence[int]) -> list[int]:
        beyond = [head for head in removed if not 0 <= head < total]
        if beyond:
            raise PlanError(
                f"prune_heads is to remove number {beyond[0]} of the {self._unit_name()}, which are 0 to {total - 1}"
            )
        left = [head for head in range(total) if head not in removed]
        if not left or len(left) == total:
            raise PlanError(f"prune_heads is to remove {total - len(left)} of {total} {self._unit_name()}")
        if self.unit == "query":
            counts = [sum(head // self.heads.group == kv for head in left) for kv in range(self.heads.kv)]
            if min(counts) < max(counts) or not min(counts):
                raise PlanError(
                    f"prune_heads would leave {', '.join(map(str, counts))} query heads to the {self.heads.kv} "
                    "key/value heads, each of which needs equally many: remove others, or key/value heads (unit: kv)"
                )
        return left

    def _unit_name(self) -> str:
        return "key/value heads" if self.unit == "kv" else "query heads"


def _largest(scores: Tensor, count: int) -> list[int]:
    return sorted(scores.argsort(descending=True, stable=True)[:count].tolist())
