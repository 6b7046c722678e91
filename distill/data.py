"""Where training text comes from: local files, the Hugging Face Hub, or the packaged sample; as ordered documents."""

import random
from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from ..files.foreign_errors import first_line
from ..packaged.model import embedded_model_path, embedded_tokens
from ..recipes import DataSection
from .batches import Batch
from .packing import PackedSequence, Position, pack

BUILDERS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
}
# The shuffle buffer holds this much at most, so that whole books do not fill the memory.
BUFFER_DOCUMENTS = 10_000
BUFFER_CHARACTERS = 32_000_000

# Text, token ids, or the bytes of an image.
Document = TypeVar("Document", bound=Sized)


@dataclass(frozen=True)
class TokenStream:
    """The training data of a stage: ordered documents, turned into token ids as they are needed.

    The order is that of a buffer of 10,000 documents (or 32 million characters, if that is less) from which documents
    are drawn at random; it depends on the seed and the epoch alone, and covers every document once in each epoch.

    Attributes:
        section: the recipe's data section.
        tokenizer: the model's tokenizer.
    """

    section: DataSection
    tokenizer: PreTrainedTokenizerBase

    def sequences(self, length: int | None, start: Position | None = None) -> Iterator[PackedSequence]:
        """Endless training sequences of `length` tokens from a place on; see `pack`."""
        assert length is not None, "a recipe gives every stage on text a sequence_length"
        return pack(self.token_lists, length, start)

    def collate(self, sequences: list[PackedSequence]) -> Batch:
        """A batch of sequences, whose documents see each other or not as the recipe says."""
        tokens = torch.stack([sequence.tokens for sequence in sequences])
        if self.section.boundaries == "joined":
            return Batch(tokens)
        positions = [sequence.positions for sequence in sequences if sequence.positions is not None]
        return Batch(tokens, position_ids=torch.stack(positions))

    def token_lists(self, epoch: int = 0, skip: int = 0) -> Iterator[list[int]]:
        """The token ids of each document of an epoch, boundary tokens included, without the first `skip` documents."""
        order = random.Random(f"{self.section.seed}/{epoch}")
        for index, document in enumerate(shuffled(read_documents(self.section, self.tokenizer), order)):
            if index >= skip:
                yield encode_document(self.tokenizer, document) if isinstance(document, str) else document.tolist()


