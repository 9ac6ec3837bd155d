"""Every verifier of the package, each on a tiny checkpoint of its own, by name: to ask all of them the same questions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tiny_clip
import tiny_dino
import torch
from safetensors.torch import save_file
from value_runs import synthetic

from tsdiff.plugin.conformance import ExampleCandidates
from tsdiff.treesearch.protocols import Condition
from tsdiff.treesearch.references import resolve_verifier
from tsdiff.treesearch.schedule import Schedule
from tsdiff.verifiers.value_fit import fit
from tsdiff.worlds.gaussian.model import GaussianModel
from tsdiff.worlds.gaussian.presets import preset

WORDS = "a red star"  # ten letters fit into the tiniest of the text towers

CHECKPOINTS = {
    "clip-transformers": "clip:model={clip}",
    "clip-open": "clip:model={open_clip},scale=logit",
    "clip-siglip": "clip:model={siglip},scale=probability",
    "aesthetic": "aesthetic:model={quick},head={head}",
    "clip-zero-shot": "clip-zero-shot:model={clip},classes=red,green,blue,templates=a {{}}",
    "dino-classifier": "dino-classifier:model={classes}",
    "self-supervised": "self-supervised:model={dino}",
    "path-stability": "path-stability:model={clip},features=clip",
    "compositional": "compositional:question=[clip:model={clip}],template={{fact}}",
    "ensemble": "ensemble:rule=weighted,members=[clip:model={clip}],luminance",
    "value": "value:{value}",
}
"""References of the verifiers with weights; the folders are those of `checkpoints`."""

FORMULAS = {name: name for name in ("luminance", "jpeg-size", "jpeg-compressibility", "target-color", "total-variation", "sharpness")}

REFERENCES = CHECKPOINTS | FORMULAS

ELSEWHERE = {"human"}
"""Verifiers that need a terminal; they have a test file of their own."""

CLASSED = {"clip-zero-shot", "dino-classifier"}
"""Those that score for a class."""

PICTURELESS = {"value"}
"""Those that read latents."""

WEIGHTS = {
    "clip-transformers": "clip/model.safetensors",
    "clip-open": "open_clip/open_clip_model.safetensors",
    "clip-siglip": "siglip/model.safetensors",
    "aesthetic": "head.safetensors",
    "clip-zero-shot": "clip/model.safetensors",
    "dino-classifier": "classes/model.safetensors",
    "self-supervised": "dino/model.safetensors",
    "path-stability": "clip/model.safetensors",
    "compositional": "clip/model.safetensors",
    "ensemble": "clip/model.safetensors",
    "value": "value/value.safetensors",
}
"""A file of weights that each reads."""


def checkpoints(root: Path) -> dict[str, Path]:
    """A tiny checkpoint of each kind, by the name of its folder (or file)."""
    quick = tiny_clip.config(quick_gelu=True)
    torch_head = {"weight": torch.linspace(-1.0, 1.0, 16)[None].contiguous(), "bias": torch.ones(1)}
    save_file(torch_head, root / "head.safetensors")
    return {
        "clip": tiny_clip.save_clip(root / "clip"),
        "open_clip": tiny_clip.save_open_clip(root / "open_clip", tiny_clip.open_clip_module(tiny_clip.OPEN_CLIP), tiny_clip.OPEN_CLIP),
        "siglip": tiny_clip.save_siglip(root / "siglip"),
        "quick": tiny_clip.save_open_clip(root / "quick", tiny_clip.open_clip_module(quick), quick),
        "dino": tiny_dino.save_dino(root / "dino"),
        "classes": tiny_dino.save_dino(root / "classes", ("red", "green", "blue")),
        "head": root / "head.safetensors",
        "value": save_value(root / "value"),
    }


def save_value(folder: Path) -> Path:
    """A value of the analytic world."""
    examples = synthetic((2,), 8, ["near (1, 1)"], lambda latents, prompt: latents[0], schedule=schedule())
    examples.fingerprint = GaussianModel(preset("rare-mode").mixture).fingerprint
    fit(examples, steps=5, width=8).write(folder)
    return folder


def make(name: str, root: Path) -> Any:
    """A verifier on the checkpoints of a folder, weights not loaded."""
    return resolve_verifier(REFERENCES[name].format(**{folder: root / folder for folder in ("clip", "open_clip", "siglip", "quick", "dino", "classes", "value")}, head=root / "head.safetensors"))


def schedule() -> Schedule:
    """The one that candidates are on, and that the value was fitted to."""
    model = GaussianModel(preset("rare-mode").mixture)
    return model.schedule(model.solver("exact"), 4, None)


def condition(name: str, prompt: str = WORDS) -> Condition:
    """What a verifier can judge by."""
    return Condition("", class_label="green") if name in CLASSED else Condition(prompt)


def candidates(name: str, images: torch.Tensor, *, prompt: str = WORDS) -> ExampleCandidates:
    """Finished samples with pictures (B, 3, H, W); the first numbers of each stand for its latent (B, 2) where latents are read."""
    made = ExampleCandidates.random([""] * len(images), latent_shape=(2,))
    latents = images.flatten(1)[:, :2] if name in PICTURELESS else made.x0
    own = schedule()
    count = len(images)
    return dataclasses.replace(made, images=images, x0=latents, latents=latents, levels=[own.last] * count, schedules=[own] * count, conditions=[condition(name, prompt)] * count)


def scores(verifier: Any, batch: ExampleCandidates) -> torch.Tensor:
    """Scores (B,), float64 on the CPU."""
    with torch.no_grad():
        return torch.as_tensor(verifier.score(batch).values).double().cpu()


class Dying:
    """A network that answers some calls, and then breaks.

    Args:
      network: the one that works.
      calls: how many it answers.
    """

    def __init__(self, network: Any, calls: int) -> None:
        self._network = network
        self._left = calls

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any) -> Any:
            self._left -= 1
            if self._left < 0:
                raise RuntimeError("the network is broken")
            return call(*given)

        return counted

    def __call__(self, *given: Any) -> Any:
        return self._counted(self._network)(*given)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._network, name)
        return self._counted(found) if name in ("image_features", "logits", "cosines") else found


def owner(verifier: Any) -> Any:
    """The one that has the network: the verifier, the one that it asks, or a member."""
    if hasattr(verifier, "members"):
        return owner(verifier.members[0])
    return owner(verifier.question) if hasattr(verifier, "question") else verifier


def noise(count: int = 4, size: Sequence[int] = (32, 40), seed: int = 0) -> torch.Tensor:
    """Random pictures (B, 3, H, W)."""
    return torch.rand((count, 3, *size), generator=torch.Generator().manual_seed(seed))
