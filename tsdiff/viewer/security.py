"""Who may ask what: the checks that every request goes through before anything looks at it, and the headers of every answer.

The server listens on the loopback interface only, but web pages of strangers run on the same machine, in the same browser:

* a page whose own name was made to point to 127.0.0.1 (DNS rebinding) says its name in `Host`, which is refused;
* a page of another origin says so in `Sec-Fetch-Site` and `Origin`, and is refused;
* what changes anything needs the token too, which only the address that `tsdiff view` prints has.
"""

from __future__ import annotations

import hmac
import json
import re
from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOKEN = "x-tsdiff-token"

HEADER_BYTES = 16 * 1024
PATH_BYTES = 8 * 1024
"""Of all headers of a request, and of what it asks for."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

HEADERS: Mapping[bytes, bytes] = {
    b"content-security-policy": POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"permissions-policy": b"camera=(), geolocation=(), microphone=()",
}


class Refused(Exception):
    """A request that is not answered: an HTTP status and one line."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status
        self.why = why


class Guard:
    """ASGI middleware: the checks, and the headers.

    Args:
      app: what answers a request that may be answered.
      port: of the server, which is part of the name that it goes by.
      token: what permits to change anything.
    """

    def __init__(self, app: ASGIApp, *, port: int, token: str) -> None:
        self.app = app
        self.hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]")} | ({"127.0.0.1", "localhost", "[::1]"} if port == 80 else set())
        self.home = f"http://127.0.0.1:{port}/"
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            return

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name, value) for name, value in message.get("headers", ()) if name.lower() not in HEADERS]
                message = {**message, "headers": [*own, *HEADERS.items()]}
            await send(message)

        try:
            self.check(scope)
        except Refused as refused:
            await _refuse(told, refused)
            return
        await self.app(scope, receive, told)

    def check(self, scope: Scope) -> None:
        """Raises Refused if a request is not to be answered."""
        headers: list[tuple[bytes, bytes]] = list(scope["headers"])
        if sum(len(name) + len(value) for name, value in headers) > HEADER_BYTES:
            raise Refused(413, f"the headers have more than {HEADER_BYTES} bytes")
        if len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"") > PATH_BYTES:
            raise Refused(413, f"the address has more than {PATH_BYTES} bytes")
        if not (scope.get("raw_path") or b"").startswith(b"/"):
            raise Refused(400, "the address is no path of this server")
        host = _one(headers, b"host")
        if host is None or host.lower() not in self.hosts:
            raise Refused(421, f"this server goes by other names; open {self.home}")
        method = scope["method"]
        if method not in ("GET", "HEAD", "POST"):
            raise Refused(405, "only GET, HEAD and POST mean anything here")
        self._same_origin(scope, headers, host.lower())
        length = _one(headers, b"content-length")
        if length is not None and not re.fullmatch(r"\d{1,15}", length, re.ASCII):
            raise Refused(400, "Content-Length is no number")
        if method != "POST":
            if length not in (None, "0") or _one(headers, b"transfer-encoding") is not None:
                raise Refused(400, f"a {method} request has no body")
            return
        token = _one(headers, TOKEN.encode())
        if token is None:
            raise Refused(403, "this needs the token of the address that `tsdiff view` has printed")
        if not hmac.compare_digest(token.encode("latin-1"), self._token):
            raise Refused(403, "the token is that of another session; open the address that `tsdiff view` has printed")

    def _same_origin(self, scope: Scope, headers: list[tuple[bytes, bytes]], host: str) -> None:
        site, origin = _one(headers, b"sec-fetch-site"), _one(headers, b"origin")
        visit = scope["method"] in ("GET", "HEAD") and scope["path"] == "/" and _one(headers, b"sec-fetch-mode") in (None, "navigate")
        if site not in (None, "same-origin", "none") and not visit:
            raise Refused(403, "this is not for pages of other sites")
        if origin is not None and origin.lower() != f"http://{host}":
            raise Refused(403, "this is not for pages of other origins")
        if scope["method"] == "POST" and origin is None and site != "same-origin":
            raise Refused(403, "a request that changes anything says where it comes from (Origin)")


def _one(headers: list[tuple[bytes, bytes]], name: bytes) -> str | None:
    """A header; None without it. Raises Refused if it is there more than once."""
    found = [value.decode("latin-1").strip() for key, value in headers if key.lower() == name]
    if len(found) > 1:
        raise Refused(400, f"{name.decode()} is there more than once")
    return found[0] if found else None


async def _refuse(send: Send, refused: Refused) -> None:
    body = json.dumps({"error": refused.why}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"cache-control", b"no-store"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
