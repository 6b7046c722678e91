"""The config.json of a model folder: what is refused before anything of the model is touched, and how it is read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig

from ...errors import CheckpointError
from ...files.foreign_errors import first_line
from ...files.own_files import CONFIG_FILE, SECTION
from ..planning.section import read_section

LONGEST_QUOTE = 60
# Ten times the deepest model that there is; a model is built of them, if only to be looked at.
MOST_LAYERS = 10_000


def check_config(
    config: Mapping[str, Any], source: str, *, trust_remote_code: bool = False, allow_converted: bool = False
) -> None:
    """Refuse what must not be converted.

    Args:
        config: the contents of config.json.
        source: the model as the user named it.
        trust_remote_code: let it bring Python code.
        allow_converted: let it be the output of a conversion.

    Raises:
        CheckpointError: the model is converted already, brings its own code, is of an unknown type, or names its
            class in no list.
        PlanError: it is the output of a conversion whose section is damaged.
    """
    classes = config.get("architectures")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise CheckpointError(
            f"{source} has a damaged {CONFIG_FILE}: its 'architectures' must be a list of class names, and is "
            f"{_shortened(classes)}."
        )
    if SECTION in config or config.get("attn_implementation") == SECTION:
        if not allow_converted:
            raise CheckpointError(f"{source} is converted already: convert the model that it was made from instead.")
        read_section(config.get(SECTION))
        return
    if config.get("auto_map") and not trust_remote_code:
        raise CheckpointError(
            f"{source} brings its own Python code (auto_map in {CONFIG_FILE}), which is not run unless you allow it "
            "with --trust-remote-code."
        )
    model_type = config.get("model_type")
    if "AutoConfig" in (config.get("auto_map") or {}):
        return
    if not isinstance(model_type, str):
        raise CheckpointError(f"{source} is no model for transformers: its {CONFIG_FILE} names no model_type.")
    if model_type not in transformers.CONFIG_MAPPING:
        raise CheckpointError(
            f"{source} has the model_type {model_type!r}, which transformers {transformers.__version__} does not know: "
            f"check its {CONFIG_FILE}, or upgrade transformers."
        )


def _shortened(value: object) -> str:
    # Anything else may be nested so deeply that it cannot be printed.
    if not isinstance(value, str):
        return f"a {type(value).__name__}" if not isinstance(value, list) else "a list of something else"
    return repr(value if len(value) <= LONGEST_QUOTE else f"{value[:LONGEST_QUOTE]}...")


def read_config(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Read a folder's configuration as transformers does; no model code is imported unless the folder brings it.

    Raises:
        CheckpointError: transformers does not accept its values, or they would take for ever to be built.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    # Every configuration class checks its values in its own way.
    except Exception as error:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} is not accepted by transformers: {first_line(error)}."
        ) from error
    for part in (config, config.get_text_config()):
        layers = getattr(part, "num_hidden_layers", None)
        if isinstance(layers, int) and layers > MOST_LAYERS:
            raise CheckpointError(
                f"{folder / CONFIG_FILE} is damaged: it sets num_hidden_layers to {layers}, more than any model has"
            )
    return config
