"""The demonstration: the packaged model converted by the recipe `quickstart`, and what it says before and after."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..compat import cache_argument
from ..convert.surgery.cache_layer import AttnConvCacheLayer
from ..distill.progress import Progress
from ..evaluate.bench.cache_size import held_bytes
from ..packaged.model import embedded_model_path
from ..recipes import Recipe, load_recipe
from .conversion import run_conversion

RECIPE = "quickstart"
PROMPT = "Once upon a time, there was a little girl named Lily."
NEW_TOKENS = 120


@dataclass(frozen=True)
class Continuation:
    """What a model makes of the prompt.

    Attributes:
        text: prompt and continuation, decoded greedily.
        cache_bytes: what its cache held at the end.
        recurrent_layers: how many layers of the cache are recurrent states instead of keys and values.
    """

    text: str
    cache_bytes: int
    recurrent_layers: int


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration shows.

    Attributes:
        output: the folder of the converted model.
        layers: attention layers converted, of `num_layers`.
        num_layers: attention layers of the model.
        methods: the method and options of the converted layers.
        metrics: see `ConversionResult.metrics`.
        prompt: what both models continue.
        teacher: the teacher's continuation.
        converted: the converted model's.
        seconds: wall time of all of it.
    """

    output: Path
    layers: int
    num_layers: int
    methods: tuple[str, ...]
    metrics: tuple[Mapping[str, Any], ...]
    prompt: str
    teacher: Continuation
    converted: Continuation
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "output": str(self.output), "metrics": [dict(row) for row in self.metrics]}


def run_demo(output: str | Path, *, recipe: Recipe | None = None, progress: Progress | None = None) -> DemoResult:
    """Convert the packaged model, reload the result from disk, and let both models continue a prompt.

    Args:
        output: the folder to write; an earlier conversion there is replaced, anything else is refused.
        recipe: another recipe than `quickstart`.
        progress: whom to tell; None means nobody.

    Raises:
        OutputError: the folder cannot be written.
        RecipeError: `quickstart` was changed and is wrong.
    """
    began = time.monotonic()
    # The tensors of this model are so small that threads would spend their time waiting for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _run(output, recipe or load_recipe(RECIPE), progress, began)
    finally:
        torch.set_num_threads(threads)


def _run(output: str | Path, recipe: Recipe, progress: Progress | None, began: float) -> DemoResult:
    source = embedded_model_path()
    result = run_conversion(source, recipe, output, overwrite=True, progress=progress)
    tokenizer = AutoTokenizer.from_pretrained(source)
    teacher, converted = (
        continuation(AutoModelForCausalLM.from_pretrained(folder), tokenizer, PROMPT)
        for folder in (source, result.output)
    )
    methods = (
        f"{entry.method} (window {entry.options['window']})" if "window" in entry.options else entry.method
        for entry in result.plan.converted
    )
    return DemoResult(
        output=result.output,
        layers=len(result.plan.converted),
        num_layers=len(result.plan.entries),
        methods=tuple(dict.fromkeys(methods)),
        metrics=result.metrics,
        prompt=PROMPT,
        teacher=teacher,
        converted=converted,
        seconds=time.monotonic() - began,
    )


@torch.inference_mode()
def continuation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> Continuation:
    """Continue a prompt greedily, token by token through the model's cache."""
    inputs = tokenizer(prompt, return_tensors="pt")
    cache = DynamicCache(config=model.config)
    given = {**inputs, cache_argument(model.forward): cache}
    ids = model.eval().generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False)
    recurrent = [layer for layer in cache.layers if isinstance(layer, AttnConvCacheLayer)]
    return Continuation(str(tokenizer.decode(ids[0], skip_special_tokens=True)), held_bytes(cache), len(recurrent))
