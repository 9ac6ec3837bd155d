"""The addresses that the page asks for (`docs/viewer.md` lists them), as an ASGI application.

Addresses are matched as they were sent, percent-encoded, so that "%2F" within a run's id divides nothing. Reading happens in
threads: a large tree holds up nobody but those who want it.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import unquote, unquote_to_bytes

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tsdiff.treesearch.errors import SetupError, TsdiffError
from tsdiff.viewer.documents import curve_document, folder_title, node_document, run_document, run_url
from tsdiff.viewer.folders import inside
from tsdiff.viewer.library import Document, Library, Shown, missing
from tsdiff.viewer.pictures import Picture, baseline_picture, file_picture, node_picture
from tsdiff.viewer.plainjson import dump, line, number, text
from tsdiff.viewer.security import Guard, Refused
from tsdiff.viewer.steering import Question, Steering

STATIC = Path(__file__).parent / "static"

BODY_BYTES = 64 * 1024
BODY_SECONDS = 10.0
"""What a request may send, and how long it may take to."""

_STATIC_PATH = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*")
_STATIC_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".webp": "image/webp",
    ".ico": "image/x-icon",
    ".json": "application/json",
    ".txt": "text/plain; charset=utf-8",
    "": "text/plain; charset=utf-8",
}
_NUMBER = re.compile(r"\d{1,9}", re.ASCII)

Answer: TypeAlias = Document | Picture | Response


def make_app(library: Library, *, port: int, token: str, steering: Steering | None = None, tell: Callable[[str], None] = lambda text: None) -> ASGIApp:
    """The application.

    Args:
      library: the runs that are viewed.
      port: that it is served on; part of the names it answers to.
      token: what permits to change anything.
      steering: what carries that out; None if nothing can be changed.
      tell: called with a line when something unexpected has gone wrong, from any thread.
    """
    inner = Starlette(routes=Addresses(library, steering, tell).routes(), exception_handlers={HTTPException: _not_here})
    inner.router.redirect_slashes = False
    return Guard(_as_sent(inner), port=port, token=token)


def _as_sent(app: ASGIApp) -> ASGIApp:
    """Match addresses before they are decoded."""

    async def sent(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "path": scope["raw_path"].decode("latin-1")}, receive, send)

    return sent


async def _not_here(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 404
    return _told(Refused(status, "only other methods mean anything here" if status == 405 else "there is nothing at this address"))


class Addresses:
    """What is at each address."""

    def __init__(self, library: Library, steering: Steering | None, tell: Callable[[str], None]) -> None:
        self.library = library
        self._steering = steering
        self._tell = tell

    def routes(self) -> list[Route]:
        """All of them."""
        gets: dict[str, Callable[[Request], Answer]] = {
            "/": partial(static_file, "index.html"),
            "/static/{path:path}": lambda request: static_file(_segment(request, "path"), request),
            "/api/runs": self.runs,
            "/api/runs/{id}": self.run,
            "/api/runs/{id}/tree": self.tree,
            "/api/runs/{id}/node/{index}": self.node,
            "/api/runs/{id}/image/{index}": self.image,
            "/api/runs/{id}/atlas/{page}": self.atlas,
            "/api/runs/{id}/curve": self.curve,
            "/api/runs/{id}/commands": self.commands,
            "/api/questions": self.questions,
            "/api/questions/{question}/image": self.question_image,
        }
        posts: dict[str, Callable[[Request, Mapping[str, Any]], Any]] = {
            "/api/runs/{id}/expand": self.expand,
            "/api/runs/{id}/stop": self.stop,
            "/api/answers": self.answer,
        }
        return [
            *(Route(path, partial(self._get, function), methods=["GET"]) for path, function in gets.items()),
            *(Route(path, partial(self._post, function), methods=["POST"]) for path, function in posts.items()),
        ]

    async def _get(self, function: Callable[[Request], Answer], request: Request) -> Response:
        return await self._answered(request, function, request)

    async def _post(self, function: Callable[[Request, Mapping[str, Any]], Any], request: Request) -> Response:
        try:
            body = await _body(request)
        except Refused as refused:
            return _told(refused)
        return await self._answered(request, function, request, body)

    async def _answered(self, request: Request, function: Callable[..., Answer], *arguments: Any) -> Response:
        """Call a function in a thread; whatever happens there becomes an answer."""
        try:
            return _response(request, await run_in_threadpool(function, *arguments))
        except Refused as refused:
            return _told(refused)
        except SetupError as error:
            return _told(Refused(503, line(error)))
        except TsdiffError as error:
            return _told(Refused(400 if request.method == "POST" else 404, line(error)))
        except Exception as error:  # a mistake of ours, or files that nobody thought of: the page says so, and all else goes on
            why = f"unexpected {type(error).__name__}: {line(error)}"
            self._tell(f"{line(request.url.path)[:200]}: {why}")
            return _told(Refused(500, why))

    # Looking --------------------------------------------------------------------------------------------------------

    def runs(self, request: Request) -> Document:
        """All runs, a line each."""
        return Document({"folder": folder_title(self.library.folders.root), "steers": self._steering is not None, "runs": self.library.summaries()})

    def run(self, request: Request) -> Document:
        """Everything of a run but its nodes."""
        name, shown = self._named(request)
        with shown.now() as watched:
            return Document(run_document(name, watched))

    def tree(self, request: Request) -> Document:
        """Nodes that are new since a token was given out."""
        return self._named(request)[1].tree(request.query_params.get("since"))

    def node(self, request: Request) -> Document:
        """Everything of a node."""
        name, shown = self._named(request)
        with shown.now() as watched:
            return Document(node_document(name, watched, _index(request, "index")))

    def curve(self, request: Request) -> Document:
        """The best score after so many NFE."""
        with self._named(request)[1].now() as watched:
            return Document(curve_document(watched))

    def image(self, request: Request) -> Picture:
        """The picture of a node, or of the plain sample."""
        shown = self._named(request)[1]
        index = None if _segment(request, "index") == "baseline" else _index(request, "index")
        with shown.now() as watched:
            return baseline_picture(watched) if index is None else node_picture(watched, index)

    def atlas(self, request: Request) -> Picture:
        """A page of thumbnails."""
        size = request.query_params.get("size", "64")
        if not _NUMBER.fullmatch(size):
            raise Refused(400, "size is no number")
        shown, page = self._named(request)[1], _index(request, "page")
        with shown.now() as watched:
            pass
        return shown.atlas.page(watched, page, int(size))

    # Steering -------------------------------------------------------------------------------------------------------

    def commands(self, request: Request) -> Document:
        """What was asked of a run."""
        shown = self._named(request)[1]
        asked = () if self._steering is None else self._steering.commands(shown.path)
        return Document({"commands": [{"id": one.id, "do": one.do, "state": one.state, "message": line(one.message)} for one in asked]})

    def questions(self, request: Request) -> Document:
        """What waits for a person."""
        asked = () if self._steering is None else self._steering.questions()
        return Document({"questions": [found for one in asked if (found := self._question(one)) is not None]})

    def _question(self, one: Question) -> dict[str, Any] | None:
        name = self.library.folders.name(one.run)
        if name is None:  # of a run that is not viewed
            return None
        image = f"/api/questions/{one.id}/image" if one.picture is not None else None if one.node is None else f"{run_url(name)}/image/{one.node}"
        return {
            "id": one.id, "run": name, "node": one.node, "node_id": one.node_id, "verifier": text(one.verifier), "prompt": text(one.prompt),
            "low": number(one.low), "high": number(one.high), "image": image,
        }  # fmt: skip

    def question_image(self, request: Request) -> Picture:
        """The picture that a question is about."""
        wanted = _segment(request, "question")
        for one in () if self._steering is None else self._steering.questions():
            if one.id == wanted and one.picture is not None:
                return file_picture(one.run, inside(one.run, one.picture))
        raise Refused(404, "this question is not open (any more)")

    def expand(self, request: Request, body: Mapping[str, Any]) -> Response:
        """Ask for children of a node."""
        _only(body, "node", "children", "renoise", "to_level")
        node, children = _whole(body, "node", 0), _whole(body, "children", 1, needed=False)
        renoise, to_level = _share(body, "renoise"), _whole(body, "to_level", 0, needed=False)
        if node is None:
            raise Refused(400, "node is missing")
        if renoise is not None and to_level is not None:
            raise Refused(400, "renoise and to_level both say how far to go back; give one of them")
        steering, shown = self._steers(), self._named(request)[1]
        with shown.now() as watched:
            watched.run.tree.at(node)
        return _accepted({"command": steering.expand(shown.path, node, children=children, renoise=renoise, to_level=to_level)})

    def stop(self, request: Request, body: Mapping[str, Any]) -> Response:
        """Ask who grows a run to stop."""
        _only(body)
        return _accepted({"command": self._steers().stop(self._named(request)[1].path)})

    def answer(self, request: Request, body: Mapping[str, Any]) -> Response:
        """A person's score."""
        _only(body, "question", "score")
        question, score = body.get("question"), body.get("score", ...)
        if not isinstance(question, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,200}", question):
            raise Refused(400, "question is no id of a question")
        if score is ... or isinstance(score, bool) or not (score is None or isinstance(score, (int, float))):
            raise Refused(400, "score must be a number, or null for none")
        self._steers().answer(question, None if score is None else _finite(score, "score"))
        return _accepted({})

    # Both -----------------------------------------------------------------------------------------------------------

    def _named(self, request: Request) -> tuple[str, Shown]:
        name = _segment(request, "id")
        try:
            return name, self.library.run(name)
        except KeyError:
            raise missing(name) from None

    def _steers(self) -> Steering:
        if self._steering is None:
            raise Refused(503, "this viewer only looks: nothing can be changed from here")
        return self._steering


