"""How much each head of a vision model matters, measured on images of a file and written down."""

from itertools import islice, takewhile
from pathlib import Path

import torch
from transformers.image_processing_utils import BaseImageProcessor

from ..convert.planning.importance import HeadImportance, write_importance
from ..convert.planning.probe import probe
from ..convert.reading.checkpoint import load_model, load_tokenizer, open_checkpoint
from ..convert.surgery.in_memory import convert_model
from ..distill.images import ImageStream
from ..errors import CheckpointError
from ..evaluate.diagnose.image_heads import image_measures
from ..evaluate.diagnose.importance import ROLES
from ..evaluate.engine.models import find_device
from ..evaluate.engine.progress import Progress
from ..recipes import DataSection

PIXELS = "pixel_values"
IMAGES = 8


def image_importance(
    source: str,
    images: str | Path,
    path: str | Path,
    *,
    number: int = IMAGES,
    device: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> HeadImportance:
    """Write how much each KV head of a vision model matters: `ablation` and `distance`.

    Args:
        source: a local folder or Hub id of a model that was not converted.
        images: a folder of images, or a file with a column `image`.
        path: the JSON file.
        number: images to measure on.
        device: where to run the model; None means a GPU if there is one.
        trust_remote_code: whether a model that brings its own code may run it.
        progress: called with (done, in all, what is being done).

    Raises:
        CheckpointError: the model cannot be read, or takes no images.
        PlanError: its attention cannot be looked into.
        DataError: the images cannot be used, or another file is at `path`.
    """
    checkpoint = open_checkpoint(source, trust_remote_code=trust_remote_code)
    loaded = load_tokenizer(checkpoint)
    processor = getattr(loaded, "image_processor", loaded)
    if not isinstance(processor, BaseImageProcessor):
        raise CheckpointError(f"{source} has no image processor, so it cannot be diagnosed by images: use --text")
    stream = ImageStream(DataSection(path=str(images), image_field="image"), processor)
    # Each image once, though a stage would begin anew behind the last one.
    once = takewhile(lambda sequence: sequence.end.epoch == 0, islice(stream.sequences(), number))
    pixels = [sequence.tokens for sequence in once]
    same = len({one.shape for one in pixels}) == 1
    model = load_model(checkpoint, device=find_device(device), dtype=torch.float32).requires_grad_(False)
    if model.base_model.main_input_name != PIXELS:
        raise CheckpointError(f"{source} is a {type(model).__name__}, which takes more than images")
    modules = [module for module in probe(model.config, type(model)) if module.self_attention]
    # A method that can do as the model does; only what the model's own attention gives is asked for.
    convert_model(model, ROLES)
    batches = [torch.stack(pixels)] if same else [one[None] for one in pixels]
    return write_importance(
        path,
        source=checkpoint.source,
        modules=modules,
        measures=image_measures(model, modules, batches, progress),
        measure="ablation",
        settings={"ablation": {"images": len(pixels), "data": Path(images).name}},
    )
