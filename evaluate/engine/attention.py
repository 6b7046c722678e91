"""What the attention of a model under test does, counted in one pass over a text; each layer must run its method."""

import inspect
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...attention_modules.counts import AttentionCounts
from ...convert.writing.executed import check_executed
from ..tasks.base import EvaluatedModel, TaskSettings
from ..tasks.packaged import data_file
from ..tasks.textfile import load_tokens
from .models import positions_of

TEXT = "book"
# Tokens of the text: as many as the longest window of the tasks has, within these.
LEAST, MOST = 512, 4096


def count_attention(evaluated: EvaluatedModel, tasks: Iterable[TaskSettings]) -> dict[str, Any]:
    """Run a loaded, converted model once over the packaged text.

    Args:
        evaluated: the model with its tokenizer.
        tasks: what it is going to be measured by.

    Returns:
        `AttentionCounts.to_dict`, and the name of the text.

    Raises:
        PlanError: a layer ran something else than its method.
    """
    windows = [window for task in tasks if isinstance(window := getattr(task, "context", None), int)]
    length = int(min(max([LEAST, *windows]), MOST, positions_of(evaluated.checkpoint)))
    counts = count_tokens(evaluated.model, packaged_tokens(evaluated.tokenizer, length))
    return {"text": TEXT, **counts.to_dict()}


def packaged_tokens(tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
    """The first tokens of the packaged text, `[1, length at most]`."""
    return load_tokens(data_file(TEXT), tokenizer, context=length, limit=length)[None]


def count_tokens(model: PreTrainedModel, ids: Tensor) -> AttentionCounts:
    """What the converted layers of a causal model do with `ids` `[1, T]`, which go into a cache.

    Raises:
        PlanError: a layer ran something else than its method.
    """
    with torch.inference_mode():
        return check_executed(
            model, partial(model, input_ids=ids.to(model.device), use_cache=True, **last_logits(model))
        )


def last_logits(model: PreTrainedModel) -> dict[str, Any]:
    """What makes a model's forward give the logits of the last token alone, which can be larger than all the rest."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
