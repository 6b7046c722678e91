"""Fine-tuned branches of a model: opened, held to be of one shape and vocabulary, and merged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...errors import CheckpointError, PlanError
from ...files.json_files import read_json
from ..reading.checkpoint import TOKENIZER_FILES, Checkpoint, open_checkpoint
from ..reading.weight_files import FLOAT_TYPES
from .fitting import is_mixture, with_defaults
from .tensors import Target, mean, stored_tensors

# Settings that say nothing about what the model computes.
SILENT = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")


@dataclass(frozen=True)
class Branch:
    """A model of the same shape as the one that is rewritten.

    Attributes:
        name: what the user calls it.
        checkpoint: the model as it lies on disk.
        tensors: its tensors by name.
    """

    name: str
    checkpoint: Checkpoint = field(repr=False)
    tensors: Mapping[str, Target] = field(repr=False)


def open_branches(sources: Sequence[str], base: Checkpoint) -> tuple[Branch, ...]:
    """Open branches of a model by their headers.

    Args:
        sources: folders or Hub ids.
        base: the model that is rewritten.

    Raises:
        CheckpointError: one cannot be read.
        PlanError: one is of another shape, has another vocabulary, or is a mixture of experts already.
    """
    branches = []
    for source in sources:
        checkpoint = open_checkpoint(source, trust_remote_code=base.trust_remote_code)
        if checkpoint.gguf_file is not None:
            raise PlanError(f"the source {source} is a GGUF file, which no rewrite can read: give the safetensors")
        _check_settings(source, checkpoint.config_dict, base)
        _check_vocabulary(source, checkpoint, base)
        branches.append(Branch(source, checkpoint, stored_tensors(checkpoint)))
    return tuple(branches)


def public_names(branches: Sequence[Branch]) -> dict[str, Checkpoint]:
    """Branches by what they are called in public; those of one name get a number."""
    names = [branch.checkpoint.name for branch in branches]
    places = [name if names.count(name) == 1 else f"{name}-{place}" for place, name in enumerate(names)]
    return {name: branch.checkpoint for name, branch in zip(places, branches, strict=True)}


def check_tensors(branch: Branch, wanted: Mapping[str, Target]) -> None:
    """Refuse a branch whose tensors are not those of the model, by name, shape and type.

    Raises:
        PlanError: names the first.
    """
    odd = sorted(branch.tensors.keys() ^ wanted.keys())
    if odd:
        where = "no" if odd[0] in wanted else "a"
        raise PlanError(
            f"the source {branch.name} is of another shape: it has {where} tensor {odd[0]!r}; "
            "give branches of one model"
        )
    for name, tensor in wanted.items():
        found = branch.tensors[name]
        if found.shape != tensor.shape:
            raise PlanError(
                f"the source {branch.name} is of another shape: {name!r} is {list(found.shape)}, and "
                f"{list(tensor.shape)} in the model; give branches of one model"
            )
        if found.dtype != tensor.dtype:
            raise PlanError(
                f"the source {branch.name} has {name!r} as {found.dtype}, and the model as {tensor.dtype}: save them "
                "in one type, and cast only after this step"
            )


def merged(name: str, models: Sequence[Mapping[str, Target]]) -> Target:
    """The mean of a tensor over models, and of one of whole numbers that of the first."""
    tensors = [model[name] for model in models]
    return mean(tensors) if tensors[0].dtype in FLOAT_TYPES else replace(tensors[0])


def _check_settings(source: str, config: Mapping[str, Any], base: Checkpoint) -> None:
    if is_mixture(config):
        raise PlanError(
            f"the source {source} is a mixture of experts already ({config.get('model_type')}): give dense branches"
        )
    if config.get("model_type") != base.config_dict.get("model_type"):
        raise PlanError(
            f"the source {source} is a {config.get('model_type')}, and {base.source} a "
            f"{base.config_dict.get('model_type')}: give branches of one model"
        )
    if config.get("quantization_config"):
        raise PlanError(f"the source {source} is quantised: give the weights that it was made from")
    ours, theirs = with_defaults(base.config_dict), with_defaults(config)
    for key in sorted(ours.keys() | theirs.keys()):
        silent = key in SILENT or key.endswith(("_token_id", "_dropout", "_attn_implementation"))
        if not silent and ours.get(key) != theirs.get(key):
            raise PlanError(
                f"the source {source} is of another shape: its {key} is {theirs.get(key)!r}, and {ours.get(key)!r} in "
                f"{base.source}; give branches of one model"
            )


def _check_vocabulary(source: str, branch: Checkpoint, base: Checkpoint) -> None:
    for name in TOKENIZER_FILES:
        ours, theirs = base.path / name, branch.path / name
        # Those say how text is put in, not what the numbers of tokens mean.
        if name == "tokenizer_config.json" or not (ours.is_file() and theirs.is_file()):
            continue
        if ours.read_bytes() == theirs.read_bytes():
            return
        if name != "tokenizer.json" or _vocabulary(base, name) != _vocabulary(branch, name):
            raise PlanError(
                f"the source {source} has another tokenizer than {base.source} ({name} differs): the same numbers "
                "would mean other words to its experts; give branches with one tokenizer"
            )
        return


def _vocabulary(checkpoint: Checkpoint, name: str) -> tuple[object, ...]:
    try:
        content = read_json(checkpoint.path / name)
    except CheckpointError:
        return (checkpoint.source,)
    added = [(token.get("id"), token.get("content")) for token in content.get("added_tokens") or ()]
    return (content.get("model"), added)
