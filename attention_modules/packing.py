"""Documents packed into one row: each is attended to by itself, whatever the method.

A packed row is taken apart before the method sees it: documents of similar length become rows of one padded batch, for
which every method is exact already, and their outputs go back to where the tokens stood. Documents in a batch differ in
length by less than a factor of two, so that padding never costs more than the tokens themselves.

Letters in shapes: `T` tokens of a packed row, `N` documents of a group, `L` tokens of the longest of them.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .tokens import Rotation, Surroundings


@dataclass(frozen=True)
class Group:
    """Documents of similar length.

    Attributes:
        places: `[N, L]` int64, where each token stands in the flattened batch; any place where padding is.
        valid: `[N, L]` bool, padding before real tokens; None where all documents are equally long.
    """

    places: Tensor
    valid: Tensor | None

    def take(self, tensor: Tensor) -> Tensor:
        """`[batch, heads, T, dim]` → `[N, heads, L, dim]`."""
        return tensor.transpose(1, 2).flatten(0, 1)[self.places].transpose(1, 2)

    def take_rows(self, tensor: Tensor) -> Tensor:
        """`[batch, T, ...]` → `[N, L, ...]`."""
        return tensor.flatten(0, 1)[self.places]

    def take_around(self, around: Surroundings) -> Surroundings:
        """What a method may ask for, of these documents; the board stays whole."""
        positions, before, rotation = around.positions, around.unrotated, around.rotation
        return Surroundings(
            None if positions is None else self.take_rows(positions),
            None if before is None else (self.take(before[0]), self.take(before[1])),
            None
            if rotation is None
            else Rotation(self.take_rows(rotation.cos), self.take_rows(rotation.sin), rotation.function),
            around.board,
        )


@dataclass(frozen=True)
class Documents:
    """Where the documents of a batch of packed rows lie.

    Attributes:
        groups: each document once; padding is in none.
        last: `[batch, T]` bool, tokens of each row's last document, the one that more tokens would continue.
    """

    groups: tuple[Group, ...]
    last: Tensor

    @classmethod
    def from_starts(cls, starts: Tensor, valid: Tensor | None = None) -> "Documents | None":
        """The documents that begin at some tokens.

        Args:
            starts: `[batch, T]` bool, a row's first token counts as one whatever it says.
            valid: `[batch, T]` bool, True = real token; None when all are.

        Returns:
            None if no row has more than one document.
        """
        batch, length = starts.shape
        real = torch.ones_like(starts) if valid is None else valid
        numbers = (starts & real).long().cumsum(1)
        # A row whose first real token is not marked has one more document: the one before the first mark.
        first = numbers.masked_fill(~real, length + 1).amin(1, keepdim=True)
        numbers = numbers - first
        ends = numbers.masked_fill(~real, -1).amax(1, keepdim=True)
        if not bool((ends > 0).any()):
            return None
        places = torch.arange(batch * length, device=starts.device)[real.flatten()]
        own = numbers + torch.arange(batch, device=starts.device)[:, None] * (length + 1)
        sizes = own[real].unique_consecutive(return_counts=True)[1]
        return cls(_groups(places, sizes), (numbers == ends) & real)

    def joined(self) -> Group:
        """All of them in one group, padded to the longest."""
        places = torch.cat([_flat(group) for group in self.groups])
        sizes = torch.cat([_sizes(group) for group in self.groups])
        return _group(places, sizes, list(range(len(sizes))))

    def one_by_one(self) -> Iterator[Tensor]:
        """`[L]` places of each document's tokens in the flattened batch."""
        for group in self.groups:
            for row, places in enumerate(group.places):
                yield places if group.valid is None else places[group.valid[row]]


def attend_documents(
    core: torch.nn.Module,
    documents: Documents,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    hidden_states: Tensor | None,
    around: Surroundings,
) -> Tensor:
    """What an attention module makes of packed rows: for each document the same as for the document alone.

    Args:
        core: the attention module, or what an adapter library put around it.
        documents: which tokens belong together.
        query: `[batch, num_heads, T, head_dim]`.
        key: `[batch, num_kv_heads, T, head_dim]`.
        value: `[batch, num_kv_heads, T, value_dim]`.
        scaling: factor on query-key products.
        hidden_states: `[batch, T, hidden]` or None.
        around: what else the method reads; what it writes on the board is kept for each group of documents.

    Returns:
        `[batch, num_heads, T, value_dim]`; zero where padding stands.
    """
    batch, heads, length, _ = query.shape
    places, outs = [], []
    for number, group in enumerate(documents.groups):
        board = None if around.board is None else _part_of(around.board, number)
        out = core(
            group.take(query),
            group.take(key),
            group.take(value),
            scaling=scaling,
            padding_mask=group.valid,
            hidden_states=None if hidden_states is None else group.take_rows(hidden_states),
            around=replace(group.take_around(around), board=board),
        ).transpose(1, 2)
        if around.board is not None and board is not None:
            around.board.update({f"{number} {name}": tensor for name, tensor in board.items()})
        places.append(_flat(group))
        outs.append(out.flatten(0, 1) if group.valid is None else out[group.valid])
    flat = outs[0].new_zeros(batch * length, heads, outs[0].shape[-1])
    whole: Tensor = flat.index_copy(0, torch.cat(places), torch.cat(outs)).unflatten(0, (batch, length))
    return whole.transpose(1, 2)


def _part_of(board: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    prefix = f"{number} "
    return {name.removeprefix(prefix): tensor for name, tensor in board.items() if name.startswith(prefix)}


def _groups(places: Tensor, sizes: Tensor) -> tuple[Group, ...]:
    by_magnitude: dict[int, list[int]] = defaultdict(list)
    for document, size in enumerate(sizes.tolist()):
        by_magnitude[int(size).bit_length()].append(document)
    return tuple(_group(places, sizes, members) for _, members in sorted(by_magnitude.items()))


def _group(places: Tensor, sizes: Tensor, members: list[int]) -> Group:
    """Some of the documents that lie behind one another in `places`, moved to the right ends of rows."""
    chosen = torch.tensor(members, device=places.device)
    ends, own = sizes.cumsum(0)[chosen], sizes[chosen]
    longest = int(own.max())
    age = torch.arange(longest, 0, -1, device=places.device)
    at = ends[:, None] - age
    valid = age <= own[:, None]
    return Group(places[at.clamp_min(0)], None if bool(valid.all()) else valid)


def _flat(group: Group) -> Tensor:
    return group.places.flatten() if group.valid is None else group.places[group.valid]


def _sizes(group: Group) -> Tensor:
    full = group.places.new_full((len(group.places),), group.places.shape[1])
    return full if group.valid is None else group.valid.sum(1)
