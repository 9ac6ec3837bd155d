"""A finished search on disk: one folder a run, strict JSON, safetensors and PNG.

    run.json             status, options, versions, hardware, results
    journal.jsonl        everything that happened: the record that the others are derived from (`docs/run-format.md`)
    latents/             tensors of the journal, until the run is done
    lock                 held by the process that writes
    tree.json            the searched tree
    baseline.json        the tree of the one plain sample it is compared with
    best.png             the answer's image           baseline.png   the plain sample's
    latents.safetensors  "node/INDEX" -> the latent of a node, float32

A search of several prompts or seeds makes a folder of such folders with an `index.json`.
"""

from __future__ import annotations

import io
import json
import platform
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdiff.treesearch.disk import LOCAL, Disk, told, write_whole
from tsdiff.treesearch.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

FORMAT = 1
_WRITE_BYTES = 1 << 16
PACKAGES = ("tsdiff", "torch", "diffusers", "transformers", "open_clip_torch", "numpy", "safetensors")


def claim_folder(parent: Path) -> Path:
    """Make and return a new folder "run-0001", "run-0002", ... in `parent`; nothing is ever overwritten.

    Raises:
      UsageError: if the folder cannot be made.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        taken = [int(match[1]) for entry in parent.iterdir() if (match := re.fullmatch(r"run-(\d+)", entry.name))]
        number = max(taken, default=0) + 1
        while True:
            folder = parent / f"run-{number:04d}"
            try:
                folder.mkdir()
                return folder
            except FileExistsError:  # another search was faster
                number += 1
    except OSError as error:
        raise UsageError(f"cannot write to the output folder {str(parent)!r} ({error.strerror}); choose another with --out") from None


def slug(text: str, most: int = 40) -> str:
    """A part of a file name that recalls a prompt."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:most].strip("-") or "sample"


def write_json(path: Path, data: Mapping[str, Any], *, disk: Disk = LOCAL) -> None:
    """Write strict JSON (no NaN), whole or not at all. Values that are iterators become lists, and are never in memory as a whole."""
    texts: Iterator[str] = chain(indented(data), ["\n"])
    if not any(isinstance(value, Iterator) for value in data.values()):
        texts = iter(list(texts))  # what cannot be written is told before a file is begun
    _write(disk, path, (text.encode("utf-8", "surrogatepass") for text in texts))


def indented(data: Mapping[str, Any]) -> Iterator[str]:
    """What `json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False)` gives, faster and in pieces."""
    before = "{\n "
    for key, value in data.items():
        yield f"{before}{_key(key)}: "
        before = ",\n "
        if isinstance(value, Iterator):
            ahead = "[\n  "
            for item in value:
                yield ahead + _text(item, "\n  ")
                ahead = ",\n  "
            yield "[]" if ahead.startswith("[") else "\n ]"
        else:
            yield _text(value, "\n ")
    yield "\n}" if data else "{}"


def _text(value: Any, margin: str) -> str:
    """A value whose further lines begin with `margin`."""
    kind = type(value)
    if kind is int or (kind is float and isfinite(value)):
        return repr(value)
    if kind is not str and isinstance(value, (dict, list, tuple)):
        inner = margin + " "
        if isinstance(value, dict):
            return f"{{{','.join([f'{inner}{_key(key)}: {_text(item, inner)}' for key, item in value.items()])}{margin}}}" if value else "{}"
        return f"[{','.join([inner + _text(item, inner) for item in value])}{margin}]" if value else "[]"
    return _word(value) if kind is bool or value is None else _plain(value)


def _key(key: Any) -> str:
    if isinstance(key, str):
        return _word(key)
    if key is None or isinstance(key, (bool, int, float)):
        return f'"{_plain(key)}"'
    raise TypeError(f"keys must be text, not {type(key).__name__}")


_plain = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
_word = lru_cache(maxsize=1024, typed=True)(_plain)  # names of facts, of which there are few; true, false and null


