"""Matrix products of tokens in bfloat16, by processors that multiply bfloat16 in hardware.

The torch forms of all methods compute in fp32. Where queries, keys and values came in bfloat16, a CPU with AMX rounds
the factors of a product to bfloat16 and adds up in fp32 (oneDNN's `bf16` mode of fp32 products), which takes a fraction
of the time; results, sums and states stay fp32. Other processors are left alone: what they would gain is not known.
"""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch.backends import mkldnn

# An attribute that type checkers do not see, for it is put there at import.
_products = cast("Any", mkldnn).matmul
_lock = threading.Lock()
# Calls that are at work now, in whatever thread, and the setting that was found by the first of them.
_calls = 0
_found = "none"


@functools.cache
def multiplies_bf16() -> bool:
    """Whether this CPU has matrix products in bfloat16 that sum in fp32 (AMX)."""
    return mkldnn.is_available() and bool(torch.cpu.get_capabilities().get("amx_bf16"))


@contextmanager
def bf16_products(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Inside, fp32 products on the CPU may round their factors to bfloat16, if the tokens came in that.

    torch keeps the setting for the process, so products of other threads meet it as well while a call is at work.

    Args:
        dtype: in which the tokens came.
        device: where they are.
    """
    # A compiled graph cannot change settings, and need not: inductor has its own products.
    wanted = dtype == torch.bfloat16 and device.type == "cpu" and not torch.compiler.is_compiling()
    if not wanted or not multiplies_bf16():
        yield
        return
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _calls, _found
    with _lock:
        if not _calls:
            _found = _products.fp32_precision
            _products.fp32_precision = "bf16"
        _calls += 1


def _leave() -> None:
    global _calls
    with _lock:
        _calls -= 1
        if not _calls:
            _products.fp32_precision = _found
