"""What a base's own files say that is true of its conversion too: its licence, and the model of the Hub it is from."""

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from yaml import YAMLError

from ...files.foreign_errors import first_line
from ...files.own_files import CARD_FILE
from ..reading.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

CARRIED_OVER = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""What of the base's own card stays true of a conversion of it."""
# First parts of paths that look like a model of the Hub.
FOLDERS = re.compile(r"(models?|checkpoints?|ckpts?|outputs?|out|results?|runs?|data|tmp|home|mnt|work|weights)\d*")


@dataclass(frozen=True)
class BaseFacts:
    """What is known of a base.

    Attributes:
        metadata: what its card says that is true of its conversion too, above all its licence.
        models: the models of the Hub that it is, or else is made from as far as its files tell; never a local path.
        is_local: whether it is not known to be a model of the Hub itself.
    """

    metadata: Mapping[str, Any]
    models: tuple[str, ...]
    is_local: bool

    def sentences(self) -> Iterator[str]:
        """What to say of a base that is not from the Hub."""
        if not self.is_local:
            return
        if self.models:
            links = ", ".join(f"[{name}](https://huggingface.co/{name})" for name in self.models)
            yield f"The base was a local copy; the nearest model of the Hub that its own files name is {links}."
        else:
            yield "The base was a local copy that names no model of the Hub, so this card has no `base_model`."
        if "license" not in self.metadata:
            yield "The base's files name no licence, so neither does this card."


def read_base(checkpoint: Checkpoint) -> BaseFacts:
    """Read what a base's own files say of it: its card, and else its configuration, which may be years old."""
    card = _front_matter(checkpoint.path)
    metadata = {key: card[key] for key in CARRIED_OVER if card.get(key) is not None}
    if checkpoint.repo_id is not None:
        return BaseFacts(metadata, (checkpoint.repo_id,), is_local=False)
    named = card.get("base_model")
    sources = (named if isinstance(named, list) else [named], [checkpoint.config_dict.get("_name_or_path")])
    found = (tuple(name for name in names if _is_hub_model(name)) for names in sources)
    return BaseFacts(metadata, next((models for models in found if models), ()), is_local=True)


def _front_matter(folder: Path) -> dict[str, Any]:
    """The metadata of a folder's card, empty if it has none."""
    from huggingface_hub import ModelCard

    path = folder / CARD_FILE
    if not path.is_file():
        return {}
    try:
        return dict(ModelCard.load(path, ignore_metadata_errors=True).data.to_dict())
    except (OSError, ValueError, YAMLError) as error:
        logger.warning("the card of the base cannot be read, so its licence is not carried over: %s", first_line(error))
        return {}


def _is_hub_model(name: Any) -> TypeGuard[str]:
    """Whether a text is `user/name`, and not a path that only looks like one."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    if not isinstance(name, str) or name.count("/") != 1:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    first, last = name.split("/")
    return not (FOLDERS.fullmatch(first.lower()) or re.fullmatch(r"checkpoint-\d+", last) or Path(name).exists())
