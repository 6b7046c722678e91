"""Packing: documents become training sequences of one length, in a fixed order, without losing a token.

What is kept of the boundaries between documents: documents are never mixed or cut out of order. Each is followed by
the tokenizer's end-of-sequence token (and preceded by its beginning-of-sequence token where the tokenizer adds one),
so the model sees where one ends, as it did in pretraining. A sequence is filled with the next document's tokens, and
what does not fit opens the following sequence. Whether attention is cut at a boundary is the recipe's choice
(`data.boundaries`): paragraphs of 130 tokens teach more about long contexts when they are joined, documents as long as
the context more when each is by itself.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch

from ..errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class Position:
    """A place in an endless stream of documents: where the next token comes from.

    Attributes:
        epoch: how often all documents have been used up before.
        document: index of the document, in the order of this epoch.
        offset: tokens of that document that are used up.
    """

    epoch: int = 0
    document: int = 0
    offset: int = 0

    def to_dict(self) -> dict[str, int]:
        """The three numbers by name."""
        return asdict(self)


@dataclass(frozen=True)
class PackedSequence:
    """One training sequence.

    Attributes:
        tokens: `[length]` int64; of an image its pixel values `[channels, height, width]`.
        end: the place behind its last token; packing from there goes on with the next sequence.
        positions: `[length]` int64, each token's place in its document, or in the part of it that is here.
    """

    tokens: torch.Tensor
    end: Position
    positions: torch.Tensor | None = None


# (epoch, documents to leave out) -> the token ids of each document from there on, boundary tokens included.
TokenizedDocuments = Callable[[int, int], Iterator[list[int]]]


def pack(documents: TokenizedDocuments, length: int, start: Position | None = None) -> Iterator[PackedSequence]:
    """Cut an endless stream of documents into sequences; documents are read only as they are needed.

    When the documents are used up they start again, in the order of the next epoch.

    Args:
        documents: see `TokenizedDocuments`; the same arguments must give the same documents.
        length: tokens in a sequence, at least 2.
        start: where to begin, for instance the `end` of an earlier sequence; None means the very beginning.

    Raises:
        DataError: all documents together do not fill one sequence.
    """
    if length < 2:
        raise DataError(f"The sequence length is {length} tokens; it must be at least 2.")
    position = start or Position()
    buffer: list[int] = []
    # The documents whose tokens are in the buffer: (place of the first of them, how many).
    pieces: deque[tuple[Position, int]] = deque()
    for origin, tokens in _pieces(documents, position, length):
        buffer += tokens
        pieces.append((origin, len(tokens)))
        used = 0
        while len(buffer) - used >= length:
            sequence = torch.tensor(buffer[used : used + length])
            used += length
            sizes: list[int] = []
            end = _advance(pieces, length, sizes)
            yield PackedSequence(sequence, end, torch.cat([torch.arange(size) for size in sizes]))
        del buffer[:used]


def _advance(pieces: deque[tuple[Position, int]], length: int, sizes: list[int]) -> Position:
    """Take `length` tokens off the front of the pieces, note how many of each, and return the place behind them."""
    while True:
        origin, size = pieces.popleft()
        end = Position(origin.epoch, origin.document, origin.offset + min(size, length))
        sizes.append(min(size, length))
        if size > length:
            pieces.appendleft((end, size - length))
            return end
        length -= size
        if length == 0:
            return pieces[0][0] if pieces else Position(origin.epoch, origin.document + 1)


def _pieces(documents: TokenizedDocuments, start: Position, length: int) -> Iterator[tuple[Position, list[int]]]:
    """Documents without end, each with the place of its first token; the first one may lack its beginning."""
    skip, offset = start.document, start.offset
    epoch = start.epoch
    while True:
        index, total = skip, 0
        for tokens in documents(epoch, skip):
            total += len(tokens)
            rest = tokens[offset:]
            if rest:
                yield Position(epoch, index, offset), rest
            index, offset = index + 1, 0
        if skip == 0 and total < length:
            raise DataError(f"The data hold {total} tokens; one sequence of {length} tokens needs more of them.")
        logger.info("All %d documents are used up; starting over in another order.", index)
        epoch, skip = epoch + 1, 0