def read_json(path: Path) -> dict[str, Any]:
    """A file of one JSON object. Raises UsageError if it is none, or of a newer format."""
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{str(path.parent)!r} is not a run folder: it has no {path.name}") from None
    except (ValueError, OSError) as error:
        raise UsageError(f"{str(path)!r} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise UsageError(f"{str(path)!r} cannot be read: it holds no JSON object")
    if data.get("format") != FORMAT:
        raise UsageError(f"{str(path)!r} has format {data.get('format')}, but this tsdiff reads format {FORMAT}; install a newer tsdiff")
    return data


def write_image(path: Path, image: Image, *, disk: Disk = LOCAL) -> None:
    """Write a PNG, whole or not at all."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    _write(disk, path, [buffer.getvalue()])


def write_latents(path: Path, names: Iterable[str], read: Callable[[str], Tensor], *, alike: bool = False, disk: Disk = LOCAL) -> None:
    """Write a safetensors file one tensor at a time, so that memory does not grow with the tree.

    The format (an 8-byte length, a JSON header, then raw little-endian data) needs all shapes first, so every tensor
    is read twice; once if all are `alike`, as far as that is true.
    """
    kept = list(names)
    forms = [_form(read(name)) for name in kept[: 1 if alike else None]]
    if alike:
        forms *= len(kept)

    def header() -> Iterator[bytes]:
        before, offset = "{", 0
        for name, (size, form) in zip(kept, forms, strict=True):
            yield f'{before}{json.dumps(name)}: {{{form}, "data_offsets": [{offset}, {offset + size}]}}'.encode()
            before, offset = ", ", offset + size
        yield b"}" if kept else b"{}"

    def data() -> Iterator[bytes]:
        for name, form in zip(kept, forms, strict=True):
            tensor = read(name)
            if _form(tensor) != form:
                raise _Unlike
            yield _raw(tensor)

    length = sum(map(len, header()))
    padding = -length % 8
    try:
        _write(disk, path, chain([(length + padding).to_bytes(8, "little")], header(), [b" " * padding], data()))
    except _Unlike:
        write_latents(path, kept, read, disk=disk)


class _Unlike(Exception):
    """A tensor differs in type or shape from the others."""


def _form(tensor: Tensor) -> tuple[int, str]:
    """Bytes; and type and shape as the header of a safetensors file has them."""
    return tensor.nbytes, f'"dtype": "{_DTYPES[str(tensor.dtype)]}", "shape": {list(tensor.shape)}'


def _write(disk: Disk, path: Path, pieces: Iterable[bytes]) -> None:
    try:
        write_whole(disk, path, _gathered(pieces))
    except OSError as error:
        raise told(error, path) from error


def _gathered(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same in pieces that are worth a write each."""
    waiting: list[bytes] = []
    size = 0
    for piece in pieces:
        waiting.append(piece)
        size += len(piece)
        if size >= _WRITE_BYTES:
            yield b"".join(waiting)
            waiting, size = [], 0
    if waiting:
        yield b"".join(waiting)


_DTYPES = {"torch.float32": "F32", "torch.float64": "F64", "torch.float16": "F16", "torch.bfloat16": "BF16"}


def _raw(tensor: Tensor) -> bytes:
    import torch

    data: bytes = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return data


@cache
def _versions() -> dict[str, str | None]:
    """Versions of the packages that matter. Reading them takes longer than a small search, and they do not change."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def environment() -> dict[str, Any]:
    """Versions and hardware, as far as they may matter to a result."""
    import torch

    return {
        "python": sys.version.split()[0],
        "revision": revision(),
        "packages": dict(_versions()),
        "platform": platform.platform(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def revision() -> str | None:
    """The commit of the git checkout that this package runs from; None where it is installed otherwise."""
    git = Path(__file__).resolve().parents[2] / ".git"
    try:
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        reference = git / head.removeprefix("ref: ")
        if reference.exists():
            return reference.read_text().strip()
        packed = (git / "packed-refs").read_text().splitlines()
        return next((line.split()[0] for line in packed if line.endswith(head.removeprefix("ref: "))), None)
    except OSError:
        return None


def read_tree(folder: Path) -> dict[str, Any]:
    """The saved tree of a run folder."""
    return read_json(folder / "tree.json")
