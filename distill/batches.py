"""Batches: which sequences a step trains on, and what of them counts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .losses import IGNORED, next_token_targets
from .packing import PackedSequence, Position
from .team import Team


@dataclass(frozen=True)
class Batch:
    """Sequences that go through the model together.

    Attributes:
        input_ids: `[batch, T]` int64.
        padding_mask: `[batch, T]` bool, True = real token; None means all.
        position_ids: `[batch, T]` int64, 0 where a document begins, for rows of documents that do not see each other.
    """

    input_ids: torch.Tensor
    padding_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Real tokens."""
        return int(self.input_ids.numel() if self.padding_mask is None else self.padding_mask.sum())

    @property
    def targets(self) -> torch.Tensor:
        """`[batch, T]`: the next token of each position in its document, -100 where there is none."""
        targets = next_token_targets(self.input_ids, self.padding_mask)
        if self.position_ids is None:
            return targets
        ends = torch.nn.functional.pad(self.position_ids[:, 1:] == 0, (0, 1), value=True)
        return targets.masked_fill(ends, IGNORED)

    @property
    def num_targets(self) -> int:
        """Positions that have a next token."""
        return int((self.targets != IGNORED).sum())

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        mask = None if self.padding_mask is None else self.padding_mask.to(device)
        positions = None if self.position_ids is None else self.position_ids.to(device)
        return Batch(self.input_ids.to(device), mask, positions)

    def inputs(self, dtype: torch.dtype) -> dict[str, Any]:
        """What a model in a dtype takes."""
        mask = None if self.padding_mask is None else self.padding_mask.long()
        inputs = {"input_ids": self.input_ids, "attention_mask": mask, "use_cache": False}
        return inputs if self.position_ids is None else {**inputs, "position_ids": self.position_ids}


@dataclass(frozen=True)
class ImageBatch(Batch):
    """Images that go through the model together; there are no token ids.

    Attributes:
        pixel_values: `[batch, channels, height, width]`.
    """

    input_ids: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))
    pixel_values: torch.Tensor = field(kw_only=True)

    @property
    def num_tokens(self) -> int:
        """Images, since all have equally many patches."""
        return self.pixel_values.shape[0]

    def to(self, device: torch.device) -> "ImageBatch":
        """The same batch on a device."""
        return ImageBatch(pixel_values=self.pixel_values.to(device))

    def inputs(self, dtype: torch.dtype) -> dict[str, Any]:
        """What a model in a dtype takes."""
        return {"pixel_values": self.pixel_values.to(dtype)}


@dataclass(frozen=True)
class StepData:
    """What one optimizer step trains on.

    Attributes:
        batches: the micro-batches of this process, one after another.
        end: the place in the data behind the sequences of all processes.
    """

    batches: tuple[Batch, ...]
    end: Position


def step_data(
    sequences: Iterator[PackedSequence],
    *,
    batch_size: int,
    accumulation: int,
    team: Team,
    collate: Callable[[list[PackedSequence]], Batch],
) -> Iterator[StepData]:
    """Deal out sequences to steps: each takes `batch_size * accumulation` for every process of the team.

    The processes take turns, so a team of two with a batch of one sees in a step what one process with a batch of two
    sees, and the data end at the same place.

    Args:
        sequences: endless; the same in every process.
        batch_size: sequences in one micro-batch of one process.
        accumulation: micro-batches of one process in one step.
        team: the processes that share the step.
        collate: makes a batch of sequences.
    """
    needed = batch_size * accumulation * team.size
    while True:
        taken = [next(sequences) for _ in range(needed)]
        own = taken[team.rank :: team.size]
        batches = tuple(
            collate(own[start : start + batch_size]).to(team.device) for start in range(0, len(own), batch_size)
        )
        yield StepData(batches, taken[-1].end)
