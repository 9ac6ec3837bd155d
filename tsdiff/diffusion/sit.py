"""SiT: DiT's transformer, trained to predict the velocity of a straight path from noise to data.

Ma et al. 2024 (arXiv 2401.08740), linear path. Three conventions differ from this engine's, and are translated in `forward`:

| | SiT | here |
| --- | --- | --- |
| time | t = 0 is noise, t = 1 is data; the network is told t in [0, 1] | level s = 1 - t, timesteps 1000 s |
| path | x = t x0 + (1 - t) eps | x = (1 - s) x0 + s eps, the same |
| prediction | dx/dt = x0 - eps | dx/ds = eps - x0 |

The model is a folder that `tsdiff convert sit` wrote. Its network is the DiT transformer of diffusers, whose frequencies of
time differ from SiT's by one setting, which is set here. No pipeline of diffusers runs such a model: the folder's pipeline
class, `SiTPipeline`, is there to keep one from trying.

The published sampling code guides the first three of four channels (for the sake of reproducing older results), and published
scores were measured so. `guided_channels` in the folder's `model_index.json` says how many; all where it is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tsdiff.diffusion.dit import DiTModel, DiTOutline
from tsdiff.diffusion.flow_plan import FlowPlan
from tsdiff.diffusion.source import INDEX, Source, unwrapped
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Row, Sampler
from tsdiff.treesearch.schedule import Schedule, SolverInfo

if TYPE_CHECKING:
    from torch import Tensor

PIPELINE = "SiTPipeline"
GUIDED = "guided_channels"


class SiTOutline(DiTOutline):
    """SiT before its weights are loaded.

    Args:
      source: of a folder that `tsdiff convert sit` wrote, or of a hub repository with such a folder's contents.

    Attributes:
      guided_channels: how many channels of a prediction guidance covers.

    Raises:
      UsageError: as DiT's, and for a scheduler that is not for flow models.
    """

    def __init__(self, source: Source) -> None:
        if source.pipeline is not None:
            raise UsageError(f"a {source.class_name} object cannot be searched; give the folder that `tsdiff convert sit` wrote")
        super().__init__(source)
        self.guided_channels = source.entries.get(GUIDED, self.channels)
        if type(self.guided_channels) is not int or not 1 <= self.guided_channels <= self.channels:
            raise UsageError(f"{GUIDED} of {source.name!r} is {self.guided_channels!r} but must be a whole number between 1 and {self.channels}; mend its {INDEX}")

    def planned(self, source: Source) -> FlowPlan:
        """Velocities, on levels 1, (N - 1) / N, ..., 1 / N, as the published sampling code has them."""
        class_name, config = source.scheduler()
        return FlowPlan(source.name, class_name, config, strict=source.options.strict_scheduler, even_sigmas=True)

    def load(self) -> SiTModel:
        """Load the weights."""
        return SiTModel(self)


class SiTModel(DiTModel):
    """SiT ready to run.

    Args:
      outline: of the model to load.

    Raises:
      UsageError, SetupError: if the weights cannot be loaded.
    """

    outline: SiTOutline

    def __init__(self, outline: SiTOutline) -> None:
        super().__init__(outline)
        for block in unwrapped(self.network).transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0  # SiT's frequencies are 10000^(-i / 128), DiT's in diffusers 10000^(-i / 127)

    def named_facts(self) -> dict[str, Any]:
        """Further plain data that results depend on."""
        return super().named_facts() | {"family": PIPELINE, GUIDED: self.outline.guided_channels}

    def sampler(self, schedule: Schedule, solver: SolverInfo) -> Sampler:
        """The latent arithmetic of a solver on a schedule of this model, with guidance of its guided channels."""
        from tsdiff.diffusion.guided_channels import GuidedChannelsSampler

        return self.rounded(GuidedChannelsSampler(self, self.outline.plan.tables(schedule), solver, self.outline.guided_channels))

    def forward(self, latents: Tensor, timesteps: Tensor, rows: Sequence[Row]) -> Tensor:
        """The velocity eps - x0 (B, C, h, w), in the network's dtype, of latents (B, C, h, w) at timesteps (B,) in 0..1000."""
        return -super().forward(latents, 1.0 - timesteps / 1000.0, rows)
