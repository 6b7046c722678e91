"""What a pretend Hugging Face Hub remembers: repositories, branches, commits and stored large files."""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

REGULAR_LIMIT = 10_000_000
"""Bytes from which a file goes through large-file storage, whatever its name."""


class RefusedError(Exception):
    """An answer with an error status, an optional `X-Error-Code` and a message."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


@dataclass(frozen=True)
class Blob:
    """One version of one file."""

    data: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        """The git object id: of the content, or for a large file of the pointer that stands for it."""
        content = self.data
        if self.large:
            content = (
                f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
            ).encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.oid


@dataclass
class Repository:
    """A model repository: each branch names a commit, each commit the files it shows."""

    name: str
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def revision(self, name: str) -> str:
        """The commit that a branch name or a commit id stands for."""
        commit = self.branches.get(name, name)
        if commit not in self.commits:
            raise RefusedError(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return commit

    def files(self, revision: str = "main") -> dict[str, Blob]:
        return self.commits[self.revision(revision)]


class HubStore:
    """Repositories by id and large files by SHA-256."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self._numbers = itertools.count()

    def create(self, repo_id: str, *, private: bool) -> Repository:
        if repo_id in self.repositories:
            raise RefusedError(409, "You already created this model repo")
        repository = self.repositories[repo_id] = Repository(repo_id, private)
        first = {".gitattributes": Blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", large=False)}
        self._advance(repository, "main", first, "initial commit")
        return repository

    def get(self, repo_id: str) -> Repository:
        if repo_id not in self.repositories:
            raise RefusedError(404, "Repository not found", "RepoNotFound")
        return self.repositories[repo_id]

    def branch(self, repository: Repository, name: str, start: str = "main") -> None:
        if name in repository.branches:
            raise RefusedError(409, f"Reference already exists: {name}")
        repository.branches[name] = repository.revision(start)

    def upload_modes(
        self, repository: Repository, revision: str, files: Iterable[Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        """For each offered file: how it has to be sent, and what the revision holds under its path."""
        present = repository.files(revision)
        answers = []
        for offered in files:
            path = offered["path"]
            large = path.endswith(".safetensors") or offered["size"] >= REGULAR_LIMIT
            answer = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if path in present:
                answer["oid"] = present[path].etag
            answers.append(answer)
        return answers

    def store(self, sha256: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != sha256:
            raise RefusedError(400, "The content does not have the announced SHA-256")
        self.objects[sha256] = data

    def commit(self, repository: Repository, branch: str, lines: Iterable[Mapping[str, Any]]) -> str:
        """Apply the lines of a commit request at once, or none of them; returns the new commit's id."""
        if branch not in repository.branches:
            raise RefusedError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        files = dict(repository.files(branch))
        message = ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), large=False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    raise RefusedError(400, f"{value['path']}: the large file was never uploaded")
                files[value["path"]] = Blob(self.objects[value["oid"]], large=True)
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
            else:
                raise RefusedError(400, f"Unknown operation {line['key']}")
        return self._advance(repository, branch, files, message)

    def _advance(self, repository: Repository, branch: str, files: dict[str, Blob], message: str) -> str:
        seed = f"{repository.name} {branch} {message} {next(self._numbers)}"
        commit = hashlib.sha1(seed.encode()).hexdigest()
        repository.commits[commit] = files
        repository.branches[branch] = commit
        repository.messages.append(message)
        return commit
