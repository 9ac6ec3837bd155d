"""The analytic model: exact noise (or velocity) predictions for a Gaussian mixture, without weights or a network.

`GaussianModel` is its own outline: it costs nothing to build, and imports torch only when it computes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from tsdiff.treesearch.errors import UsageError, unknown_name
from tsdiff.treesearch.protocols import Condition, Demo, Encoded, LoadOptions, Media, Row, Size
from tsdiff.treesearch.registry import split_options, split_reference
from tsdiff.treesearch.schedule import Schedule, SolverInfo
from tsdiff.worlds.gaussian.mixture import Mixture
from tsdiff.worlds.gaussian.presets import DEFAULT_PRESET, class_index, parse_target, preset, prompt_near

if TYPE_CHECKING:
    from torch import Tensor

    from tsdiff.diffusion.tables import Tables
    from tsdiff.treesearch.protocols import Sampler

Process = Literal["vp", "ve", "flow"]

SOLVERS: dict[str, tuple[str, ...]] = {
    "vp": ("ddim", "ddpm", "dpm++2m", "dpm++2m-sde", "exact"),
    "ve": ("euler", "euler-ancestral", "heun", "exact"),
    "flow": ("flow-euler", "flow-ancestral", "flow-sde", "exact"),
}
# The exact transition shares its schedule with the process' main solver, which also looks ahead for it.
EXACT = {
    "vp": SolverInfo("exact", "ddim", stochastic=True, num_noise=2, ode="ddim"),
    "ve": SolverInfo("exact", "euler", stochastic=True, num_noise=2, ode="euler"),
    "flow": SolverInfo("exact", "flow", stochastic=True, num_noise=2, ode="flow-euler"),
}
LISTED = {"exact": EXACT["vp"]}
"""Solvers of this world's own, for listings; each process has its own kind of `exact`."""

PICTURE_PIXELS = 128


def outline(reference: str, options: LoadOptions) -> GaussianModel:
    """The model of a reference "gaussian" or "gaussian:process=flow,preset=rare-mode".

    Raises:
      UsageError: for an unknown option, process or preset, or load options that mean nothing here.
    """
    given = split_options(split_reference(reference)[1])
    for key in given:
        if key not in ("process", "preset"):
            raise unknown_name("option of the model 'gaussian'", key, ("process", "preset"))
    process, name = given.get("process", "vp"), given.get("preset", DEFAULT_PRESET)
    if process not in SOLVERS:
        raise unknown_name("process of the model 'gaussian'", process, SOLVERS)
    if options.dtype not in ("auto", "float32"):
        raise UsageError(f"dtype is {options.dtype} but the model 'gaussian' has no weights to store; use float32 or auto")
    device = "cpu" if options.device == "auto" else options.device
    chosen = preset(name)
    demo = Demo(prompt_near(chosen.mixture.means[chosen.good]), ("gaussian-target",)) if name == DEFAULT_PRESET else None
    return GaussianModel(chosen.mixture, process, class_names=chosen.class_names, name=reference, device=device, demo=demo)  # type: ignore[arg-type]


