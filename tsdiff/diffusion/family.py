"""What the model families of diffusers share: their solvers and schedules, and the model around a loaded pipeline."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from tsdiff.diffusion.level_plan import LevelPlan
from tsdiff.diffusion.source import Source
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Condition, Demo, DiffusionModel, Encoded, Flops, Media, Row, Sampler, Size
from tsdiff.treesearch.schedule import Schedule, SolverInfo

if TYPE_CHECKING:
    from torch import Tensor

VP_SOLVERS = ("ddim", "ddpm", "euler", "euler-ancestral", "heun", "dpm++2m", "dpm++2m-sde", "lcm")
"""Solvers of models that were trained on a variance-preserving process."""

_NATIVE = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler-ancestral",
    "HeunDiscreteScheduler": "heun",
    "LCMScheduler": "lcm",
}
_MULTISTEP = {"dpmsolver++": "dpm++2m", "sde-dpmsolver++": "dpm++2m-sde"}
_PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def native_solver(class_name: str, config: Mapping[str, Any]) -> str | None:
    """The solver that steps as a scheduler class of diffusers does under its config, or None if there is none."""
    if class_name == "DPMSolverMultistepScheduler":
        return _MULTISTEP.get(config.get("algorithm_type", "dpmsolver++")) if config.get("solver_order", 2) == 2 else None
    return _NATIVE.get(class_name)


class SchedulerPlan(LevelPlan):
    """The solvers and schedules of a pipeline with a variance-preserving scheduler.

    Args:
      name: of the model, for messages.
      class_name, config: of the pipeline's own scheduler.
      strict: refuse a scheduler without a solver of ours instead of replacing it by ddim on the same betas.

    Raises:
      UsageError: for a prediction type that is not supported, or a scheduler to replace when `strict`.
    """

    def __init__(self, name: str, class_name: str, config: Mapping[str, Any], *, strict: bool) -> None:
        prediction_type = str(config.get("prediction_type", "epsilon"))
        if prediction_type not in _PREDICTION_TYPES:
            raise UsageError(f"{name!r} predicts {prediction_type!r}, which is not supported; supported are {', '.join(_PREDICTION_TYPES)}")
        if class_name.startswith("FlowMatch") or config.get("use_flow_sigmas"):
            raise UsageError(f"the scheduler of {name!r}, {class_name}, is for flow models, but this model is not one; give it e.g. a DDIMScheduler")
        native = native_solver(class_name, config)
        notices: tuple[str, ...] = ()
        if native is None:
            variant = f" ({config.get('algorithm_type')}, order {config.get('solver_order')})" if class_name.startswith("DPMSolver") else ""
            if strict:
                raise UsageError(f"the scheduler of {name!r}, {class_name}{variant}, is not supported and strict_scheduler forbids replacing it; choose a solver of {', '.join(VP_SOLVERS)} without strict_scheduler")
            notices = (f"scheduler {class_name}{variant} is not supported; replaced by ddim on the same betas",)
        super().__init__(
            class_name if native is not None else None,
            # Latents are not confined to [-1, 1]: only a scheduler that says so itself clips them.
            {"clip_sample": False} | dict(config),
            solvers=tuple(dict.fromkeys((native or "ddim", *VP_SOLVERS))),
            prediction_type=prediction_type,
            notices=notices,
        )


def whole_sides(height: int | None, width: int | None, usual: tuple[int, int], multiple: int) -> tuple[int, int]:
    """(height, width) in pixels, `usual` filled in. Raises UsageError unless both are multiples of `multiple`."""
    sides = []
    for name, given, default in (("height", height, usual[0]), ("width", width, usual[1])):
        side = default if given is None else given
        low = side // multiple * multiple
        if low != side or side < 1:
            allowed = f"{low} or {low + multiple}" if low > 0 else f"{multiple}"
            raise UsageError(f"{name} is {side} but must be a multiple of {multiple}; the nearest are {allowed}")
        sides.append(side)
    return sides[0], sides[1]


class PipelineOutline(ABC):
    """A family's outline. A family names its defaults and adds `size`, `latent_shape`, `check` and `load`."""

    default_steps: int
    default_guidance_scale: float
    media: Literal["image", "video"] | None = "image"
    guidable: bool = True
    demo: Demo | None = None
    usual_dtype = "bfloat16"
    """Number format of the weights on an accelerator, where that has it."""
    network: tuple[str, str] | None = None
    """The component that predicts and its class in diffusers; None for a family whose operations cannot be counted."""
    takes_no: Mapping[str, str] = {}
    """Options of memory and speed that do not apply to the family, and why: it "..."."""

    def __init__(self, source: Source, plan: LevelPlan) -> None:
        self.source = source
        self.plan = plan
        self.name = source.name
        self.solvers = plan.solvers
        self.notices = plan.notices

    def solver(self, name: str | None = None, eta: float | None = None) -> SolverInfo:
        """A solver by name, "ddim(eta=0.5)" included; None takes that of the pipeline's scheduler. Raises UsageError."""
        return self.plan.solver(name, eta)

    def schedule(self, solver: SolverInfo, num_steps: int, size: Size) -> Schedule:
        """The levels of a solver. Raises UsageError if the number of steps does not fit the model."""
        return self.plan.schedule(solver, num_steps, self.tokens(size))

    def tokens(self, size: Size) -> int | None:
        """Length of the network's image sequence, on which the levels of a flow model may depend; None where there is none."""
        return None

    @abstractmethod
    def size(self, height: int | None, width: int | None) -> Size:
        """The output size in pixels, defaults filled in. Raises UsageError if the model cannot make it."""

    @abstractmethod
    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """Shape of one latent, without batch axis."""

    @abstractmethod
    def check(self, condition: Condition, *, guided: bool = False) -> None:
        """Raise UsageError if the model cannot take this condition (under guidance)."""

    def row(self) -> Row:
        """The conditioning of one row of usual length, of zeros: what its network call is counted with."""
        raise NotImplementedError(f"{type(self).__name__} names its network, so it must have a row")

    def flops(self, size: Size) -> Flops | None:
        """Operations of one network row and of one decode, counted without weights; None where they cannot be counted."""
        from tsdiff.diffusion.flops import count

        return None if self.network is None else count(self, size)

    @abstractmethod
    def load(self) -> DiffusionModel:
        """Load the weights."""


