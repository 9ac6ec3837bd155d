"""LTX-Video: a flow-matching transformer that reads all frames of a video, strongly compressed, in one attention.

HaCohen et al. 2024 (arXiv 2501.00103). A node's latent is (128, 1 + (frames - 1) / 8, height / 32, width / 32) for the
published models, the shape in which the pipeline draws its noise; the network reads it as a sequence. Levels depend on the
number of latent pixels, over space and time. Padding of the text is hidden by a mask. The network is told how far frames are
apart, so the frame rate is an option of a condition, and rows of different rates share batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from tsdiff.diffusion.family import PipelineOutline, whole_sides
from tsdiff.diffusion.flow_plan import FlowPlan
from tsdiff.diffusion.latent import LatentModel
from tsdiff.diffusion.pipelines import device_of, refuse_training
from tsdiff.diffusion.source import Source
from tsdiff.diffusion.text_conditions import T5_TOKENIZERS, Option, TextConditioner, TextRules, require_encoders, whole_number
from tsdiff.diffusion.text_masks import EMBEDS, MASK, check_masks, padded
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Condition, Encoded, Media, Row, Size

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ENCODERS = {"text_encoder": ("T5EncoderModel", T5_TOKENIZERS)}
T5_TOKENS = 128
"""Tokens that T5 reads, unless `max_sequence_length` says otherwise."""

SIDES, FRAMES, FRAME_RATE = (512, 704), 161, 25.0
"""Height and width, length, and frames per second, where nothing else is asked for: those of the pipeline."""

SPACING = "frame_spacing"
"""The row tensor that says how many seconds lie between the frames of a latent."""

_AT_DECODE = "videos are decoded at timestep 0, without noise, which is the pipeline's default"


class LTXOutline(PipelineOutline):
    """LTX-Video before its weights are loaded.

    Args:
      source: of an `LTXPipeline`.

    Attributes:
      channels: of a latent.
      space, time: pixels, and frames, that a latent pixel stands for along each axis.

    Raises:
      UsageError: if a component is missing, damaged or of a class that is not supported, or modules are in training mode.
    """

    default_steps = 50
    default_guidance_scale = 3.0
    media = "video"
    network = ("transformer", "LTXVideoTransformer3DModel")
    takes_no: Mapping[str, str] = {
        "vae_slicing": "decodes its videos one at a time as it is",
        "channels_last": "has convolutions over time as well, which that layout is not for",
        "x0_decoder": "makes videos, and tiny autoencoders decode images",
    }

    def __init__(self, source: Source) -> None:
        source.require("transformer", "LTXVideoTransformer3DModel")
        source.require("vae", "AutoencoderKLLTXVideo")
        missing = require_encoders(source, ENCODERS)
        class_name, scheduler = source.scheduler()
        if source.pipeline is not None:
            refuse_training(source.pipeline)
        self.channels, latent = int(source.entry("transformer", "in_channels")), source.entry("vae", "latent_channels")
        if self.channels != latent:
            raise UsageError(f"the transformer of {source.name!r} takes {self.channels} channels but its autoencoder makes {latent}; they do not belong together")
        patches = [int(source.entry("transformer", key)) for key in ("patch_size", "patch_size_t")]
        if patches != [1, 1]:  # the pipeline draws noise of the wrong shape for others
            raise UsageError(f"the transformer of {source.name!r} reads patches of {patches[0]} pixels and {patches[1]} frames; give a model that reads each latent pixel by itself, as the published ones do")
        source.check_weights("transformer", "vae", *ENCODERS)
        super().__init__(source, FlowPlan(source.name, class_name, scheduler, strict=source.options.strict_scheduler, even_sigmas=True))
        self.space, self.time = (_compression(source, *keys) for keys in (("spatial_compression_ratio", "patch_size"), ("temporal_compression_ratio", "patch_size_t")))
        self.rules = _rules(source, missing)

    def size(self, height: int | None, width: int | None, frames: int | None = None) -> tuple[int, int, int]:
        """(height, width, frames): multiples of 32 pixels, and one more than a multiple of 8, for the published models."""
        count = FRAMES if frames is None else frames
        low = max(count - 1, 0) // self.time * self.time + 1
        if low != count:
            nearest = f"{low} or {low + self.time}" if count > 0 else f"{low}"
            raise UsageError(f"frames is {count} but must be one more than a multiple of {self.time}; the nearest are {nearest}")
        return *whole_sides(height, width, SIDES, self.space), count

    def frame_rate(self, condition: Condition) -> float:
        """What the network is told, frames per second."""
        told = condition.extra.get("frame_rate")
        return FRAME_RATE if told is None else float(told)

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """(channels, latent frames, height / factor, width / factor)."""
        height, width, frames = self.size(None, None) if size is None else size
        return self.channels, (frames - 1) // self.time + 1, height // self.space, width // self.space

    def tokens(self, size: Size) -> int:
        """Latent pixels, over space and time."""
        _, frames, height, width = self.latent_shape(size)
        return frames * height * width

    def check(self, condition: Condition, *, guided: bool = False) -> None:
        """Raise UsageError if the model cannot take this condition (under guidance)."""
        self.rules.check(condition)
        check_masks(condition)
        if guided:
            self.rules.check(padded(condition, self.rules), guided=True)

    def row(self) -> Row:
        """See `PipelineOutline`."""
        return {**self.rules.row(), SPACING: _spacing(self.time, FRAME_RATE)}

    def load(self) -> LTXModel:
        """Load the weights; a pipeline object that was handed over is used as it is."""
        return LTXModel(self)


class LTXModel(LatentModel):
    """LTX-Video ready to run. Its pipeline is never changed.

    Args:
      outline: of the model to load.

    Raises:
      UsageError, SetupError: if the weights cannot be loaded.
    """

    parts = ("transformer", "vae", *ENCODERS, "tokenizer")

    def __init__(self, outline: LTXOutline) -> None:
        super().__init__(outline, "LTXPipeline", "transformer")
        self.conditioner = Conditioner(self.pipeline, self.device, outline)
        self.space, self.frame_rate = outline.space, outline.frame_rate
        self._places: dict[tuple[int, ...], Tensor] = {}

    def size(self, height: int | None, width: int | None, frames: int | None = None) -> tuple[int, int, int]:
        """See the outline."""
        size: tuple[int, int, int] = self.outline.size(height, width, frames)  # type: ignore[call-arg, assignment]
        return size

    def forward(self, latents: Tensor, timesteps: Tensor, rows: Sequence[Row]) -> Tensor:
        """The velocity (B, C, f, h, w), in the network's dtype, of latents (B, C, f, h, w) at timesteps (B,) in 0..1000."""
        import torch

        shape = tuple(latents.shape[2:])
        if shape not in self._places:
            self._places[shape] = _places(shape, self.space).to(self.device)
        places = self._places[shape].repeat(len(rows), 1, 1)  # (B, 3, tokens), in float32 like the pipeline's
        places[:, 0] *= torch.stack([row[SPACING] for row in rows]).to(self.device)[:, None]
        with torch.no_grad():
            output: Tensor = self.network(
                hidden_states=latents.to(device=self.device, dtype=self.dtype).flatten(2).transpose(1, 2).contiguous(),
                encoder_hidden_states=self.gathered(rows, EMBEDS),
                timestep=timesteps.to(self.device),
                encoder_attention_mask=self.gathered(rows, MASK),
                video_coords=places,
                return_dict=False,
            )[0]
        return output.transpose(1, 2).reshape(latents.shape)

    def decode(self, latents: Tensor) -> Media:
        """Videos (B, F, 3, H, W), float32 in [0, 1], of clean latents (B, C, f, h, w); one at a time, for they are large."""
        import torch

        vae, device = self._autoencoder(), self._vae_device
        mean, deviation = (part.view(-1, 1, 1, 1).to(device, torch.float32) for part in (vae.latents_mean, vae.latents_std))
        moment = torch.zeros(1, device=device, dtype=vae.dtype) if vae.config.timestep_conditioning else None
        videos = []
        with torch.no_grad():
            for latent in latents.to(device=device, dtype=torch.float32):
                scaled = latent * deviation / vae.config.scaling_factor + mean
                with _fixed_noise(device):
                    frames = vae.decode(scaled[None].to(vae.dtype), moment, return_dict=False)[0][0]
                videos.append((frames.float() / 2 + 0.5).clamp(0, 1).transpose(0, 1))
        return Media(torch.stack(videos), "video")

    def encode_images(self, images: Tensor, noise: Tensor) -> Tensor:
        """Refused: an image is not a video."""
        raise UsageError(f"{self.name!r} makes videos, which cannot start from an image; leave out the initial image")


