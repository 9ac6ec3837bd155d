"""DiT: a transformer over patches of the latent, conditioned on a class.

Peebles & Xie 2022 (arXiv 2212.09748). Latents are (4, 32, 32) or (4, 64, 64) for the published models, whose images are 256
or 512 pixels wide and nothing else: positions and output are of one square size. The variance that the network predicts
beside the noise is not used, as in diffusers' pipeline; guidance covers all channels of the noise, also as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tsdiff.diffusion.class_conditions import ROW, ClassConditioner, class_rules
from tsdiff.diffusion.family import PipelineOutline, SchedulerPlan
from tsdiff.diffusion.latent import LatentModel
from tsdiff.diffusion.level_plan import LevelPlan
from tsdiff.diffusion.pipelines import refuse_training
from tsdiff.diffusion.source import Source
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Condition, Row, Size

if TYPE_CHECKING:
    from torch import Tensor

PIPELINE = "DiTPipeline"


class DiTOutline(PipelineOutline):
    """DiT before its weights are loaded.

    Args:
      source: of a `DiTPipeline`.

    Attributes:
      channels: of a latent.
      rules: of its classes.

    Raises:
      UsageError: if a component is missing, damaged or of a class that is not supported, or modules are in training mode.
    """

    default_steps = 50
    default_guidance_scale = 4.0

    network = ("transformer", "DiTTransformer2DModel")

    def __init__(self, source: Source) -> None:
        # The published models were saved under the name of a class that diffusers has since split up.
        source.require("transformer", "DiTTransformer2DModel", "Transformer2DModel")
        source.require("vae", "AutoencoderKL", "AutoencoderTiny")
        plan = self.planned(source)
        if source.pipeline is not None:
            refuse_training(source.pipeline)
        config = source.config("transformer")
        if config.get("norm_type", "ada_norm_zero") != "ada_norm_zero":
            raise UsageError(f"the transformer of {source.name!r} is none of DiT's (norm_type is {config['norm_type']!r}); give a DiT model")
        self.channels, latent = int(source.entry("transformer", "in_channels")), source.entry("vae", "latent_channels")
        made = config.get("out_channels") or self.channels
        if self.channels != latent:
            raise UsageError(f"the transformer of {source.name!r} takes {self.channels} channels but its autoencoder makes {latent}; they do not belong together")
        if made not in (self.channels, 2 * self.channels):
            raise UsageError(f"the transformer of {source.name!r} takes {self.channels} channels and makes {made}, which is neither a prediction nor one with a variance; give a DiT model")
        self.rules = class_rules(source, int(source.entry("transformer", "num_embeds_ada_norm")))
        source.check_weights("transformer", "vae")
        super().__init__(source, plan)
        self.side = int(source.entry("transformer", "sample_size"))
        self.patch = int(source.entry("transformer", "patch_size"))
        self.scale_factor = 2 ** (len(source.entry("vae", "block_out_channels")) - 1)

    def planned(self, source: Source) -> LevelPlan:
        """The solvers and schedules of the pipeline's scheduler."""
        class_name, config = source.scheduler()
        return SchedulerPlan(source.name, class_name, config, strict=source.options.strict_scheduler)

    def size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """(height, width) in pixels: the one size that the model makes."""
        own = self.side * self.scale_factor
        for name, given in (("height", height), ("width", width)):
            if given not in (None, own):
                raise UsageError(f"{name} is {given} but {self.name!r} makes images of {own} x {own} pixels only; leave height and width out")
        return own, own

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """(channels, side, side)."""
        return self.channels, self.side, self.side

    def tokens(self, size: Size) -> int:
        """Patches of the latent."""
        return (self.side // self.patch) ** 2

    def check(self, condition: Condition, *, guided: bool = False) -> None:
        """Raise UsageError if the model cannot take this condition."""
        self.rules.check(condition)

    def row(self) -> Row:
        """See `PipelineOutline`."""
        import torch

        return {ROW: torch.tensor(0)}

    def load(self) -> DiTModel:
        """Load the weights; a pipeline object that was handed over is used as it is."""
        return DiTModel(self)


class DiTModel(LatentModel):
    """DiT ready to run. Its pipeline is never changed.

    Args:
      outline: of the model to load.

    Raises:
      UsageError, SetupError: if the weights cannot be loaded.
    """

    parts = ("transformer", "vae")

    def __init__(self, outline: DiTOutline) -> None:
        super().__init__(outline, PIPELINE, "transformer")
        self.conditioner = ClassConditioner(outline.rules, self.device)
        self.channels = outline.channels

    def forward(self, latents: Tensor, timesteps: Tensor, rows: Sequence[Row]) -> Tensor:
        """The prediction (B, C, h, w), in the network's dtype, of latents (B, C, h, w) at timesteps (B,) in 0..1000."""
        import torch

        with torch.no_grad():
            output: Tensor = self.network(
                latents.to(device=self.device, dtype=self.dtype),
                timestep=timesteps.to(self.device),
                class_labels=torch.stack([row[ROW] for row in rows]).to(self.device),
                return_dict=False,
            )[0]
        return output[:, : self.channels]
