"""What the tasks on a text share: its settings, the windows that it is cut into, and the blocks that are scored."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import BeforeValidator, Field

from ...errors import CheckpointError
from ...recipes.fields import Text, whole_number
from ..engine.models import positions_of, same_tokens
from .base import EvaluatedModel, Scope, TaskSettings, Unit
from .packaged import data_file
from .perplexity import cut_windows, stack_windows
from .textfile import load_tokens

logger = logging.getLogger(__name__)

# Positions scored as one item: neighbouring tokens are alike, so that intervals need pieces longer than a token.
BLOCK = 128
# Tokens in one forward pass at most, unless a single window is longer.
TOKENS_AT_ONCE = 4096

TwoOrMore = Annotated[int, BeforeValidator(whole_number), Field(ge=2)]


class TextSettings(TaskSettings):
    """Which part of which text is read, and how.

    Attributes:
        data: name of a packaged text, or path of a `.txt` or `.jsonl` file, or of either with `.gz` behind it.
        field: the key that holds the text in each JSON line.
        tokens: tokens of the text to use; a shorter text is used whole.
        context: tokens in a window; less where the model has fewer positions.
    """

    data: Text = "book"
    field: Text = "text"
    tokens: TwoOrMore = 16384
    context: TwoOrMore = 1024


@dataclass(frozen=True)
class Windows:
    """Neighbouring windows of a text that share a forward pass.

    Attributes:
        first: number of the first one in the text.
        context: tokens in a full window; these may be the shorter rest.
        ids: `[batch, at most context]` int64.
    """

    first: int
    context: int
    ids: torch.Tensor


@dataclass(frozen=True)
class Block:
    """Positions `start` to `stop - 1` of window number `window`, which is row `row` of its batch."""

    window: int
    row: int
    start: int
    stop: int
    bucket: str

    @property
    def id(self) -> str:
        """What names it among all blocks of a text."""
        return f"window {self.window}, {self.start}-{self.stop - 1}"


def window_units(evaluated: EvaluatedModel, scope: Scope, settings: TextSettings) -> list[Unit]:
    """Cut a text into batches of windows that do not overlap.

    Args:
        evaluated: its tokenizer and configuration are used.
        scope: the limit counts windows.
        settings: the text.

    Returns:
        units with `Windows` as their content.

    Raises:
        DataError: the text cannot be read, or holds fewer than two tokens.
    """
    context = fitting_context(evaluated, settings.context)
    tokens = settings.tokens if scope.limit is None else min(settings.tokens, scope.limit * context)
    ids = load_tokens(
        data_file(settings.data), evaluated.tokenizer, context=context, field=settings.field, limit=tokens
    )
    batch_size = max(1, min(scope.batch_size, TOKENS_AT_ONCE // context))
    units, first = [], 0
    for batch in stack_windows(cut_windows(ids, context), batch_size):
        units.append(Unit(batch.numel(), Windows(first, context, batch)))
        first += len(batch)
    return units


def fitting_context(evaluated: EvaluatedModel, context: int) -> int:
    """The length of windows, cut to the positions that the model was made for."""
    positions = positions_of(evaluated.checkpoint)
    if context <= positions:
        return context
    logger.warning("%s has %d positions: windows have no more, not %d.", evaluated.source, positions, context)
    return int(positions)


def comparable_base(evaluated: EvaluatedModel, length: int) -> EvaluatedModel:
    """The base that a model is compared with token by token.

    Args:
        evaluated: the model.
        length: tokens that the base has to read.

    Raises:
        CheckpointError: there is none, it reads other tokens than the model, or it has too few positions.
    """
    base = evaluated.base
    if base is None:
        raise CheckpointError(f"{evaluated.source} is to be compared with its base, and no base was named.")
    if not same_tokens(base, evaluated):
        raise CheckpointError(
            f"{evaluated.source} and {base.source} cut text into different tokens, so that their predictions cannot be "
            "compared token by token; name the base that the model was made from."
        )
    if length > positions_of(base.checkpoint):
        raise CheckpointError(
            f"{base.source} has {positions_of(base.checkpoint)} positions, but {length} are compared; "
            "choose a smaller context."
        )
    return base


def cut_blocks(windows: Windows, *, start: int, buckets: Sequence[int] = ()) -> Iterator[Block]:
    """Cut each window's positions, from `start` on, into blocks of at most `BLOCK` positions of one bucket.

    Args:
        windows: the windows.
        start: first position that is scored: 0 where every position is, 1 where its token was predicted.
        buckets: positions where buckets end; a bucket behind the last of them goes up to the context.
    """
    ends = [end for end in buckets if end < windows.context]
    length = windows.ids.shape[1]
    for row in range(windows.ids.shape[0]):
        for low, high in zip([0, *ends], [*ends, windows.context], strict=True):
            for begin in range(low, min(high, length), BLOCK):
                block = max(begin, start), min(begin + BLOCK, high, length)
                if block[0] < block[1]:
                    yield Block(windows.first + row, row, *block, f"{low}-{high}")
