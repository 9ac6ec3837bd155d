"""Tiny DINOv2 checkpoints in the layout that real ones are published in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_clip import randomised

from tsdiff.verifiers.libraries import quiet_libraries

with quiet_libraries():
    from transformers import BitImageProcessor, Dinov2Config, Dinov2ForImageClassification, Dinov2Model

COLOURS = ("red", "green", "blue")


def save_dino(folder: Path, labels: tuple[str, ...] = (), *, resize: int = 32, crop: int = 28, seed: int = 0) -> Path:
    """A Dinov2Model, or with labels a Dinov2ForImageClassification: trained on more patches than the processor makes."""
    config = _config(labels, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
    with quiet_libraries():
        model = randomised((Dinov2ForImageClassification if labels else Dinov2Model)(config), seed)
        return _save(folder, model, BitImageProcessor(size={"shortest_edge": resize}, crop_size={"height": crop, "width": crop}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]))


def colour_dino(folder: Path, *, classes: bool = True) -> Path:
    """A model whose answers are known: features are the direction of (r, g, b), the mean over patches of their colours' directions.

    Patches are embedded as (r, -r, g, -g, b, -b), which sums to zero, so that a layer norm keeps its direction and sets its
    length to sqrt(6). Attention is uniform and passes values on, so that the class token becomes the mean of the tokens,
    of which it is one, and zero at first; the second half of the block adds nothing. The logit of "red" is r's share of
    the mean patch token. Pixels are not normalised.
    """
    config = _config(COLOURS if classes else (), hidden_size=6, num_hidden_layers=1, num_attention_heads=1, image_size=16, patch_size=8)
    pairs = torch.zeros(3, 6)
    for channel in range(3):
        pairs[channel, 2 * channel], pairs[channel, 2 * channel + 1] = 1.0, -1.0
    with quiet_libraries():
        model = (Dinov2ForImageClassification if classes else Dinov2Model)(config)
        sides = {"height": 16, "width": 16}
        _save(folder, model, BitImageProcessor(size={"shortest_edge": 16}, crop_size=sides, image_mean=[0.0] * 3, image_std=[1.0] * 3))
    # Under the names of published checkpoints; what is not set here is zero.
    body, block = ("dinov2." if classes else ""), ("dinov2." if classes else "") + "encoder.layer.0."
    known = {
        f"{body}embeddings.patch_embeddings.projection.weight": pairs.T[:, :, None, None].expand(-1, -1, 8, 8) / 64.0,
        f"{block}attention.attention.value.weight": torch.eye(6),
        f"{block}attention.output.dense.weight": torch.eye(6),
        f"{block}layer_scale1.lambda1": torch.ones(6),
        "classifier.weight": torch.cat([torch.zeros(3, 6), pairs / 2.0], dim=1),  # of the class token, and of the patches' mean
    }
    known |= {f"{place}.weight": torch.ones(6) for place in (f"{block}norm1", f"{block}norm2", f"{body}layernorm")}
    path = folder / "model.safetensors"
    state = {key: known.get(key, torch.zeros_like(tensor)).contiguous() for key, tensor in load_file(path).items()}
    assert known.keys() - state.keys() == ({"classifier.weight"} if not classes else set())
    save_file(state, path, metadata={"format": "pt"})
    return folder


def _config(labels: tuple[str, ...], **size: int) -> Dinov2Config:
    return Dinov2Config(**size, **({"id2label": dict(enumerate(labels))} if labels else {}))


def _save(folder: Path, model: Any, processor: Any) -> Path:
    for part in (model, processor):
        part.save_pretrained(folder)
    return folder
