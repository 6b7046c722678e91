"""Where a model comes from: a local folder, a GGUF file, or a repository of the Hub, brought to a local folder."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import CheckpointError
from ...files.foreign_errors import first_line
from ...files.own_files import CARD_FILE, CONFIG_FILE

logger = logging.getLogger(__name__)

SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*", "NOTICE*", CARD_FILE]
"""What is downloaded of a repository before it is known to be one that can be converted."""
CODE = ["*.py"]

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PICKLE_ADVICE = (
    "convert it first, where you trust its author: AutoModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) "
    "writes safetensors"
)


@dataclass(frozen=True)
class Location:
    """A model's files on this machine.

    Attributes:
        folder: the local folder.
        gguf_file: name of the GGUF file in it that holds the model, if one does.
        repo_id: the Hub repository it came from, if it came from one.
        revision: the commit of that repository.
        remote: whether the weights may still have to be downloaded.
    """

    folder: Path
    gguf_file: str | None = None
    repo_id: str | None = None
    revision: str | None = None
    remote: bool = False


def locate(source: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Location:
    """Find a model's folder; of a Hub repository only the small files are downloaded, see `fetch`.

    Args:
        source: a folder, a `.gguf` file, a Hub id, or `HUB_ID/FILE.gguf`.
        revision: branch, tag or commit of a Hub repository.
        trust_remote_code: download the repository's Python files too.

    Raises:
        CheckpointError: nothing is there, it is no model, or the Hub did not give it.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _from_cache(Location(path.resolve(), _only_gguf(path)))
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return _from_cache(Location(path.parent.resolve(), path.name))
        if path.suffix.lower() in PICKLES:
            raise CheckpointError(f"{source} is a pickle file, which can run any code when opened: {PICKLE_ADVICE}.")
        raise CheckpointError(f"{source} is a file: give the folder of a model, a .gguf file or a Hub id.")
    repo_id, gguf_file = _hub_name(source)
    patterns = SMALL_FILES + (CODE if trust_remote_code else []) + ([gguf_file] if gguf_file else [])
    folder = _download(repo_id, revision, patterns)
    if gguf_file and not (folder / gguf_file).is_file():
        raise CheckpointError(f"The Hub repository {repo_id!r} has no file {gguf_file}.")
    return Location(folder, gguf_file, repo_id, folder.name, remote=True)


def fetch(location: Location, names: Sequence[str]) -> None:
    """Download more files of a Hub repository, such as its weights; of anything local there is nothing to fetch.

    Raises:
        CheckpointError: the Hub did not give them.
    """
    if location.remote and location.repo_id is not None:
        _download(location.repo_id, location.revision, list(names))


def _only_gguf(folder: Path) -> str | None:
    """The GGUF file of a folder that holds nothing else to load."""
    if (folder / CONFIG_FILE).exists():
        return None
    files = sorted(path.name for path in folder.iterdir() if path.suffix.lower() == ".gguf")
    if len(files) > 1:
        raise CheckpointError(f"{folder} holds {len(files)} GGUF files: name the one to convert, such as {files[0]}.")
    return files[0] if files else None


def _from_cache(location: Location) -> Location:
    """Name the repository of a folder that is a snapshot in the Hub's local cache."""
    cache = location.folder.parent.parent
    if location.folder.parent.name != "snapshots" or not cache.name.startswith("models--"):
        return location
    repo_id = cache.name.removeprefix("models--").replace("--", "/")
    return replace(location, repo_id=repo_id, revision=location.folder.name)


def _hub_name(source: str) -> tuple[str, str | None]:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    parts = source.split("/")
    gguf_file = parts.pop() if len(parts) == 3 and source.lower().endswith(".gguf") else None
    repo_id = "/".join(parts)
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise CheckpointError(f"{source} does not exist, and it is no Hub id such as 'user/name' either.") from None
    if Path(source).suffix.lower() in (*PICKLES, ".gguf", ".safetensors") and gguf_file is None:
        raise CheckpointError(f"There is no file {source}.")
    return repo_id, gguf_file


def _download(repo_id: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    logger.info("fetching %s from the Hub: %s", repo_id, ", ".join(patterns))
    try:
        folder = snapshot_download(repo_id, revision=revision, allow_patterns=patterns)
    # The client has no common base for its failures: HTTP libraries, OSError, RuntimeError and hf_xet's own.
    except Exception as error:
        raise CheckpointError(_reason(error, repo_id, revision)) from error
    return Path(folder)


def _reason(error: BaseException, repo_id: str, revision: str | None) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    link: BaseException | None = error
    while link is not None and not isinstance(link, HfHubHTTPError):
        link = link.__cause__
    answer = link or error
    if isinstance(answer, GatedRepoError):
        return f"{repo_id!r} is gated: accept its terms on the Hub, then run `hf auth login`."
    if isinstance(answer, RepositoryNotFoundError):
        return (
            f"{repo_id!r} is neither a folder here nor a model on the Hub; if it is private, run `hf auth login` first."
        )
    if isinstance(answer, RevisionNotFoundError):
        return f"{repo_id!r} has no revision {revision!r} on the Hub."
    if isinstance(answer, LocalEntryNotFoundError | OfflineModeIsEnabled):
        return (
            f"{repo_id!r} is no folder here, and the Hub cannot be reached to look for it there "
            "(no connection, or HF_HUB_OFFLINE is set)."
        )
    return f"{repo_id!r} could not be downloaded from the Hub: {first_line(answer)}."
