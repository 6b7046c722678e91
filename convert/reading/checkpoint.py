"""A pretrained model as it lies on disk: opened by its headers, refused if it cannot be converted, loaded on demand."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from ...errors import CheckpointError
from ...files.foreign_errors import first_line
from ...files.json_files import read_json
from ...files.own_files import CONFIG_FILE, SECTION
from ..writing.companion_files import companion_files
from .config_file import check_config, read_config
from .gguf_file import read_gguf
from .shards import Shard
from .sources import Location, fetch, locate
from .weight_files import float_type, is_new_tensor, read_weights, weight_files

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
EXPERTS_NDIM, GROUPED_BYTES = 3, 16
GENERATION_FILE = "generation_config.json"
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; no tensor has been read.

    Attributes:
        source: what the user named.
        path: the local folder.
        config: transformers' configuration.
        config_dict: config.json as it is on disk; for a GGUF file, what stands for it.
        shards: the safetensors files, empty for a GGUF file.
        dtype: the type most of the weights have; for a quantised GGUF file, the type it is dequantised to.
        gguf_file: name of the GGUF file in `path`, None for safetensors.
        repo_id: the Hub repository that the files came from, if known.
        revision: the commit of that repository.
        trust_remote_code: whether the checkpoint's own Python code may run.
        companions: names of the files in `path` that its conversion takes over as they are.
    """

    source: str
    path: Path
    config: PreTrainedConfig = field(repr=False)
    config_dict: Mapping[str, Any] = field(repr=False)
    shards: tuple[Shard, ...]
    dtype: torch.dtype
    gguf_file: str | None = None
    repo_id: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    companions: tuple[str, ...] = field(default=(), repr=False)

    @property
    def name(self) -> str:
        """What to call it in public: of a folder or file its name without its place, else the Hub id."""
        if Path(self.source).expanduser().exists():
            return self.gguf_file or Path(self.source).expanduser().resolve().name
        return self.source

    @cached_property
    def weight_map(self) -> Mapping[str, str]:
        """The file name of each tensor."""
        # The last shard of a conversion repeats one name as a mark; the tensor itself lies in the shard before.
        return {tensor: shard.name for shard in reversed(self.shards) for tensor in shard.tensors}

    @property
    def architecture(self) -> str:
        """Name of the model class."""
        return architecture_of(self.config)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def is_converted(self) -> bool:
        """Whether this is the output of a conversion."""
        return SECTION in self.config_dict


def open_checkpoint(
    source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False, allow_converted: bool = False
) -> Checkpoint:
    """Open a model by its configuration and the headers of its weights, in well under a second for local files.

    Args:
        source: a folder, a `.gguf` file, a Hub id (downloaded to the Hub's cache), or `HUB_ID/FILE.gguf`.
        revision: branch, tag or commit of a Hub repository.
        trust_remote_code: let the checkpoint's own Python code define the model.
        allow_converted: open the output of a conversion too; it is refused otherwise.

    Raises:
        CheckpointError: it is no model, is damaged, or must not be converted; the message says what to do.
    """
    location = locate(str(source), revision=revision, trust_remote_code=trust_remote_code)
    if location.gguf_file is not None:
        config, dtype = read_gguf(location.folder / location.gguf_file)
        return _checkpoint(source, location, config, config.to_dict(), (), dtype, trust_remote_code)
    config_dict = read_json(location.folder / CONFIG_FILE)
    check_config(config_dict, str(source), trust_remote_code=trust_remote_code, allow_converted=allow_converted)
    config = read_config(location.folder, trust_remote_code=trust_remote_code)
    if (location.folder / GENERATION_FILE).is_file():
        read_json(location.folder / GENERATION_FILE)
    names = weight_files(location.folder)
    fetch(location, names)
    shards = read_weights(location.folder, names)
    if SECTION not in config_dict and any(is_new_tensor(name) for shard in shards for name in shard.tensors):
        raise CheckpointError(
            f"{source} holds weights that attnconv converted, but its {CONFIG_FILE} does not say how: restore the "
            "file, or convert again."
        )
    dtype = float_type(shards) or getattr(config, "dtype", None) or torch.float32
    return _checkpoint(source, location, config, config_dict, shards, dtype, trust_remote_code)


