"""The requests of the Hugging Face Hub's HTTP API that publishing and loading a model make, answered from a store."""

from __future__ import annotations

import json
import re
import secrets
import socket
import struct
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from hub_store import Blob, RefusedError, Repository

if TYPE_CHECKING:
    from hub_server import Fault, HubServer

OWNER = "hf_owner"
READER = "hf_reader"
"""The two tokens that the server knows; both belong to the user `tester`, the second may only read."""

REPO = r"(?P<repo>[^/]+/[^/]+?)"
REV = r"(?P<rev>[^/]+)"
ROUTES: tuple[tuple[str, str, re.Pattern[str]], ...] = tuple(
    (name, method, re.compile(pattern))
    for name, method, pattern in (
        ("whoami", "GET", r"/api/whoami-v2"),
        ("create", "POST", r"/api/repos/create"),
        ("validate_card", "POST", r"/api/validate-yaml"),
        ("branch", "POST", rf"/api/models/{REPO}/branch/{REV}"),
        ("preupload", "POST", rf"/api/models/{REPO}/preupload/{REV}"),
        ("batch", "POST", rf"/{REPO}\.git/info/lfs/objects/batch"),
        ("upload", "PUT", r"/store/(?P<sha>[0-9a-f]{64})"),
        ("verify", "POST", rf"/{REPO}\.git/info/lfs/objects/verify"),
        ("commit", "POST", rf"/api/models/{REPO}/commit/{REV}"),
        ("info", "GET", rf"/api/models/{REPO}(?:/revision/{REV})?"),
        ("tree", "GET", rf"/api/models/{REPO}/tree/{REV}(?:/(?P<path>.+))?"),
        ("resolve", "GET", rf"/{REPO}/resolve/{REV}/(?P<path>.+)"),
        ("stored", "GET", r"/store/(?P<sha>[0-9a-f]{64})"),
    )
)


