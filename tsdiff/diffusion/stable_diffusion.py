"""Stable Diffusion 1.x and 2.x: latent diffusion with a UNet that attends to CLIP text embeddings.

Rombach et al. 2022 (arXiv 2112.10752). Latents are (4, height / 8, width / 8) for the published models; a batch is
(B, C, h, w). The safety checker of the pipeline is neither loaded nor run: judging images is the caller's task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tsdiff.diffusion.family import PipelineOutline, SchedulerPlan, whole_sides
from tsdiff.diffusion.latent import LatentModel
from tsdiff.diffusion.pipelines import refuse_training
from tsdiff.diffusion.source import Source
from tsdiff.diffusion.stable_diffusion_conditions import IMAGE, TEXT, Conditioner, ConditionRules
from tsdiff.diffusion.told_guidance import TOLD
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Condition, Row, Size

if TYPE_CHECKING:
    from torch import Tensor

TOLD_SCALE = 8.5
"""The guidance scale that the UNet of a latent consistency model is told, unless a condition says otherwise."""


class StableDiffusionOutline(PipelineOutline):
    """Stable Diffusion before its weights are loaded.

    Args:
      source: of a `StableDiffusionPipeline` (or its image-to-image twin or `LatentConsistencyModelPipeline`, which have the
        same parts).

    Attributes:
      told_scale: the guidance scale that the UNet is usually told (a latent consistency model), None if it is not told any.

    Raises:
      UsageError: if a component is missing, damaged or of a class that is not supported; for UNets that want more than
        a noisy latent and a text (inpainting, depth, SDXL); for modules in training mode.
    """

    network = ("unet", "UNet2DConditionModel")

    def __init__(self, source: Source) -> None:
        source.require("unet", "UNet2DConditionModel")
        source.require("vae", "AutoencoderKL", "AutoencoderTiny")
        if "text_encoder" in source.components:
            source.require("text_encoder", "CLIPTextModel")
            source.require("tokenizer", "CLIPTokenizer", "CLIPTokenizerFast")
        class_name, scheduler = source.scheduler()
        if source.pipeline is not None:
            refuse_training(source.pipeline)
        self.unet = source.config("unet")
        _check_unet(source)
        if source.pipeline is None:
            scheduler = _as_pipeline_does(scheduler)
        source.check_weights("unet", "vae", "text_encoder")
        super().__init__(source, SchedulerPlan(source.name, class_name, scheduler, strict=source.options.strict_scheduler))
        self.scale_factor = 2 ** (len(source.entry("vae", "block_out_channels")) - 1)
        self.told_scale = None if self.unet.get("time_cond_proj_dim") is None else TOLD_SCALE
        self.default_steps, self.default_guidance_scale = (20, 7.5) if self.told_scale is None else (4, 1.0)
        adapter = self.unet.get("encoder_hid_dim_type") == "ip_image_proj"
        self.rules = ConditionRules(source.name, _text_layers(source), _width(self.unet), adapter, self.told_scale, self.text_tokens)

    def size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """(height, width) in pixels; None takes what the UNet was trained on. Both are multiples of the VAE's factor (8)."""
        trained = _sample_size(self.source)
        return whole_sides(height, width, (trained[0] * self.scale_factor, trained[1] * self.scale_factor), self.scale_factor)

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """(channels, height / factor, width / factor)."""
        height, width = self.size(None, None) if size is None else size
        return int(self.unet["in_channels"]), height // self.scale_factor, width // self.scale_factor

    def check(self, condition: Condition, *, guided: bool = False) -> None:
        """Raise UsageError if the model cannot take this condition (under guidance)."""
        self.rules.check(condition, guided=guided)

    def row(self) -> Row:
        """See `PipelineOutline`."""
        import torch

        told = {TOLD: torch.zeros(self.unet["time_cond_proj_dim"])} if self.told_scale is not None else {}
        return {TEXT: torch.zeros(self.text_tokens, _width(self.unet))} | told

    @property
    def text_tokens(self) -> int:
        """Length of an encoded prompt."""
        return int(self.source.entry("text_encoder", "max_position_embeddings")) if "text_encoder" in self.source.components else 77

    def load(self) -> StableDiffusionModel:
        """Load the weights; a pipeline object that was handed over is used as it is."""
        return StableDiffusionModel(self)