def _places(shape: tuple[int, ...], space: int) -> Tensor:
    """Frame, row and column of every latent pixel (3, f * h * w), the last two in pixels."""
    import torch

    steps = (1.0, float(space), float(space))
    axes = [torch.arange(count, dtype=torch.float32) * step for count, step in zip(shape, steps, strict=True)]
    return torch.cartesian_prod(*axes).T.contiguous()


@contextmanager
def _fixed_noise(device: torch.device) -> Iterator[None]:
    """Some decoders add noise of torch's global generator: the same for every video, and the generator is left as it was."""
    import torch

    on_cpu = device.type in ("cpu", "meta")
    source: Any = torch if on_cpu else getattr(torch, device.type)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        state = source.get_rng_state()
        (torch.default_generator if on_cpu else source).manual_seed(0)
        try:
            yield
        finally:
            source.set_rng_state(state)


class Conditioner(TextConditioner):
    """Rows of LTX-Video: `prompt_embeds` (tokens, width), `prompt_attention_mask` (tokens,) and `frame_spacing` ()."""

    def __init__(self, pipeline: Any, device: str, outline: LTXOutline) -> None:
        super().__init__(pipeline, device, outline.rules)
        self.time = outline.time

    def encode(self, conditions: Sequence[Condition], *, guided: bool) -> list[Encoded]:
        """The rows of conditions, in order; a caller's embeddings are padded to the length of prompts."""
        return super().encode([padded(condition, self.rules) for condition in conditions], guided=guided)

    def embed(self, prompt: str, options: Mapping[str, Any]) -> dict[str, Tensor]:
        """See `TextConditioner`."""
        pipeline, length = self.pipeline, self.rules.tokens(options)
        self.note_length(prompt, pipeline.tokenizer, length, "T5")
        embeds, mask, _, _ = pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, device=device_of(pipeline.text_encoder, self.device), max_sequence_length=length
        )
        return {EMBEDS: embeds, MASK: mask}

    def facts(self, options: Mapping[str, Any]) -> dict[str, Tensor]:
        """How far the frames of a latent are apart."""
        return {SPACING: _spacing(self.time, options.get("frame_rate", FRAME_RATE))}


