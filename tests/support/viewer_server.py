"""Viewers for tests: an application to ask without a network, or a real server on a free port, in a thread."""

from __future__ import annotations

import atexit
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from anyio.from_thread import BlockingPortal, start_blocking_portal
from starlette.testclient import TestClient

from tsdiff.treesearch.errors import UsageError
from tsdiff.viewer.app import make_app
from tsdiff.viewer.folders import Folders
from tsdiff.viewer.library import Library
from tsdiff.viewer.server import listen, make_server
from tsdiff.viewer.steering import Command, Question, Steering

PORT, TOKEN = 9999, "the-token"
ORIGIN = f"http://127.0.0.1:{PORT}"
WRITES = {"X-Tsdiff-Token": TOKEN, "Origin": ORIGIN}


@dataclass
class Told:
    """A steering that writes down what it was told."""

    asked: list[tuple[Any, ...]] = field(default_factory=list)
    open: list[Question] = field(default_factory=list)
    given: list[Command] = field(default_factory=list)
    error: Exception | None = None

    def _take(self, *what: Any) -> str:
        if self.error is not None:
            raise self.error
        self.asked.append(what)
        return f"c{len(self.asked)}"

    def expand(self, run: Path, node: int, *, children: int | None, renoise: float | None, to_level: int | None) -> str:
        return self._take("expand", run, node, children, renoise, to_level)

    def stop(self, run: Path) -> str:
        return self._take("stop", run)

    def commands(self, run: Path) -> Sequence[Command]:
        return self.given

    def questions(self) -> Sequence[Question]:
        return self.open

    def answer(self, question: str, score: float | None) -> None:
        if question not in [one.id for one in self.open]:
            raise UsageError("this question is not open")
        self._take("answer", question, score)

    def close(self) -> None:
        pass


@dataclass
class Viewer:
    """An application, and what it said went wrong."""

    library: Library
    client: TestClient
    went_wrong: list[str]

    def get(self, path: str, status: int = 200, **headers: str) -> Any:
        """JSON from an address; the status must be as expected, and nothing may have gone wrong that nobody thought of."""
        answer = self.client.get(path, headers=headers)
        assert answer.status_code == status, (path, answer.status_code, answer.text[:300])
        assert not self.went_wrong
        return strict(answer.content)

    def post(self, path: str, body: Any = None, status: int = 202, headers: dict[str, str] | None = None) -> Any:
        """JSON to an address, as the page sends it."""
        answer = self.client.post(path, json={} if body is None else body, headers=WRITES if headers is None else headers)
        assert answer.status_code == status, (path, answer.status_code, answer.text[:300])
        return strict(answer.content)


def strict(data: bytes) -> Any:
    """JSON without NaN and infinities."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(data, parse_constant=refuse)


def view(root: Path, steering: Steering | None = None, *, patience: float = 0.0) -> Viewer:
    """A viewer of a folder, asked without a network."""
    library = Library(Folders(root))
    library.folders.patience = patience
    went_wrong: list[str] = []
    app = make_app(library, port=PORT, token=TOKEN, steering=steering, tell=went_wrong.append)
    client = TestClient(app, base_url=ORIGIN)
    client.portal = _portal()
    return Viewer(library, client, went_wrong)


@cache
def _portal() -> BlockingPortal:
    """One event loop for all; a client would begin a new one, in a new thread, for each request."""
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(start_blocking_portal())


@contextmanager
def serving(viewed: Path | Library, steering: Steering | None = None, *, token: str = TOKEN) -> Iterator[int]:
    """A real server of a folder, or of a library; gives its port."""
    with listen(0) as opened:
        port = opened.getsockname()[1]
        library = Library(Folders(viewed)) if isinstance(viewed, Path) else viewed
        library.folders.patience = 0.0
        server = make_server(make_app(library, port=port, token=token, steering=steering))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, daemon=True)
        thread.start()
        try:
            yield port
        finally:
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive()


def ask(port: int, path: str, *, method: str = "GET", body: bytes | None = None, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
    """One request to a real server, with exactly these headers beside Host."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, body=body, headers=headers or {})
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def send(port: int, data: bytes, *, patience: float = 10.0) -> bytes:
    """Raw bytes to a real server; everything that it answers until it closes, or says nothing for a while after an answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=patience) as opened:
        opened.sendall(data)
        found = b""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            try:
                piece = opened.recv(65536)
            except (TimeoutError, ConnectionResetError):
                break
            if not piece:
                break
            found += piece
            if b"\r\n\r\n" in found:
                opened.settimeout(0.3)
        return found