class HubHandler(BaseHTTPRequestHandler):
    """Answers the requests of both ports; `hub` is set by the server that makes a subclass of this."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: HubServer

    def log_message(self, *_: object) -> None:
        """Keep the test output free of access lines."""

    def do_GET(self) -> None:
        self._serve("GET")

    def do_HEAD(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def _serve(self, method: str) -> None:
        name, arguments = _route(method, urlsplit(self.path).path)
        fault = self.hub.arrival(name)
        if fault is not None and fault.status is None:
            self._hang_up(fault)
            return
        body = self._body()
        try:
            if fault is not None and fault.status is not None:
                fault.reached.set()
                raise RefusedError(fault.status, "This failure was ordered by the test")
            with self.hub.lock:
                getattr(self, f"_{name}")(body, **arguments)
        except RefusedError as refused:
            headers = {"X-Error-Message": str(refused)} | ({"X-Error-Code": refused.code} if refused.code else {})
            self._json({"error": str(refused)}, status=refused.status, headers=headers)

    def _hang_up(self, fault: Fault) -> None:
        """Read a little of the body, then reset the connection as a broken line would."""
        if int(self.headers.get("Content-Length") or 0) > 1 or "Transfer-Encoding" in self.headers:
            self.rfile.read(1)
        fault.reached.set()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RD)
        self.connection.close()
        self.close_connection = True

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            return b"".join(self._chunks())
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _require_writer(self, namespace: str) -> None:
        if self._token() not in (OWNER, READER):
            raise RefusedError(401, "Invalid username or password.")
        if self._token() != OWNER or namespace != "tester":
            raise RefusedError(403, "You don't have the rights to write to this namespace")

    def _writable(self, repo: str) -> Repository:
        self._require_writer(repo.split("/")[0])
        return self.hub.store.get(repo)

    def _readable(self, repo: str) -> Repository:
        repository = self.hub.store.repositories.get(repo)
        known = self._token() in (OWNER, READER)
        if repository is None or (repository.private and not known):
            raise RefusedError(404 if known else 401, "Repository not found", "RepoNotFound")
        return repository

    def _unknown(self, body: bytes) -> None:
        raise RefusedError(404, f"Not Found: {self.command} {self.path}")

    def _whoami(self, body: bytes) -> None:
        if self._token() not in (OWNER, READER):
            raise RefusedError(401, "Invalid credentials in Authorization header")
        self._json({"type": "user", "name": "tester", "auth": {"type": "access_token"}})

    def _create(self, body: bytes) -> None:
        wanted = json.loads(body)
        namespace = wanted.get("organization") or "tester"
        self._require_writer(namespace)
        repo_id = f"{namespace}/{wanted['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.store.repositories:
            self._json(answer | {"error": "You already created this model repo"}, status=409)
        else:
            self.hub.store.create(repo_id, private=wanted.get("visibility") == "private")
            self._json(answer)

    def _validate_card(self, body: bytes) -> None:
        if "license: unheard-of" in json.loads(body)["content"]:
            self._json({"errors": [{"message": "license must be one of a list"}]}, status=400)
        else:
            self._json({"errors": [], "warnings": []})

    def _branch(self, body: bytes, repo: str, rev: str) -> None:
        self.hub.store.branch(self._writable(repo), rev, json.loads(body or b"{}").get("startingPoint", "main"))
        self._json({})

    def _preupload(self, body: bytes, repo: str, rev: str) -> None:
        self._json({"files": self.hub.store.upload_modes(self._writable(repo), rev, json.loads(body)["files"])})

    def _batch(self, body: bytes, repo: str) -> None:
        self._writable(repo)
        answers = []
        for wanted in json.loads(body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.store.objects:
                signature = secrets.token_hex(8)
                self.hub.uploads.add(signature)
                upload = {"href": f"{self.hub.storage_url}/store/{wanted['oid']}?signature={signature}"}
                verify = {"href": f"{self.hub.url}/{repo}.git/info/lfs/objects/verify"}
                answer["actions"] = {"upload": upload, "verify": verify}
            answers.append(answer)
        self._json({"transfer": "basic", "objects": answers})

    def _upload(self, body: bytes, sha: str) -> None:
        if urlsplit(self.path).query.removeprefix("signature=") not in self.hub.uploads:
            raise RefusedError(403, "This address was not signed by the Hub")
        self.hub.store.store(sha, body)
        self._send(200, b"", {})

    def _verify(self, body: bytes, repo: str) -> None:
        self._writable(repo)
        wanted = json.loads(body)
        if len(self.hub.store.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise RefusedError(422, "The uploaded file is not complete")
        self._json({"message": "ok"})

    def _commit(self, body: bytes, repo: str, rev: str) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        commit = self.hub.store.commit(self._writable(repo), rev, lines)
        self._json({"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit})

    def _info(self, body: bytes, repo: str, rev: str = "main") -> None:
        repository = self._readable(repo)
        commit = repository.revision(rev)
        siblings = [{"rfilename": path} for path in sorted(repository.files(commit))]
        self._json({"id": repo, "modelId": repo, "sha": commit, "private": repository.private, "siblings": siblings})

    def _tree(self, body: bytes, repo: str, rev: str, path: str = "") -> None:
        files = self._readable(repo).files(rev)
        inside = {name: blob for name, blob in files.items() if not path or name.startswith(f"{path}/")}
        if path and not inside:
            raise RefusedError(404, f"{path} does not exist on {rev}", "EntryNotFound")
        self._json([_entry(name, blob) for name, blob in sorted(inside.items())])

    def _resolve(self, body: bytes, repo: str, rev: str, path: str) -> None:
        repository = self._readable(repo)
        commit = repository.revision(rev)
        headers = {"X-Repo-Commit": commit}
        blob = repository.files(commit).get(path)
        if blob is None:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            self._send(404, b"Entry not found", headers)
            return
        headers |= {"ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
        if blob.large:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
            self._send(302, b"", headers | {"Location": f"{self.hub.storage_url}/store/{blob.sha256}"})
        else:
            self._content(blob.data, headers)

    def _stored(self, body: bytes, sha: str) -> None:
        if sha not in self.hub.store.objects:
            raise RefusedError(404, "No such object")
        self._content(self.hub.store.objects[sha], {"ETag": f'"{sha}"', "Accept-Ranges": "bytes"})

    def _content(self, data: bytes, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            self._send(200, data, headers)
            return
        start, stop = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1) + 1
        if start >= len(data):
            self._send(416, b"", headers | {"Content-Range": f"bytes */{len(data)}"})
            return
        self._send(206, data[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.oid}
    if blob.large:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": 134}
    return entry


def _route(method: str, path: str) -> tuple[str, dict[str, str]]:
    for name, wanted, pattern in ROUTES:
        match = pattern.fullmatch(path)
        if match and wanted == method:
            return name, {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
    return "unknown", {}
