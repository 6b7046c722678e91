"""What must not change between a run and its continuation: recipe, model, weights, text and number of processes."""

import json
from typing import Any

from ..convert.reading.checkpoint import PROCESSOR_FILES, TOKENIZER_FILES, Checkpoint
from ..distill.run import Run
from ..distill.work_folder import fingerprint
from ..files.containment import inside
from ..files.digests import FileDigests, digest_files, files_below
from ..recipes import DataSection, Recipe

# What a recipe says about reporting and saving; the weights in the end are the same whatever it is.
OUTSIDE_TRAINING = ("name", "description", "paper", "output")
OUTSIDE_STAGES = ("save_every", "log_every")
VOCABULARY_FILES = ("added_tokens.json", "special_tokens_map.json", "merges.txt")


def run_identity(run: Run) -> dict[str, Any]:
    """Everything that the weights of a healed model depend on, as JSON data."""
    names = (*TOKENIZER_FILES, *PROCESSOR_FILES, *VOCABULARY_FILES)
    tokenizer = {name: run.checkpoint.path / name for name in names if (run.checkpoint.path / name).is_file()}
    return {
        "recipe": training_part(run.recipe),
        "model": fingerprint(json.dumps(run.checkpoint.config_dict, sort_keys=True, default=str)),
        "weights": dict(run.weights.digests) if run.weights is not None else {},
        "rewritten from": dict(run.origin_digests or {}),
        "tokenizer": dict(digest_files(tokenizer).digests),
        "data": dict(digest_files(files_below(_local_data(run.recipe))).digests),
        "plan": fingerprint(json.dumps(run.plan.to_config(), sort_keys=True)),
        "number of processes": run.team.size,
    }


def digest_weights(checkpoint: Checkpoint) -> FileDigests:
    """The digests of a checkpoint's weight files."""
    names = [checkpoint.gguf_file] if checkpoint.gguf_file else [shard.name for shard in checkpoint.shards]
    return digest_files({name: inside(checkpoint.path, name) for name in names})


def training_part(recipe: Recipe) -> dict[str, Any]:
    """A recipe without what does not touch training: a run may go on with another output or other intervals."""
    plain: dict[str, Any] = recipe.model_dump(mode="json")
    for key in OUTSIDE_TRAINING:
        del plain[key]
    for stage in plain["stages"]:
        for key in OUTSIDE_STAGES:
            stage.pop(key, None)
    return plain


def data_sections(recipe: Recipe) -> list[DataSection]:
    """The data sections that the stages of a recipe read."""
    sections = (stage.data or recipe.data for stage in recipe.stages)
    return [section for section in sections if section is not None]


def find_revisions(recipe: Recipe) -> dict[str, str]:
    """The commit of each Hub data set of a recipe, so that a run reads the same text however long it takes.

    Returns:
        the commits by the data sets' names; without those that the Hub does not tell.
    """
    from huggingface_hub import HfApi

    found = {}
    for name in {section.hub for section in data_sections(recipe) if section.hub is not None}:
        try:
            commit = HfApi().dataset_info(name).sha
        # The data are known to be readable by now, perhaps from a cache without any network.
        except Exception:  # noqa: BLE001
            continue
        if commit is not None:
            found[name] = commit
    return found


def _local_data(recipe: Recipe) -> list[str]:
    """The files and folders that training and evaluation read."""
    paths = [section.path for section in data_sections(recipe)]
    paths.append(recipe.evaluate.path if recipe.evaluate is not None else None)
    return [path for path in dict.fromkeys(paths) if path is not None]
