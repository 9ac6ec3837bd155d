"""Stable Diffusion 3 and 3.5: a flow-matching transformer that reads the image and the text in one attention.

Esser et al. 2024 (arXiv 2403.03206). Latents are (16, height / 8, width / 8) for the published models. The text is read by
two CLIP encoders and, where it is there, T5; without T5 its part of the embedding is zero, as in the pipeline.
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
    hooks_kept,
    require_encoders,
    whole_number,
)
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Condition, Row, Size

if TYPE_CHECKING:
    from torch import Tensor

ENCODERS = {
    "text_encoder": ("CLIPTextModelWithProjection", CLIP_TOKENIZERS),
    "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_TOKENIZERS),
    "text_encoder_3": ("T5EncoderModel", T5_TOKENIZERS),
}
CLIPS, T5 = ("text_encoder", "text_encoder_2"), "text_encoder_3"
T5_TOKENS = 256
"""Tokens that T5 reads, unless `max_sequence_length` says otherwise."""

_SKIP_LAYERS = "skip-layer guidance needs a third network row for each evaluation"


class StableDiffusion3Outline(PipelineOutline):
    """Stable Diffusion 3 before its weights are loaded.

    Args:
      source: of a `StableDiffusion3Pipeline` (or its image-to-image twin, which has the same parts).

    Raises:
      UsageError: if a component is missing, damaged or of a class that is not supported, or modules are in training mode.
    """

    default_steps = 28
    default_guidance_scale = 7.0

    network = ("transformer", "SD3Transformer2DModel")

    def __init__(self, source: Source) -> None:
        source.require("transformer", "SD3Transformer2DModel")
        source.require("vae", "AutoencoderKL", "AutoencoderTiny")
        missing = require_encoders(source, ENCODERS, optional=(T5,))
        class_name, scheduler = source.scheduler()
        if source.pipeline is not None:
            refuse_training(source.pipeline)
        self.channels, latent = int(source.entry("transformer", "in_channels")), source.entry("vae", "latent_channels")
        if self.channels != latent:
            raise UsageError(f"the transformer of {source.name!r} takes {self.channels} channels but its autoencoder makes {latent}; give a text-to-image Stable Diffusion 3 model")
        source.check_weights("transformer", "vae", *ENCODERS)
        super().__init__(source, FlowPlan(source.name, class_name, scheduler, strict=source.options.strict_scheduler))
        self.scale_factor = 2 ** (len(source.entry("vae", "block_out_channels")) - 1)
        self.patch = int(source.entry("transformer", "patch_size"))
        self.rules = _rules(source, missing)

    def size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """(height, width) in pixels, multiples of 16 for the published models; None takes what the model was trained on."""
        side, multiple = int(self.source.entry("transformer", "sample_size")) * self.scale_factor, self.patch * self.scale_factor
        size = whole_sides(height, width, (side, side), multiple)
        most = int(self.source.entry("transformer", "pos_embed_max_size")) * multiple
        for name, given in zip(("height", "width"), size, strict=True):
            if given > most:
                raise UsageError(f"{name} is {given} but {self.name!r} knows positions up to {most} only; ask for at most {most}")
        return size

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """(channels, height / factor, width / factor)."""
        height, width = self.size(None, None) if size is None else size
        return self.channels, height // self.scale_factor, width // self.scale_factor

    def tokens(self, size: Size) -> int:
        """Patches of the latent."""
        _, height, width = self.latent_shape(size)
        return (height // self.patch) * (width // self.patch)

    def check(self, condition: Condition, *, guided: bool = False) -> None:
        """Raise UsageError if the model cannot take this condition (under guidance)."""
        self.rules.check(condition, guided=guided)

    def row(self) -> Row:
        """See `PipelineOutline`."""
        return self.rules.row()

    def load(self) -> StableDiffusion3Model:
        """Load the weights; a pipeline object that was handed over is used as it is."""
        return StableDiffusion3Model(self)


class StableDiffusion3Model(LatentModel):
    """Stable Diffusion 3 ready to run. Its pipeline is never changed.

    Args:
      outline: of the model to load.

    Raises:
      UsageError, SetupError: if the weights cannot be loaded.
    """

    parts = ("transformer", "vae", *ENCODERS, "tokenizer", "tokenizer_2", "tokenizer_3")

    def __init__(self, outline: StableDiffusion3Outline) -> None:
        super().__init__(outline, "StableDiffusion3Pipeline", "transformer", image_encoder=None, feature_extractor=None)
        self.conditioner = Conditioner(self.pipeline, self.device, outline.rules)

    def forward(self, latents: Tensor, timesteps: Tensor, rows: Sequence[Row]) -> Tensor:
        """The velocity (B, C, h, w), in the network's dtype, of latents (B, C, h, w) at timesteps (B,) in 0..1000."""
        import torch

        with torch.no_grad():
            output: Tensor = self.network(
                hidden_states=latents.to(device=self.device, dtype=self.dtype),
                timestep=timesteps.to(self.device),
                encoder_hidden_states=self.gathered(rows, "prompt_embeds"),
                pooled_projections=self.gathered(rows, "pooled_prompt_embeds"),
                return_dict=False,
            )[0]
        return output


