"""Models before their weights are loaded: `ModelOutline`, what some outlines can tell beside, and how to load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, runtime_checkable

from tsdiff.treesearch.node import Json
from tsdiff.treesearch.protocols.conditions import Condition
from tsdiff.treesearch.schedule import Schedule, SolverInfo

if TYPE_CHECKING:
    from tsdiff.treesearch.protocols.models import DiffusionModel

Size: TypeAlias = tuple[int, ...] | None
"""(height, width) of the output in pixels, (height, width, frames) of a video; None where a model has no such thing."""


@dataclass(frozen=True)
class Demo:
    """What a search does when the caller names no prompt or verifier.

    Attributes:
      prompt: shows what a search is good for.
      verifiers: the first steers; the others say of finished samples what it made of them.
    """

    prompt: str
    verifiers: tuple[str, ...]


_SHORT_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class LoadOptions:
    """How to load a model.

    Attributes:
      device: "cpu", "cuda", "cuda:1", "mps", or "auto" for the best there is.
      dtype: "float32", "float16" or "bfloat16" of the weights, "fp16" and "bf16" for short; "auto" is float32 on a CPU, and elsewhere
        what the family is used to (bfloat16, where the device has it).
      offline: never touch the network.
      revision, variant: of a hub repository, as in diffusers.
      strict_scheduler: refuse a scheduler that is not supported instead of replacing it.
      lora: files that are merged into the weights, each "PATH" or "PATH:SCALE".
      latent_dtype: "float32", or "model" to round latents to the network's number format after every step, as pipelines do.
      offload: keep only the components at work on the device, the others in host memory.
      vae_slicing: decode a batch image by image.
      vae_tiling: decode large images in overlapping tiles.
      channels_last: lay out the weights of convolutions with their channels last.
      compile: compile the network's repeated blocks; its calls then have one row count.
      x0_decoder: folder of a tiny autoencoder that decodes the clean estimates of unfinished nodes, None for the model's own.
    """

    device: str = "auto"
    dtype: str = "auto"
    offline: bool = False
    revision: str | None = None
    variant: str | None = None
    strict_scheduler: bool = False
    lora: tuple[str, ...] = ()
    latent_dtype: str = "float32"
    offload: bool = False
    vae_slicing: bool = False
    vae_tiling: bool = False
    channels_last: bool = False
    compile: bool = False
    x0_decoder: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", _SHORT_DTYPES.get(self.dtype, self.dtype))


class ModelOutline(Protocol):
    """A model before its weights are loaded: enough to check options, build schedules and count costs.

    Attributes:
      name: as the caller named it.
      solvers: names of the solvers it supports, the default first.
      default_steps, default_guidance_scale: used when the caller names none.
      media: "image", "video" (then it is a `VideoOutline`), or None where samples cannot be shown.
      guidable: whether there is an unconditional row to guide with.
      demo: a prompt and a verifier that show the model at work, or None.
      notices: lines to show the user once (e.g. a scheduler that was replaced).
    """

    @property
    def name(self) -> str: ...
    @property
    def solvers(self) -> tuple[str, ...]: ...
    @property
    def default_steps(self) -> int: ...
    @property
    def default_guidance_scale(self) -> float: ...
    @property
    def media(self) -> Literal["image", "video"] | None: ...
    @property
    def guidable(self) -> bool: ...
    @property
    def demo(self) -> Demo | None: ...
    @property
    def notices(self) -> tuple[str, ...]: ...

    def solver(self, name: str | None = None, eta: float | None = None) -> SolverInfo:
        """A supported solver; None takes the model's default. Accepts "ddim(eta=0.5)". Raises UsageError."""
        ...

    def size(self, height: int | None, width: int | None) -> Size:
        """The output size, defaults filled in. Raises UsageError if the model cannot make it."""
        ...

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """Shape of one latent, without batch axis."""
        ...

    def schedule(self, solver: SolverInfo, num_steps: int, size: Size) -> Schedule:
        """The levels of a solver. Raises UsageError if the number of steps does not fit the model."""
        ...

    def check(self, condition: Condition, *, guided: bool = False) -> None:
        """Raise UsageError if the model cannot take this condition (under guidance)."""
        ...

    def load(self) -> DiffusionModel:
        """Load the weights."""
        ...


@runtime_checkable
class ToldOutline(Protocol):
    """An outline whose network may be told the guidance scale (distilled guidance), which costs no second row.

    `guidance_scale` of a search is then the option "guidance_scale" of its conditions, and `true_cfg_scale` the scale of
    classifier-free guidance beside it.

    Attributes:
      told_scale: what the network is usually told, None if this model's network is not told anything.
    """

    @property
    def told_scale(self) -> float | None: ...


@runtime_checkable
class VideoOutline(Protocol):
    """An outline whose samples are videos: it is asked for their length, and how fast they are shown.

    The option `fps` of a search is the option "frame_rate" of its conditions, for networks that are told it; a model
    whose network is not refuses it, as it does any option that it does not know.
    """

    def size(self, height: int | None, width: int | None, frames: int | None = None) -> Size:
        """(height, width, frames), defaults filled in. Raises UsageError if the model cannot make it."""
        ...

    def frame_rate(self, condition: Condition) -> float:
        """Frames per second at which samples of a condition are shown, above 0 and at most 1000."""
        ...


@runtime_checkable
class TellingOutline(Protocol):
    """An outline with something to tell whoever looks at its runs later: `run.json` keeps it as `model_facts`.

    Attributes:
      facts: strict JSON, small. {"mixture": {"weights": [...], "means": [[...], ...], "stds": [...]}} is the density of the
        data, where that is known.
    """

    @property
    def facts(self) -> Mapping[str, Json]: ...


@dataclass(frozen=True)
class Flops:
    """Floating-point operations, two for a multiply-add.

    Attributes:
      row: of a network row; an evaluation has two where it is guided.
      decode: of decoding one sample.
      x0_decode: of decoding the clean estimate of an unfinished node, where that is done by another decoder.
    """

    row: int
    decode: int
    x0_decode: int | None = None


@runtime_checkable
class CountableOutline(Protocol):
    """An outline that can tell what its network and decoder compute, from their configs alone."""

    def flops(self, size: Size) -> Flops | None:
        """What one row of a size costs; None if it is not known."""
        ...
