"""Stable Diffusion XL: latent diffusion with a larger UNet that reads two text encoders and is told the size of its image.

Podell et al. 2023 (arXiv 2307.01952). Latents are (4, height / 8, width / 8). Beside the text the UNet takes a pooled
embedding and six numbers, the time ids: the size that a training image had before it was scaled, where it was cropped, and
the size asked for. Their usual values are the size of the sample, (0, 0), and the size of the sample.

Turbo, Lightning and other models distilled to few steps are Stable Diffusion XL with another scheduler config; a latent
consistency model has a UNet that is told its guidance scale, which costs one row instead of two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tsdiff.diffusion.family import PipelineOutline, SchedulerPlan, whole_sides
from tsdiff.diffusion.latent import LatentModel
from tsdiff.diffusion.pipelines import refuse_training
from tsdiff.diffusion.source import Source
from tsdiff.diffusion.stable_diffusion_xl_conditions import (
    ENCODERS,
    IMAGE,
    TIME_IDS,
    Conditioner,
    ConditionRules,
    setting,
)
from tsdiff.diffusion.text_conditions import require_encoders
from tsdiff.diffusion.told_guidance import TOLD
from tsdiff.diffusion.vae import upcast
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Condition, Row, Size

if TYPE_CHECKING:
    from torch import Tensor

IDS = 6
"""Numbers among the time ids; a refiner has five, the last of which is an aesthetic score."""

TOLD_SCALE = 5.0
"""The guidance scale that the UNet of a latent consistency model is told, unless a condition says otherwise."""


class StableDiffusionXLOutline(PipelineOutline):
    """Stable Diffusion XL before its weights are loaded.

    Args:
      source: of a `StableDiffusionXLPipeline` (or its image-to-image twin, which has the same parts).

    Attributes:
      told_scale: the guidance scale that the UNet is usually told (a latent consistency model), None if it is not told any.

    Raises:
      UsageError: if a component is missing, damaged or of a class that is not supported; for refiners, and UNets that want
        more than a noisy latent and a text (inpainting, editing); for modules in training mode.
    """

    network = ("unet", "UNet2DConditionModel")

    def __init__(self, source: Source) -> None:
        source.require("unet", "UNet2DConditionModel")
        source.require("vae", "AutoencoderKL", "AutoencoderTiny")
        class_name, scheduler = source.scheduler()
        if class_name.startswith("EDM"):
            raise UsageError(f"the scheduler of {source.name!r}, {class_name}, scales what the network reads and predicts in a way of its own (Playground 2.5), which is not supported; give a Stable Diffusion XL model with e.g. an EulerDiscreteScheduler")
        if source.pipeline is not None:
            refuse_training(source.pipeline)
        self.unet = source.config("unet")
        _check_unet(source)
        if source.config("vae").get("latents_mean") is not None:
            raise UsageError(f"the autoencoder of {source.name!r} shifts every channel of its latents by a mean of its own (latents_mean), which is not supported; give a model with the autoencoder of Stable Diffusion XL")
        missing = require_encoders(source, ENCODERS)
        source.check_weights("unet", "vae", *ENCODERS)
        super().__init__(source, SchedulerPlan(source.name, class_name, scheduler, strict=source.options.strict_scheduler))
        self.scale_factor = 2 ** (len(source.entry("vae", "block_out_channels")) - 1)
        self.told_scale = None if self.unet.get("time_cond_proj_dim") is None else TOLD_SCALE
        self.default_steps, self.default_guidance_scale = (30, 5.0) if self.told_scale is None else (4, 1.0)
        self.rules = ConditionRules.of(source, missing, pooled=pooled_width(source), told_scale=self.told_scale)

    def size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """(height, width) in pixels; None takes what the UNet was trained on. Both are multiples of the VAE's factor (8)."""
        side = int(self.source.entry("unet", "sample_size")) * self.scale_factor
        return whole_sides(height, width, (side, side), self.scale_factor)

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
        return self.rules.row() | {TIME_IDS: torch.zeros(IDS)} | told

    def load(self) -> StableDiffusionXLModel:
        """Load the weights; a pipeline object that was handed over is used as it is."""
        return StableDiffusionXLModel(self)


