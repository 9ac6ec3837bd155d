"""A finished search on disk: one folder a run, strict JSON, safetensors and PNG.

    run.json             status, options, versions, hardware, results
    journal.jsonl        everything that happened: the record that the others are derived from (`docs/run-format.md`)
    latents/             tensors of the journal, until the run is done
    lock                 held by the process that writes
    tree.json            the searched tree
    baseline.json        the tree of the one plain sample it is compared with
    best.png             the answer's image           baseline.png   the plain sample's
    best.webp            the answer's video, where the model makes videos (then best.png is a frame of it), baseline.webp
    summary.csv          the result as a line of a table
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
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdiff.treesearch.disk import LOCAL, Disk, told, write_whole
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.strictjson import decode, in_pieces

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

RUN, INDEX, LOCK, TREE, BASELINE, LATENTS = "run.json", "index.json", "lock", "tree.json", "baseline.json", "latents.safetensors"

SUMMARY = "summary.csv"
PICTURES = {"best": "best.png", "baseline": "baseline.png"}
VIDEOS = {"best": "best.webp", "baseline": "baseline.webp"}
FILES = (RUN, INDEX, LOCK, TREE, BASELINE, LATENTS, SUMMARY, *PICTURES.values(), *VIDEOS.values(), "journal.jsonl", "inputs.safetensors", "init.png", "previews.pack")
"""What a run folder, or a folder of those, is made of; and the folder of the journal's tensors."""

UPGRADES: tuple[Callable[[str, dict[str, Any]], dict[str, Any]], ...] = ()
"""Step i turns the JSON file of a name ("tree.json"), of format version i + 1, into one of version i + 2."""

FORMAT = len(UPGRADES) + 1
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
    pieces = in_pieces(data)
    if not any(isinstance(value, Iterator) for value in data.values()):
        pieces = iter(list(pieces))  # what cannot be written is told before a file is begun
    write_file(path, chain(pieces, [b"\n"]), disk=disk)


def read_json(path: Path) -> dict[str, Any]:
    """A file of one JSON object, as the newest format has it. Raises UsageError if it is none, or of a newer format."""
    try:
        data: Any = decode(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(f"{str(path.parent)!r} is not a run folder: it has no {path.name}") from None
    except (ValueError, OSError) as error:
        raise UsageError(f"{str(path)!r} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise UsageError(f"{str(path)!r} cannot be read: it holds no JSON object")
    version, newest = data.get("format"), len(UPGRADES) + 1
    if type(version) is not int or version < 1:
        raise UsageError(f"{str(path)!r} cannot be read: it says format {version!r}, and no number from 1 on")
    if version > newest:
        raise UsageError(f"{str(path)!r} has format {version}, but this tsdiff reads up to format {newest}; install a newer tsdiff")
    for step in UPGRADES[version - 1 :]:
        data = step(path.name, data)
    known: dict[str, Any] = data
    return known


def write_image(path: Path, image: Image, texts: Mapping[str, str] | None = None, *, disk: Disk = LOCAL) -> None:
    """Write a PNG, whole or not at all. `texts` are what it carries by keyword: `tEXt` chunks, or `iTXt` beyond Latin-1."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for keyword, text in (texts or {}).items():
        info.add_text(keyword, text)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    write_file(path, [buffer.getvalue()], disk=disk)


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
        write_file(path, chain([(length + padding).to_bytes(8, "little")], header(), [b" " * padding], data()), disk=disk)
    except _Unlike:
        write_latents(path, kept, read, disk=disk)


class _Unlike(Exception):
    """A tensor differs in type or shape from the others."""


def _form(tensor: Tensor) -> tuple[int, str]:
    """Bytes; and type and shape as the header of a safetensors file has them."""
    return tensor.nbytes, f'"dtype": "{_DTYPES[str(tensor.dtype)]}", "shape": {list(tensor.shape)}'


class LatentsFile:
    """The tensors of a safetensors file, read one by one when they are asked for; the file is not held open.

    Attributes:
      names: of the tensors, in the order of the file.

    Raises:
      UsageError: if the file is none, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                self._header: dict[str, Any] = json.loads(file.read(min(length, size)))
            self._header.pop("__metadata__", None)
            self._start = 8 + length
            ends = [entry["data_offsets"][1] for entry in self._header.values()]
            if any(entry["dtype"] not in _NAMES for entry in self._header.values()) or self._start + max(ends, default=0) != size:
                raise ValueError("its header does not fit its size")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{str(path)!r} cannot be read: {error}") from None
        self.names = list(self._header)

    def __contains__(self, name: object) -> bool:
        return name in self._header

    def read(self, name: str) -> Tensor:
        """A tensor, on the CPU. Raises KeyError if there is none of that name, UsageError if it cannot be read."""
        import torch

        entry = self._header[name]
        first, end = entry["data_offsets"]
        try:
            with self.path.open("rb") as file:
                file.seek(self._start + first)
                data = bytearray(file.read(end - first))
        except OSError as error:
            raise UsageError(f"{str(self.path)!r} cannot be read: {error}") from None
        dtype: torch.dtype = getattr(torch, _NAMES[entry["dtype"]])
        return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(entry["shape"]) if data else torch.empty(entry["shape"], dtype=dtype)


def write_file(path: Path, pieces: Iterable[bytes], *, disk: Disk = LOCAL) -> None:
    """Write a file, whole or not at all. Raises UsageError, SetupError if it cannot be written."""
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
_NAMES = {name: dtype.removeprefix("torch.") for dtype, name in _DTYPES.items()}


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


def lock_path(folder: Path) -> Path:
    """The lock that guards a run: its own, or that of the search of several runs that it belongs to."""
    several = (folder.parent / INDEX).exists() and not (folder / INDEX).exists() and (folder.parent / LOCK).exists()
    return (folder.parent if several else folder) / LOCK


def read_tree(folder: Path) -> dict[str, Any]:
    """The saved tree of a run folder, as it is written down; `tsdiff.load_run` reads runs with all that belongs to them."""
    return read_json(folder / TREE)
