"""Publishing a converted model on the Hugging Face Hub."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import AttnConvError, CheckpointError, HubError
from ...files.containment import inside
from ...files.foreign_errors import first_line
from ...files.json_files import read_json
from ...files.output_folder import is_ours
from ...files.own_files import CARD_FILE, CONFIG_FILE, RECEIPT_FILE, SECTION
from ..reading.links import refuse_overwritten
from ..reading.weight_files import INDEX_FILE, read_weights, weight_files
from .public_text import public_content

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

WEIGHTS = "model*.safetensors"
UNPUBLISHED = (".*", "__pycache__", "*.pyc", "*.tmp", "*.part", "*.partial", "*.incomplete", "*.lock", "*.bak", "*~")
"""Names of files and folders that never leave the machine."""
REPLACED = (WEIGHTS, INDEX_FILE)
"""Names of remote files that a push removes if the folder no longer has them: old weights would win over new ones."""

CONTINUE = "nothing was published, because the commit is the last step; run the same command again to continue"
UNDECIDED = "whether the commit was made is not known; run the same command again, nothing is sent or committed twice"


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
) -> str:
    """Publish a finished conversion as one commit of a model repository, creating the repository if needed.

    Large files go up first and become visible only with the commit, so that an interrupted push shows nobody anything,
    and a repeated one sends only what is missing.

    Args:
        folder: a folder written by a conversion, or by a rewrite.
        repo_id: `"user/name"`, or `"name"` for a repository of the user who is logged in.
        private: create the repository as a private one; an existing public one is then refused.
        revision: branch to commit to, created if needed; the default is `main`.
        message: first line of the commit.
        token: access token; the default is the one stored by `hf auth login`, or `HF_TOKEN`.

    Returns:
        the address of the repository, or of the branch.

    Raises:
        CheckpointError: the folder is not a complete converted model.
        HubError: the repository name is not valid, the Hub refused, or the connection broke.
    """
    from huggingface_hub import HfApi

    folder = Path(folder).expanduser().resolve()
    files = published_files(folder)
    api = HfApi(token=token, library_name="attnconv")
    with _explained(f"preparing {repo_id!r}", repo_id, CONTINUE):
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        repo_id = url.repo_id
        _check_card(api, folder)
        if private and not api.model_info(repo_id).private:
            raise HubError(
                f"{repo_id!r} exists already and is public, but a private push was asked for: "
                "make it private in its settings on the Hub, or push to another name."
            )
        if revision is not None and revision != "main" and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    _publish(api, folder, files, repo_id, revision, message or "Upload a model converted with attnconv")
    return str(url) if revision is None else f"{url}/tree/{revision}"


def published_files(folder: Path) -> list[str]:
    """The files of a finished conversion that a push publishes, as sorted POSIX paths relative to the folder.

    Hidden and temporary files stay out, and so do weight files that the index does not name. What this package wrote is
    published without paths of this machine (`public_text`).

    Args:
        folder: a resolved folder.

    Raises:
        CheckpointError: the folder is not a complete converted model, a link leads out of it, or its weights are no
            longer those that were converted.
    """
    _check_ours(folder)
    refuse_overwritten(folder, read_all=True)
    weights = weight_files(folder)
    read_weights(folder, weights)
    files = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or any(fnmatch(part, pattern) for part in name.split("/") for pattern in UNPUBLISHED):
            continue
        if fnmatch(name, WEIGHTS) and name not in weights:
            logger.warning("%s is not named by %s and is left out of the push", name, INDEX_FILE)
            continue
        inside(folder, name)
        files.append(name)
    return files


def _check_ours(folder: Path) -> None:
    """Insist that a folder is a finished result: a converted model with its section, or a native one by its receipt."""
    if isinstance(read_json(folder / CONFIG_FILE).get(SECTION), dict):
        return
    if not is_ours(folder):
        raise CheckpointError(
            f"{folder} is not a model converted with attnconv: it has neither a {RECEIPT_FILE} of ours nor an "
            f"{SECTION!r} section in its {CONFIG_FILE}."
        )
    if read_json(folder / RECEIPT_FILE).get("plan"):
        raise CheckpointError(
            f"{folder} is damaged: its {RECEIPT_FILE} tells of converted attention, and its {CONFIG_FILE} has no "
            f"{SECTION!r} section any more; convert again"
        )


def _check_card(api: HfApi, folder: Path) -> None:
    """Let the Hub check the card's metadata before anything large is sent.

    `ModelCard.validate` does the same, but before huggingface_hub 2 it asks huggingface.co whatever the endpoint is.
    """
    from huggingface_hub import ModelCard, get_session

    # It is documented there, but its newest module lists no names.
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

    if (folder / CARD_FILE).is_file():
        body = {"repoType": "model", "content": str(ModelCard.load(folder / CARD_FILE))}
        answer = get_session().post(f"{api.endpoint}/api/validate-yaml", json=body, headers={"Accept": "text/plain"})
        if answer.status_code == HTTPStatus.BAD_REQUEST:
            raise HubError(
                f"The metadata of {folder / CARD_FILE} is not accepted by the Hub: {first_line(answer.text)}."
            )
        hf_raise_for_status(answer)


def _publish(api: HfApi, folder: Path, files: list[str], repo_id: str, revision: str | None, message: str) -> None:
    """Send what is large, then commit everything at once."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    with _explained(f"sending files to {repo_id!r}", repo_id, CONTINUE):
        additions = [CommitOperationAdd(name, public_content(folder, name) or folder / name) for name in files]
        remote = api.list_repo_files(repo_id, revision=revision)
        old = [
            CommitOperationDelete(name)
            for name in remote
            if name not in files and any(fnmatch(name, pattern) for pattern in REPLACED)
        ]
        api.preupload_lfs_files(repo_id, additions, revision=revision)
    with _explained(f"committing to {repo_id!r}", repo_id, UNDECIDED):
        api.create_commit(repo_id, [*old, *additions], commit_message=message, revision=revision)