def encode_document(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of one document with what the tokenizer adds to a text, and an end-of-sequence token behind it."""
    # verbose=False: documents are longer than the model's context on purpose, packing cuts them.
    ids: list[int] = list(tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"])
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if end is not None and ids[-1:] != [end]:
        ids.append(end)
    return ids


def shuffled(documents: Iterator[Document], order: random.Random) -> Iterator[Document]:
    """Draw documents at random from a buffer that is refilled as it empties; every document comes out once."""
    buffer: list[Document] = []
    size = 0
    for document in documents:
        buffer.append(document)
        size += len(document)
        while len(buffer) >= BUFFER_DOCUMENTS or (size > BUFFER_CHARACTERS and len(buffer) > 1):
            chosen = _draw(buffer, order)
            size -= len(chosen)
            yield chosen
    while buffer:
        yield _draw(buffer, order)


def _draw(buffer: list[Document], order: random.Random) -> Document:
    place = order.randrange(len(buffer))
    buffer[place], buffer[-1] = buffer[-1], buffer[place]
    return buffer.pop()


def read_documents(section: DataSection, tokenizer: PreTrainedTokenizerBase) -> Iterator[str | torch.Tensor]:
    """Yield the non-empty documents of a data section, in the order of the source.

    A JSON line or a table row is a document, and so is a paragraph of a text file (paragraphs are separated by empty
    lines). The packaged sample comes as token ids if the tokenizer has its vocabulary, else as text.

    Raises:
        DataError: the source cannot be read, holds no text, or a row has no text under the section's field.
    """
    if section.embedded:
        yield from _embedded_documents(section, tokenizer)
        return
    source, found = name_of(section), False
    for row in read_rows(section):
        text = row.get(section.field)
        if section.field not in row or not isinstance(text, str | None):
            raise wrong_field(source, "text", section.field, row)
        if text and not text.isspace():
            found = True
            yield text
    if not found:
        raise DataError(f"{source} holds no text.")


def _embedded_documents(section: DataSection, tokenizer: PreTrainedTokenizerBase) -> Iterator[str | torch.Tensor]:
    split = section.split or "train"
    if _embedded_tokenizer().get_vocab() == tokenizer.get_vocab():
        yield from embedded_tokens(split)
    else:
        yield from _embedded_texts(split)


@cache
def _embedded_tokenizer() -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(embedded_model_path())
    return tokenizer


# A run reads its data anew for every stage and every measurement, and decoding these few megabytes takes a second.
@cache
def _embedded_texts(split: str) -> list[str]:
    texts: list[str] = _embedded_tokenizer().batch_decode(embedded_tokens(split), skip_special_tokens=True)
    return texts


def name_of(section: DataSection) -> str:
    """What messages call the source of a data section."""
    if section.embedded:
        return "The packaged sample"
    if section.path is None:
        return f'The data set "{section.hub}"'
    return f"The data {'folder' if Path(section.path).expanduser().is_dir() else 'file'} {section.path}"


def wrong_field(source: str, wanted: str, field: str, row: Mapping[str, Any]) -> DataError:
    """What to say of a row without the wanted kind of data in a field."""
    fields = ", ".join(row) or "none"
    kind = "no field" if field not in row else f"no {wanted} ({type(row[field]).__name__}) in the field"
    return DataError(f'{source} has {kind} "{field}"; its fields are: {fields}.')


def read_rows(section: DataSection) -> Iterator[dict[str, Any]]:
    """The rows of a file, a folder of images or a Hub data set, read as they are asked for; images as they are stored.

    Raises:
        DataError: the source cannot be read.
    """
    from datasets import Image, load_dataset

    source = name_of(section)
    try:
        if section.path is None:
            options = {} if section.revision is None else {"revision": section.revision}
            dataset = load_dataset(section.hub, section.name, split=section.split or "train", streaming=True, **options)
        else:
            builder, options = _builder(Path(section.path).expanduser(), images=section.image_field is not None)
            dataset = load_dataset(builder, split="train", streaming=True, **options)
        if section.image_field is not None and isinstance((dataset.features or {}).get(section.image_field), Image):
            dataset = dataset.cast_column(section.image_field, Image(decode=False))
        rows = iter(dataset)
    except (DataError, StopIteration) as error:
        # An archive of nothing ends before its first row.
        if isinstance(error, StopIteration):
            return
        raise
    # `datasets` and what it reads with raise errors of a dozen kinds, most of them for a wrong name or no network.
    except Exception as error:
        advice = "" if section.hub is None else "; a file of your own can be named instead with data.path"
        raise DataError(f"{source} cannot be opened: {first_line(error)}{advice}.") from error
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        # As above: a truncated archive, text that is no JSON or a lost connection each have their own kind of error.
        except Exception as error:
            raise DataError(f"{source} cannot be read: {first_line(error)}.") from error
        yield row


def _builder(path: Path, *, images: bool) -> tuple[str, dict[str, Any]]:
    """Which reader of `datasets` takes a file or folder, and with which options."""
    if images and path.is_dir():
        return "imagefolder", {"data_dir": str(path.resolve())}
    if not path.is_file():
        raise DataError(f"There is no data file at {path}.")
    if path.stat().st_size == 0:
        raise DataError(f"The data file {path} is empty.")
    name = path.name.lower().removesuffix(".gz")
    builder = BUILDERS.get(Path(name).suffix)
    if builder is None:
        raise DataError(
            f"The data file {path} is of no known kind; use {', '.join(BUILDERS)}, also with .gz behind it."
        )
    options = {"sample_by": "paragraph"} if builder == "text" else {}
    return builder, {"data_files": str(path.resolve()), **options}
