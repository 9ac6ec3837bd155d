"""What the model families of diffusers share: their solvers and schedules, and the model around a loaded pipeline."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from tsdiff.diffusion.quiet import quiet_libraries
from tsdiff.diffusion.solvers import solver_info
from tsdiff.diffusion.source import Source
from tsdiff.diffusion.tables import Tables, scheduler_tables
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Condition, Demo, DiffusionModel, Encoded, Media, Row, Size
from tsdiff.treesearch.schedule import Schedule, SolverInfo

if TYPE_CHECKING:
    from torch import Tensor

    from tsdiff.diffusion.sampler import TableSampler

VP_SOLVERS = ("ddim", "ddpm", "euler", "euler-ancestral", "heun", "dpm++2m", "dpm++2m-sde")
"""Solvers of models that were trained on a variance-preserving process."""

_NATIVE = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler-ancestral",
    "HeunDiscreteScheduler": "heun",
}
_MULTISTEP = {"dpmsolver++": "dpm++2m", "sde-dpmsolver++": "dpm++2m-sde"}
_PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def native_solver(class_name: str, config: Mapping[str, Any]) -> str | None:
    """The solver that steps as a scheduler class of diffusers does under its config, or None if there is none."""
    if class_name == "DPMSolverMultistepScheduler":
        return _MULTISTEP.get(config.get("algorithm_type", "dpmsolver++")) if config.get("solver_order", 2) == 2 else None
    return _NATIVE.get(class_name)


class SchedulerPlan:
    """The solvers and schedules of a pipeline with a variance-preserving scheduler.

    Args:
      name: of the model, for messages.
      class_name, config: of the pipeline's own scheduler.
      strict: refuse a scheduler without a solver of ours instead of replacing it by ddim on the same betas.

    Attributes:
      solvers: names of the solvers on offer, the pipeline's own first.
      notices: a line if the scheduler was replaced.
      prediction_type: "epsilon", "v_prediction" or "sample".

    Raises:
      UsageError: for a prediction type that is not supported, or a scheduler to replace when `strict`.
    """

    def __init__(self, name: str, class_name: str, config: Mapping[str, Any], *, strict: bool) -> None:
        self.prediction_type = str(config.get("prediction_type", "epsilon"))
        if self.prediction_type not in _PREDICTION_TYPES:
            raise UsageError(f"{name!r} predicts {self.prediction_type!r}, which is not supported; supported are {', '.join(_PREDICTION_TYPES)}")
        if class_name.startswith("FlowMatch") or config.get("use_flow_sigmas"):
            raise UsageError(f"the scheduler of {name!r}, {class_name}, is for flow models, but this model is not one; give it e.g. a DDIMScheduler")
        native = native_solver(class_name, config)
        self.notices: tuple[str, ...] = ()
        if native is None:
            variant = f" ({config.get('algorithm_type')}, order {config.get('solver_order')})" if class_name.startswith("DPMSolver") else ""
            if strict:
                raise UsageError(f"the scheduler of {name!r}, {class_name}{variant}, is not supported and strict_scheduler forbids replacing it; choose a solver of {', '.join(VP_SOLVERS)} without strict_scheduler")
            self.notices = (f"scheduler {class_name}{variant} is not supported; replaced by ddim on the same betas",)
        # Latents are not confined to [-1, 1]: only a scheduler that says so itself clips them.
        self.config = {"clip_sample": False} | dict(config)
        self.class_name = class_name if native is not None else None
        self.solvers = tuple(dict.fromkeys((native or "ddim", *VP_SOLVERS)))
        self._tables: dict[str, Tables] = {}
        self._keys: dict[tuple[SolverInfo, int], str] = {}

    def solver(self, name: str | None, eta: float | None) -> SolverInfo:
        """One of the solvers on offer."""
        return solver_info(self.solvers[0] if name is None else name, eta, self.solvers)

    def schedule(self, solver: SolverInfo, num_steps: int) -> Schedule:
        """The levels of a solver, made once and kept."""
        limit = int(self.config.get("num_train_timesteps", 1000))
        if not 1 <= num_steps <= limit:
            raise UsageError(f"steps is {num_steps} but must lie between 1 and {limit}")
        if (solver, num_steps) not in self._keys:
            with quiet_libraries():
                tables = scheduler_tables(self.config, self.class_name, solver, num_steps)
            self._tables[tables.schedule.key] = tables
            self._keys[solver, num_steps] = tables.schedule.key
        return self._tables[self._keys[solver, num_steps]].schedule

    def tables(self, schedule: Schedule) -> Tables:
        """The tables behind a schedule of this plan, or behind the tail of one (key "KEY+start")."""
        if schedule.key not in self._tables:
            self._tables[schedule.key] = self._tail(schedule.key)
        return self._tables[schedule.key]

    def _tail(self, key: str) -> Tables:
        if key in self._tables:
            return self._tables[key]
        base, _, start = key.rpartition("+")
        if not base or not start.isdecimal():
            raise ValueError(f"schedule {key!r} was not made by this model")
        return self._tail(base).tail(int(start))


class PipelineOutline(ABC):
    """A family's outline. A family names its defaults and adds `size`, `latent_shape`, `check` and `load`."""

    default_steps: int
    default_guidance_scale: float
    media: Literal["image"] | None = "image"
    guidable: bool = True
    demo: Demo | None = None

    def __init__(self, source: Source, plan: SchedulerPlan) -> None:
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
        return self.plan.schedule(solver, num_steps)

    @abstractmethod
    def size(self, height: int | None, width: int | None) -> Size:
        """The output size in pixels, defaults filled in. Raises UsageError if the model cannot make it."""

    @abstractmethod
    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """Shape of one latent, without batch axis."""

    @abstractmethod
    def check(self, condition: Condition, *, guided: bool = False) -> None:
        """Raise UsageError if the model cannot take this condition (under guidance)."""

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

    def sampler(self, schedule: Schedule, solver: SolverInfo) -> TableSampler:
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
