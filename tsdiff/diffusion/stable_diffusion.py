"""Stable Diffusion 1.x and 2.x: latent diffusion with a UNet that attends to CLIP text embeddings.

Rombach et al. 2022 (arXiv 2112.10752). Latents are (4, height / 8, width / 8) for the published models; a batch is
(B, C, h, w). The safety checker of the pipeline is neither loaded nor run: judging images is the caller's task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tsdiff.diffusion.family import PipelineModel, PipelineOutline, SchedulerPlan
from tsdiff.diffusion.fingerprint import fingerprint
from tsdiff.diffusion.pipelines import device_of, load_pipeline, refuse_training
from tsdiff.diffusion.source import Source
from tsdiff.diffusion.stable_diffusion_conditions import IMAGE, TEXT, Conditioner, ConditionRules
from tsdiff.diffusion.vae import decode, encode, needs_upcast, upcast
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Condition, Encoded, Media, Row, Size

if TYPE_CHECKING:
    from torch import Tensor


class StableDiffusionOutline(PipelineOutline):
    """Stable Diffusion before its weights are loaded.

    Args:
      source: of a `StableDiffusionPipeline` (or its image-to-image twin, which has the same parts).

    Raises:
      UsageError: if a component is missing, damaged or of a class that is not supported; for UNets that want more than
        a noisy latent and a text (inpainting, depth, distilled guidance, SDXL); for modules in training mode.
    """

    default_steps = 20
    default_guidance_scale = 7.5

    def __init__(self, source: Source) -> None:
        source.require("unet", "UNet2DConditionModel")
        source.require("vae", "AutoencoderKL", "AutoencoderTiny")
        if "text_encoder" in source.components:
            source.require("text_encoder", "CLIPTextModel")
            source.require("tokenizer", "CLIPTokenizer", "CLIPTokenizerFast")
        if "scheduler" not in source.components:
            raise UsageError(f"{source.name!r} has no scheduler, so its noise levels are unknown; add its scheduler folder, or give the pipeline one")
        if source.pipeline is not None:
            refuse_training(source.pipeline)
        self.unet, self.vae = source.config("unet"), source.config("vae")
        _check_unet(source.name, self.unet, self.vae)
        scheduler = source.config("scheduler", "scheduler_config.json")
        if source.pipeline is None:
            scheduler = _as_pipeline_does(scheduler)
        source.check_weights("unet", "vae", "text_encoder")
        class_name = source.components["scheduler"][1]
        super().__init__(source, SchedulerPlan(source.name, class_name, scheduler, strict=source.options.strict_scheduler))
        self.scale_factor = 2 ** (len(_entry(source.name, "vae", self.vae, "block_out_channels")) - 1)
        self.rules = ConditionRules(source.name, _text_layers(source), _width(self.unet), self.unet.get("encoder_hid_dim_type") == "ip_image_proj")

    def size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """(height, width) in pixels; None takes what the UNet was trained on. Both are multiples of the VAE's factor (8)."""
        trained = _sample_size(self.source.name, self.unet)
        sides = []
        for name, given, default in (("height", height, trained[0]), ("width", width, trained[1])):
            side = default * self.scale_factor if given is None else given
            low = side // self.scale_factor * self.scale_factor
            if low != side or side < 1:
                allowed = f"{low} or {low + self.scale_factor}" if low > 0 else f"{self.scale_factor}"
                raise UsageError(f"{name} is {side} but must be a multiple of {self.scale_factor}; the nearest are {allowed}")
            sides.append(side)
        return sides[0], sides[1]

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """(channels, height / factor, width / factor)."""
        height, width = self.size(None, None) if size is None else size
        return int(self.unet["in_channels"]), height // self.scale_factor, width // self.scale_factor

    def check(self, condition: Condition, *, guided: bool = False) -> None:
        """Raise UsageError if the model cannot take this condition (under guidance)."""
        self.rules.check(condition, guided=guided)

    def load(self) -> StableDiffusionModel:
        """Load the weights; a pipeline object that was handed over is used as it is."""
        return StableDiffusionModel(self)


