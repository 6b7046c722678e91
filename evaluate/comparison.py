"""Perplexity of models on a text file, one beside the other."""

import gc
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..convert.checkpoint import Checkpoint, load_model, load_tokenizer, open_checkpoint
from ..errors import CheckpointError, DataError
from .perplexity import PerplexityResult, perplexity
from .textfile import load_tokens

logger = logging.getLogger(__name__)

CONTEXT = 1024
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Measurement:
    """One model's result.

    Attributes:
        model: The model as it was named.
        dtype: The dtype it ran in.
        converted: Whether it carries a conversion.
        result: What was measured.
    """

    model: str
    dtype: str
    converted: bool
    result: PerplexityResult


@dataclass(frozen=True)
class Comparison:
    """The answer of `compare`.

    Attributes:
        text: The text file.
        context: Tokens in a window.
        measurements: One per model, in the order they were named.
        same_tokens: Whether all models read the same token ids; if not, compare bits per character.
    """

    text: str
    context: int
    measurements: tuple[Measurement, ...]
    same_tokens: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def compare(
    sources: Sequence[str],
    *,
    text: str | Path,
    field: str = "text",
    tokens: int | None = 5120,
    context: int | None = None,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Measure how well each model predicts the same text; the models are loaded one after another.

    Args:
        sources: Local folders, Hub ids or `.gguf` files of causal language models, converted or not.
        text: See `read_documents`.
        field: The key that holds the text in each JSON line.
        tokens: Tokens of the text to use; None means all.
        context: Tokens in a window; None means 1,024, or less where a model has fewer positions.
        dtype: One of `DTYPES`; auto is that of each checkpoint.
        device: Where to run; None means a GPU if there is one.
        trust_remote_code: Whether models that bring their own code may run it.
        progress: Called with (tokens done, tokens in all) over all models.

    Raises:
        CheckpointError: A model cannot be read, or is no causal language model.
        DataError: The text cannot be used, or a setting is none of those allowed.
    """
    if dtype not in DTYPES:
        raise DataError(f"dtype is {dtype!r}; use one of {', '.join(DTYPES)}.")
    checkpoints = [
        open_checkpoint(source, trust_remote_code=trust_remote_code, allow_converted=True) for source in sources
    ]
    window = context or int(min([CONTEXT, *(_positions(checkpoint) for checkpoint in checkpoints)]))
    tokenizers = [_tokenizer_of(checkpoint) for checkpoint in checkpoints]
    streams = [load_tokens(text, tokenizer, context=window, field=field, limit=tokens) for tokenizer in tokenizers]
    measurements = []
    for index, checkpoint in enumerate(checkpoints):
        if window > _positions(checkpoint):
            logger.warning("%s was made for fewer positions than the context of %d.", checkpoint.source, window)
        model = load_model(checkpoint, dtype=None if dtype == "auto" else getattr(torch, dtype), device=_device(device))
        advance = _shifted(progress, index, len(checkpoints))
        result = perplexity(model, streams[index], context=window, tokenizer=tokenizers[index], progress=advance)
        ran_in = str(model.dtype).removeprefix("torch.")
        measurements.append(Measurement(checkpoint.source, ran_in, checkpoint.is_converted, result))
        del model
        gc.collect()
    same_tokens = all(stream.equal(streams[0]) for stream in streams)
    return Comparison(str(text), window, tuple(measurements), same_tokens)


def _tokenizer_of(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer of a causal language model.

    Raises:
        CheckpointError: It is another kind of model, or has no tokenizer.
    """
    name = checkpoint.architecture
    if not name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) or (
        checkpoint.config.is_encoder_decoder
    ):
        raise CheckpointError(f"{checkpoint.source} is a {name}; perplexity needs a causal language model.")
    loaded = load_tokenizer(checkpoint)
    tokenizer = getattr(loaded, "tokenizer", loaded)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise CheckpointError(f"{checkpoint.source} has no tokenizer, which perplexity on a text needs.")
    return tokenizer


def _shifted(progress: Callable[[int, int], None] | None, index: int, models: int) -> Callable[[int, int], None] | None:
    """Progress of one model as progress of all of them, each with as many tokens."""
    if progress is None:
        return None
    return lambda done, total: progress(index * total + done, models * total)


def _positions(checkpoint: Checkpoint) -> float:
    """Positions that the model was made for; infinity if its configuration does not say."""
    positions = getattr(checkpoint.config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 1 else math.inf


def _device(device: str | None) -> torch.device:
    try:
        return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise DataError(f"There is no device {device!r}: use cpu, cuda or cuda:0.") from error
