"""Models that are ready to run: `DiffusionModel`. Shapes: B = rows of a batch, `...` = one latent's shape."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, runtime_checkable

from tsdiff.treesearch.protocols.conditions import Condition
from tsdiff.treesearch.protocols.outlines import ModelOutline
from tsdiff.treesearch.schedule import Schedule, SolverInfo

if TYPE_CHECKING:
    from torch import Tensor

    from tsdiff.treesearch.protocols.samplers import Sampler

Row: TypeAlias = Mapping[str, "Tensor"]
"""The conditioning of one network row: named tensors without batch axis."""


@dataclass(frozen=True)
class Encoded:
    """A condition as the network takes it.

    Attributes:
      rows: the conditional row, then (with guidance) the unconditional one.
      bucket: rows of equal buckets fit in one batch (same keys, shapes and attention rule).
    """

    rows: tuple[Row, ...]
    bucket: Hashable


@dataclass(frozen=True)
class Media:
    """Decoded samples: `pixels` in [0, 1], (B, 3, H, W) of images, (B, F, 3, H, W) of videos with F frames."""

    pixels: Tensor
    kind: Literal["image", "video"] = "image"


class DiffusionModel(ModelOutline, Protocol):
    """A model ready to run.

    Attributes:
      fingerprint: names the weights: equal fingerprints give equal results on one machine.
      prediction_type: "epsilon", "v_prediction", "sample" or "flow".
      device: where latents live, e.g. "cuda:0".
    """

    @property
    def fingerprint(self) -> str: ...
    @property
    def prediction_type(self) -> str: ...
    @property
    def device(self) -> str: ...

    def sampler(self, schedule: Schedule, solver: SolverInfo) -> Sampler:
        """The latent arithmetic of a solver on a schedule of its kind (also one made for another solver of the kind)."""
        ...

    def encode(self, conditions: Sequence[Condition], *, guided: bool) -> list[Encoded]:
        """Encode conditions, in order; with `guided` each gets its unconditional row too."""
        ...

    def encode_images(self, images: Tensor, noise: Tensor) -> Tensor:
        """Clean latents (B, ...) of images (B, 3, H, W) in [0, 1]; `noise` (B, ...) feeds a sampling encoder."""
        ...

    def forward(self, latents: Tensor, timesteps: Tensor, rows: Sequence[Row]) -> Tensor:
        """The network's raw output (B, ...) for scaled latents (B, ...), timesteps (B,) and one `Row` each."""
        ...

    def decode(self, latents: Tensor) -> Media:
        """Decode clean latents (B, ...)."""
        ...


@runtime_checkable
class CompiledModel(Protocol):
    """A model that may want all network calls to have one row count.

    Attributes:
      constant_rows: whether it does, because its network is compiled for the shapes that it meets.
    """

    @property
    def constant_rows(self) -> bool: ...


@runtime_checkable
class EstimateDecoder(Protocol):
    """A model that may have another, cheaper decoder for the clean estimates of unfinished nodes.

    Attributes:
      estimate_decoder: names it; None where the model's own decodes everything.
    """

    @property
    def estimate_decoder(self) -> str | None: ...

    def decode_estimates(self, x0: Tensor) -> Media:
        """Decode clean estimates (B, ...), for verifiers only."""
        ...
