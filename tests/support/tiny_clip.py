"""Tiny CLIP and SigLIP checkpoints in the layouts that real ones are published in."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from tsdiff.verifiers.libraries import quiet_libraries

with quiet_libraries():
    import open_clip
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPTokenizer,
        PreTrainedTokenizerFast,
        SiglipConfig,
        SiglipImageProcessor,
        SiglipModel,
    )

WORDS = ["a", "red", "green", "blue", "star", "circle", "and"]

OPEN_CLIP: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
"""A model config with OpenAI's vocabulary, whose tokenizer open_clip brings along."""


def config(**changes: Any) -> dict[str, Any]:
    """`OPEN_CLIP` with entries replaced; those of the towers are merged."""
    made = copy.deepcopy(OPEN_CLIP)
    for key, value in changes.items():
        made[key] = {**made[key], **value} if isinstance(value, dict) and key in made else value
    return made


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights large enough for images and prompts to matter; the scale and bias of logits stay."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if not name.startswith("logit"):
                weight.copy_(torch.randn(weight.shape, generator=generator) * (0.3 if weight.ndim > 1 else 0.5))
    return module.eval()


def open_clip_module(model_cfg: dict[str, Any], seed: int = 0) -> Any:
    """A model as open_clip builds it."""
    cfg = copy.deepcopy(model_cfg)
    cls = open_clip.CustomTextCLIP if cfg.pop("custom_text", False) else open_clip.CLIP
    return randomised(cls(**cfg), seed)


def save_open_clip(folder: Path, module: nn.Module, model_cfg: dict[str, Any], *, tokenizer: Any = None, half: bool = False, **preprocess: Any) -> Path:
    """The layout of "local-dir:": config, weights, and the files of a tokenizer of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess}, indent=2))
    state = {key: tensor.half() if half else tensor for key, tensor in module.state_dict().items()}
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "open_clip_model.safetensors")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's kind of tokenizer with a vocabulary of its own: letters, and the marks of both ends last."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[], model_max_length=12)


def word_tokenizer(*, end: bool = True, mask: bool = False) -> PreTrainedTokenizerFast:
    """One token a word, known or not, an end mark after the last, and filling, which a mask may mark."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if end:
        made.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>", model_max_length=8, model_input_names=["input_ids", "attention_mask"] if mask else ["input_ids"])


def save_clip(folder: Path, *, size: int = 32, crop: int | None = None, seed: int = 0) -> Path:
    """A CLIPModel as transformers saves it."""
    tokenizer = clip_tokenizer()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 12}
    vision = {"image_size": crop or size, "patch_size": 8, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": crop or size, "width": crop or size})
    with quiet_libraries():
        model = randomised(CLIPModel(CLIPConfig(text_config=text | ends, vision_config=vision, projection_dim=12)), seed)
        for part in (model, tokenizer, processor):
            part.save_pretrained(folder)
    return folder


def save_siglip(folder: Path, *, mask: bool = False, seed: int = 0) -> Path:
    """A SiglipModel as transformers saves it; published ones have no mask."""
    tokenizer = word_tokenizer(mask=mask)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tower | {"vocab_size": len(tokenizer), "max_position_embeddings": 8, "projection_size": 16}
    with quiet_libraries(), torch.no_grad():
        model = randomised(SiglipModel(SiglipConfig(text_config=text, vision_config=tower | {"image_size": 32, "patch_size": 8})), seed)
        model.logit_scale.fill_(1.5)
        model.logit_bias.fill_(-0.7)
        for part in (model, tokenizer, SiglipImageProcessor(size={"height": 32, "width": 32})):
            part.save_pretrained(folder)
    return folder


def colour_model(folder: Path) -> Path:
    """An open_clip model whose answers are known: the cosine of (r, g, b), an image's mean colour, with a word's colour.

    Its blocks add nothing, so that the image tower is: mean over patches of a linear map to (r, -r, g, -g, b, -b), then
    a layer norm, which keeps the direction because the entries sum to zero. The text tower reads one token, and holds
    (1, -1, 0, 0, 0, 0) for "red", and so on. Pixels are not normalised.
    """
    model_cfg = {
        "embed_dim": 6,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 6, "patch_size": 8, "head_width": 6, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
        "text_cfg": {"context_length": 1, "vocab_size": 10, "width": 6, "heads": 1, "layers": 1, "hf_tokenizer_name": "words", "pool_type": "last"},
    }
    module = open_clip_module(model_cfg)
    pairs = torch.zeros(3, 6)
    for channel in range(3):
        pairs[channel, 2 * channel], pairs[channel, 2 * channel + 1] = 1.0, -1.0
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if name.endswith((".out_proj.weight", ".out_proj.bias", ".c_proj.weight", ".c_proj.bias")) or "positional" in name:
                weight.zero_()
            if name in ("visual.ln_post.weight", "ln_final.weight"):
                weight.fill_(1.0)
            if name in ("visual.ln_post.bias", "ln_final.bias"):
                weight.zero_()
        module.visual.conv1.weight.copy_(pairs.T[:, :, None, None].expand(-1, -1, 8, 8) / 64.0)
        module.visual.proj.copy_(torch.eye(6))
        module.text_projection.copy_(torch.eye(6))
        tokenizer = word_tokenizer(end=False)
        for channel, word in enumerate(("red", "green", "blue")):
            module.token_embedding.weight[tokenizer.get_vocab()[word]] = pairs[channel]
    return save_open_clip(folder, module, model_cfg, tokenizer=tokenizer, mean=[0.0, 0.0, 0.0], std=[1.0, 1.0, 1.0])
