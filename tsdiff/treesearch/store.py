"""Where latents live: on the device, then in host memory, then on disk, the least recently used first to move.

Nodes are small records; what they stand for is kept here under a key, as a group of named tensors without batch axis
("latent", "history0", "cond", ...). Memory follows two byte limits, not the size of the trees: what does not fit is
written to append-only segment files in a scratch folder and read back when asked for. A spill never loses anything.
What is on disk already, because a run's files hold it, is not written again.
"""

from __future__ import annotations

import shutil
import tempfile
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SEGMENT_BYTES = 64 << 20
SCRATCH = "tsdiff-latents-"


@dataclass(slots=True)
class _OnDisk:
    """Where a tensor's raw little-endian bytes are."""

    segment: int
    offset: int
    size: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Stored(ABC):
    """Named tensors that are on disk already; false where nothing was kept."""

    __slots__ = ()

    @abstractmethod
    def __len__(self) -> int:
        """How many they are."""

    @abstractmethod
    def read(self) -> dict[str, Tensor]:
        """The tensors, in host memory."""


class Store:
    """Named tensors by key, under byte limits.

    Args:
      device: where tensors are wanted.
      host_limit: bytes of host memory before the least recently used entries go to disk.
      device_limit: bytes of device memory before they move to host memory; ignored where the device is the host.
      folder: parent of the scratch folder; None takes the system's temporary folder. It is made at the first spill.
    """

    def __init__(
        self, device: str, *, host_limit: int = 4 << 30, device_limit: int = 4 << 30, folder: Path | None = None
    ) -> None:
        self.device = device
        self.host_limit = host_limit
        self.device_limit = device_limit
        self.peak = {"host": 0, "device": 0}
        self.spilled_bytes = 0
        self._on_host = device == "cpu"
        self._parent = folder
        self._scratch: Path | None = None
        self._entries: OrderedDict[Hashable, dict[str, Tensor]] = OrderedDict()
        self._disk: dict[Hashable, dict[str, _OnDisk]] = {}
        self._stored: dict[Hashable, Stored] = {}
        self._bytes = {"host": 0, "device": 0}
        self._segment = 0
        self._segment_size = 0
        self._segment_live: dict[int, int] = {}

    def put(self, key: Hashable, tensors: Mapping[str, Tensor] | Stored) -> None:
        """Keep tensors under a key, replacing what was there. Views are copied, so that a row does not keep its batch."""
        self.drop(key)
        if isinstance(tensors, Stored):
            self.refer(key, tensors)
            return
        kept = {name: _own(tensor) for name, tensor in tensors.items()}
        self._entries[key] = kept
        self._count(kept, +1)
        self._shrink(keep=key)

    def refer(self, key: Hashable, stored: Stored) -> None:
        """What is kept under a key is (also) on disk elsewhere, so that a spill need not write it."""
        if stored:
            self._stored[key] = stored

    def referred(self) -> Iterator[Stored]:
        """All that is (also) on disk elsewhere and may be asked for."""
        return iter(self._stored.values())

    def get(self, key: Hashable) -> dict[str, Tensor]:
        """The tensors of a key, on the device. Raises KeyError if there are none."""
        kept = self._entries.get(key)
        if kept is not None and (self._on_host or all(self._tier(tensor) == "device" for tensor in kept.values())):
            self._entries.move_to_end(key)  # the most recently used is last
            return kept
        kept = {name: tensor.to(self.device) for name, tensor in self.read(key).items()}
        if key in self._entries:
            self._count(self._entries.pop(key), -1)
        elif key in self._disk:
            self._forget(key)
        self._entries[key] = kept
        self._count(kept, +1)
        self._shrink(keep=key)
        return kept

    def read(self, key: Hashable) -> Mapping[str, Tensor]:
        """The tensors of a key from where they are, which is where they stay. Raises KeyError if there are none."""
        if key in self._entries:
            return self._entries[key]
        if key in self._disk:
            return {name: self._read(place) for name, place in self._disk[key].items()}
        return self._stored[key].read()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries or key in self._disk or key in self._stored

    def drop(self, key: Hashable) -> None:
        """Forget a key; unknown keys are fine."""
        self._stored.pop(key, None)
        if key in self._entries:
            self._count(self._entries.pop(key), -1)
        elif key in self._disk:
            self._forget(key)

    def spill(self, key: Hashable) -> None:
        """Move a key to disk now (a closed node that is kept for the record); unknown keys are fine."""
        if key in self._entries:
            tensors = self._entries.pop(key)
            self._count(tensors, -1)
            if key not in self._stored:
                self._disk[key] = {name: self._write(tensor) for name, tensor in tensors.items()}

    def close(self) -> None:
        """Forget everything and remove the scratch folder."""
        self._entries.clear()
        self._disk.clear()
        self._stored.clear()
        self._bytes = {"host": 0, "device": 0}
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None

    def _tier(self, tensor: Tensor) -> str:
        return "host" if self._on_host or tensor.device.type == "cpu" else "device"

    def _count(self, tensors: Mapping[str, Tensor], sign: int) -> None:
        for tensor in tensors.values():
            tier = self._tier(tensor)
            size = self._bytes[tier] = self._bytes[tier] + sign * tensor.nbytes
            if size > self.peak[tier]:
                self.peak[tier] = size

    def _shrink(self, keep: Hashable) -> None:
        if self._bytes["device"] > self.device_limit:
            for key in list(self._entries):
                if key != keep and any(self._tier(tensor) == "device" for tensor in self._entries[key].values()):
                    self._count(self._entries[key], -1)
                    self._entries[key] = {name: tensor.cpu() for name, tensor in self._entries[key].items()}
                    self._count(self._entries[key], +1)
                if self._bytes["device"] <= self.device_limit:
                    break
        while self._bytes["host"] > self.host_limit:
            victim = next((key for key in self._entries if key != keep), None)
            if victim is None:
                return
            self.spill(victim)

    def _path(self, segment: int) -> Path:
        if self._scratch is None:
            if self._parent is not None:
                self._parent.mkdir(parents=True, exist_ok=True)
            self._scratch = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=self._parent))
        return self._scratch / f"segment-{segment:05d}.bin"

    def _write(self, tensor: Tensor) -> _OnDisk:
        import torch

        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        if self._segment_size >= SEGMENT_BYTES:
            self._segment, self._segment_size = self._segment + 1, 0
            self._tidy(self._segment - 1)
        with self._path(self._segment).open("ab") as file:
            file.write(data)
        place = _OnDisk(self._segment, self._segment_size, len(data), tuple(tensor.shape), tensor.dtype)
        self._segment_size += len(data)
        self._segment_live[self._segment] = self._segment_live.get(self._segment, 0) + 1
        self.spilled_bytes += len(data)
        return place

    def _read(self, place: _OnDisk) -> Tensor:
        import torch

        with self._path(place.segment).open("rb") as file:
            file.seek(place.offset)
            data = bytearray(file.read(place.size))
        if len(data) != place.size:
            raise OSError(f"the scratch file {self._path(place.segment)} was cut short; was it changed while the search ran?")
        if not data:
            return torch.empty(place.shape, dtype=place.dtype)
        return torch.frombuffer(data, dtype=torch.uint8).view(place.dtype).reshape(place.shape)

    def _forget(self, key: Hashable) -> None:
        for place in self._disk.pop(key).values():
            self._segment_live[place.segment] -= 1
            self._tidy(place.segment)

    def _tidy(self, segment: int) -> None:
        """Remove a full segment once nothing in it is wanted any more."""
        if segment != self._segment and not self._segment_live[segment]:
            del self._segment_live[segment]
            self._path(segment).unlink(missing_ok=True)


def remove_scratch(folder: Path) -> None:
    """Remove the scratch folders in a folder: of processes that were killed, so call it where no other can be alive."""
    for left in folder.glob(f"{SCRATCH}*"):
        shutil.rmtree(left, ignore_errors=True)


def _own(tensor: Tensor) -> Tensor:
    """The tensor itself if it owns its memory, else a copy."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
