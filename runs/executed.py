"""What a conversion's result does when it runs once, for its receipt; one that runs something else is not saved."""

import inspect
import logging
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..convert.planning.probe_inputs import candidate_inputs
from ..convert.reading.checkpoint import load_tokenizer
from ..convert.surgery.attention_function import core_of
from ..convert.surgery.swap import converted_modules
from ..convert.writing.executed import check_executed
from ..distill.run import Run
from ..errors import PlanError
from ..evaluate.engine.attention import TEXT, last_logits, packaged_tokens

logger = logging.getLogger(__name__)

TOKENS = 512
# Positions that some models keep for themselves.
RESERVED = 8
# What a forward raises whose arguments do not suit it.
UNSUITED = (ValueError, TypeError, RuntimeError, KeyError, IndexError, AttributeError)
STREAMED = "the weights were taken over as files, and the model was not built"


def count_executed(run: Run, model: PreTrainedModel) -> dict[str, Any]:
    """Run a converted model on a short packaged text, or on inputs made up for it where it reads none.

    Returns:
        what its converted layers did, and on what; or `not_measured`, why that is not known.

    Raises:
        PlanError: a layer runs something else than its method.
    """
    run.progress.phase("Counting what the attention does")
    ran: list[str] = []
    failed: list[str] = []
    forwards = [partial(_forward, model, *pair, ran, failed) for pair in _inputs(run, model)]
    try:
        counts = check_executed(model, *forwards)
    except PlanError:
        if not failed:
            raise
        logger.info("inputs made up for the model did not suit it: %s", "; ".join(failed))
        return {"not_measured": "no inputs could be made up on which all converted layers run"}
    finally:
        run.progress.end()
    return {"text": ran[-1], **counts.to_dict()}


def _inputs(run: Run, model: PreTrainedModel) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arguments of the model's forward, and what they are, the best first."""
    parameters = inspect.signature(model.forward).parameters
    options = last_logits(model)
    if any(core_of(module).geometry.causal for module in converted_modules(model).values()):
        options |= {"use_cache": True} if "use_cache" in parameters else {}
    if model.main_input_name == "input_ids" and not model.config.is_encoder_decoder:
        name, ids = _text(run, model)
        yield name, {"input_ids": ids.to(model.device), **options}
    for made_up in candidate_inputs(model, str(model.device)):
        yield "made-up inputs", {name: _in_dtype(tensor, model.dtype) for name, tensor in made_up.items()}


def _text(run: Run, model: PreTrainedModel) -> tuple[str, Tensor]:
    """The name of a text, and its tokens `[1, TOKENS at most]`; random ones for a model without a tokenizer."""
    config = model.config.get_text_config()
    length = min(TOKENS, max(2, (getattr(config, "max_position_embeddings", None) or 2 * TOKENS) - RESERVED))
    loaded = run.tokenizer or load_tokenizer(run.checkpoint)
    tokenizer = getattr(loaded, "tokenizer", loaded)
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return TEXT, packaged_tokens(tokenizer, length).clamp_max(config.vocab_size - 1)
    drawn = torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    return "random tokens", drawn


def _in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _forward(model: PreTrainedModel, name: str, inputs: Mapping[str, Any], ran: list[str], failed: list[str]) -> None:
    try:
        model(**inputs)
    except PlanError:
        failed.clear()
        raise
    except UNSUITED as error:
        failed.append(f"{type(error).__name__}: {error}".splitlines()[0])
    else:
        ran.append(name)
