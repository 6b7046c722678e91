"""The processes that train together: started by `accelerate launch` or `torchrun`, or one alone."""

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import distributed

from ..errors import TrainingError

# What `accelerate launch` sets for ways of training that split the model's weights.
SHARDING_FLAGS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


@dataclass(frozen=True)
class Team:
    """Processes that each hold the whole model, see different sequences, and add up their gradients.

    Gradients are summed here and not by `DistributedDataParallel`: attention transfer runs its backward passes inside
    the forward pass, layer by layer, where DDP's hooks are not yet armed; and what healing trains is small.

    Attributes:
        device: where this process computes.
        rank: which of the processes this is; 0 writes the files.
        size: how many there are.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def add_up(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace every tensor by its sum over all processes, in one message."""
        tensors = list(tensors)
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.detach().float().flatten() for tensor in tensors])
        distributed.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.detach().copy_(part.view_as(tensor))

    def share_start(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace every tensor by that of the leading process."""
        if self.size > 1:
            for tensor in tensors:
                distributed.broadcast(tensor.detach(), 0)

    def agree(self, wish: bool) -> bool:
        """Whether any process wishes something; the same answer in all of them."""
        if self.size == 1:
            return wish
        wishes = torch.tensor(float(wish), device=self.device)
        self.add_up([wishes])
        return bool(wishes)

    def wait(self) -> None:
        """Go on only when all processes have come here."""
        if self.size > 1:
            distributed.barrier()


def find_team(device: str | None = None) -> Team:
    """Join the processes that were launched together.

    Args:
        device: where to compute, as torch names it; None means the accelerator that accelerate assigns, else the CPU.

    Raises:
        TrainingError: the launch asks for a way of training that splits the model, or the device does not exist.
    """
    for flag, name in SHARDING_FLAGS.items():
        if os.environ.get(flag, "").lower() in ("1", "true"):
            raise TrainingError(f"Healing does not split the model's weights: launch without {name}.")
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    if state.num_processes > 1:
        return Team(state.device, state.process_index, state.num_processes)
    try:
        chosen = torch.device(device) if device is not None else state.device
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise TrainingError(f'There is no device "{device}" here: {str(error).splitlines()[0]}') from error
    return Team(chosen)