class GaussianModel:
    """An exact model of a Gaussian mixture: `ModelOutline` and `DiffusionModel` in one.

    A row carries the log-weights of its own law, so a class is an ordinary row whose weights single out one component.
    The prompt steers no denoising; it names the point that the world's verifiers look for.

    Args:
      mixture: the data law, of any dimension d; latents are (d,).
      process: "vp" (variance preserving), "ve" (variance exploding) or "flow" (rectified flow).
      class_names: a name per component, or none; numbers always work.
      name: how the model is called in messages and runs.
      device: "cpu", or a CUDA device. (Apple's has no float64, which the formulas need.)
      demo: a prompt and a verifier that show the model at work.
    """

    default_steps = 20
    default_guidance_scale = 1.0
    guidable = True
    notices: tuple[str, ...] = ()

    def __init__(
        self,
        mixture: Mixture,
        process: Process = "vp",
        *,
        class_names: Sequence[str] = (),
        name: str = "gaussian",
        device: str = "cpu",
        demo: Demo | None = None,
    ) -> None:
        if process not in get_args(Process):
            raise unknown_name("process of a GaussianModel", process, get_args(Process))
        if class_names and len(class_names) != mixture.num_components:
            raise UsageError(
                f"GaussianModel: {len(class_names)} class names for {mixture.num_components} components; give one for each, or none"
            )
        if device != "cpu" and not device.startswith("cuda"):
            raise UsageError(f"device is {device!r} but the model {name!r} computes in float64, on 'cpu' or 'cuda' only")
        self.mixture = mixture
        self.process: Process = process
        self.class_names = tuple(class_names)
        self.name = name
        self.device = device
        self.demo = demo
        self.solvers = SOLVERS[process]
        self.media: Literal["image"] | None = "image" if mixture.dim == 2 else None
        self.prediction_type = "flow" if process == "flow" else "epsilon"
        parameters = json.dumps([process, mixture.weights, mixture.means, mixture.stds])
        self.fingerprint = f"gaussian-{hashlib.sha256(parameters.encode()).hexdigest()[:32]}"

    # Outline ---------------------------------------------------------------------------------------------------------

    @property
    def facts(self) -> dict[str, Any]:
        """The mixture, for pictures of what was searched."""
        mixture = self.mixture
        return {"mixture": {"weights": list(mixture.weights), "means": [list(mean) for mean in mixture.means], "stds": list(mixture.stds)}}

    def solver(self, name: str | None = None, eta: float | None = None) -> SolverInfo:
        """A solver of the model's process; None takes "ddim", "euler" or "flow-euler". Raises UsageError."""
        from tsdiff.diffusion.solvers import SOLVERS as GENERAL
        from tsdiff.diffusion.solvers import solver_info

        return solver_info(name, eta, self.solvers, GENERAL | {"exact": EXACT[self.process]})

    def size(self, height: int | None, width: int | None) -> Size:
        """None. Raises UsageError if a size is asked for."""
        if height is not None or width is not None:
            raise UsageError(f"the model {self.name!r} makes points, not pictures of a size; leave height and width out")
        return None

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """(d,)."""
        return (self.mixture.dim,)

    def schedule(self, solver: SolverInfo, num_steps: int, size: Size) -> Schedule:
        """The levels of a solver in `num_steps` steps."""
        from tsdiff.diffusion.tables import plain_tables

        return plain_tables(self.process, solver, num_steps).schedule

    def check(self, condition: Condition, *, guided: bool = False) -> None:
        """Accept "" and "near (x, y)" as prompts, and classes; guidance needs a class. Raises UsageError otherwise."""
        if condition.prompt:
            parse_target(condition.prompt, self.mixture.dim)
        class_index(condition.class_label, self.mixture.num_components, self.class_names)
        if guided and condition.class_label is None:
            raise UsageError(
                f"guidance needs a class (0 to {self.mixture.num_components - 1}): give one, or a guidance scale of at most 1"
            )
        if condition.negative_prompt:
            raise UsageError(
                f"the model {self.name!r} has no use for a negative prompt ({condition.negative_prompt!r}); leave it out"
            )
        unused = [*condition.tensors, *condition.extra]
        if unused:
            raise UsageError(f"the model {self.name!r} has no use for {', '.join(unused)}; leave it out")

    def load(self) -> GaussianModel:
        """The model itself. Raises SetupError if this machine lacks its device."""
        from tsdiff.diffusion.devices import resolve_device

        resolve_device(self.device)
        return self

    # Model -----------------------------------------------------------------------------------------------------------

    def sampler(self, schedule: Schedule, solver: SolverInfo) -> Sampler:
        """The latent arithmetic of a solver on a schedule of this model of its kind, tails included."""
        from tsdiff.diffusion.sampler import TableSampler

        if solver.name != "exact":
            return TableSampler(self, self._tables(schedule), solver)
        from tsdiff.worlds.gaussian.exact import ExactSampler

        return ExactSampler(self, self._tables(schedule), solver, self.mixture)

    def _tables(self, schedule: Schedule) -> Tables:
        """The tables behind a schedule, or behind the tail of one (key "KEY+start"): they follow from kind and length."""
        from tsdiff.diffusion.tables import plain_tables

        starts = [int(start) for start in schedule.key.split("+")[1:]]
        kinds = {info.kind: info for info in (self.solver(name) for name in self.solvers)}
        tables = (
            plain_tables(self.process, kinds[schedule.kind], schedule.last + sum(starts)) if schedule.kind in kinds else None
        )
        for start in starts:
            tables = tables and tables.tail(start)
        if tables is None or tables.schedule != schedule:
            raise ValueError(f"the schedule {schedule.key!r} of kind {schedule.kind!r} was not made by the model {self.name!r}")
        return tables

    def encode(self, conditions: Sequence[Condition], *, guided: bool) -> list[Encoded]:
        """Rows {"log_weights": (K,)} of each condition, and of the whole mixture to guide with."""
        import torch

        encoded = []
        for condition in conditions:
            index = class_index(condition.class_label, self.mixture.num_components, self.class_names)
            laws = [self.mixture.log_weights(index)] + [self.mixture.log_weights()] * guided
            rows = tuple({"log_weights": torch.tensor(law, dtype=torch.float64, device=self.device)} for law in laws)
            encoded.append(Encoded(rows, bucket="gaussian"))
        return encoded

    def encode_images(self, images: Tensor, noise: Tensor) -> Tensor:
        """Always raises UsageError: a picture of a point is not a point."""
        raise UsageError(f"the model {self.name!r} cannot start from an image; start from noise")

    def forward(self, latents: Tensor, timesteps: Tensor, rows: Sequence[Row]) -> Tensor:
        """The exact prediction (B, d): E[eps | x], or E[eps - x0 | x] for flow.

        Args:
          latents: (B, d); for VP and VE in variance-preserving scaling, as a network is fed.
          timesteps: (B,) sigma/alpha for VP and VE (also inf), t in [0, 1] for flow.
          rows: B rows of `encode`.
        """
        import torch

        time = timesteps.double()
        if self.process == "flow":
            alpha, sigma = 1.0 - time, time
        else:
            alpha, sigma = (1.0 + time**2).rsqrt(), (1.0 + time**-2).rsqrt()
        log_weights = torch.stack([row["log_weights"] for row in rows])
        x0, eps = self.mixture.denoise(latents, alpha, sigma, log_weights)
        return (eps - x0 if self.process == "flow" else eps).to(latents.dtype)

    def decode(self, latents: Tensor) -> Media:
        """Pictures (B, 3, 128, 128) of points in the plane. Raises UsageError in other dimensions."""
        from tsdiff.worlds.gaussian.pictures import draw

        if self.media is None:
            raise UsageError(f"the model {self.name!r} has {self.mixture.dim} dimensions; only two can be drawn")
        return Media(draw(self.mixture, latents, PICTURE_PIXELS))
