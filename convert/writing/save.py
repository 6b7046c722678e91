"""The format of a converted model: the base's own model type, marked so that it never loads as softmax by accident.

Its config.json keeps `model_type` and `architectures` and adds three things. The section `attnconv` holds the plan.
`attn_implementation: attnconv` makes transformers refuse to load it where attnconv is not imported. `auto_map` leads
`trust_remote_code=True` to a small generated file that imports attnconv. Where config.json has lost the sentinel, the
mark in the weights refuses instead (`weight_mark`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import INSTALL
from ...files.json_files import read_json, write_json
from ...files.own_files import CARD_FILE, CONFIG_FILE, RECIPE_FILE, SECTION
from ...files.whole_files import write_atomically
from ..planning.plan import Plan
from ..reading.checkpoint import Checkpoint, load_tokenizer
from ..surgery.attention_function import ATTENTION
from .companion_files import copy_companions
from .receipt import Receipt, write_receipt
from .reload import CLASS_PREFIX
from .weight_mark import mark_weights

MODELING_MODULE = "modeling_attnconv"

MODELING_HEADER = f'''"""Lets `trust_remote_code=True` load this model, which attnconv made and which needs attnconv.

With `import attnconv` beforehand the model loads without this file.
"""

try:
    from attnconv.convert.writing.reload import native_model
except ImportError as error:
    raise ImportError("This model needs attnconv: {INSTALL}.") from error

'''


def save_converted(
    model: PreTrainedModel,
    folder: Path,
    *,
    checkpoint: Checkpoint,
    plan: Plan,
    shard_size: str | int = "5GB",
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a converted model with everything its base brought along except the base's weights.

    Args:
        model: the converted model; adapters must be merged.
        folder: an empty folder, such as the one that `atomic_folder` gives.
        checkpoint: the base.
        plan: what was converted.
        shard_size: largest size of one weight file, such as `"5GB"`, or in bytes.
        weights: what to write in place of the model's weights.
    """
    model.save_pretrained(folder, max_shard_size=shard_size, state_dict=None if weights is None else dict(weights))
    mark_weights(folder, plan)
    config = read_json(folder / CONFIG_FILE)
    write_marked(folder, mark_config(config | {"architectures": [checkpoint.architecture]}, plan))
    if checkpoint.gguf_file is not None and (tokenizer := load_tokenizer(checkpoint)) is not None:
        tokenizer.save_pretrained(folder)
    copy_companions(checkpoint.path, checkpoint.companions, folder)


def save_native(
    model: PreTrainedModel,
    folder: Path,
    *,
    checkpoint: Checkpoint,
    shard_size: str | int = "5GB",
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write an ordinary model with everything its base brought along except the base's weights.

    Args:
        model: a model with the base's own attention; adapters must be merged.
        folder: an empty folder, such as the one that `atomic_folder` gives.
        checkpoint: the base, whose configuration stays as it is but for the type of the weights.
        shard_size: largest size of one weight file, such as `"5GB"`, or in bytes.
        weights: what to write in place of the model's weights.
    """
    model.save_pretrained(folder, max_shard_size=shard_size, state_dict=None if weights is None else dict(weights))
    dtype = str(model.dtype).removeprefix("torch.")
    write_json(folder / CONFIG_FILE, {**checkpoint.config_dict, "dtype": dtype})
    copy_companions(checkpoint.path, checkpoint.companions, folder)


def write_companions(folder: Path, *, recipe_yaml: str, receipt: Receipt, card: str) -> None:
    """Write what tells how a converted model came about: `recipe.yaml`, `receipt.json` and the model card."""
    (folder / RECIPE_FILE).write_text(recipe_yaml, encoding="utf-8")
    write_receipt(folder, receipt)
    (folder / CARD_FILE).write_text(card, encoding="utf-8")


def mark_config(config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """The config.json of a model converted by `plan`.

    Args:
        config: the config.json of the base, or of a converted model as transformers writes it.
        plan: what was converted.
    """
    return _marked(config, plan.to_config())


def mark_folder(folder: str | Path) -> None:
    """Mark a model that transformers has just saved, if its config.json carries a plan; see `mark_config`."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        return
    config = read_json(path)
    if SECTION in config:
        write_marked(Path(folder), _marked(config, config[SECTION]))


def write_marked(folder: Path, config: Mapping[str, Any]) -> None:
    """Write a marked config.json, and the modeling file that its `auto_map` leads to."""
    write_json(folder / CONFIG_FILE, config)
    prefix = f"{MODELING_MODULE}."
    classes = sorted({name.removeprefix(prefix) for name in config["auto_map"].values() if name.startswith(prefix)})
    path = folder / f"{MODELING_MODULE}.py"
    # One that holds all classes is already in place where a self-contained model is saved again.
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if classes and not all(f"\n{name} = " in text for name in classes):
        lines = [f'{name} = native_model("{name.removeprefix(CLASS_PREFIX)}", __name__)\n' for name in classes]
        write_atomically(path, (MODELING_HEADER + "".join(lines)).encode())


def auto_classes(model_type: str, architecture: str) -> dict[str, str]:
    """The auto classes of transformers that stand for an architecture, and `AutoModel` for its model without a head.

    Args:
        model_type: the configuration's model type.
        architecture: a class of transformers.

    Returns:
        the auto class's name → the model class's name; empty if transformers does not have the architecture.
    """
    from transformers.models.auto import modeling_auto

    if not hasattr(transformers, architecture):
        return {}
    found = {}
    for name, auto_class in vars(modeling_auto).items():
        if not (name.startswith("Auto") and hasattr(auto_class, "_model_mapping")):
            continue
        # The outer mapping is by configuration class and would import each model; the inner one is of names.
        entry = auto_class._model_mapping._model_mapping.get(model_type, ())
        names = (entry,) if isinstance(entry, str) else entry
        if architecture in names:
            found[name] = architecture
        elif name == "AutoModel" and names:
            found[name] = names[0]
    return found


def _marked(config: Mapping[str, Any], section: Mapping[str, Any]) -> dict[str, Any]:
    architecture = _native(config["architectures"][0])
    classes = auto_classes(config.get("model_type", ""), architecture)
    references = {name: f"{MODELING_MODULE}.{CLASS_PREFIX}{model_class}" for name, model_class in classes.items()}
    return {
        **config,
        "architectures": [architecture],
        SECTION: dict(section),
        "attn_implementation": ATTENTION,
        # A model of foreign code keeps its own map; the sentinel guards it all the same.
        "auto_map": references or dict(config.get("auto_map") or {}),
    }


def _native(architecture: str) -> str:
    """The name of transformers' class for one that was loaded through a modeling file of ours."""
    native = architecture.removeprefix(CLASS_PREFIX)
    return native if hasattr(transformers, native) else architecture