class StableDiffusionModel(PipelineModel):
    """Stable Diffusion ready to run. Its pipeline is never changed.

    Args:
      outline: of the model to load.

    Raises:
      UsageError, SetupError: if the weights cannot be loaded.
    """

    def __init__(self, outline: StableDiffusionOutline) -> None:
        if outline.source.pipeline is None:
            # Parts that are not used are not read: their files may be missing.
            without = {"safety_checker": None, "feature_extractor": None, "image_encoder": None, "requires_safety_checker": False}
            pipeline, device = load_pipeline(outline.source, "StableDiffusionPipeline", **without)
        else:
            pipeline, device = load_pipeline(outline.source, outline.source.class_name)
        super().__init__(outline, pipeline, str(device_of(pipeline.unet, device)))
        self.channels = int(outline.unet["in_channels"])
        self._dtype = pipeline.unet.dtype  # diffusers walks through all parameters to tell it, which takes a millisecond
        self._conditioner = Conditioner(pipeline, self.device)
        vae = pipeline.vae
        self._vae_device = device_of(vae, device)
        self._vae = upcast(vae) if needs_upcast(vae) else vae

    @cached_property
    def fingerprint(self) -> str:
        """Names the weights, configs and adapters: equal fingerprints give equal results on one machine."""
        parts = {name: getattr(self.pipeline, name) for name in ("unet", "vae", "text_encoder", "tokenizer", "image_encoder")}
        plan = self.outline.plan
        return fingerprint(parts, scheduler=plan.config, scheduler_class=plan.class_name)

    def encode(self, conditions: Sequence[Condition], *, guided: bool) -> list[Encoded]:
        """Encode conditions, in order; with `guided` each gets its unconditional row too.

        A prompt that is too long for the text encoder adds a line to `notices`.

        Raises:
          UsageError: if the model cannot take a condition.
        """
        for condition in conditions:
            self.check(condition)
        encoded = self._conditioner.encode(conditions, guided=guided)
        self.notices = (*self.outline.notices, *self._conditioner.notices)
        return encoded

    def forward(self, latents: Tensor, timesteps: Tensor, rows: Sequence[Row]) -> Tensor:
        """The UNet's raw output (B, C, h, w), in its dtype, for scaled latents (B, C, h, w) and timesteps (B,) in 0..1000."""
        import torch

        unet = self.pipeline.unet
        target = {"device": self.device, "dtype": self._dtype}
        images = [torch.stack([row[key] for row in rows]).to(**target) for key in sorted(rows[0]) if key.startswith(IMAGE)]
        options = self._conditioner.attention_kwargs(rows[0])
        with torch.no_grad(), self._conditioner.scale_kept(options.get("scale") if options else None):
            output: Tensor = unet(
                latents.to(**target),
                timesteps.to(self.device),
                encoder_hidden_states=torch.stack([row[TEXT] for row in rows]).to(**target),
                cross_attention_kwargs=options,
                added_cond_kwargs={"image_embeds": images} if images else None,
                return_dict=False,
            )[0]
        return output[:, : self.channels]

    def decode(self, latents: Tensor) -> Media:
        """Images (B, 3, H, W), float32 in [0, 1], of clean latents (B, C, h, w)."""
        return Media(decode(self._vae, latents, self._vae_device))

    def encode_images(self, images: Tensor, noise: Tensor) -> Tensor:
        """Clean latents (B, C, h, w), float32, of images (B, 3, H, W) in [0, 1], sampled from the VAE's posterior by `noise`."""
        return encode(self._vae, images, noise, self._vae_device).to(self.device)


def _as_pipeline_does(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """A saved scheduler config with the two corrections that the pipeline's constructor makes to outdated ones."""
    corrected = dict(scheduler)
    if corrected.get("steps_offset", 1) != 1:
        corrected["steps_offset"] = 1
    if corrected.get("clip_sample", False) is True:
        corrected["clip_sample"] = False
    return corrected


def _check_unet(name: str, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
    channels, latent = _entry(name, "unet", unet, "in_channels"), _entry(name, "vae", vae, "latent_channels")
    if channels != latent:
        kinds = {9: "an inpainting UNet", 5: "a depth-conditioned UNet", 8: "an image-editing UNet", 7: "an upscaling UNet"}
        raise UsageError(f"{name!r} has {kinds.get(channels, 'a UNet')} with {channels} input channels beside {latent}-channel latents, which is not supported; give a text-to-image Stable Diffusion model")
    wants = {
        "time_cond_proj_dim": "the guidance scale as an input (a distilled consistency model)",
        "class_embed_type": "a class embedding",
        "num_class_embeds": "a class embedding",
        "addition_embed_type": "further embeddings (an SDXL-type UNet)",
    }
    for key, what in wants.items():
        if unet.get(key) is not None:
            raise UsageError(f"the UNet of {name!r} wants {what} ({key}={unet[key]!r}), which is not supported; give a Stable Diffusion 1.x or 2.x model")
    if unet.get("encoder_hid_dim_type") not in (None, "ip_image_proj"):
        raise UsageError(f"the UNet of {name!r} projects its text embeddings ({unet['encoder_hid_dim_type']!r}), which is not supported; give a Stable Diffusion 1.x or 2.x model")


def _entry(name: str, component: str, config: Mapping[str, Any], key: str) -> Any:
    if config.get(key) is None:
        raise UsageError(f"the {component} config of {name!r} has no {key}; save or download the pipeline again")
    return config[key]


def _sample_size(name: str, unet: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) of the latents the UNet was trained on."""
    size = _entry(name, "unet", unet, "sample_size")
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _text_layers(source: Source) -> int | None:
    if "text_encoder" not in source.components:
        return None
    return int(_entry(source.name, "text_encoder", source.config("text_encoder"), "num_hidden_layers"))


def _width(unet: Mapping[str, Any]) -> int:
    width = unet.get("cross_attention_dim", 1280)
    return int(width if isinstance(width, int) else width[0])
