"""The recipe: what becomes of which layers, and how the model heals."""

import re
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from .data import DataSection, EvaluateSection
from .fields import Section, Text
from .heads import IMPORTANCE, Heads, HeadSelector, parse_heads
from .rewrites.base import Rewrite
from .selectors import Layers, LayerSelector, parse_layers
from .stages.base import Stage

if TYPE_CHECKING:
    from ..convert.rewriting.steps import Step

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KB|MB|GB|TB)", re.IGNORECASE)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
LINK = re.compile(r"https?://\S+")
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class AttentionRule(Section):
    """Which layers get which attention; the first rule that matches a layer wins.

    Attributes:
        layers: `all`, `"0-3,7"`, `{every: 4, offset: 3}`, `{first: 2}`, `{last: 2}` or a regex on module names.
        heads: KV heads of these layers that the rule is about, by number such as `"0,3"`, or `{importance: FILE, top:
            25%}`, those that matter most of all these layers' heads; null = all that no earlier rule takes.
        method: a registered method; `softmax` keeps the layers as they are.
        options: the method's own options; one that names KV heads takes `{importance: FILE, top: 2}` too, those that
            matter most in each layer.
    """

    layers: Layers
    heads: Heads | None = None
    method: Text
    options: dict[str, Any] = Field(default_factory=dict)

    @property
    def selector(self) -> LayerSelector:
        """The parsed `layers`."""
        return parse_layers(self.layers)

    @property
    def head_options(self) -> dict[str, HeadSelector]:
        """The parsed options that name KV heads of each layer by their importance."""
        named = {name: value for name, value in self.options.items() if isinstance(value, dict) and IMPORTANCE in value}
        return {name: parse_heads(value) for name, value in named.items()}

    @model_validator(mode="after")
    def _readable_heads(self) -> Self:
        _ = self.head_options
        return self

    @property
    def head_selector(self) -> HeadSelector | None:
        """The parsed `heads`; None if the rule takes all."""
        return None if self.heads is None else parse_heads(self.heads)

    def matches(self, index: int | None, num_layers: int, module_name: str) -> bool:
        """Whether the rule is about a module.

        Args:
            index: the module's layer, from 0; None for a module outside of the stack of layers.
            num_layers: layers of the model.
            module_name: dotted name, such as `model.layers.0.self_attn`.

        Raises:
            RecipeError: the rule names a layer that the model does not have.
        """
        selector = self.selector
        selector.check(num_layers)
        return selector.matches(index, num_layers, module_name)


class OutputSection(Section):
    """How the converted model is saved.

    Attributes:
        dtype: dtype of the saved weights; null = that of the input.
        shard_size: largest weight file, such as `5GB` (decimal units).
        merge_lora: add the low-rank updates to the weights; false keeps them as an adapter beside the model.
    """

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    shard_size: Text = "5GB"
    merge_lora: bool = True

    @field_validator("shard_size")
    @classmethod
    def _readable_size(cls, value: str) -> str:
        if not SIZE.fullmatch(value) or _size_in_bytes(value) < 1:
            raise ValueError(f"{value!r} is no size; write a number and one of {', '.join(UNITS)}, such as 5GB")
        return value

    @property
    def shard_bytes(self) -> int:
        """`shard_size` in bytes."""
        return _size_in_bytes(self.shard_size)


def _size_in_bytes(text: str) -> int:
    found = SIZE.fullmatch(text)
    return int(float(found[1]) * UNITS[found[2].upper()]) if found else 0


class Recipe(Section):
    """A conversion from start to end.

    Attributes:
        name: short name: letters, digits, `.`, `_` and `-`.
        description: one sentence.
        paper: URL of the paper.
        rewrite: what is done to the weights before anything else, in order; the result is an ordinary model.
        attention: rules, the first that matches a layer wins; layers without a match keep their softmax. May be empty
            beside `rewrite`; the result is then the rewritten model, which loads without attnconv.
        stages: healing stages in order; none = no training. Where a rewrite changes what the model computes, they learn
            from the model that was rewritten.
        data: training text or images of the stages that name none of their own.
        evaluate: text on which perplexity is measured; null = no measurement.
        output: how the result is saved.
    """

    name: str
    description: str = ""
    paper: str | None = None
    rewrite: list[Rewrite] = Field(default_factory=list)
    attention: list[AttentionRule] = Field(default_factory=list)
    data: DataSection | None = None
    stages: list[Stage] = Field(default_factory=list)
    evaluate: EvaluateSection | None = None
    output: OutputSection = OutputSection()

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not NAME.fullmatch(value):
            raise ValueError(f"{value!r} is no name; use letters, digits, '.', '_' and '-'")
        return value

    @field_validator("paper")
    @classmethod
    def _link(cls, value: str | None) -> str | None:
        if value is not None and not LINK.fullmatch(value):
            raise ValueError(f"{value!r} is no link; write the URL of the paper, https://...")
        return value

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if self.attention:
            return self
        if not self.rewrite:
            raise ValueError("there is nothing to do: give attention rules, or a rewrite")
        for number, stage in enumerate(self.stages):
            if stage.needs_attention:
                raise ValueError(
                    f"stage {number} ({stage.kind}) is about new attention, and there are no attention rules: take a "
                    "stage logits or lora in its place, or leave it out"
                )
        idle = {} if self.stages else {"evaluate": self.evaluate, "output.dtype": self.output.dtype}
        for key, value in idle.items():
            if value:
                raise ValueError(
                    f"{key} is about models that are loaded, and without attention rules and stages none is: leave it "
                    "out; `attnconv eval` measures, and the rewrite cast changes the dtype"
                )
        return self

    @model_validator(mode="after")
    def _rewrites_have_their_method(self) -> Self:
        methods = {rule.method for rule in self.attention}
        for number, rewrite in enumerate(self.rewrite):
            if rewrite.needs_method is not None and rewrite.needs_method not in methods:
                raise ValueError(
                    f"rewrite {number} ({rewrite.kind}) makes layers for the method {rewrite.needs_method!r}: add an "
                    f"attention rule {{layers: all, method: {rewrite.needs_method}}}"
                )
        return self

    @model_validator(mode="after")
    def _stages_have_data(self) -> Self:
        hungry = [str(number) for number, stage in enumerate(self.stages) if stage.data is None]
        if hungry and self.data is None:
            stages = f"stage{'s' * (len(hungry) > 1)} {', '.join(hungry)}"
            raise ValueError(f"{stages} would train on nothing: give data to the recipe or to each stage")
        for number, stage in enumerate(self.stages):
            section = stage.data or self.data
            why_unsupported = None if section is None else stage.why_unsupported(section)
            if why_unsupported is not None:
                raise ValueError(f"stage {number} ({stage.kind}) {why_unsupported}")
        return self

    def steps(self) -> list["Step"]:
        """What carries the rewrites out, in order; this is where torch is imported."""
        return [rewrite.step_before(self.attention) for rewrite in self.rewrite]

    def to_yaml(self) -> str:
        """The recipe as YAML with every default written out; loading it gives an equal recipe."""
        text: str = yaml.safe_dump(self.compact(), sort_keys=False, allow_unicode=True, width=110)
        return text
