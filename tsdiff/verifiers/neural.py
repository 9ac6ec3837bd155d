"""What verifiers with a network have in common: weights that load once onto a device, and rows that fail alone."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from tsdiff.treesearch.errors import SetupError, UsageError
from tsdiff.treesearch.parameters import check, parameter
from tsdiff.treesearch.protocols import Candidates, Condition, Scores

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NOT_FINITE = "the image holds numbers that are not finite"


class Network(Protocol):
    """Weights, loaded."""

    @property
    def device(self) -> torch.device: ...

    def to(self, device: str) -> None:
        """Move all of it."""
        ...


@dataclass(frozen=True, kw_only=True)
class Neural(ABC):
    """A verifier of images by a network whose files are found when it is made, and loaded by `prepare`.

    Raises:
      UsageError: for a wrong option, or files that are missing, damaged or do not belong together.
      SetupError: for weights that exist but are not on this machine; the message says how to fetch them.
    """

    scope: ClassVar[Literal["row"]] = "row"
    latency: ClassVar[Literal["immediate"]] = "immediate"
    judges: ClassVar[Literal["any", "final"]] = "any"
    differentiable: ClassVar[bool] = True

    name: str = parameter("", help="what its scores are called, to tell two of them apart")
    device: str = parameter("auto", help="cpu, cuda, cuda:1 or mps; auto is the sampler's")
    dtype: Literal["float32", "float16", "bfloat16"] = parameter("float32", help="number format of the network")
    _state: dict[str, Any] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name or any(character in self.name for character in ":=,@ \t\n"):
            raise UsageError(f"{self.name or type(self).__name__}: name is {self.name!r} but must not be empty or contain ':', '=', ',', '@' or spaces")
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            raise UsageError(f"{self.name}: device is {self.device!r} but must be 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'")
        check(self)
        self._find()

    @abstractmethod
    def _find(self) -> None:
        """Find the files and look at them; no weights load."""

    @abstractmethod
    def _load(self) -> Network:
        """Load the weights, onto the CPU."""

    @property
    @abstractmethod
    def files(self) -> tuple[Path, ...]:
        """The files that hold the weights."""

    @abstractmethod
    def score(self, candidates: Candidates) -> Scores:
        """Score images of any size and any number of trees in one batch; values are float32 (B,), differentiable.

        An image whose pixels are not all finite fails alone.
        """

    def check(self, condition: Condition) -> None:  # noqa: B027 - nothing to refuse, unless a class says otherwise
        """Any condition will do: only pixels are read."""

    def prepare(self, device: str) -> None:
        """Load the weights onto the verifier's own device, or the sampler's; a second call only moves them.

        Raises:
          UsageError: if the files do not make a model together.
          SetupError: if this machine lacks the device, or a part of the model.
        """
        own = device if self.device == "auto" else self.device
        _require_device(self.name, own)
        if "network" not in self._state:
            self._state["network"] = self._load()
        self._state["network"].to(own)

    @property
    def _network(self) -> Any:
        if "network" not in self._state:
            raise UsageError(f"{self.name} has no weights yet; call prepare(device) first")
        return self._state["network"]

    @property
    def sha256(self) -> dict[str, str]:
        """SHA-256 of each file of weights, by name; read once."""
        if "sha256" not in self._state:
            digests = {}
            for path in self.files:
                with path.open("rb") as file:
                    digests[path.name if path.name not in digests else str(path)] = hashlib.file_digest(file, "sha256").hexdigest()
            self._state["sha256"] = digests
        return dict(self._state["sha256"])


class FeatureVerifier(Neural, ABC):
    """A verifier whose network has features of pictures, by which others may compare them too (`hacking-report --features`)."""

    def image_features(self, images: Tensor) -> Tensor:
        """Features (B, d), float32 of length 1, of images (B, 3, H, W) in [0, 1]; differentiable.

        Raises:
          UsageError: before `prepare`, or for another shape.
        """
        features: Tensor = self._network.image_features(images)
        return features


def sighted(images: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) that a network can be shown, and which rows (B,) they really are.

    A grey picture stands in for one with NaN or infinite pixels: its row will fail, and its neighbours do not notice.
    """
    import torch

    finite = images.detach().isfinite().flatten(1).all(1)
    return torch.where(finite[:, None, None, None], images, torch.full_like(images, 0.5)), finite


def answered(values: Tensor, finite: Tensor, parts: Mapping[str, Tensor] | None = None) -> Scores:
    """Scores (B,) with their parts, without the rows that were not `finite`."""
    blind = ~finite.to(values.device)
    masked = {name: part.masked_fill(blind, float("nan")) for name, part in (parts or {}).items()}
    return Scores(values.masked_fill(blind, float("nan")), masked, {row: NOT_FINITE for row, fine in enumerate(finite.tolist()) if not fine})


def _require_device(name: str, device: str) -> None:
    import torch

    kind, _, index = device.partition(":")
    count = {"cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0, "mps": int(torch.backends.mps.is_available())}.get(kind, 1)
    if int(index or 0) >= count:
        raise SetupError(f"{name}: device {device!r} is not there on this machine; leave device out, or use 'cpu'")
