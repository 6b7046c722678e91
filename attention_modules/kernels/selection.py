"""Which path a call takes: a Triton kernel, or torch with one word about why."""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from .launching import MAX_DIM, MAX_FEATURES, has_triton, is_interpreted

logger = logging.getLogger(__name__)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# What CUDA takes on the second and the third axis of a grid; heads stand on one of them, chunks on the other.
MAX_ROWS = 65535
MIN_CHUNK = 16
_said: set[str] = set()

Method = TypeVar("Method", bound=Callable[..., object])


def needs_package(method: Method) -> Method:
    """Mark a method that self-contained files do without, for kernels and their operators cannot stand in one file."""
    return method


def problem_with(*tensors: Tensor, dims: tuple[int, ...] = (), features: int = 0, sequences: int = 0) -> str | None:
    """Why the kernels cannot take these tensors, or None.

    Args:
        tensors: what a kernel would read, `[batch, heads, T, dim]`; all of one device and dtype.
        dims: sizes of vectors, which are limited.
        features: size of φ, likewise.
        sequences: how many are packed in the one row, 0 when none are.
    """
    first = tensors[0]
    if any(t.device != first.device for t in tensors):
        return "the tensors are on different devices"
    problem = device_problem(first.device)
    if problem is not None:
        return problem
    rows, heads, tokens = sequences or first.shape[0], first.shape[1], first.shape[2]
    if rows * heads > MAX_ROWS:
        kind = "packed sequences" if sequences else "rows"
        return f"there are {rows} {kind} of {heads} heads, and a launch takes {MAX_ROWS} heads"
    if tokens // MIN_CHUNK + max(sequences, 1) > MAX_ROWS:
        return f"there are {tokens} tokens, and a launch takes fewer than {MAX_ROWS * MIN_CHUNK}"
    for tensor in tensors:
        if tensor.dtype not in DTYPES or tensor.dtype != first.dtype:
            return f"the dtype is {tensor.dtype}, and the kernels take bfloat16, float16 or float32, one for all"
    if dims and max(dims) > MAX_DIM:
        return f"a vector has {max(dims)} numbers, and the kernels take at most {MAX_DIM}"
    if features > MAX_FEATURES:
        return f"φ gives {features} features, and the kernels take at most {MAX_FEATURES}"
    return None


def device_problem(device: torch.device) -> str | None:
    """Why no kernel can run on a device, or None."""
    if not has_triton():
        return "triton is not installed"
    if device.type == "cuda":
        return gpu_problem(device)
    return None if is_interpreted() else f"{device.type!r} is not a CUDA device"


def gpu_problem(device: torch.device) -> str | None:
    """Why a GPU cannot run the kernels, which are made for tensor cores with bf16 and tf32, or None."""
    if torch.version.hip is not None:
        return "the GPU is not one of NVIDIA's"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"the GPU has compute capability {major}.{minor}, and the kernels need 8.0"


def in_one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in the least dtype that holds them all."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


def use_triton(implementation: str, problem: str | None, device: torch.device) -> bool:
    """Whether a call goes through Triton; on a GPU `"auto"` says once why it does not.

    Raises:
        ValueError: `implementation="triton"` was asked for and cannot be had.
    """
    if implementation == "triton":
        if problem is not None:
            raise ValueError(f"implementation='triton' is not possible here: {problem}; use 'auto' or 'torch'")
        return True
    if implementation != "auto" or device.type != "cuda":
        return False
    if problem is not None:
        _say(problem)
    return problem is None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _say(problem: str) -> None:
    """Once in a process; under torch.compile while it traces."""
    if problem not in _said:
        _said.add(problem)
        logger.warning("attention falls back to torch: %s", problem)


def use_chunks(implementation: str, problem: str | None, query: Tensor) -> bool:
    """As `use_triton`, for kernels that take chunks: one token `[batch, heads, 1, dim]` is not worth one unasked."""
    asked = implementation == "triton" or query.shape[2] > 1
    return asked and use_triton(implementation, problem, query.device)