class StableDiffusionXLModel(LatentModel):
    """Stable Diffusion XL ready to run. Its pipeline is never changed; its watermark, if it has one, is not applied.

    Args:
      outline: of the model to load.

    Raises:
      UsageError, SetupError: if the weights cannot be loaded.
    """

    outline: StableDiffusionXLOutline
    parts = ("unet", "vae", *ENCODERS, "tokenizer", "tokenizer_2", "image_encoder")

    def __init__(self, outline: StableDiffusionXLOutline) -> None:
        super().__init__(outline, "StableDiffusionXLPipeline", "unet", image_encoder=None, feature_extractor=None, add_watermarker=False)
        import torch

        vae = self.pipeline.vae
        if self._vae is vae and vae.dtype == torch.float16 and vae.config.get("force_upcast"):
            self._vae = upcast(vae)  # as the pipeline does, also where the config leaves this to the class
        self.channels = int(outline.unet["in_channels"])
        self.scale_factor = outline.scale_factor
        self.told_scale = outline.told_scale
        self.conditioner = Conditioner(self.pipeline, self.device, outline.rules, outline.unet.get("time_cond_proj_dim"))

    def named_facts(self) -> dict[str, Any]:
        """What a negative prompt that is not there means."""
        return super().named_facts() | {"force_zeros_for_empty_prompt": self.outline.rules.zeros}

    def forward(self, latents: Tensor, timesteps: Tensor, rows: Sequence[Row]) -> Tensor:
        """The UNet's raw output (B, C, h, w), in its dtype, for scaled latents (B, C, h, w) and timesteps (B,) in 0..1000."""
        import torch

        target: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        added: dict[str, Any] = {"text_embeds": self.gathered(rows, "pooled_prompt_embeds"), "time_ids": self._time_ids(latents, rows).to(**target)}
        images = [self.gathered(rows, key) for key in sorted(rows[0]) if key.startswith(IMAGE)]
        if images:
            added["image_embeds"] = images
        with torch.no_grad():
            output: Tensor = self.network(
                latents.to(**target),
                timesteps.to(self.device),
                encoder_hidden_states=self.gathered(rows, "prompt_embeds"),
                timestep_cond=self.gathered(rows, TOLD) if TOLD in rows[0] else None,
                added_cond_kwargs=added,
                return_dict=False,
            )[0]
        return output[:, : self.channels]

    def _time_ids(self, latents: Tensor, rows: Sequence[Row]) -> Tensor:
        """The time ids of rows (B, 6), with the sides of the image where a condition does not say."""
        import torch

        ids = torch.stack([row[TIME_IDS] for row in rows])
        height, width = (side * self.scale_factor for side in latents.shape[-2:])
        usual = torch.tensor([height, width, 0, 0, height, width], dtype=ids.dtype, device=ids.device)
        return torch.where(ids.isnan(), usual, ids)


def pooled_width(source: Source) -> int:
    """Numbers in the pooled embedding that the UNet takes beside its time ids."""
    return int(source.entry("unet", "projection_class_embeddings_input_dim")) - IDS * int(source.entry("unet", "addition_time_embed_dim"))


def _check_unet(source: Source) -> None:
    name, unet = source.name, source.config("unet")
    channels, latent = source.entry("unet", "in_channels"), source.entry("vae", "latent_channels")
    if channels != latent:
        kinds = {9: "an inpainting UNet", 8: "an image-editing UNet"}
        raise UsageError(f"{name!r} has {kinds.get(channels, 'a UNet')} with {channels} input channels beside {latent}-channel latents, which is not supported; give a text-to-image Stable Diffusion XL model")
    if unet.get("addition_embed_type") != "text_time":
        raise UsageError(f"the UNet of {name!r} takes no pooled text and sizes (addition_embed_type={unet.get('addition_embed_type')!r}), so it is none of Stable Diffusion XL; load the model as the pipeline it belongs to")
    for key in ("class_embed_type", "num_class_embeds"):
        if unet.get(key) is not None:
            raise UsageError(f"the UNet of {name!r} wants a class embedding ({key}={unet[key]!r}), which is not supported; give a Stable Diffusion XL model")
    if unet.get("encoder_hid_dim_type") not in (None, "ip_image_proj"):
        raise UsageError(f"the UNet of {name!r} projects its text embeddings ({unet['encoder_hid_dim_type']!r}), which is not supported; give a Stable Diffusion XL model")
    made = int(source.entry("text_encoder_2", "projection_dim")) if "text_encoder_2" in source.components else None
    width = pooled_width(source)
    ids = IDS if made is None else (width - made) / int(source.entry("unet", "addition_time_embed_dim")) + IDS
    if setting(source, "requires_aesthetics_score", False) or ids == IDS - 1:
        raise UsageError(f"{name!r} is a refiner, which wants an aesthetic score and another model's half-finished latents; refiners are not supported, give the base model")
    if not math.isclose(ids, IDS):
        raise UsageError(f"text_encoder_2 of {name!r} makes a pooled embedding of {made} numbers but the UNet takes {width}; they do not belong together")
