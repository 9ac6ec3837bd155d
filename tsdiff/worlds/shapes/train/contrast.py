"""`shapes-clip`: a small CLIP that tells a picture's caption from near misses of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from torch import nn

from tsdiff.treesearch.imports import prepare_torchvision
from tsdiff.treesearch.noise import derive, generator
from tsdiff.worlds.shapes.geometry import CANVAS, Scene
from tsdiff.worlds.shapes.grammar import MOST_THINGS, Prompt, read
from tsdiff.worlds.shapes.render import render
from tsdiff.worlds.shapes.scenes import WEIGHTS, draw_scene, is_held_out, near_misses, training_example
from tsdiff.worlds.shapes.spoil import spoil
from tsdiff.worlds.shapes.train.layout import PLACES, THINGS, places, places_loss, things, things_loss
from tsdiff.worlds.shapes.train.loop import Training, begin_from
from tsdiff.worlds.shapes.train.text import LENGTH, tokenizer, vocabulary

MODEL: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": CANVAS, "patch_size": 8, "width": 128, "head_width": 32, "layers": 6},
    "text_cfg": {"context_length": LENGTH, "vocab_size": len(vocabulary()), "width": 128, "heads": 4, "layers": 3, "pool_type": "eos", "eos_id": 1, "pad_id": 1},
}
"""The model's configuration, as open_clip reads it."""

MEAN = DEVIATION = (0.5, 0.5, 0.5)
"""What is taken from, and divides, pixels in [0, 1]."""

SPOILT = 0.5
"""Share of pictures that are spoilt as an autoencoder would, so that decoded pictures are nothing new."""


@dataclass(frozen=True)
class Contrast:
    """Contrastive training (Radford et al. 2021, arXiv 2103.00020) with open_clip's loss and hard negatives.

    Half of a batch are pairs of the training set; to each comes a near miss of its caption (colours or sides swapped, a
    count off by one, ...) together with a picture of that. So every picture and every caption has its hardest negative in the batch, both ways
    (Yuksekgonul et al. 2023, arXiv 2210.01936, add such captions; here they have pictures too).

    That alone leaves the model a bag of words: 4,000 steps told every near miss but swapped colours and swapped sides, which
    stayed at chance. So in a second part heads on both embeddings, which are not exported, have to say which coloured shapes
    there are and where (`layout.py`), and near misses that only swap are drawn more often.

    Attributes:
      name: of the model.
      training: the numbers of the run.
      weights: share of each kind of caption.
      swaps: how much more often a near miss is drawn that names the same things, in other colours or places.
      layout: weight of the heads' losses; 0 goes without heads.
      first: a checkpoint's folder to begin from; None begins with random weights.
    """

    name: str
    training: Training
    weights: Mapping[str, float] = field(default_factory=lambda: WEIGHTS)
    swaps: float = 1.0
    layout: float = 0.0
    first: Path | None = None

    def build(self) -> nn.Module:
        prepare_torchvision()
        from open_clip import CLIP

        model = CLIP(**MODEL)
        if self.first is not None:
            begin_from(model, self.first)
        width = MODEL["embed_dim"]
        if self.layout:
            model.heads = nn.ModuleDict({f"{tower} {what}": nn.Linear(width, size) for tower in ("image", "text") for what, size in (("things", THINGS), ("places", PLACES))})
        return model

    def loss(self, model: Any, step: int, noise: torch.Generator) -> torch.Tensor:
        from open_clip.loss import ClipLoss

        captions, scenes, pixels = self.pairs(step)
        images, texts = model.encode_image(pixels), model.encode_text(self._tokens(captions))
        # Without a bound the scale grows until single pairs decide the loss (Radford et al., section 2.5).
        contrast = ClipLoss()(F.normalize(images, dim=-1), F.normalize(texts, dim=-1), model.logit_scale.clamp(max=np.log(100.0)).exp())
        if not self.layout:
            return contrast
        said = sum(
            things_loss(model.heads[f"{tower} things"](features), things(scenes, prompts)) + places_loss(model.heads[f"{tower} places"](features), places(scenes, prompts))
            for tower, features, prompts in (("image", images, [None] * len(scenes)), ("text", texts, [read(caption).prompt for caption in captions]))
        )
        return contrast + self.layout * said

    def pairs(self, step: int) -> tuple[list[str], list[Scene], torch.Tensor]:
        """Captions (B), scenes and pixels (B, 3, 64, 64), normalised; the second half are near misses of the first."""
        plan, half = self.training, self.training.batch // 2
        captions, scenes = zip(*(training_example(plan.seed, step * half + number, self.weights) for number in range(half)), strict=True)
        rng = generator(derive(plan.seed, self.name, "near misses", step))
        misses = [self._miss(read(caption).prompt, rng) for caption in captions]
        every = [*scenes, *(scene for _, scene in misses)]
        pictures = np.stack([self._picture(scene, rng) for scene in every])
        pixels = (torch.from_numpy(pictures).permute(0, 3, 1, 2) - MEAN[0]) / DEVIATION[0]
        return [*captions, *(text for text, _ in misses)], every, pixels

    def _miss(self, prompt: Prompt, rng: Generator) -> tuple[str, Scene]:
        """One of the near misses of a prompt that training may show, and a scene of it."""
        # A relation among three things has no sentence, and pictures show four things at most.
        possible = [(name, miss) for name, miss in near_misses(prompt).items() if len(miss.groups) <= (2 if miss.links else 3) and miss.total <= MOST_THINGS]
        possible = [(name, miss) for name, miss in possible if not is_held_out(miss)]
        weights = np.array([self.swaps if name in ("swapped colors", "swapped relation", "wrong relation") else 1.0 for name, _ in possible])
        miss = possible[int(rng.choice(len(possible), p=weights / weights.sum()))][1]
        return miss.text, draw_scene(miss, rng)

    @staticmethod
    def _picture(scene: Scene, rng: Generator) -> np.ndarray[Any, np.dtype[np.float32]]:
        picture = render(scene)
        return spoil(picture, rng, rng.uniform(26.0, 40.0)) if rng.random() < SPOILT else picture

    def _tokens(self, captions: list[str]) -> torch.Tensor:
        return self._tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids

    @cached_property
    def _tokenizer(self) -> Any:
        return tokenizer()

    def export(self, model: Any, folder: Path) -> None:
        """Write a folder that open_clip loads as `local-dir:`, float16."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.half().contiguous() for name, value in model.state_dict().items() if not name.startswith("heads.")}, folder / "open_clip_model.safetensors")
        config = MODEL | {"text_cfg": MODEL["text_cfg"] | {"hf_tokenizer_name": "tokenizer"}}
        preprocess = {"mean": MEAN, "std": DEVIATION, "interpolation": "bicubic", "resize_mode": "shortest"}
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2) + "\n")
        self._tokenizer.save_pretrained(folder)
