"""Perplexity of a causal language model over non-overlapping windows of a token stream."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...convert.surgery.head import ModelHead, evaluating, slices
from ...errors import DataError
from ..engine.progress import Progress

logger = logging.getLogger(__name__)

# Logits held at once, in numbers: 2**24 of them are 64 MiB in fp32 whatever the size of the vocabulary.
LOGITS_AT_ONCE = 2**24


@dataclass(frozen=True)
class PerplexityResult:
    """What `perplexity` measured.

    Attributes:
        nll: mean negative log-likelihood per predicted token, in nats.
        perplexity: `exp(nll)`; infinity where that overflows.
        bits_per_character: total negative log-likelihood in bits over the characters of the predicted text; None
            without a tokenizer.
        tokens: tokens predicted.
        characters: characters those tokens stand for; None without a tokenizer.
    """

    nll: float
    perplexity: float
    bits_per_character: float | None
    tokens: int
    characters: int | None


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    token_ids: torch.Tensor,
    *,
    context: int,
    limit: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Measure how well a model predicts a stream of tokens.

    The stream is cut into windows of `context` tokens that do not overlap and do not see each other. In each window
    every token but the first is predicted from the tokens before it, and all those predictions weigh the same: 5,120
    tokens at a context of 1,024 make 5 windows and 5,115 predictions. A last, shorter window counts if it has two
    tokens. No token is added: where a model wants a BOS token at each start, the stream must hold it
    (`load_tokens` sees to that).

    Args:
        model: a causal language model, converted or not; it is put into eval mode for the measurement.
        token_ids: `[tokens]`, or `[rows, tokens]` for separate texts, whose windows never cross from row to row.
        context: tokens in a window, at least 2.
        limit: how many tokens of the stream (or of the rows, in order) are used at most; None means all.
        tokenizer: with it, the result also carries characters and bits per character.
        batch_size: windows in one forward pass, at least 1; only windows of equal length share one.
        progress: called with (tokens done, tokens in all, what is being done) after every batch.

    Raises:
        DataError: there are fewer than two tokens to use, or a number is out of its range.
    """
    windows = cut_windows(token_ids, context, limit)
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}; it must be at least 1.")
    device = model.device
    in_all = sum(window.numel() for window in windows)
    done, predicted, total = 0, 0, 0.0
    with evaluating(model):
        in_slices = ModelHead(model).takes_slices()
        for batch in stack_windows(windows, batch_size):
            total += float(token_losses(model, batch.to(device), in_slices=in_slices).sum())
            predicted += batch.shape[0] * (batch.shape[1] - 1)
            done += batch.numel()
            if progress is not None:
                progress(done, in_all, "measuring perplexity")
    characters = None if tokenizer is None else sum(_predicted_characters(tokenizer, window) for window in windows)
    return _result(total, predicted, characters)


def _result(total: float, predicted: int, characters: int | None) -> PerplexityResult:
    nll = total / predicted
    if not math.isfinite(nll):
        logger.warning("The model's predictions are not finite; its perplexity means nothing.")
    try:
        value = math.exp(nll)
    except OverflowError:
        value = math.inf
    bits = total / math.log(2) / characters if characters else None
    return PerplexityResult(nll, value, bits, predicted, characters)


def cut_windows(token_ids: torch.Tensor, context: int, limit: int | None = None) -> list[torch.Tensor]:
    """Windows `[at most context]` of at least two tokens each, in order."""
    if context < 2:
        raise DataError(f"The context is {context} tokens; it must be at least 2.")
    if token_ids.dim() not in (1, 2):
        raise DataError(f"token_ids must be [tokens] or [rows, tokens]; its shape is {tuple(token_ids.shape)}.")
    rows = [token_ids] if token_ids.dim() == 1 else list(token_ids)
    left = sum(row.numel() for row in rows) if limit is None else limit
    windows: list[torch.Tensor] = []
    for row in rows:
        used = row[:left]
        left -= used.numel()
        windows += [window for window in used.long().split(context) if window.numel() >= 2]
        if left <= 0:
            break
    if not windows:
        raise DataError(f"There are fewer than two tokens to predict (limit {limit}, context {context}).")
    return windows


def stack_windows(windows: Sequence[torch.Tensor], batch_size: int) -> Iterator[torch.Tensor]:
    """Stack runs of equally long windows: `[at most batch_size, window]`."""
    pending: list[torch.Tensor] = []
    for window in windows:
        if pending and (len(pending) == batch_size or window.numel() != pending[0].numel()):
            yield torch.stack(pending)
            pending = []
        pending.append(window)
    yield torch.stack(pending)


def token_losses(model: PreTrainedModel, input_ids: torch.Tensor, *, in_slices: bool | None = None) -> torch.Tensor:
    """-log p(token | tokens before it) of every token but the first of each row.

    Args:
        model: a causal language model in eval mode.
        input_ids: `[batch, T]`, on the model's device.
        in_slices: what `ModelHead.takes_slices` says of the model, if it was asked already.

    Returns:
        `[batch, T - 1]` float64 on the CPU, in nats.
    """
    parts, start = [], 0
    for logits in logit_slices(model, input_ids, in_slices=in_slices):
        targets = input_ids[:, start + 1 : start + 1 + logits.shape[1]].to(logits.device)
        # The last position of the window predicts a token outside it.
        scores = logits[:, : targets.shape[1]].float()
        losses = functional.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="none")
        parts.append(losses.view(targets.shape).cpu().double())
        start += logits.shape[1]
    return torch.cat(parts, dim=1)


def logit_slices(
    model: PreTrainedModel, input_ids: torch.Tensor, *, in_slices: bool | None = None, size: int | None = None
) -> Iterator[torch.Tensor]:
    """Yield the model's logits of a few positions after another, `[batch, at most size, vocabulary]`.

    The layers run once. Where the model's head can run alone, only a slice of the logits exists at a time.

    Args:
        model: a causal language model in eval mode.
        input_ids: `[batch, T]`, on the model's device.
        in_slices: what `ModelHead.takes_slices` says of the model, if it was asked already.
        size: positions in a slice; None means as many as `LOGITS_AT_ONCE` allows.
    """
    head = ModelHead(model)
    if head.takes_slices() if in_slices is None else in_slices:
        size = size or max(1, LOGITS_AT_ONCE // ((head.vocabulary or 1) * input_ids.shape[0]))
        hidden = head.hidden_states(input_ids=input_ids, use_cache=False)
        yield from (head.logits(hidden[:, part]) for part in slices(input_ids.shape[1], size))
        return
    whole = model(input_ids=input_ids, use_cache=False).logits
    yield from whole.split(size or max(1, LOGITS_AT_ONCE // (whole.shape[-1] * whole.shape[0])), dim=1)


def characters_before(tokenizer: PreTrainedTokenizerBase, window: torch.Tensor, position: int) -> int:
    """Characters that the first `position` tokens of a window `[T]` stand for; special tokens stand for none."""
    return len(tokenizer.decode(window[:position].tolist(), skip_special_tokens=True))


def _predicted_characters(tokenizer: PreTrainedTokenizerBase, window: torch.Tensor) -> int:
    """Characters of the text that the window's tokens add to its first one."""
    return characters_before(tokenizer, window, window.numel()) - characters_before(tokenizer, window, 1)
