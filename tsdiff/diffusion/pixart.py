"""PixArt-Sigma and PixArt-alpha: a transformer over patches of the latent that attends to T5's embeddings of a caption.

Chen et al. 2024 (arXiv 2403.04692) and 2023 (arXiv 2310.00426). Latents are (4, height / 8, width / 8). The variance that the
network predicts beside the noise is not used, as in the pipeline. Padding of the text is hidden by a mask, so texts of
different lengths share batches, padded to one length: what is hidden has no weight at all, and results do not change.

The pipeline's "resolution binning" is not there: an image has the size that was asked for, not the nearest of a table, scaled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from tsdiff.diffusion.family import PipelineOutline, SchedulerPlan, whole_sides
from tsdiff.diffusion.latent import LatentModel
from tsdiff.diffusion.pipelines import device_of, refuse_training
from tsdiff.diffusion.source import Source
from tsdiff.diffusion.text_conditions import (
    T5_TOKENIZERS,
    Option,
    TextConditioner,
    TextRules,
    require_encoders,
    whole_number,
)
from tsdiff.diffusion.text_masks import EMBEDS, MASK, check_masks, padded
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Condition, Encoded, Row, Size

if TYPE_CHECKING:
    from torch import Tensor

ENCODERS = {"text_encoder": ("T5EncoderModel", T5_TOKENIZERS)}
T5_TOKENS = {"PixArtSigmaPipeline": 300, "PixArtAlphaPipeline": 120}
"""Tokens that T5 reads, by pipeline class, unless `max_sequence_length` says otherwise."""

CLEANERS = ("bs4", "ftfy")
"""What the pipeline cleans captions with; without both it only makes them lower-case."""


class PixArtOutline(PipelineOutline):
    """PixArt before its weights are loaded.

    Args:
      source: of a `PixArtSigmaPipeline` or `PixArtAlphaPipeline`.

    Attributes:
      channels: of a latent.
      told_size: whether the network is told the size of the image (the 1024-pixel model of PixArt-alpha).

    Raises:
      UsageError: if a component is missing, damaged or of a class that is not supported, or modules are in training mode.
    """

    default_steps = 20
    default_guidance_scale = 4.5

    network = ("transformer", "PixArtTransformer2DModel")

    def __init__(self, source: Source) -> None:
        # The published models were saved under the name of a class that diffusers has since split up.
        source.require("transformer", "PixArtTransformer2DModel", "Transformer2DModel")
        source.require("vae", "AutoencoderKL", "AutoencoderTiny")
        missing = require_encoders(source, ENCODERS)
        class_name, scheduler = source.scheduler()
        if source.pipeline is not None:
            refuse_training(source.pipeline)
        config = source.config("transformer")
        if config.get("norm_type", "ada_norm_single") != "ada_norm_single":
            raise UsageError(f"the transformer of {source.name!r} is none of PixArt's (norm_type is {config['norm_type']!r}); give a PixArt model")
        self.channels, latent = int(source.entry("transformer", "in_channels")), source.entry("vae", "latent_channels")
        if self.channels != latent:
            raise UsageError(f"the transformer of {source.name!r} takes {self.channels} channels but its autoencoder makes {latent}; they do not belong together")
        source.check_weights("transformer", "vae", *ENCODERS)
        super().__init__(source, SchedulerPlan(source.name, class_name, scheduler, strict=source.options.strict_scheduler))
        self.scale_factor = 2 ** (len(source.entry("vae", "block_out_channels")) - 1)
        self.side, self.patch = int(source.entry("transformer", "sample_size")), int(source.entry("transformer", "patch_size"))
        told = config.get("use_additional_conditions")
        self.told_size = self.side == 128 if told is None else bool(told)
        self.rules = _rules(source, missing)

    def size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """(height, width) in pixels, multiples of 16 for the published models; None takes what the model was trained on."""
        side = self.side * self.scale_factor
        return whole_sides(height, width, (side, side), self.patch * self.scale_factor)

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
        self.rules.check(condition)
        check_masks(condition)
        if condition.extra.get("clean_caption") and not can_clean():
            raise UsageError("clean_caption needs beautifulsoup4 and ftfy; install them (`pip install beautifulsoup4 ftfy`), or leave clean_caption out")
        if guided:
            self.rules.check(padded(condition, self.rules), guided=True)

    def row(self) -> Row:
        """See `PipelineOutline`."""
        return self.rules.row()

    def load(self) -> PixArtModel:
        """Load the weights; a pipeline object that was handed over is used as it is."""
        return PixArtModel(self)


class PixArtModel(LatentModel):
    """PixArt ready to run. Its pipeline is never changed.

    Args:
      outline: of the model to load.

    Raises:
      UsageError, SetupError: if the weights cannot be loaded.
    """

    parts = ("transformer", "vae", *ENCODERS, "tokenizer")

    def __init__(self, outline: PixArtOutline) -> None:
        super().__init__(outline, outline.source.class_name, "transformer")
        self.conditioner = Conditioner(self.pipeline, self.device, outline.rules)
        self.channels, self.scale_factor, self.told_size = outline.channels, outline.scale_factor, outline.told_size

    def forward(self, latents: Tensor, timesteps: Tensor, rows: Sequence[Row]) -> Tensor:
        """The prediction (B, C, h, w), in the network's dtype, of scaled latents (B, C, h, w) at timesteps (B,) in 0..1000."""
        import torch

        with torch.no_grad():
            output: Tensor = self.network(
                latents.to(device=self.device, dtype=self.dtype),
                encoder_hidden_states=self.gathered(rows, EMBEDS),
                encoder_attention_mask=self.gathered(rows, MASK),
                timestep=timesteps.to(self.device),
                added_cond_kwargs=self._size_conditions(latents),
                return_dict=False,
            )[0]
        return output[:, : self.channels]

    def _size_conditions(self, latents: Tensor) -> dict[str, Tensor | None]:
        """Height and width in pixels (B, 2) and their quotient (B, 1), where the network is told them."""
        import torch

        if not self.told_size:
            return {"resolution": None, "aspect_ratio": None}
        height, width = (side * self.scale_factor for side in latents.shape[-2:])
        facts = torch.tensor([height, width, height / width], device=self.device, dtype=self.dtype).expand(len(latents), 3)
        return {"resolution": facts[:, :2], "aspect_ratio": facts[:, 2:]}


