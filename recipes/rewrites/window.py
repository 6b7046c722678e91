"""Sliding windows, as settings of a class that transformers has."""

from typing import TYPE_CHECKING, Literal

from ..fields import Count
from ..selectors import Layers, parse_layers
from .base import REWRITES, RewriteBase

if TYPE_CHECKING:
    from ...convert.rewriting.steps import Step


@REWRITES.register
class WindowRewrite(RewriteBase):
    """Let layers see the newest tokens only, in a class that has windows: Qwen2 and Qwen3 keep theirs.

    A Llama or Mistral becomes a Ministral, or a Mistral if all layers have the window.

    Attributes:
        window: how many tokens they see, each itself included.
        keep: layers that stay as they are, chosen as in attention rules; null = none.
        sinks: give each head a learned sink whose logit starts at this, in the class GraniteSWA, for Llama and Mistral;
            -10000 changes nothing and cannot be learned, -10 nearly nothing. null = no sinks.
    """

    kind: Literal["window"] = "window"
    window: Count
    keep: Layers | None = None
    sinks: float | None = None

    def step(self) -> "Step":
        from ...convert.rewriting.window import Window

        selector = None if self.keep is None else parse_layers(self.keep)

        def chosen(count: int) -> list[int]:
            if selector is None:
                return list(range(count))
            selector.check(count)
            names = (f"model.layers.{index}.self_attn" for index in range(count))
            return [index for index, name in enumerate(names) if not selector.matches(index, count, name)]

        return Window(window=self.window, layers=chosen, sinks=self.sinks)
