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
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdiff.treesearch.disk import LOCAL, Disk, told, write_whole
from tsdiff.treesearch.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

FORMAT = 1
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
    """Write strict JSON (no NaN), whole or not at all."""
    text = json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    _write(disk, path, [text.encode("utf-8", "surrogatepass")])


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


def write_latents(path: Path, names: Iterable[str], read: Callable[[str], Tensor], *, disk: Disk = LOCAL) -> None:
    """Write a safetensors file one tensor at a time, so that memory does not grow with the tree.

    The format (an 8-byte length, a JSON header, then raw little-endian data) needs all shapes first, so every tensor
    is read twice.
    """
    header: dict[str, Any] = {}
    offset = 0
    kept = list(names)
    for name in kept:
        tensor = read(name)
        header[name] = {
            "dtype": _DTYPES[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    _write(disk, path, chain([len(text).to_bytes(8, "little") + text], (_raw(read(name)) for name in kept)))


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


def _write(disk: Disk, path: Path, pieces: Iterable[bytes]) -> None:
    try:
        write_whole(disk, path, pieces)
    except OSError as error:
        raise told(error, path) from error


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


def read_tree(folder: Path) -> dict[str, Any]:
    """The saved tree of a run folder."""
    return read_json(folder / "tree.json")
