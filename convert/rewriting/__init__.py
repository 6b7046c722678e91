"""Rewrites: a checkpoint in, an ordinary checkpoint out, tensor by tensor; the result needs nothing of this package.

from attnconv.convert.rewriting import rewrite_checkpoint
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import rewrite_checkpoint

__all__ = ["rewrite_checkpoint"]


def __getattr__(name: str) -> Any:
    # Cards and receipts tell of rewrites, and `checkpoint` writes receipts: it is loaded only when it is asked for.
    if name in __all__:
        from .checkpoint import rewrite_checkpoint

        return rewrite_checkpoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
