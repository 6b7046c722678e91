"""The attention of each layer copied, or taken from several models, for a gate to mix."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from ..fields import Count, Text
from .base import REWRITES, RewriteBase

if TYPE_CHECKING:
    from ...convert.rewriting.steps import Step


@REWRITES.register
class WidenRewrite(RewriteBase):
    """Put several attentions of each layer side by side, as heads of one; the method `moa` then mixes them.

    Attributes:
        num_experts: how many; null means 2, and with sources one for each model.
        share_kv: whether they share one set of keys and values, so that the cache stays as it is; otherwise it grows
            with their number. Shared ones of several models are the mean of theirs.
        sources: fine-tuned branches of the model, folders or Hub ids, whose attentions these are. Everything else stays
            as it is: put `experts` with the same sources before this, which averages it.
        include_base: whether the model's own attention is the first.
    """

    needs_method: ClassVar[str | None] = "moa"
    kind: Literal["widen"] = "widen"
    num_experts: Count | None = None
    share_kv: bool = False
    sources: list[Text] = Field(default_factory=list)
    include_base: bool = True

    @property
    def count(self) -> int:
        """Attentions of each layer."""
        if self.num_experts is not None:
            return self.num_experts
        return len(self.sources) + self.include_base if self.sources else 2

    @model_validator(mode="after")
    def _several(self) -> Self:
        models = len(self.sources) + self.include_base
        if not models:
            raise ValueError("include_base: false leaves no attention to take: give sources")
        if self.count < 2:
            raise ValueError("num_experts must be at least 2: one attention leaves a router nothing to choose")
        if self.sources and self.count != models:
            raise ValueError(
                f"num_experts is {self.count}, and there are {models} models to take attentions from: leave it out"
            )
        return self

    def step(self) -> "Step":
        return self.step_before(())

    def step_before(self, rules: Sequence[Any]) -> "Step":
        from ...convert.rewriting.widen import Widen

        return Widen(
            num_experts=self.count,
            share_kv=self.share_kv,
            mixed=bool(rules) and self._is_mixed_by(rules[0]),
            sources=self.sources,
            include_base=self.include_base,
        )

    def _is_mixed_by(self, rule: Any) -> bool:
        """Whether a rule makes one attention of these again, in all layers."""
        from ...attention_modules.registry import get_method

        if (rule.method, rule.layers) != (self.needs_method, "all"):
            return False
        options = get_method(rule.method).options_class.model_validate(rule.options)
        return (getattr(options, "num_experts", None), getattr(options, "share_kv", None)) == (
            self.count,
            self.share_kv,
        )
