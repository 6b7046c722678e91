"""Matrix products of tokens in bfloat16, by processors that multiply bfloat16 in hardware.

The torch forms of all methods compute in fp32. Where queries, keys and values came in bfloat16, a CPU with AMX rounds
the factors of a product to bfloat16 and adds up in fp32 (oneDNN's `bf16` mode of fp32 products), which takes a fraction
of the time; results, sums and states stay fp32. Other processors are left alone: what they would gain is not known.
"""

import functools
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch.backends import mkldnn


class RoundedProducts:
    """Has products round their factors while any call is at work, in whatever thread."""

    def __init__(self) -> None:
        # An attribute that type checkers do not see, for it is put there at import.
        self._setting = cast("Any", mkldnn).matmul
        self._lock = threading.Lock()
        self._calls = 0
        self._found = "none"

    def __enter__(self) -> None:
        with self._lock:
            if not self._calls:
                self._found = self._setting.fp32_precision
                self._setting.fp32_precision = "bf16"
            self._calls += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._calls -= 1
            if not self._calls:
                self._setting.fp32_precision = self._found


ROUNDED_PRODUCTS = RoundedProducts()


@functools.cache
def multiplies_bf16() -> bool:
    """Whether this CPU has matrix products in bfloat16 that sum in fp32 (AMX)."""
    return mkldnn.is_available() and bool(torch.cpu.get_capabilities().get("amx_bf16"))


def bf16_products(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[None]:
    """Inside, fp32 products on the CPU may round their factors to bfloat16, if the tokens came in that.

    torch keeps the setting for the process, so products of other threads meet it as well while a call is at work.

    Args:
        dtype: in which the tokens came.
        device: where they are.
    """
    # A compiled graph cannot change settings, and need not: inductor has its own products.
    wanted = dtype == torch.bfloat16 and device.type == "cpu" and not torch.compiler.is_compiling()
    return ROUNDED_PRODUCTS if wanted and multiplies_bf16() else nullcontext()
