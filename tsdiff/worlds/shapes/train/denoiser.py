"""The text-to-image models: a UNet on the autoencoder's latents, and the text encoder that it listens to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.imports import prepare_torchvision
from tsdiff.treesearch.noise import derive
from tsdiff.worlds.shapes.grammar import read
from tsdiff.worlds.shapes.scenes import WEIGHTS, training_example
from tsdiff.worlds.shapes.train.layout import PLACES, THINGS, map_head, map_loss, places, places_loss, things, things_loss
from tsdiff.worlds.shapes.train.loop import Training, begin_from
from tsdiff.worlds.shapes.train.pictures import draw_pictures
from tsdiff.worlds.shapes.train.text import LENGTH, known_tokens, tokenizer, vocabulary

WIDTH = 128
"""Channels of a token's embedding."""

CAPTION_DROPOUT = 0.1
"""Share of pictures that are trained without their caption, for guidance (Ho & Salimans 2022, arXiv 2207.12598)."""

NOISE_BIAS = 0.7
"""Timesteps are 1000 u^0.7 with u uniform: 63 % fall in the noisier half, where counts and places are decided."""

TOLD = 64
"""Captions a step that the text encoder has to tell the layout of, where that is asked."""

TELLING = {"position": 0.3, "color_position": 0.5, "color_attr": 0.1, "three_objects": 0.1}
"""Shares of their kinds."""

SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@dataclass(frozen=True)
class Denoiser:
    """Latent diffusion with v-prediction (Rombach et al. 2022, arXiv 2112.10752; Salimans & Ho 2022, arXiv 2202.00512).

    Only the two coarser levels of the UNet, 8x8 and 4x4, attend to the text: that is where layout is decided, and
    attention on 16x16 would cost as much as all the rest.

    Attributes:
      name: of the model.
      channels: of the UNet's levels 16x16, 8x8 and 4x4.
      autoencoder: folder of the trained `AutoencoderKL`.
      training: the numbers of the run.
      weights: share of each kind of caption.
      layout: weight of a loss that makes the text encoder say where things stand whose relation a caption tells (`layout.py`).
      cover: weight of a loss that makes the UNet say what covers which part of the picture: in pure noise only the caption
        tells it, and then being wrong about a side costs much more than it does in v.
      early: share of pictures that are shown in the noisiest 15 % of the timesteps, where only the caption tells what is where.
      first: a checkpoint's folder to begin from; None begins with random weights.
    """

    name: str
    channels: tuple[int, int, int]
    autoencoder: Path
    training: Training
    weights: Mapping[str, float] = field(default_factory=lambda: WEIGHTS)
    layout: float = 0.0
    cover: float = 0.0
    early: float = 0.0
    first: Path | None = None

    def build(self) -> nn.Module:
        prepare_torchvision()
        from diffusers import UNet2DConditionModel

        unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=self.channels,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=4,  # diffusers reads this as the number of heads
            norm_num_groups=8,
        )
        model = nn.ModuleDict({"unet": unet.to(memory_format=torch.channels_last), "text_encoder": text_encoder()})
        if self.first is not None:
            begin_from(model, self.first)
        if self.layout:
            model["places"], model["things"] = nn.Linear(WIDTH, PLACES), nn.Linear(WIDTH, THINGS)
        if self.cover:
            # Behind the middle (4x4), and behind each of the levels that attend to the text on the way up (8x8 and 16x16).
            model["maps"] = nn.ModuleList(map_head(channels) for channels in (self.channels[2], self.channels[2], self.channels[1]))
        return model

    def loss(self, model: Any, step: int, noise: torch.Generator) -> torch.Tensor:
        """Squared error of v, averaged over pictures and latent elements; and the losses that have a weight."""
        plan = self.training
        pictures = draw_pictures(plan.seed, step * plan.batch, plan.batch, self.weights)
        with torch.no_grad():
            latents = self._vae.encode(pictures.pixels).latent_dist.mean * self._vae.config.scaling_factor
        alpha, sigma, timesteps = self._noise_levels(plan.batch, noise)
        epsilon = torch.randn(latents.shape, generator=noise)
        dropped = torch.rand(plan.batch, generator=noise) < CAPTION_DROPOUT
        captions = ["" if drop else caption for caption, drop in zip(pictures.captions, dropped.tolist(), strict=True)]
        embeddings = model["text_encoder"](self._tokens(captions)).last_hidden_state
        with ExitStack() as stack:
            heard = stack.enter_context(_listening(model["unet"])) if self.cover else []
            output = model["unet"](alpha * latents + sigma * epsilon, timesteps, embeddings).sample
        total = F.mse_loss(output, alpha * epsilon - sigma * latents)
        for features, head in zip(heard, model["maps"], strict=True) if self.cover else ():
            total = total + self.cover / 3 * map_loss(head(features), pictures.scenes)
        if self.layout:
            total = total + self.layout * self._layout_loss(model, step)
        return total

    def _layout_loss(self, model: Any, step: int) -> torch.Tensor:
        """How badly the text encoder tells what is where. Captions alone cost little, so there are more of them than pictures."""
        seed = derive(self.training.seed, self.name, "layout")
        captions, scenes = zip(*(training_example(seed, step * TOLD + number, TELLING) for number in range(TOLD)), strict=True)
        prompts = [read(caption).prompt for caption in captions]
        tokens = self._tokens(list(captions))
        states = model["text_encoder"](tokens).last_hidden_state
        # The last word and the end: of all tokens these have read the whole sentence.
        ends, rows = tokens.eq(tokens[0, -1]).int().argmax(dim=1), torch.arange(TOLD)
        where, what = places(scenes, prompts), things(scenes, prompts)
        parts = [places_loss(model["places"](states[rows, place]), where) + things_loss(model["things"](states[rows, place]), what) / 4 for place in (ends - 1, ends)]
        return torch.stack(parts).mean()

    def _noise_levels(self, count: int, noise: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """alpha and sigma (B, 1, 1, 1) and timesteps (B,): stratified, one in each 1/B of the distribution."""
        places = (torch.randperm(count, generator=noise) + torch.rand(count, generator=noise)) / count
        early = torch.arange(count) < round(self.early * count)
        timesteps = torch.where(early, 850 + 150 * places, 1000 * places**NOISE_BIAS).long().clamp(max=999)
        alpha_bar = self._alpha_bar[timesteps][:, None, None, None]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), timesteps

    def _tokens(self, captions: list[str]) -> torch.Tensor:
        return self._tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids

    @cached_property
    def _tokenizer(self) -> Any:
        return tokenizer()

    @cached_property
    def _alpha_bar(self) -> torch.Tensor:
        from diffusers import DDIMScheduler

        return DDIMScheduler(**SCHEDULER).alphas_cumprod

    @cached_property
    def _vae(self) -> Any:
        from diffusers import AutoencoderKL

        if not (self.autoencoder / "config.json").exists():
            raise UsageError(f"{self.name} is trained on the latents of an autoencoder, but there is none in {self.autoencoder}; train `autoencoder` first")
        return AutoencoderKL.from_pretrained(self.autoencoder).eval().to(memory_format=torch.channels_last)

    def export(self, model: Any, folder: Path) -> None:
        """Write the folder of a `StableDiffusionPipeline`, float16."""
        from diffusers import DDIMScheduler, StableDiffusionPipeline

        pipe = StableDiffusionPipeline(
            unet=model["unet"],
            text_encoder=model["text_encoder"],
            vae=self._vae,
            tokenizer=self._tokenizer,
            scheduler=DDIMScheduler(**SCHEDULER),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.to(dtype=torch.float16, silence_dtype_warnings=True)
        pipe.save_pretrained(folder)


@contextmanager
def _listening(unet: Any) -> Iterator[list[torch.Tensor]]:
    """What the parts of a UNet give that have heads, in order, while the context lasts."""
    heard: list[torch.Tensor] = []
    parts = (unet.mid_block, *unet.up_blocks[:2])
    hooks = [part.register_forward_hook(lambda _part, _given, output: heard.append(output)) for part in parts]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def text_encoder() -> nn.Module:
    """A CLIP text model of 3 layers with random weights. Fragments of unknown words add nothing but their place."""
    prepare_torchvision()
    from transformers import CLIPTextConfig, CLIPTextModel

    numbers = vocabulary()
    start, end = numbers["<|startoftext|>"], numbers["<|endoftext|>"]
    config = CLIPTextConfig(
        vocab_size=len(numbers),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
    )
    model = CLIPTextModel(config)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        embedding[known_tokens() :] = 0
    return model