class PipelineModel(ABC):
    """A family's loaded model: everything its outline says, and the pipeline at work.

    The pipeline is never changed, whoever made it: its scheduler is not called, and no attribute is left set.

    Args:
      outline: of the family.
      pipeline: of diffusers, in eval mode.
      device: where latents live.
    """

    def __init__(self, outline: PipelineOutline, pipeline: Any, device: str) -> None:
        self.outline = outline
        self.pipeline = pipeline
        self.device = device
        self.name = outline.name
        self.solvers = outline.solvers
        self.default_steps = outline.default_steps
        self.default_guidance_scale = outline.default_guidance_scale
        self.media = outline.media
        self.guidable = outline.guidable
        self.demo = outline.demo
        self.notices = outline.notices
        self.prediction_type = outline.plan.prediction_type

    def solver(self, name: str | None = None, eta: float | None = None) -> SolverInfo:
        """See the outline."""
        return self.outline.solver(name, eta)

    def schedule(self, solver: SolverInfo, num_steps: int, size: Size) -> Schedule:
        """See the outline."""
        return self.outline.schedule(solver, num_steps, size)

    def size(self, height: int | None, width: int | None) -> Size:
        """See the outline."""
        return self.outline.size(height, width)

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """See the outline."""
        return self.outline.latent_shape(size)

    def check(self, condition: Condition, *, guided: bool = False) -> None:
        """See the outline."""
        self.outline.check(condition, guided=guided)

    def load(self) -> DiffusionModel:
        """The model itself: it is loaded."""
        return self

    def sampler(self, schedule: Schedule, solver: SolverInfo) -> Sampler:
        """The latent arithmetic of a solver on a schedule of this model (or of its outline), tails included."""
        from tsdiff.diffusion.sampler import TableSampler

        return TableSampler(self, self.outline.plan.tables(schedule), solver)

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Names the weights and configs: equal fingerprints give equal results on one machine."""

    @abstractmethod
    def encode(self, conditions: Sequence[Condition], *, guided: bool) -> list[Encoded]:
        """Encode conditions, in order."""

    @abstractmethod
    def encode_images(self, images: Tensor, noise: Tensor) -> Tensor:
        """Clean latents of images in [0, 1]."""

    @abstractmethod
    def forward(self, latents: Tensor, timesteps: Tensor, rows: Sequence[Row]) -> Tensor:
        """The network's raw output."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Media:
        """Decode clean latents."""