def _spacing(time: int, rate: float) -> Tensor:
    """Seconds between the frames of a latent, each of which stands for `time` frames of the video."""
    import torch

    return torch.tensor(time / rate, dtype=torch.float32)


def _compression(source: Source, key: str, patch: str) -> int:
    """What the autoencoder says, or what follows from its patches and its halvings."""
    said = source.config("vae").get(key)
    return int(said) if said is not None else int(source.entry("vae", patch)) * 2 ** sum(map(bool, source.entry("vae", "spatio_temporal_scaling")))


def _rules(source: Source, missing: str | None) -> TextRules:
    width = int(source.entry("transformer", "caption_channels"))
    for name in ENCODERS:
        if name in source.components and source.entry(name, "d_model") != width:
            raise UsageError(f"{name} of {source.name!r} makes embeddings of width {source.entry(name, 'd_model')} but the transformer takes {width}; they do not belong together")
    rate = Option(lambda value: type(value) in (int, float) and 0 < value <= 1000, "a number of frames per second above 0 and up to 1000")
    return TextRules(
        source.name,
        "LTX-Video",
        {EMBEDS: ("tokens", width), MASK: ("tokens",)},
        lambda extra: extra.get("max_sequence_length") or T5_TOKENS,
        {"max_sequence_length": whole_number(1, 512), "frame_rate": rate},
        missing=missing,
        refused=dict.fromkeys(("decode_timestep", "decode_noise_scale"), _AT_DECODE),
    )
