"""The files beside a model's weights that a converted model takes over as they are: tokenizer, templates, licence."""

import shutil
from fnmatch import fnmatch
from pathlib import Path

from ...files.containment import inside
from ...files.own_files import CONFIG_FILE, RECEIPT_FILE

LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "*TERMS*", "USE_POLICY*")
TAKEN_OVER = (
    *LICENCES,
    *("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.spm", "*.bpe", "*.codes"),
    # Chat templates, and the modules of a sentence-transformers model.
    *("additional_chat_templates/*.jinja", "[0-9]_*/*.json"),
)
LEFT_BEHIND = (
    # Written anew, or about the weights of the base.
    *(CONFIG_FILE, "*.index.json", RECEIPT_FILE, "adapter_*.json"),
    # About how the base was trained or exported.
    *("trainer_state.json", "all_results.json", "*_results.json", "training_args*", "SOURCE.json"),
)
CODE = ("*.py",)


def companion_files(folder: Path, *, code: bool = False, licences_only: bool = False) -> tuple[str, ...]:
    """Names of the files that a conversion of a folder's model takes over.

    Args:
        folder: a resolved folder.
        code: the model's own Python files too.
        licences_only: nothing but licences, where a folder is not one model's (GGUF files).

    Raises:
        CheckpointError: one of them is a link that leads out of the folder.
    """
    wanted = LICENCES if licences_only else TAKEN_OVER + (CODE if code else ())
    found = []
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and _matches(name, wanted) and not _matches(name, LEFT_BEHIND):
            inside(folder, name)
            found.append(name)
    return tuple(found)


def copy_companions(source: Path, names: tuple[str, ...], target: Path) -> None:
    """Copy files byte for byte into a folder, over what is there."""
    for name in names:
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    # A pattern's star also matches slashes, so the depth is compared as well.
    return any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)