class Conditioner(TextConditioner):
    """Rows of Stable Diffusion 3: `prompt_embeds` (77 + T5's tokens, width) and `pooled_prompt_embeds` (width,)."""

    def embed(self, prompt: str, options: Mapping[str, Any]) -> dict[str, Tensor]:
        """See `TextConditioner`."""
        pipeline = self.pipeline
        length = options.get("max_sequence_length", T5_TOKENS)
        prompts = [prompt, *(options.get(name) or prompt for name in ("prompt_2", "prompt_3"))]
        limit = pipeline.tokenizer_max_length
        readers = [(pipeline.tokenizer, limit, "CLIP"), (pipeline.tokenizer_2, limit, "the second CLIP"), (pipeline.tokenizer_3, length, "T5")]
        for text, (tokenizer, most, reader) in zip(prompts, readers, strict=True):
            if tokenizer is not None:
                self.note_length(text, tokenizer, most, reader)
        with hooks_kept(pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3):
            embeds, _, pooled, _ = pipeline.encode_prompt(
                *prompts,
                device=device_of(pipeline.text_encoder, self.device),
                do_classifier_free_guidance=False,
                clip_skip=options.get("clip_skip"),
                max_sequence_length=length,
            )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def _rules(source: Source, missing: str | None) -> TextRules:
    width, pooled = (int(source.entry("transformer", key)) for key in ("joint_attention_dim", "pooled_projection_dim"))
    options = dict.fromkeys(("prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3"), TEXT)
    options["max_sequence_length"] = whole_number(1, 512)
    clip_tokens = 77
    if missing is None:
        layers = min(int(source.entry(name, "num_hidden_layers")) for name in CLIPS)
        options["clip_skip"] = whole_number(0, layers - 1)
        clip_tokens = int(source.entry("text_encoder", "max_position_embeddings"))
        made = sum(int(source.entry(name, "projection_dim")) for name in CLIPS)
        if made != pooled:
            raise UsageError(f"the text encoders of {source.name!r} make a pooled embedding of {made} numbers but its transformer takes {pooled}; they do not belong together")
    if T5 in source.components and source.entry(T5, "d_model") != width:
        raise UsageError(f"{T5} of {source.name!r} makes embeddings of width {source.entry(T5, 'd_model')} but the transformer takes {width}; they do not belong together")
    return TextRules(
        source.name,
        "Stable Diffusion 3",
        {"prompt_embeds": ("tokens", width), "pooled_prompt_embeds": (pooled,)},
        lambda extra: clip_tokens + (extra.get("max_sequence_length") or T5_TOKENS),
        options,
        conditional=("clip_skip",),
        missing=missing,
        refused=dict.fromkeys(("skip_guidance_layers", "skip_layer_guidance_scale", "skip_layer_guidance_start", "skip_layer_guidance_stop"), _SKIP_LAYERS),
    )