class StableDiffusionModel(LatentModel):
    """Stable Diffusion ready to run. Its pipeline is never changed.

    Args:
      outline: of the model to load.

    Raises:
      UsageError, SetupError: if the weights cannot be loaded.
    """

    conditioner: Conditioner
    parts = ("unet", "vae", "text_encoder", "tokenizer", "image_encoder")

    def __init__(self, outline: StableDiffusionOutline) -> None:
        # Parts that are not used are not read: their files may be missing.
        without = {"safety_checker": None, "feature_extractor": None, "image_encoder": None, "requires_safety_checker": False}
        super().__init__(outline, "StableDiffusionPipeline", "unet", **without)
        self.channels = int(outline.unet["in_channels"])
        self.told_scale = outline.told_scale
        self.conditioner = Conditioner(self.pipeline, self.device, outline.told_scale)

    def forward(self, latents: Tensor, timesteps: Tensor, rows: Sequence[Row]) -> Tensor:
        """The UNet's raw output (B, C, h, w), in its dtype, for scaled latents (B, C, h, w) and timesteps (B,) in 0..1000."""
        import torch

        target = {"device": self.device, "dtype": self.dtype}
        images = [self.gathered(rows, key) for key in sorted(rows[0]) if key.startswith(IMAGE)]
        options = self.conditioner.attention_kwargs(rows[0])
        with torch.no_grad(), self.conditioner.scale_kept(options.get("scale") if options else None):
            output: Tensor = self.network(
                latents.to(**target),
                timesteps.to(self.device),
                encoder_hidden_states=self.gathered(rows, TEXT),
                timestep_cond=self.gathered(rows, TOLD) if TOLD in rows[0] else None,
                cross_attention_kwargs=options,
                added_cond_kwargs={"image_embeds": images} if images else None,
                return_dict=False,
            )[0]
        return output[:, : self.channels]


def _as_pipeline_does(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """A saved scheduler config with the two corrections that the pipeline's constructor makes to outdated ones."""
    corrected = dict(scheduler)
    if corrected.get("steps_offset", 1) != 1:
        corrected["steps_offset"] = 1
    if corrected.get("clip_sample", False) is True:
        corrected["clip_sample"] = False
    return corrected


def _check_unet(source: Source) -> None:
    name, unet = source.name, source.config("unet")
    channels, latent = source.entry("unet", "in_channels"), source.entry("vae", "latent_channels")
    if channels != latent:
        kinds = {9: "an inpainting UNet", 5: "a depth-conditioned UNet", 8: "an image-editing UNet", 7: "an upscaling UNet"}
        raise UsageError(f"{name!r} has {kinds.get(channels, 'a UNet')} with {channels} input channels beside {latent}-channel latents, which is not supported; give a text-to-image Stable Diffusion model")
    wants = {
        "class_embed_type": "a class embedding",
        "num_class_embeds": "a class embedding",
        "addition_embed_type": "further embeddings (an SDXL-type UNet)",
    }
    for key, what in wants.items():
        if unet.get(key) is not None:
            raise UsageError(f"the UNet of {name!r} wants {what} ({key}={unet[key]!r}), which is not supported; give a Stable Diffusion 1.x or 2.x model")
    if unet.get("encoder_hid_dim_type") not in (None, "ip_image_proj"):
        raise UsageError(f"the UNet of {name!r} projects its text embeddings ({unet['encoder_hid_dim_type']!r}), which is not supported; give a Stable Diffusion 1.x or 2.x model")


def _sample_size(source: Source) -> tuple[int, int]:
    """(height, width) of the latents the UNet was trained on."""
    size = source.entry("unet", "sample_size")
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _text_layers(source: Source) -> int | None:
    """Layers of the text encoder, None if there is none. Raises UsageError if it does not fit the UNet."""
    if "text_encoder" not in source.components:
        return None
    made, taken = int(source.entry("text_encoder", "hidden_size")), _width(source.config("unet"))
    if made != taken:
        raise UsageError(f"the text encoder of {source.name!r} makes embeddings of width {made} but its UNet takes {taken}; they do not belong together")
    return int(source.entry("text_encoder", "num_hidden_layers"))


def _width(unet: Mapping[str, Any]) -> int:
    width = unet.get("cross_attention_dim", 1280)
    return int(width if isinstance(width, int) else width[0])