def architecture_of(config: PreTrainedConfig) -> str:
    """Name of the model class that a configuration stands for; a causal language model where it names none.

    Raises:
        CheckpointError: it names none and transformers knows no default for the model type.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

    if config.architectures:
        return str(config.architectures[0])
    for names in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES):
        if config.model_type in names:
            name = names[config.model_type]
            return str(name if isinstance(name, str) else name[0])
    raise CheckpointError(
        f"The configuration of model type {config.model_type!r} names no model class: add 'architectures' to it."
    )


def model_class_of(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> type[PreTrainedModel]:
    """The model class that a configuration stands for.

    Args:
        config: a configuration, read from disk if its class is the checkpoint's own code.
        trust_remote_code: look the class up in the checkpoint's own code, if it brings any.

    Raises:
        CheckpointError: there is no such class.
    """
    name = architecture_of(config)
    if trust_remote_code:
        for reference in (getattr(config, "auto_map", None) or {}).values():
            if isinstance(reference, str) and reference.rsplit(".", 1)[-1] == name:
                return _remote_class(reference, str(config.name_or_path))
    model_class = getattr(transformers, name, None)
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise CheckpointError(
            f"The configuration asks for the model class {name!r}, "
            f"which transformers {transformers.__version__} does not have."
        )
    return model_class


def load_model(
    checkpoint: Checkpoint, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> PreTrainedModel:
    """Load a checkpoint's model, in evaluation mode, as the class its configuration names.

    Args:
        checkpoint: an opened checkpoint.
        dtype: type of the weights; the default is the checkpoint's own.
        device: where to put it; the default is the CPU.

    Raises:
        CheckpointError: the weights do not make up the whole model.
    """
    from transformers.utils.quantization_config import GgufConfig

    model_class = model_class_of(checkpoint.config, trust_remote_code=checkpoint.trust_remote_code)
    load: Any = model_class.from_pretrained
    options: dict[str, Any] = {"config": copy.deepcopy(checkpoint.config)}
    if checkpoint.gguf_file is not None:
        options = {"gguf_file": checkpoint.gguf_file, "quantization_config": GgufConfig(dequantize=True)}
    if device is not None:
        options["device_map"] = {"": device}
    try:
        model, info = load(
            checkpoint.path, dtype=dtype or checkpoint.dtype, local_files_only=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint.source} cannot be loaded: {first_line(error)}.") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{checkpoint.source} does not hold all weights of {model_class.__name__}: "
            f"{len(missing)} are missing, the first is {missing[0]!r}."
        )
    loaded: PreTrainedModel = model.eval()
    _settle_experts(loaded)
    return loaded


def _settle_experts(model: PreTrainedModel) -> None:
    """Let experts be multiplied one by one whose rows are no multiple of what torch's grouped products take."""
    if not getattr(model, "_can_set_experts_implementation", bool)():
        return
    fused = [parameter for parameter in model.parameters() if parameter.ndim == EXPERTS_NDIM]
    if any(parameter.shape[-1] * parameter.itemsize % GROUPED_BYTES for parameter in fused):
        model.set_experts_implementation("eager")


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Load what turns raw input into the model's input: a tokenizer, or for other inputs a processor.

    Returns:
        a tokenizer, a processor (text and something else), an image processor or a feature extractor; None if the
        checkpoint has none.

    Raises:
        CheckpointError: its files are damaged or need a package that is not installed.
    """
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": checkpoint.trust_remote_code}
    has_tokenizer = any((checkpoint.path / name).is_file() for name in TOKENIZER_FILES)
    auto_class: Any = transformers.AutoTokenizer
    if checkpoint.gguf_file is not None:
        options["gguf_file"] = checkpoint.gguf_file
    elif any((checkpoint.path / name).is_file() for name in PROCESSOR_FILES):
        auto_class = transformers.AutoProcessor if has_tokenizer else _processor_class(checkpoint.path)
    elif not has_tokenizer:
        return None
    try:
        return auto_class.from_pretrained(checkpoint.path, **options)
    # Tokenizers and processors come in hundreds of classes, each of which fails in its own way.
    except Exception as error:
        raise CheckpointError(
            f"The tokenizer or processor of {checkpoint.source} cannot be loaded: {first_line(error)}."
        ) from error


def _processor_class(folder: Path) -> Any:
    """The auto class for a folder that has a processor and no tokenizer."""
    name = PROCESSOR_FILES[1]
    if not (folder / name).is_file():
        return transformers.AutoProcessor
    processor = read_json(folder / name)
    return (
        transformers.AutoFeatureExtractor if "feature_extractor_type" in processor else transformers.AutoImageProcessor
    )


def _checkpoint(
    source: str | Path,
    location: Location,
    config: PreTrainedConfig,
    config_dict: dict[str, Any],
    shards: tuple[Shard, ...],
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> Checkpoint:
    return Checkpoint(
        source=str(source),
        path=location.folder,
        config=config,
        config_dict=config_dict,
        shards=shards,
        dtype=dtype,
        gguf_file=location.gguf_file,
        repo_id=location.repo_id,
        revision=location.revision,
        trust_remote_code=trust_remote_code,
        companions=companion_files(
            location.folder, code=trust_remote_code, licences_only=location.gguf_file is not None
        ),
    )


def _remote_class(reference: str, folder: str) -> type[PreTrainedModel]:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    model_class: type[PreTrainedModel] = get_class_from_dynamic_module(reference, folder, local_files_only=True)
    return model_class
