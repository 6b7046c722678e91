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


def _describe_every_shape_once() -> None:
    """Each result of each operation makes anew what its shape and type amount to, of which there are a few dozen."""
    core, known = tl.core, ("tensor", "block_type", "tuple", "constexpr", "_unwrap_shape", "validate_block_shape")
    if not all(hasattr(core, name) for name in known) or not hasattr(interpreter, "_get_np_dtype"):
        return
    make_tensor, make_block, make_dtype = core.tensor.__init__, core.block_type.__init__, interpreter._get_np_dtype
    shapes: dict[Any, Any] = {}
    blocks: dict[Any, Any] = {}
    dtypes: dict[str, Any] = {}

    def tensor(self: Any, handle: Any, type: Any) -> None:
        key = type.name if type.is_block() else ""
        if key not in shapes:
            make_tensor(self, handle, type)
            shapes[key] = (self.shape, self.numel)
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[key]

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = (self.shape, self.numel, self.name)
            return
        self.element_ty = element_ty
        self.shape, self.numel, self.name = blocks[key]

    def np_dtype(tt_dtype: Any) -> Any:
        if tt_dtype.name not in dtypes:
            dtypes[tt_dtype.name] = make_dtype(tt_dtype)
        return dtypes[tt_dtype.name]

    core.tensor.__init__, core.block_type.__init__, interpreter._get_np_dtype = tensor, block_type, np_dtype


_patch_language_once_a_launch()
_describe_every_shape_once()
_leave_out_what_only_debugging_reads()
