"""Log-likelihoods of continuations, many at once, cut into tokens as lm-eval does."""

import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...errors import DataError

# Logits held at once, in numbers: 2**25 of them are 128 MiB in fp32 whatever the size of the vocabulary.
LOGITS_AT_ONCE = 2**25


@dataclass(frozen=True)
class Continuation:
    """Tokens to score and the tokens before them.

    Attributes:
        context: what is given, at least one token.
        tokens: what is scored, at least one token.
    """

    context: tuple[int, ...]
    tokens: tuple[int, ...]

    @property
    def key(self) -> tuple[int, ...]:
        """What the model has to read: everything but the last token."""
        return self.context + self.tokens[:-1]


@dataclass(frozen=True)
class _Row:
    """One sequence to read, and the places in the list of results that it answers."""

    ids: tuple[int, ...]
    answers: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def start(self) -> int:
        """The first position whose logits are needed."""
        return len(self.ids) - max(len(tokens) for _, tokens in self.answers)


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, context: str, continuation: str, *, longest: float = math.inf
) -> Continuation:
    """Cut a context and its continuation into tokens.

    Both are encoded together, with the tokenizer's own BOS token if it has one, after spaces at the context's end were
    moved to the continuation; an empty context becomes the BOS token, else the EOS token. What is too long for the
    model loses its beginning.

    Args:
        tokenizer: the model's tokenizer.
        context: the text that is given.
        continuation: the text that is scored.
        longest: tokens that the model reads at most.

    Raises:
        DataError: the continuation makes no token, or more than the model reads.
    """
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if context:
        bare = context.rstrip()
        given = _encode(tokenizer, bare or context, prefix)
        whole = _encode(tokenizer, context + continuation, prefix)
        scored = whole[len(given) :]
    elif prefix is not None:
        given, scored = [prefix], list(tokenizer.encode(continuation, add_special_tokens=False))
        if scored[:1] == given:
            scored = scored[1:]
    else:
        raise DataError("A question is empty, and the tokenizer has no token to begin a text with.")
    if not given or not scored or len(scored) > longest:
        raise DataError(
            f"The answer {continuation!r} makes {len(scored)} tokens behind {context[-40:]!r}; at least 1 are needed, "
            f"and the model reads {longest:g} at most."
        )
    if len(given) + len(scored) > longest + 1:
        given = given[len(given) + len(scored) - int(longest) - 1 :]
    return Continuation(tuple(given), tuple(scored))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, prefix: int | None) -> list[int]:
    # A text that spells the beginning-of-text token out gets no second one.
    if prefix is not None and text.startswith(str(tokenizer.decode([prefix]))):
        return list(tokenizer.encode(text, add_special_tokens=False))
    return list(tokenizer.encode(text))


@torch.inference_mode()
def log_likelihoods(
    model: PreTrainedModel, requests: Sequence[Continuation], *, batch_size: int, pad: int = 0
) -> list[float]:
    """Sum of log p(token | tokens before it) over each continuation, in nats.

    Continuations that differ in their last token alone share one pass; the longest sequences come first; shorter ones
    are padded on the right and masked.

    Args:
        model: a causal language model in evaluation mode.
        requests: what to score.
        batch_size: sequences in one forward pass at most.
        pad: token that fills up shorter sequences.
    """
    scores = [math.nan] * len(requests)
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    vocabulary = model.config.get_text_config().vocab_size
    for rows in _batches(_rows(requests), batch_size, LOGITS_AT_ONCE // vocabulary, keeps):
        for place, score in _score(model, rows, keeps, pad):
            scores[place] = score
    return scores


def _rows(requests: Sequence[Continuation]) -> list[_Row]:
    shared: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}
    for place, request in enumerate(requests):
        shared.setdefault(request.key, []).append((place, request.tokens))
    rows = [_Row(ids, tuple(answers)) for ids, answers in shared.items()]
    return sorted(rows, key=lambda row: (-len(row.ids), row.start))


def _batches(rows: Iterable[_Row], batch_size: int, positions: int, keeps: bool) -> Iterator[list[_Row]]:
    """Rows that go together: at most `batch_size`, and so many that their logits stay within `positions`."""
    batch: list[_Row] = []
    for row in rows:
        together = [*batch, row]
        kept = _end(together) - (_first(together) if keeps else 0)
        if batch and (len(batch) == batch_size or len(together) * kept > positions):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _first(rows: Sequence[_Row]) -> int:
    return min(row.start for row in rows)


def _end(rows: Sequence[_Row]) -> int:
    return max(len(row.ids) for row in rows)


def _score(model: PreTrainedModel, rows: Sequence[_Row], keeps: bool, pad: int) -> Iterator[tuple[int, float]]:
    """Place and score of every continuation in a batch."""
    first, end = _first(rows), _end(rows)
    input_ids = torch.tensor([[*row.ids, *[pad] * (end - len(row.ids))] for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row.ids) + [0] * (end - len(row.ids)) for row in rows], device=model.device)
    wanted = {"logits_to_keep": torch.arange(first, end, device=model.device)} if keeps else {}
    logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False, **wanted).logits
    if not keeps:
        logits = logits[:, first:]
    # [batch, positions, vocabulary], in place of a copy of all of it for the softmax.
    logits = logits.float()
    normaliser = logits.logsumexp(-1)
    for index, row in enumerate(rows):
        stop = len(row.ids) - first
        for place, tokens in row.answers:
            span = torch.arange(stop - len(tokens), stop, device=logits.device)
            picked = logits[index, span, torch.tensor(tokens, device=logits.device)]
            yield place, float((picked - normaliser[index, span]).sum())
