"""Tensors of a checkpoint that is being written: their names, types and shapes, and where their numbers come from.

A target is planned before a byte is read, so headers can be written first. Targets may be made of other targets, which
is how one rewrite follows another without a checkpoint in between.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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
