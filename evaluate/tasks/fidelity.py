"""How close a converted model's attention is to its base's: weights head by head, outputs layer by layer."""

import logging
from collections.abc import Sequence
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...convert.surgery.recording import AttentionLayer
from ...files.documents import Document, Number
from ...recipes.fields import Count, CountOrZero, Text
from ..diagnose.compare import LayerComparison, comparable_layers, compare_layers
from ..engine.items import Item, Metric, Style
from .base import EvaluatedModel, Outcome, Scope, Task, TaskSettings, Unit, register_task
from .packaged import data_file
from .perplexity import cut_windows
from .textdata import TwoOrMore, comparable_base, fitting_context
from .textfile import load_tokens

logger = logging.getLogger(__name__)

# Digits of the weights of a map, which nobody sees more of.
MAP_DIGITS = 4


class FidelitySettings(TaskSettings):
    """Attention beside the base's on windows of a text.

    Attributes:
        data: name of a packaged text, or path of a `.txt` or `.jsonl` file, or of either with `.gz` behind it.
        field: the key that holds the text in each JSON line.
        windows: windows of the text.
        context: tokens in a window; less where the model has fewer positions.
        map_heads: heads whose maps are kept: those with the largest divergence, some in the middle, the smallest.
        map_size: rows and columns of a map; longer windows are shrunk to it, keeping the largest weight of each cell.
    """

    kind: Literal["fidelity"] = "fidelity"
    data: Text = "book"
    field: Text = "text"
    windows: Count = 4
    context: TwoOrMore = 256
    map_heads: CountOrZero = 6
    map_size: TwoOrMore = 48


class HeadMap(Document):
    """One head's attention in base and model, each row a query."""

    layer: str = ""
    layer_index: int
    head: int
    kl: Number = None
    teacher: list[list[Number]]
    student: list[list[Number]]


class LayerStatistic(Document):
    """What a method says about itself in one layer."""

    layer: str = ""
    layer_index: int
    name: str
    meaning: str = ""
    style: Style = "number"
    per: str = "layer"
    values: list[Number]


class FidelityExtra(Document):
    """What is kept of a window of text, besides scores.

    Attributes:
        maps: of some heads
        size: rows of each map
        tokens: what each row and column stands for; None where maps are shrunk
        statistics: of every layer
    """

    maps: list[HeadMap] = Field(default_factory=list)
    size: int | None = None
    tokens: list[str] | None = None
    statistics: list[LayerStatistic] = Field(default_factory=list)


@register_task(FidelitySettings)
class FidelityTask(Task[FidelitySettings]):
    """Both models run freely, so that a layer's figures hold what the layers before it did to its input."""

    report_words = "attention maps against the base's"
    own_section = True
    needs_base = True
    metrics = (
        Metric("attention KL", "kl", "one", meaning="nats between the attention weights of base and model, by query"),
        Metric(
            "output error",
            "error",
            "power",
            meaning="squared difference of the attention outputs over the base's square; 1 is as far off as zeros",
        ),
    )
    slices = (("layer",), ("layer", "head"))

    def __init__(self, settings: FidelitySettings) -> None:
        super().__init__(settings)
        # Finding layers means running a model without its weights, once for all windows.
        self._layers: WeakKeyDictionary[PreTrainedModel, tuple[AttentionLayer, ...]] = WeakKeyDictionary()

    def units(self, evaluated: EvaluatedModel, scope: Scope) -> Sequence[Unit]:
        """One window each."""
        if evaluated.base is not None:
            comparable_base(evaluated, 0)
        settings = self.settings
        windows = settings.windows if scope.limit is None else min(settings.windows, scope.limit)
        context = fitting_context(evaluated, settings.context)
        path = data_file(settings.data)
        ids = load_tokens(path, evaluated.tokenizer, context=context, field=settings.field, limit=windows * context)
        return [Unit(window.numel(), (number, window)) for number, window in enumerate(cut_windows(ids, context))]

    def measure(self, evaluated: EvaluatedModel, unit: Unit) -> Outcome:
        """Compare every layer on one window."""
        number, window = unit.content
        base = comparable_base(evaluated, window.numel())
        layers = self._comparable(base.model, evaluated.model)
        size = self.settings.map_size
        compared = list(compare_layers(base.model, evaluated.model, window[None], layers, map_size=size))
        items = [item for layer in compared for item in _items(number, layer)]
        shown = min(size, window.numel())
        extra = FidelityExtra(
            maps=_maps(compared, self.settings.map_heads),
            size=shown,
            tokens=token_texts(evaluated.tokenizer, window) if window.numel() == shown else None,
            statistics=[statistic for layer in compared for statistic in _statistics(layer)],
        )
        return Outcome(items, extra.plain())

    def _comparable(self, base: PreTrainedModel, model: PreTrainedModel) -> tuple[AttentionLayer, ...]:
        if model not in self._layers:
            self._layers[model], skipped = comparable_layers(base, model)
            for name, reason in skipped.items():
                logger.warning("%s is not compared with the base's: %s.", name, reason)
        return self._layers[model]


def _items(window: int, compared: LayerComparison) -> list[Item]:
    layer = compared.layer.index
    prefix = f"window {window}, layer {layer}"
    heads = [
        Item(
            f"{prefix}, head {head}", {"kl": kl, "one": 1.0}, {"layer": layer, "head": head}, cluster=f"window {window}"
        )
        for head, kl in enumerate(compared.kl.tolist())
    ]
    return [
        *heads,
        Item(prefix, {"error": compared.error, "power": compared.power}, {"layer": layer}, cluster=f"window {window}"),
    ]


def _maps(compared: Sequence[LayerComparison], count: int) -> list[HeadMap]:
    """Maps of some heads, the one that differs most first."""
    heads = [(kl, layer, head) for layer in compared for head, kl in enumerate(layer.kl.tolist())]
    heads.sort(key=lambda one: -one[0])
    return [
        HeadMap(
            layer=layer.layer.name,
            layer_index=layer.layer.index,
            head=head,
            kl=kl,
            teacher=_rows(layer.base_map[head]),
            student=_rows(layer.model_map[head]),
        )
        for kl, layer, head in (heads[place] for place in spread(len(heads), count))
    ]


def spread(length: int, count: int) -> list[int]:
    """At most `count` places of a list: a third of them at its start, a third in the middle, a third at its end."""
    count = min(length, count)
    first, last = -(-count // 3), count // 3
    middle = count - first - last
    begin = (length - middle) // 2
    return [*range(first), *range(begin, begin + middle), *range(length - last, length)]


def _rows(weights: torch.Tensor) -> list[list[Number]]:
    return [[round(weight, MAP_DIGITS) for weight in row] for row in weights.tolist()]


def _statistics(compared: LayerComparison) -> list[LayerStatistic]:
    return [
        LayerStatistic(
            layer=compared.layer.name,
            layer_index=compared.layer.index,
            name=statistic.name,
            meaning=statistic.meaning,
            style=statistic.style,
            per=statistic.per,
            values=statistic.values.tolist(),
        )
        for statistic in compared.statistics
    ]


def token_texts(tokenizer: PreTrainedTokenizerBase, window: torch.Tensor) -> list[str]:
    """What each token of a window stands for."""
    return [str(tokenizer.decode([token])) for token in window.tolist()]
