"""Tensors of a checkpoint that is being written: their names, types and shapes, and where their numbers come from.

A target is planned before a byte is read, so headers can be written first. Targets may be made of other targets, which
is how one rewrite follows another without a checkpoint in between.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ...errors import CheckpointError
from ..reading.checkpoint import Checkpoint

PIECE_BYTES = 1 << 21
"""How much of a tensor that can be made in pieces is made at once; small enough to stay in a processor's cache."""

TORCH_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Safetensors' names of the types that rewrites read and write; tensors of other types can be copied."""
NAMES = {dtype: name for name, dtype in TORCH_TYPES.items()}


class Content(ABC):
    """Where the numbers of a tensor come from."""

    @abstractmethod
    def read(self, start: int, stop: int) -> Tensor:
        """The numbers from `start` to before `stop` of the flattened tensor.

        Raises:
            CheckpointError: they cannot be made.
        """

    def pieces(self, numbers: int, itemsize: int) -> Iterator[tuple[int, int]]:
        """The ranges in which a tensor is best made.

        Args:
            numbers: how many the tensor has.
            itemsize: bytes of one.
        """
        step = max(1, PIECE_BYTES // itemsize)
        for start in range(0, numbers, step):
            yield start, min(numbers, start + step)


@dataclass(frozen=True)
class Target:
    """One tensor.

    Attributes:
        name: its name.
        dtype: safetensors' name of its type.
        shape: its sizes.
        nbytes: bytes of its numbers.
        content: where they come from.
        of: names of the source tensors that they are made of.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    content: Content = field(repr=False)
    of: tuple[str, ...]

    @property
    def numbers(self) -> int:
        """How many numbers it has."""
        return prod(self.shape)

    def read(self) -> Tensor:
        """The whole tensor."""
        return self.content.read(0, self.numbers).view(self.shape)


@dataclass(frozen=True)
class Stored(Content):
    """The bytes of a tensor in a safetensors file, as they are.

    Attributes:
        path: the file.
        start: where in the file the tensor's data begin.
        dtype: safetensors' name of its type.
    """

    path: Path
    start: int
    dtype: str

    def read(self, start: int, stop: int) -> Tensor:
        dtype = TORCH_TYPES[self.dtype]
        buffer = bytearray((stop - start) * dtype.itemsize)
        if not buffer:
            return torch.empty(0, dtype=dtype)
        # A map of the file would count as memory of this process, for as long as the file is open.
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start + start * dtype.itemsize)
            read = 0
            while read < len(buffer):
                count = file.readinto(memoryview(buffer)[read:])
                if not count:
                    raise CheckpointError(f"{self.path} ended early while it was being read: run the conversion again.")
                read += count
        return torch.frombuffer(buffer, dtype=dtype)


@dataclass(frozen=True)
class Elementwise(Content):
    """A function of another tensor of the same shape, number by number, so that it can be made in pieces."""

    of: Target
    function: Callable[[Tensor], Tensor]

    def read(self, start: int, stop: int) -> Tensor:
        return self.function(self.of.content.read(start, stop))


@dataclass(frozen=True)
class Made(Content):
    """A function of whole tensors, such as a mean or a factor of them."""

    of: tuple[Target, ...]
    function: Callable[..., Tensor]
    shape: tuple[int, ...]

    def read(self, start: int, stop: int) -> Tensor:
        whole = self.function(*(target.read() for target in self.of))
        if whole.shape != self.shape:
            # A defect of a rewrite, never of a model.
            raise CheckpointError(f"a tensor was to have the shape {self.shape} and got {tuple(whole.shape)}")
        return whole.reshape(-1)[start:stop]

    def pieces(self, numbers: int, itemsize: int) -> Iterator[tuple[int, int]]:
        """One, for all sources are needed for any part."""
        yield 0, numbers


@dataclass(frozen=True)
class Rows(Content):
    """Numbers of another tensor that follow each other, from `first` on."""

    of: Target
    first: int

    def read(self, start: int, stop: int) -> Tensor:
        return self.of.content.read(self.first + start, self.first + stop)

    def pieces(self, numbers: int, itemsize: int) -> Iterator[tuple[int, int]]:
        """Those of the tensor, which may have to be made as a whole."""
        whole = isinstance(self.of.content, Made)
        yield from [(0, numbers)] if whole else super().pieces(numbers, itemsize)


@dataclass(frozen=True)
class Columns(Content):
    """The columns of a matrix from `first` to before `last`."""

    of: Target
    first: int
    last: int

    def read(self, start: int, stop: int) -> Tensor:
        width, whole = self.last - self.first, self.of.shape[1]
        above, below = start // width, -(-stop // width)
        rows = self.of.content.read(above * whole, below * whole).view(-1, whole)
        return rows[:, self.first : self.last].reshape(-1)[start - above * width : stop - above * width]


@dataclass(frozen=True)
class Joined(Content):
    """Tensors one after the other."""

    of: tuple[Target, ...]

    def read(self, start: int, stop: int) -> Tensor:
        parts, before = [], 0
        for part in self.of:
            first, last = max(start - before, 0), min(stop - before, part.numbers)
            if first < last:
                parts.append(part.content.read(first, last))
            before += part.numbers
        return torch.cat(parts) if parts else torch.empty(0)

    def pieces(self, numbers: int, itemsize: int) -> Iterator[tuple[int, int]]:
        """Those of each part, so that none is made twice."""
        before = 0
        for part in self.of:
            for start, stop in part.content.pieces(part.numbers, itemsize):
                yield before + start, before + stop
            before += part.numbers


@dataclass(frozen=True)
class Mean(Content):
    """The mean of tensors of one shape, number by number, taken in float32."""

    of: tuple[Target, ...]
    dtype: torch.dtype

    def read(self, start: int, stop: int) -> Tensor:
        total = self.of[0].content.read(start, stop).float()
        for target in self.of[1:]:
            # Not in place: what was read may be somebody's tensor.
            total = total + target.content.read(start, stop)
        return (total / len(self.of)).to(self.dtype)


def rows(target: Target, first: int, last: int) -> Target:
    """The rows of a tensor from `first` to before `last`."""
    if (first, last) == (0, target.shape[0]):
        return target
    row = target.numbers // target.shape[0]
    itemsize = target.nbytes // target.numbers
    content: Content = Rows(target, first * row)
    if isinstance(target.content, Stored):
        content = replace(target.content, start=target.content.start + first * row * itemsize)
    shape = (last - first, *target.shape[1:])
    return replace(target, shape=shape, nbytes=prod(shape) * itemsize, content=content)


def columns(target: Target, first: int, last: int) -> Target:
    """The columns of a matrix from `first` to before `last`."""
    if (first, last) == (0, target.shape[1]):
        return target
    shape = (target.shape[0], last - first)
    nbytes = target.nbytes // target.shape[1] * shape[1]
    return replace(target, shape=shape, nbytes=nbytes, content=Columns(target, first, last))


def joined(name: str, shape: tuple[int, ...], parts: Sequence[Target]) -> Target:
    """A tensor whose numbers are those of others of its type, one after the other."""
    of = tuple(dict.fromkeys(source for part in parts for source in part.of))
    return Target(name, parts[0].dtype, shape, sum(part.nbytes for part in parts), Joined(tuple(parts)), of)


def mean(targets: Sequence[Target]) -> Target:
    """The mean of tensors of one shape and floating type, under the name of the first."""
    if len(targets) == 1:
        return targets[0]
    return replace(targets[0], content=Mean(tuple(targets), TORCH_TYPES[targets[0].dtype]))


def stored_tensors(checkpoint: Checkpoint) -> dict[str, Target]:
    """The tensors of a checkpoint in the order of their files, and in these of their places.

    Raises:
        CheckpointError: a header says of a tensor that it has more or fewer bytes than its shape takes.
    """
    for shard in checkpoint.shards:
        for name, tensor in shard.tensors.items():
            dtype = TORCH_TYPES.get(tensor.dtype)
            if dtype is not None and prod(tensor.shape) * dtype.itemsize != tensor.nbytes:
                raise CheckpointError(
                    f"{shard.path} is damaged: {name!r} has {tensor.nbytes} bytes, which do not make up {tensor.shape} "
                    f"in {tensor.dtype}"
                )
    return {
        name: Target(
            name, tensor.dtype, tensor.shape, tensor.nbytes, Stored(shard.path, tensor.start, tensor.dtype), (name,)
        )
        for shard in checkpoint.shards
        for name, tensor in sorted(shard.tensors.items(), key=lambda item: item[1].start)
    }


def elementwise(target: Target, dtype: torch.dtype, function: Callable[[Tensor], Tensor]) -> Target:
    """A tensor of the same name and shape, each number made of one of `target`'s."""
    nbytes = target.numbers * dtype.itemsize
    return Target(target.name, NAMES[dtype], target.shape, nbytes, Elementwise(target, function), target.of)


def made(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, of: tuple[Target, ...], function: Callable[..., Tensor]
) -> Target:
    """A tensor made of whole other ones.

    Args:
        name: its name.
        shape: its sizes.
        dtype: its type.
        of: the tensors it is made of.
        function: called with these; gives a tensor of this shape and type.
    """
    sources = tuple(dict.fromkeys(source for target in of for source in target.of))
    return Target(name, NAMES[dtype], shape, prod(shape) * dtype.itemsize, Made(of, function, shape), sources)