@contextmanager
def _explained(doing: str, repo_id: str, then: str) -> Iterator[None]:
    """Turn whatever the client raises inside into one HubError."""
    try:
        yield
    except AttnConvError:
        raise
    # The client has no common base for its failures: HTTP libraries, OSError, RuntimeError and hf_xet's own.
    except Exception as error:
        raise HubError(_sentence(error, doing, repo_id, then)) from error


def _sentence(error: BaseException, doing: str, repo_id: str, then: str) -> str:
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    chain = list(_chain(error))
    if isinstance(error, HFValidationError):
        return f"{repo_id!r} is not a valid repository name; give 'user/name' of letters, digits, '-', '_' and '.'."
    answer = next((link for link in chain if isinstance(link, HfHubHTTPError)), None)
    status = None if answer is None else answer.response.status_code
    if status == 401 or any(isinstance(link, LocalTokenNotFoundError) for link in chain):
        return (
            f"The Hub does not know who you are while {doing}: run `hf auth login` with a token that may write, "
            "or set HF_TOKEN."
        )
    # A signed storage address that has run out is refused too, but carries no token and is no matter of rights.
    if answer is not None and status == 403 and "authorization" in answer.response.request.headers:
        return (
            f"Your token may not write to {repo_id!r}: check the user or organisation in the name, "
            "or run `hf auth login` with a token that has write access."
        )
    if any(isinstance(link, OfflineModeIsEnabled) for link in chain):
        return f"The Hub cannot be reached for {doing}: offline mode is on; unset HF_HUB_OFFLINE to push."
    if answer is not None:
        # An answer below 500 is a refusal, so the commit was not made either.
        then = CONTINUE if answer.response.status_code < 500 else then
        reason = f"{status}, {answer.server_message}" if answer.server_message else f"{status}"
        return f"The Hub answered with an error ({reason.splitlines()[0]}) while {doing}: {then}."
    return f"The connection to the Hub failed while {doing} ({first_line(chain[-1])}): {then}."


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
