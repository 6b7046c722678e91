"""The model card of a conversion: metadata the Hub understands, what was measured, how to load it, how it was made."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ...attention_modules.counts import AttentionCounts
from ...attention_modules.registry import get_method
from ...errors import INSTALL_COMMAND, INSTALL_PLACE
from ...formats import count, number
from ..planning.plan import Plan
from ..reading.checkpoint import Checkpoint
from ..rewriting.exactness import Exactness
from .base_card import read_base
from .receipt import Receipt
from .save import auto_classes
from .serving import serving_text

PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
    "AutoModelForImageTextToText": "image-text-to-text",
}
"""What the Hub calls the task of an auto class."""
HOW_IT_WAS_MADE = "## How it was made"
REPORT_START, REPORT_END = "<!-- attnconv:report -->", "<!-- /attnconv:report -->"
# A card is published: of a data file it tells the name, not where it lies.
_FOLDERS = re.compile(r"(?<=(?:path|text): )[/~].*/|(?<=(?:path|text): ')[/~].*/|(?<=- )[/~].*/|(?<=- ')[/~].*/")


def make_card(
    name: str,
    *,
    checkpoint: Checkpoint,
    plan: Plan,
    receipt: Receipt,
    recipe_name: str,
    recipe_yaml: str,
    papers: Sequence[str] = (),
    self_contained: bool = False,
    native_config: Mapping[str, Any] | None = None,
) -> str:
    """Write the card of a converted model.

    Args:
        name: the converted model's name, such as that of the output folder.
        checkpoint: the base.
        plan: what was converted.
        receipt: what was measured, and the versions.
        recipe_name: the recipe's name.
        recipe_yaml: the recipe as it was run.
        papers: addresses of papers besides those of the methods used.
        self_contained: whether the model brings all its code along.
        native_config: config.json of a model that needs no code of this package, for what is known of serving it.

    Returns:
        the text of `README.md`, metadata first.
    """
    from huggingface_hub import ModelCard, ModelCardData

    methods = Counter(entry.method for entry in plan.converted)
    used = dict.fromkeys(method for entry in plan.converted for method in entry.methods)
    addresses = list(dict.fromkeys([*(get_method(method).paper for method in used), *papers]))
    auto_class = _auto_class(checkpoint.config.model_type, checkpoint.architecture)
    known = read_base(checkpoint)
    metadata: dict[str, Any] = {"pipeline_tag": PIPELINES.get(auto_class), **known.metadata}
    data = ModelCardData(
        base_model=known.models[0] if len(known.models) == 1 else list(known.models) or None,
        library_name="transformers",
        tags=["attnconv", *sorted(methods), *_arxiv_tags(addresses)],
        **metadata,
    )
    body = [
        f"# {name}",
        _summary(checkpoint, plan, methods, healed=any("loss" in row for row in receipt.metrics)),
        *([" ".join(known.sentences())] if known.is_local else []),
        "## Load it",
        _native_loading(name, auto_class) if plan.is_native else _loading(name, auto_class, self_contained),
        *([] if native_config is None else ["## Serve it", serving_text(name, native_config)]),
        *_measured(receipt),
        HOW_IT_WAS_MADE,
        f"With the recipe `{recipe_name}`; `receipt.json` holds versions, digests of the input and every figure.",
        f"```yaml\n{_FOLDERS.sub('', recipe_yaml.strip())}\n```",
        f"```sh\n{receipt.command}\n```",
        *(["## Papers", "\n".join(f"- <{address}>" for address in addresses if address)] if any(addresses) else []),
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n"))


def loading(name: str, model_type: str, architecture: str, *, self_contained: bool = False) -> str:
    """The Python that loads a converted model.

    Args:
        name: the model's name, such as that of its folder.
        model_type: its configuration's model type.
        architecture: its class in transformers.
        self_contained: whether the model brings all its code along.
    """
    return _snippet(name, _auto_class(model_type, architecture), self_contained)


def with_report(card: str, section: str) -> str:
    """A card with a section of measurements between two markers; one that is there already is replaced.

    Args:
        card: the text of `README.md`.
        section: the section with its heading.

    Returns:
        the card's text; outside of the markers it is as it was.

    Raises:
        ValueError: the card has one of the two markers only, or has them twice.
    """
    counts = card.count(REPORT_START), card.count(REPORT_END)
    body = f"{REPORT_START}\n{section.strip()}\n{REPORT_END}"
    if counts == (0, 0):
        place = card.find(f"\n{HOW_IT_WAS_MADE}\n") + 1
        if not place:
            return f"{card.rstrip()}\n\n{body}\n"
        return f"{card[:place]}{body}\n\n{card[place:]}"
    before, _, rest = card.partition(REPORT_START)
    _, found, after = rest.partition(REPORT_END)
    if counts != (1, 1) or not found:
        raise ValueError(f"it needs {REPORT_START} and {REPORT_END} once each, in this order, or neither of them.")
    return f"{before}{body}{after}"


def _auto_class(model_type: str, architecture: str) -> str:
    """The auto class that a reader of the card would load the model with."""
    names = auto_classes(model_type, architecture)
    fitting = [name for name, model_class in names.items() if model_class == architecture]
    known = [name for name in PIPELINES if name in fitting]
    return (known or [name for name in fitting if name != "AutoModelForPreTraining"] or ["AutoModel"])[0]


def _arxiv_tags(addresses: Sequence[str]) -> list[str]:
    """`arxiv:` tags, by which the Hub links a model to its papers."""
    numbers = [
        address.rstrip("/").rsplit("/", 1)[-1].removesuffix(".pdf") for address in addresses if "arxiv" in address
    ]
    return [f"arxiv:{number}" for number in dict.fromkeys(numbers)]


def _summary(checkpoint: Checkpoint, plan: Plan, methods: Mapping[str, int], *, healed: bool) -> str:
    local = f"`{checkpoint.gguf_file or checkpoint.path.name}`"
    base = f"[{checkpoint.repo_id}](https://huggingface.co/{checkpoint.repo_id})" if checkpoint.repo_id else local
    rewritten = f"its weights rewritten ({', '.join(plan.rewrites)})"
    if plan.is_native:
        then = " and then trained" if healed else ""
        return f"This is {base} with {rewritten}{then}, made with `attnconv`. It is an ordinary model of its kind."
    before = f"{rewritten} and " if plan.rewrites else ""
    lines = [
        f"This is {base} with {before}another attention, made with `attnconv`; everything else is the base's own.",
        "",
        "| attention | layers | what it is |",
        "|---|---|---|",
        *(f"| `{method}` | {count} | {get_method(method).summary} |" for method, count in sorted(methods.items())),
    ]
    kept = len(plan.entries) - len(plan.converted)
    if kept:
        lines.append(f"| softmax | {kept} | as in the base |")
    return "\n".join(lines)


def _loading(name: str, auto_class: str, self_contained: bool) -> str:
    snippet = f"```python\n{_snippet(name, auto_class, self_contained)}\n```\n\n"
    if self_contained:
        return (
            f"{snippet}transformers and torch suffice: `modeling_attnconv.py` holds the code of the attention, "
            "which `trust_remote_code=True` lets run. An installed attnconv runs in its place."
        )
    return (
        f"```sh\n{INSTALL_COMMAND}  # {INSTALL_PLACE}\n```\n\n"
        f"{snippet}With `trust_remote_code=True` the import is not needed, the package is."
    )


def _native_loading(name: str, auto_class: str) -> str:
    code = f'from transformers import {auto_class}\n\nmodel = {auto_class}.from_pretrained("{name}")'
    return f"```python\n{code}\n```\n\ntransformers alone suffices: nothing of `attnconv` is needed to load or run it."


def _snippet(name: str, auto_class: str, self_contained: bool) -> str:
    if self_contained:
        return (
            f"from transformers import {auto_class}\n\n"
            f'model = {auto_class}.from_pretrained("{name}", trust_remote_code=True)'
        )
    return (
        "import attnconv  # without it, transformers refuses to load this model\n"
        f"from transformers import {auto_class}\n\n"
        f'model = {auto_class}.from_pretrained("{name}")'
    )


def _measured(receipt: Receipt) -> list[str]:
    """The section of figures, one row per moment; nothing if nothing was measured."""
    rows = list(receipt.metrics)
    parts = []
    if receipt.exactness:
        parts.append(f"The start: {Exactness.from_dict(receipt.exactness).sentence}.")
    if rows:
        columns = list(dict.fromkeys(key for row in rows for key in row if key != "stage"))
        lines = [
            f"| | {' | '.join(column.replace('_', ' ') for column in columns)} |",
            "|---" * (len(columns) + 1) + "|",
        ]
        for row in rows:
            lines.append(f"| {row.get('stage', '')} | {' | '.join(_cell(row.get(column)) for column in columns)} |")
        parts.append("\n".join(lines))
    if receipt.start_distance:
        figures = ", ".join(f"{key.replace('_', ' ')} {_cell(value)}" for key, value in receipt.start_distance.items())
        parts.append(f"Distance from the base right after the swap: {figures}.")
    for path, ratio in receipt.path_use.items():
        parts.append(f"Perplexity without the {path} path: {_cell(ratio)} times that with it.")
    if receipt.attention:
        parts.append(_attention(receipt.attention))
    return ["## Measured", *parts] if parts else []


def _attention(found: Mapping[str, Any]) -> str:
    """What the converted layers did in one pass over a text."""
    if "not_measured" in found:
        return f"What the attention does was not counted: {found['not_measured']}."
    counts = AttentionCounts.from_dict(found)
    return f"What the attention of {len(counts.layers)} converted layers does: {counts.sentence}."


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(_cell(part) for part in value)
    if isinstance(value, int | float):
        return number(value) if isinstance(value, float) else count(value)
    return str(value).replace("|", "\\|")