class Conditioner(TextConditioner):
    """Rows of PixArt: `prompt_embeds` (tokens, width) and `prompt_attention_mask` (tokens,)."""

    def encode(self, conditions: Sequence[Condition], *, guided: bool) -> list[Encoded]:
        """The rows of conditions, in order; a caller's embeddings are padded to the length of prompts."""
        return super().encode([padded(condition, self.rules) for condition in conditions], guided=guided)

    def embed(self, prompt: str, options: Mapping[str, Any]) -> dict[str, Tensor]:
        """See `TextConditioner`."""
        pipeline, length = self.pipeline, self.rules.tokens(options)
        clean = options.get("clean_caption", can_clean())
        if "clean_caption" not in options and not clean:
            self._note("captions are made lower-case but not freed of links and markup; the pipeline does that too where beautifulsoup4 and ftfy are installed")
        self.note_length(pipeline._text_preprocessing(prompt, clean_caption=clean)[0], pipeline.tokenizer, length, "T5")
        embeds, mask, _, _ = pipeline.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            device=device_of(pipeline.text_encoder, self.device),
            clean_caption=clean,
            max_sequence_length=length,
        )
        return {EMBEDS: embeds, MASK: mask}

    def _note(self, notice: str) -> None:
        if notice not in self.notices:
            self.notices.append(notice)


@cache
def can_clean() -> bool:
    """Whether the pipeline can clean captions here."""
    return all(find_spec(module) is not None for module in CLEANERS)


def _rules(source: Source, missing: str | None) -> TextRules:
    config = source.config("transformer")
    width = int(config.get("caption_channels") or source.entry("transformer", "cross_attention_dim"))
    for name in ENCODERS:
        if name in source.components and source.entry(name, "d_model") != width:
            raise UsageError(f"{name} of {source.name!r} makes embeddings of width {source.entry(name, 'd_model')} but the transformer takes {width}; they do not belong together")
    usual = T5_TOKENS[source.class_name]
    return TextRules(
        source.name,
        "PixArt",
        {EMBEDS: ("tokens", width), MASK: ("tokens",)},
        lambda extra: extra.get("max_sequence_length") or usual,
        {"max_sequence_length": whole_number(1, 512), "clean_caption": Option(lambda value: isinstance(value, bool), "true or false")},
        missing=missing,
        refused={"use_resolution_binning": "images have the size that is asked for"},
    )
