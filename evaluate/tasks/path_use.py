"""How much a converted model relies on each path of its method: what a text costs it without that path."""

from collections.abc import Sequence
from typing import Literal

from transformers import PreTrainedConfig

from ...attention_modules.paths import leaving_out
from ...attention_modules.registry import get_method
from ...convert.planning.plan import Plan
from ...convert.surgery.head import ModelHead
from ...files.own_files import SECTION
from ..engine.items import Item, Metric
from .base import EvaluatedModel, Outcome, Scope, Task, Unit, register_task
from .perplexity import token_losses
from .textdata import TextSettings, TwoOrMore, Windows, cut_blocks, window_units


class PathUseSettings(TextSettings):
    """Perplexity on a text with and without each path of the model's method."""

    kind: Literal["path_use"] = "path_use"
    tokens: TwoOrMore = 4096


@register_task(PathUseSettings)
class PathUseTask(Task[PathUseSettings]):
    """Perplexity without a path over perplexity with it; 1 means that the path does nothing."""

    report_words = "what each path of the method is worth"
    own_section = True
    of_conversions = True
    counts_tokens = True
    metrics = (
        Metric(
            "perplexity ratio",
            "excess",
            "tokens",
            scale="exp",
            better="higher",
            compare="ratio",
            meaning="perplexity without this path over perplexity with it; 1 means the path does nothing",
        ),
    )
    slices = (("left out",),)
    overall = False

    def units(self, evaluated: EvaluatedModel, scope: Scope) -> Sequence[Unit]:
        """Batches of windows; none for a model that has no paths."""
        paths = planned_paths(evaluated.checkpoint.config)
        if not paths:
            return []
        units = window_units(evaluated, scope, self.settings)
        return [Unit(unit.tokens * (1 + len(paths)), unit.content) for unit in units]

    def measure(self, evaluated: EvaluatedModel, unit: Unit) -> Outcome:
        """Score the blocks of one batch of windows, once without each path."""
        windows: Windows = unit.content
        ids = windows.ids.to(evaluated.device)
        in_slices = ModelHead(evaluated.model).takes_slices()
        intact = token_losses(evaluated.model, ids, in_slices=in_slices)
        items = []
        for path in planned_paths(evaluated.checkpoint.config):
            with leaving_out(evaluated.model, path):
                losses = token_losses(evaluated.model, ids, in_slices=in_slices)
            for block in cut_blocks(windows, start=1):
                # The token at position t is the prediction number t - 1.
                at = (block.row, slice(block.start - 1, block.stop - 1))
                nll, nll_intact = float(losses[at].sum()), float(intact[at].sum())
                values = {"nll": nll, "nll_intact": nll_intact, "excess": nll - nll_intact}
                values["tokens"] = block.stop - block.start
                items.append(Item(f"{block.id}, without {path}", values, {"left out": path}))
        return Outcome(items)


def planned_paths(config: PreTrainedConfig) -> tuple[str, ...]:
    """Names of the paths that the methods in a model's plan add up, each once; none if it is not converted."""
    section = getattr(config, SECTION, None)
    if section is None:
        return ()
    names = dict.fromkeys(name for entry in Plan.from_config(section).converted for name in entry.methods)
    return tuple(dict.fromkeys(path for name in names for path in get_method(name).module_class.paths))
