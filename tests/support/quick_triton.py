"""Triton's interpreter, chosen by importing this, without the work that it does at every call and throws away.

Results are the same to the bit. To be imported before triton is, which reads TRITON_INTERPRET once.
"""

import os
from dataclasses import replace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

from triton import language as tl
from triton.runtime import interpreter


def _patch_language_once_a_launch() -> None:
    """A function that a kernel calls patches the whole language anew, though the kernel's launch did it already.

    That is most of the time of kernels made of small functions.
    """
    patch, scope = getattr(interpreter, "_patch_lang", None), getattr(interpreter, "_LangPatchScope", None)
    # Of a triton that is built otherwise, nothing is changed.
    if patch is None or scope is None:
        return

    def patch_once(fn: Any) -> Any:
        languages = [x for x in (tl, tl.core) if any(x is found for found in fn.__globals__.values())]
        patched = languages and not any(tl.core.is_builtin(x.load) for x in languages)
        return scope() if patched else patch(fn)

    interpreter._patch_lang = patch_once


def _leave_out_what_only_debugging_reads() -> None:
    """Of every sum and product of integers it is computed whether it overflows, and looked at in debug mode alone."""
    builder = getattr(interpreter, "interpreter_builder", None)
    options = getattr(builder, "options", None)
    if getattr(options, "sanitize_overflow", False) and not getattr(options, "debug", True):
        builder.options = replace(options, sanitize_overflow=False)


_patch_language_once_a_launch()
_leave_out_what_only_debugging_reads()
