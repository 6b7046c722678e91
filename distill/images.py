"""Training images, as ordered documents like those of text, turned into pixel values as they are needed."""

import io
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from transformers.image_processing_utils import BaseImageProcessor

from ..errors import DataError
from ..recipes import DataSection
from .batches import ImageBatch
from .data import name_of, read_rows, shuffled, wrong_field
from .packing import PackedSequence, Position


class ImageFile(bytes):
    """The content of an image file.

    Attributes:
        name: what messages call it.
    """

    name: str


@dataclass(frozen=True)
class ImageStream:
    """The training images of a stage, in an order like that of `TokenStream`.

    Attributes:
        section: the recipe's data section.
        processor: the model's image processor.
    """

    section: DataSection
    processor: BaseImageProcessor

    def sequences(self, length: int | None = None, start: Position | None = None) -> Iterator[PackedSequence]:
        """Endless images from a place on; `length` is for text alone."""
        start = start or Position()
        epoch, skip = start.epoch, start.document
        while True:
            order = random.Random(f"{self.section.seed}/{epoch}")
            for index, image in enumerate(shuffled(read_images(self.section), order)):
                if index >= skip:
                    yield PackedSequence(self.pixel_values(image), Position(epoch, index + 1))
            epoch, skip = epoch + 1, 0

    def pixel_values(self, image: ImageFile) -> torch.Tensor:
        """What the model's processor makes of an image file, `[channels, height, width]`.

        Raises:
            DataError: it is no image.
        """
        try:
            with Image.open(io.BytesIO(image)) as opened:
                picture = opened.convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(f"{name_of(self.section)} holds an image that cannot be read: {image.name}.") from error
        pixels: torch.Tensor = self.processor(images=picture, return_tensors="pt")["pixel_values"][0]
        return pixels

    def collate(self, sequences: list[PackedSequence]) -> ImageBatch:
        """A batch of images.

        Raises:
            DataError: the processor left them at different sizes.
        """
        images = [sequence.tokens for sequence in sequences]
        if len({image.shape for image in images}) > 1:
            raise DataError(
                f"The model's image processor leaves the images of {name_of(self.section)[4:]} at different sizes, so "
                "they make no batch: set the stage's batch_size to 1."
            )
        return ImageBatch(pixel_values=torch.stack(images))


def unit_of(stream: object) -> str:
    """What a stage's data are counted in."""
    return "images" if isinstance(stream, ImageStream) else "tokens"


def read_images(section: DataSection) -> Iterator[ImageFile]:
    """Yield the image files of a data section, in the order of the source; rows without one are left out.

    Raises:
        DataError: the source cannot be read, holds no image, or a row has none under the section's `image_field`.
    """
    source, found = name_of(section), False
    field = str(section.image_field)
    path = None if section.path is None else Path(section.path).expanduser()
    folder = path.resolve() if path is not None and path.is_dir() else None
    for number, row in enumerate(read_rows(section), 1):
        image = row.get(field)
        if field not in row or not isinstance(image, dict | bytes | None):
            raise wrong_field(source, "image", field, row)
        content = _content(image) if isinstance(image, dict) else image
        if content:
            found = True
            file = ImageFile(content)
            path = image.get("path") if isinstance(image, dict) and folder is not None else None
            file.name = os.path.relpath(path, folder) if path else f"row {number}"
            yield file
    if not found:
        raise DataError(f"{source} holds no images.")


def _content(image: dict[str, Any]) -> bytes | None:
    """The file of an image as `datasets` stores it: its bytes or, in a folder, its path."""
    content: bytes | None = image.get("bytes")
    path = image.get("path")
    return Path(path).read_bytes() if content is None and path else content
