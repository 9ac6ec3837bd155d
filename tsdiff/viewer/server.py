"""Serving the viewer on this machine, until somebody stops it."""

from __future__ import annotations

import errno
import logging
import os
import secrets
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from tsdiff.treesearch.errors import SetupError, UsageError
from tsdiff.viewer.security import HEADER_BYTES

LOOPBACK = "127.0.0.1"

CONNECTIONS = 64
"""At most at the same time; a browser uses six."""


def new_token() -> str:
    """What nobody can guess."""
    return secrets.token_urlsafe(32)


def listen(port: int) -> socket.socket:
    """A socket on the loopback interface; port 0 takes a free one. Raises UsageError if it is in use, or may not be used."""
    opened = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # a port is free again as soon as its server has ended
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind((LOOPBACK, port))
        opened.listen(128)
    except OSError as error:
        opened.close()
        if error.errno == errno.EADDRINUSE:
            raise UsageError(f"port {port} is in use; choose another with --port, or leave it out for a free one") from None
        if error.errno == errno.EACCES:
            raise UsageError(f"port {port} may not be used ({error.strerror}); choose one from 1024 on") from None
        raise SetupError(f"cannot listen on {LOOPBACK}:{port} ({error.strerror})") from None
    return opened


def address(opened: socket.socket, token: str) -> str:
    """What to open in a browser. The token is in the fragment, which browsers send to nobody."""
    return f"http://{LOOPBACK}:{opened.getsockname()[1]}/#token={token}"


class Server(uvicorn.Server):
    """A server that ends when it is told to, without raising the signal again.

    Attributes:
      signal: that it was stopped by; None if it was not.
    """

    signal: int | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Finish what is being answered; the second time, do not."""
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True
        self.signal = sig


def make_server(app: ASGIApp) -> Server:
    """A server for an application: HTTP/1.1 only, silent, with bounded requests and connections."""
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)  # what a stranger sends is no news for the terminal
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=2,
    )
    return Server(config)


def serve(app: ASGIApp, opened: socket.socket, *, ready: Callable[[], None] = lambda: None) -> int | None:
    """Serve until a signal; returns which.

    Args:
      app: what answers.
      opened: the socket to listen on.
      ready: called once, when requests can be made.
    """
    server = make_server(app)
    ready()  # the socket listens already: what comes in waits for its answer
    server.run(sockets=[opened])
    return server.signal
