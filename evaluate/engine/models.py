"""The models under test: opened by their headers first, loaded only while they are measured."""

import gc
import logging
import math

import torch
from transformers import PreTrainedTokenizerBase

from ...convert.reading.checkpoint import Checkpoint, load_model, load_tokenizer, open_checkpoint
from ...convert.reading.links import refuse_overwritten
from ...errors import CheckpointError, DataError
from ..tasks.base import EvaluatedModel

logger = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")
# Text on which two tokenizers are compared: letters, digits, accents, spaces, line ends and signs.
PROBE = "The 3 dogs' naïve plan:\n\n  x = 12.5 + y_2;  Überraschung… 日本 \U0001f600"


def open_evaluated(role: str, source: str, *, trust_remote_code: bool = False) -> EvaluatedModel:
    """Open a causal language model without its weights.

    Args:
        role: `"model"` or `"base"`.
        source: a local folder, a Hub id or a `.gguf` file, converted or not.
        trust_remote_code: whether a model that brings its own code may run it.

    Raises:
        CheckpointError: it cannot be read, is another kind of model, or has no tokenizer.
    """
    checkpoint = open_checkpoint(source, trust_remote_code=trust_remote_code, allow_converted=True)
    require_causal(checkpoint)
    refuse_overwritten(checkpoint.path)
    loaded = load_tokenizer(checkpoint)
    tokenizer = getattr(loaded, "tokenizer", loaded)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise CheckpointError(f"{source} has no tokenizer, without which it cannot be evaluated on text.")
    return EvaluatedModel(role, source, checkpoint, tokenizer)


def require_causal(checkpoint: Checkpoint) -> None:
    """Check that a model predicts text from left to right.

    Raises:
        CheckpointError: it is another kind of model.
    """
    name = checkpoint.architecture
    causal = name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
    if not causal or checkpoint.config.is_encoder_decoder:
        raise CheckpointError(f"{checkpoint.source} is a {name}; evaluation needs a causal language model.")


def load_evaluated(evaluated: EvaluatedModel, *, dtype: str = "auto", device: str | None = None) -> None:
    """Load a model's weights; see `evaluated_dtype` and `find_device`."""
    evaluated.loaded = load_model(
        evaluated.checkpoint, dtype=evaluated_dtype(evaluated.checkpoint, dtype), device=find_device(device)
    )


def unload(evaluated: EvaluatedModel) -> None:
    """Let go of a model's weights, if they are in memory."""
    if evaluated.loaded is None:
        return
    evaluated.loaded = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def evaluated_dtype(checkpoint: Checkpoint, dtype: str) -> torch.dtype:
    """The dtype to load a model in; `auto` is that of its checkpoint.

    Raises:
        DataError: it is none of `DTYPES`.
    """
    if dtype not in DTYPES:
        raise DataError(f"dtype is {dtype!r}; use one of {', '.join(DTYPES)}.")
    found = checkpoint.dtype if dtype == "auto" else getattr(torch, dtype)
    assert isinstance(found, torch.dtype)
    return found


def find_device(device: str | None) -> torch.device:
    """The device of that name; a GPU if there is one, where none is named.

    Raises:
        DataError: there is no such device.
    """
    available = torch.cuda.device_count()
    try:
        found = torch.device(device or ("cuda" if available else "cpu"))
    except RuntimeError as error:
        raise DataError(f"There is no device {device!r}: use cpu, cuda or cuda:0.") from error
    if found.type == "cuda" and (found.index or 0) >= available:
        raise DataError(f"torch finds {available} CUDA devices here, so {device!r} cannot be used: use cpu.")
    return found


def positions_of(checkpoint: Checkpoint) -> float:
    """Positions that a model was made for; infinity if its configuration does not say."""
    positions = getattr(checkpoint.config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 1 else math.inf


def same_tokens(first: EvaluatedModel, second: EvaluatedModel) -> bool:
    """Whether two models cut text into the same tokens."""
    tokenizers = first.tokenizer, second.tokenizer
    ids = [list(tokenizer(PROBE)["input_ids"]) for tokenizer in tokenizers]
    return ids[0] == ids[1] and tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
