"""Text files for evaluation: plain text or JSON lines, gzipped or not, as one stream of token ids."""

import gzip
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch
from transformers import PreTrainedTokenizerBase

from ...errors import DataError
from ...files.json_lines import numbered_lines, parse_line

logger = logging.getLogger(__name__)

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TEXT_SUFFIXES = (".txt", ".text", ".md")
DOCUMENT_SEPARATOR = "\n\n"
# Characters read for each token wanted before the whole file is: far above what any tokenizer packs into one token.
CHARACTERS_PER_TOKEN = 16
# Tokens that must follow the last one kept, so that cutting the text did not change how that one was split.
SAFETY_TOKENS = 64


def read_documents(path: str | Path, *, field: str = "text") -> Iterator[str]:
    """Yield the documents of a file one after another: a text file is one document, each JSON line is one.

    Args:
        path: a `.txt` or `.jsonl` file, or either with `.gz` behind it.
        field: the key that holds the text in each JSON line.

    Raises:
        DataError: the file is missing, of another kind, not valid text, or a line has no such field.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise DataError(f"There is no text file at {path}.")
    kind = Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()
    if kind not in JSON_SUFFIXES + TEXT_SUFFIXES:
        allowed = ", ".join(TEXT_SUFFIXES + JSON_SUFFIXES)
        raise DataError(f"{path} is not a kind of text file that is read here: use {allowed}, or one of them with .gz.")
    try:
        with open_text(path) as file:
            if kind in TEXT_SUFFIXES:
                yield file.read()
            else:
                yield from _json_lines(file, path, field)
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}.") from error


def open_text(path: Path) -> IO[str]:
    """Open a text file for reading, gzipped if its name says so."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _json_lines(file: IO[str], path: Path, field: str) -> Iterator[str]:
    for number, line in numbered_lines(file):
        record = parse_line(line, number, path)
        text = record.get(field) if isinstance(record, dict) else None
        if text is not None and not isinstance(text, str):
            kind = type(text).__name__
            raise DataError(f'Line {number} of {path} has a {kind} under "{field}", not a text; name another field.')
        if text is None:
            keys = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
            raise DataError(f'Line {number} of {path} has no text under "{field}" (it has: {keys}); name the field.')
        yield text


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer begins every text with its beginning-of-sequence token."""
    if tokenizer.bos_token_id is None:
        return False
    return list(tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id]


def load_tokens(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    field: str = "text",
    limit: int | None = None,
) -> torch.Tensor:
    """Tokenize a text file into the stream that `perplexity` cuts into windows of `context` tokens.

    Documents are joined by an empty line. Where the tokenizer begins texts with a BOS token, every window begins
    with it: token `i * context` is BOS, and it counts towards `limit`.

    Args:
        path: see `read_documents`.
        tokenizer: the model's tokenizer.
        context: window length in tokens, at least 2.
        field: the key that holds the text in each JSON line.
        limit: tokens to return at most, at least 2; None means the whole file.

    Returns:
        `[tokens]` int64.

    Raises:
        DataError: the file cannot be read, or holds fewer than two tokens.
    """
    characters = None if limit is None else (limit + SAFETY_TOKENS) * CHARACTERS_PER_TOKEN
    text, complete = _read_at_most(path, field, characters)
    ids = _encode(tokenizer, text)
    if not complete and limit is not None and ids.numel() < limit + SAFETY_TOKENS:
        ids = _encode(tokenizer, _read_at_most(path, field, None)[0])
    if adds_bos(tokenizer) and ids.numel():
        bos = ids.new_tensor([tokenizer.bos_token_id])
        ids = torch.cat([part for window in ids.split(context - 1) for part in (bos, window)])
    ids = ids[:limit]
    if ids.numel() < 2:
        raise DataError(f"{path} holds {ids.numel()} tokens; perplexity needs at least 2.")
    return ids


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    # verbose=False: "longer than the maximum length" is no concern here, the stream is cut into windows.
    encoded = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return torch.tensor(list(encoded["input_ids"]), dtype=torch.int64)


def _read_at_most(path: str | Path, field: str, characters: int | None) -> tuple[str, bool]:
    """The joined text, cut to about `characters`, and whether it is all of it."""
    parts: list[str] = []
    size = 0
    for document in read_documents(path, field=field):
        parts.append(document)
        size += len(document) + len(DOCUMENT_SEPARATOR)
        if characters is not None and size > characters:
            return DOCUMENT_SEPARATOR.join(parts)[:characters], False
    return DOCUMENT_SEPARATOR.join(parts), True