# What is asked -------------------------------------------------------------------------------------------------------


def _segment(request: Request, name: str) -> str:
    """A part of the address, decoded."""
    try:
        return unquote_to_bytes(request.path_params[name]).decode()
    except UnicodeDecodeError:
        raise Refused(400, "the address is not UTF-8") from None


def _index(request: Request, name: str) -> int:
    found = unquote(request.path_params[name])
    if not _NUMBER.fullmatch(found):
        raise Refused(400, f"{name} is no number")
    return int(found)


async def _body(request: Request) -> Mapping[str, Any]:
    """The JSON object that a request sends. Raises Refused."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(400, "the body must be application/json")
    if int(request.headers.get("content-length", "0")) > BODY_BYTES:
        raise Refused(413, f"the body has more than {BODY_BYTES} bytes")
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                data += piece
                if len(data) > BODY_BYTES:
                    raise Refused(413, f"the body has more than {BODY_BYTES} bytes")
    except (TimeoutError, ClientDisconnect):
        raise Refused(400, f"the body did not come within {BODY_SECONDS:g} seconds") from None
    try:
        body = json.loads(data.decode(), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not strict JSON ({line(error)})") from None
    if not isinstance(body, dict):
        raise Refused(400, "the body must be a JSON object")
    return body


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _only(body: Mapping[str, Any], *names: str) -> None:
    unknown = [line(name)[:40] for name in body if name not in names]
    if unknown:
        raise Refused(400, f"{unknown[0]!r} means nothing here; known are {', '.join(names) or 'no names'}")


def _whole(body: Mapping[str, Any], name: str, least: int, *, needed: bool = True) -> int | None:
    value = body.get(name)
    if value is None and not needed:
        return None
    if type(value) is not int or not least <= value <= 1_000_000_000:
        raise Refused(400, f"{name} must be a whole number from {least} on")
    return value


def _share(body: Mapping[str, Any], name: str) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        raise Refused(400, f"{name} must be a number from 0 to 1")
    return float(value)


def _finite(value: float, name: str) -> float:
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise Refused(400, f"{name} is too large")
    return found


# What is answered ----------------------------------------------------------------------------------------------------


def static_file(path: str, request: Request) -> Response:
    """A file of the page."""
    kind = _STATIC_TYPES.get(Path(path).suffix)
    if not _STATIC_PATH.fullmatch(path) or kind is None:
        raise Refused(404, "there is nothing at this address")
    found = (STATIC / path).resolve()
    if not found.is_relative_to(STATIC.resolve()) or not found.is_file():
        raise Refused(404, "there is nothing at this address")
    about = found.stat()
    return _tagged(request, found.read_bytes, kind, f"{about.st_mtime_ns:x}-{about.st_size:x}")


def _response(request: Request, answer: Answer) -> Response:
    if isinstance(answer, Response):
        return answer
    if isinstance(answer, Picture):
        return _tagged(request, lambda: answer.data, answer.media_type, answer.tag)
    headers = {"cache-control": "no-store", "vary": "accept-encoding"}
    if answer.squeezed is not None and "gzip" in request.headers.get("accept-encoding", ""):
        return Response(answer.squeezed, media_type="application/json", headers=headers | {"content-encoding": "gzip"})
    return Response(answer.plain, media_type="application/json", headers=headers)


def _tagged(request: Request, read: Callable[[], bytes], kind: str, tag: str) -> Response:
    """A file that a browser may keep, and asks for again whether it has changed."""
    headers = {"etag": f'"{tag}"', "cache-control": "private, no-cache"}
    if headers["etag"] in (one.strip().removeprefix("W/") for one in request.headers.get("if-none-match", "").split(",")):
        return Response(status_code=304, headers=headers)
    return Response(read(), headers=headers | {"content-type": kind})


def _accepted(data: Mapping[str, Any]) -> Response:
    return Response(dump(data), status_code=202, media_type="application/json", headers={"cache-control": "no-store"})


def _told(refused: Refused) -> Response:
    return Response(dump({"error": refused.why}), status_code=refused.status, media_type="application/json", headers={"cache-control": "no-store"})


