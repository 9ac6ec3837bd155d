"""FLUX.1: a flow-matching transformer over 2 x 2 patches of the latent, with guidance distilled into it (dev) or not (schnell).

Black Forest Labs 2024. A node's latent is (16, height / 8, width / 8), not the sequence of patches that the network reads:
packing is a permutation, so the arithmetic of steps is the same, while a sequence has forgotten the sides of its image, which
decoding and the positions of the patches need, and verifiers that look at latents want a picture. Noise is drawn in this
shape, as the pipeline draws it before packing.

Two kinds of guidance, as in the pipeline. The scale that the network is told (`guidance_scale` of `Condition.extra`; dev only)
costs nothing: an evaluation is one row. Classifier-free guidance against a negative prompt (the pipeline's `true_cfg_scale`)
evaluates two rows; both rows are told the same scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tsdiff.diffusion.family import PipelineOutline, whole_sides
from tsdiff.diffusion.flow_plan import FlowPlan
from tsdiff.diffusion.latent import LatentModel
from tsdiff.diffusion.pipelines import device_of, refuse_training
from tsdiff.diffusion.source import Source
from tsdiff.diffusion.text_conditions import (
    CLIP_TOKENIZERS,
    T5_TOKENIZERS,
    TEXT,
    TextConditioner,
    TextRules,
    number_from,
    require_encoders,
    whole_number,
)
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Condition, Row, Size

if TYPE_CHECKING:
    from torch import Tensor

ENCODERS = {"text_encoder": ("CLIPTextModel", CLIP_TOKENIZERS), "text_encoder_2": ("T5EncoderModel", T5_TOKENIZERS)}
PATCH = 2
T5_TOKENS = 512
"""Tokens that T5 reads, unless `max_sequence_length` says otherwise; padding is read too, so the number is part of the result."""

TOLD_SCALE = 3.5
"""The guidance scale that the network of dev is told, unless a condition says otherwise."""


class FluxOutline(PipelineOutline):
    """FLUX.1 before its weights are loaded.

    Args:
      source: of a `FluxPipeline` (or its image-to-image twin, which has the same parts).

    Attributes:
      told_scale: the guidance scale that the network is usually told (dev), None if it is not told any (schnell).

    Raises:
      UsageError: if a component is missing, damaged or of a class that is not supported, for transformers that want more
        than a noisy latent and a text (fill, depth, canny), or if modules are in training mode.
    """

    default_guidance_scale = 1.0

    network = ("transformer", "FluxTransformer2DModel")

    def __init__(self, source: Source) -> None:
        source.require("transformer", "FluxTransformer2DModel")
        source.require("vae", "AutoencoderKL", "AutoencoderTiny")
        missing = require_encoders(source, ENCODERS)
        class_name, scheduler = source.scheduler()
        if source.pipeline is not None:
            refuse_training(source.pipeline)
        packed, self.channels = source.entry("transformer", "in_channels"), int(source.entry("vae", "latent_channels"))
        if packed != self.channels * PATCH**2:
            raise UsageError(f"the transformer of {source.name!r} takes {packed} channels but patches of its autoencoder's latents have {self.channels * PATCH**2}; give a text-to-image FLUX.1 model (dev or schnell)")
        source.check_weights("transformer", "vae", *ENCODERS)
        super().__init__(source, FlowPlan(source.name, class_name, scheduler, strict=source.options.strict_scheduler, even_sigmas=True))
        self.scale_factor = 2 ** (len(source.entry("vae", "block_out_channels")) - 1)
        self.told_scale = TOLD_SCALE if source.config("transformer").get("guidance_embeds") else None
        self.default_steps = 28 if self.told_scale is not None else 4
        self.rules = _rules(source, missing, told=self.told_scale is not None)

    def size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """(height, width) in pixels, multiples of 16 for the published models; None is 1024."""
        side = 128 * self.scale_factor
        return whole_sides(height, width, (side, side), PATCH * self.scale_factor)

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """(channels, height / factor, width / factor)."""
        height, width = self.size(None, None) if size is None else size
        return self.channels, height // self.scale_factor, width // self.scale_factor

    def tokens(self, size: Size) -> int:
        """Patches of the latent."""
        _, height, width = self.latent_shape(size)
        return (height // PATCH) * (width // PATCH)

    def check(self, condition: Condition, *, guided: bool = False) -> None:
        """Raise UsageError if the model cannot take this condition (under guidance)."""
        if guided and not (condition.negative_prompt or "negative_prompt_embeds" in condition.tensors):
            told = "" if self.told_scale is None else f" (the scale that the network is told, usually {self.told_scale:g}, is the option guidance_scale of a condition)"
            raise UsageError(f"classifier-free guidance of {self.name!r} leads away from a negative prompt, and there is none; give one, or leave this guidance out{told}")
        self.rules.check(condition, guided=guided)

    def row(self) -> Row:
        """See `PipelineOutline`."""
        import torch

        return self.rules.row() | ({} if self.told_scale is None else {"guidance": torch.zeros(())})

    def load(self) -> FluxModel:
        """Load the weights; a pipeline object that was handed over is used as it is."""
        return FluxModel(self)


class FluxModel(LatentModel):
    """FLUX.1 ready to run. Its pipeline is never changed.

    Args:
      outline: of the model to load.

    Raises:
      UsageError, SetupError: if the weights cannot be loaded.
    """

    parts = ("transformer", "vae", *ENCODERS, "tokenizer", "tokenizer_2")

    def __init__(self, outline: FluxOutline) -> None:
        super().__init__(outline, "FluxPipeline", "transformer", image_encoder=None, feature_extractor=None)
        self.conditioner = Conditioner(self.pipeline, self.device, outline.rules, outline.told_scale)
        self.told_scale = outline.told_scale
        self._positions: dict[tuple[int, int], Tensor] = {}

    def forward(self, latents: Tensor, timesteps: Tensor, rows: Sequence[Row]) -> Tensor:
        """The velocity (B, C, h, w), in the network's dtype, of latents (B, C, h, w) at timesteps (B,) in 0..1000."""
        import torch
        from torch.nn.functional import pixel_shuffle, pixel_unshuffle

        sides = (latents.shape[-2] // PATCH, latents.shape[-1] // PATCH)
        target: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        text = self.gathered(rows, "prompt_embeds")
        if sides not in self._positions:
            self._positions[sides] = _positions(*sides).to(**target)
        with torch.no_grad():
            output: Tensor = self.network(
                hidden_states=pixel_unshuffle(latents.to(**target), PATCH).flatten(2).transpose(1, 2).contiguous(),
                timestep=timesteps.to(**target) / 1000,  # rounded to the network's dtype, as the pipeline's
                guidance=torch.stack([row["guidance"] for row in rows]).to(self.device) if "guidance" in rows[0] else None,
                pooled_projections=self.gathered(rows, "pooled_prompt_embeds"),
                encoder_hidden_states=text,
                txt_ids=torch.zeros((text.shape[1], 3), **target),
                img_ids=self._positions[sides],
                return_dict=False,
            )[0]
        return pixel_shuffle(output.transpose(1, 2).reshape(len(rows), -1, *sides), PATCH)


def _positions(height: int, width: int) -> Tensor:
    """(0, row, column) of every patch (height * width, 3)."""
    import torch

    return torch.cartesian_prod(torch.zeros(1), torch.arange(float(height)), torch.arange(float(width)))


class Conditioner(TextConditioner):
    """Rows of FLUX.1: `prompt_embeds` (tokens, width), `pooled_prompt_embeds` (width,), and `guidance` () if it is told."""

    def __init__(self, pipeline: Any, device: str, rules: TextRules, told_scale: float | None) -> None:
        super().__init__(pipeline, device, rules)
        self.told_scale = told_scale

    def embed(self, prompt: str, options: Mapping[str, Any]) -> dict[str, Tensor]:
        """See `TextConditioner`."""
        pipeline = self.pipeline
        length = options.get("max_sequence_length", T5_TOKENS)
        second = options.get("prompt_2") or prompt
        self.note_length(prompt, pipeline.tokenizer, pipeline.tokenizer_max_length, "CLIP")
        self.note_length(second, pipeline.tokenizer_2, length, "T5")
        embeds, pooled, _ = pipeline.encode_prompt(prompt, second, device=device_of(pipeline.text_encoder, self.device), max_sequence_length=length)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def facts(self, options: Mapping[str, Any]) -> dict[str, Tensor]:
        """The scale that the network is told."""
        import torch

        return {} if self.told_scale is None else {"guidance": torch.tensor(float(options.get("guidance_scale", self.told_scale)))}


def _rules(source: Source, missing: str | None, *, told: bool) -> TextRules:
    width, pooled = (int(source.entry("transformer", key)) for key in ("joint_attention_dim", "pooled_projection_dim"))
    made = {"text_encoder": ("hidden_size", pooled), "text_encoder_2": ("d_model", width)}
    for name, (key, taken) in made.items():
        if name in source.components and source.entry(name, key) != taken:
            raise UsageError(f"{name} of {source.name!r} makes embeddings of width {source.entry(name, key)} but the transformer takes {taken}; they do not belong together")
    options = {"prompt_2": TEXT, "negative_prompt_2": TEXT, "max_sequence_length": whole_number(1, 512)}
    refused = {} if told else {"guidance_scale": "this model's network is not told a guidance scale (schnell)"}
    return TextRules(
        source.name,
        "FLUX.1",
        {"prompt_embeds": ("tokens", width), "pooled_prompt_embeds": (pooled,)},
        lambda extra: extra.get("max_sequence_length") or T5_TOKENS,
        options | ({"guidance_scale": number_from(0.0)} if told else {}),
        missing=missing,
        refused=refused,
    )
