"""How a kernel is started: block sizes, precision of the products, and one door through which every launch goes."""

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

MAX_DIM = 256
# φ is read in parts, but what it adds up to is written out for every chunk.
MAX_FEATURES = 512
HAS_TRITON = find_spec("triton") is not None


def has_triton() -> bool:
    """Whether triton is installed."""
    return HAS_TRITON


def is_interpreted() -> bool:
    """Whether triton runs its kernels on the CPU, for tests; the variable counts when triton is first imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def power_of_two(size: int) -> int:
    """The least one that holds `size` and that `tl.dot` takes."""
    return max(16, 1 << (size - 1).bit_length())


def block(size: int, dtype: torch.dtype) -> int:
    """Columns handled at a time: fp32 takes twice the registers, and three times the products."""
    return min(64 if dtype == torch.bfloat16 else 32, power_of_two(size))


def default_chunk(dtype: torch.dtype) -> int:
    """Tokens handled at a time."""
    return 64 if dtype == torch.bfloat16 else 32


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums before a chunk are kept in between kernels; those in fp16 would overflow."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def precision(dtype: torch.dtype) -> dict[str, Any]:
    """COMPUTE and PRECISION of a kernel: fp16 goes through tf32, which has as many digits and more range."""
    import triton.language as tl

    if dtype == torch.bfloat16:
        return {"COMPUTE": tl.bfloat16, "PRECISION": "tf32"}
    exact = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    return {"COMPUTE": tl.float32, "PRECISION": "tf32x3" if exact else "tf32"}


def launch(
    kernel: Any,
    grid: Sequence[int],
    arguments: Mapping[str, Tensor | int | float | None],
    constants: Mapping[str, Any],
    *,
    num_warps: int = 4,
    num_stages: int = 2,
) -> None:
    """Start `kernel` on the device of its tensors."""
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[tuple(grid)](**arguments, **constants, num_warps=num_warps, num_stages=num_stages)
