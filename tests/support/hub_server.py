"""A Hugging Face Hub on 127.0.0.1, small but spoken to by the real client: create, upload, commit, list, download.

Large files are kept by a second host and port, as on the real Hub, so that the client meets a redirect elsewhere.
The Xet protocol is never offered. `HubServer.fail` makes chosen requests go wrong.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from typing import Any

from hub_routes import OWNER, READER, HubHandler
from hub_store import HubStore, Repository

__all__ = ["OWNER", "READER", "Fault", "HubServer"]


@dataclass
class Fault:
    """Requests of one route that go wrong: after `skip` good ones, `times` of them (None: all that follow)."""

    route: str
    skip: int
    times: int | None
    status: int | None
    seen: int = 0
    reached: threading.Event = field(default_factory=threading.Event)

    def strikes(self) -> bool:
        self.seen += 1
        past = self.seen - self.skip
        return past > 0 and (self.times is None or past <= self.times)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *address: Any) -> None:
        # A client that is killed, or a connection cut on purpose, is no news.
        if not isinstance(sys.exc_info()[1], OSError | ValueError):
            super().handle_error(*address)


class HubServer:
    """The running server; use it as a context manager, or through the `hub` fixture."""

    def __init__(self) -> None:
        self.store = HubStore()
        self.calls: Counter[str] = Counter()
        self.faults: list[Fault] = []
        self.uploads: set[str] = set()
        self.lock = threading.RLock()
        handler = type("Handler", (HubHandler,), {"hub": self})
        self._servers = [_Server(("127.0.0.1", 0), handler) for _ in range(2)]
        ports = [server.server_address[1] for server in self._servers]
        # Another host by name too: some clients follow a redirect, with the token, that stays on the same host.
        self.url, self.storage_url = f"http://127.0.0.1:{ports[0]}", f"http://localhost:{ports[1]}"

    def __enter__(self) -> HubServer:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def fail(self, route: str, *, skip: int = 0, times: int | None = None, status: int | None = None) -> Fault:
        """Let requests of `route` fail with `status`, or by cutting the connection in the middle of the body."""
        fault = Fault(route, skip, times, status)
        self.faults.append(fault)
        return fault

    def arrival(self, route: str) -> Fault | None:
        """Count a request of `route`, and say how it is to go wrong, if at all."""
        with self.lock:
            self.calls[route] += 1
            return next((fault for fault in self.faults if fault.route == route and fault.strikes()), None)

    def repair(self) -> None:
        self.faults.clear()

    def repository(self, repo_id: str) -> Repository:
        return self.store.get(repo_id)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a visitor of the repository sees, without the file that the Hub itself adds."""
        files = self.store.get(repo_id).files(revision)
        return {path: blob.data for path, blob in files.items() if path != ".gitattributes"}
