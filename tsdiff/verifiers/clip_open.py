"""CLIP models of open_clip: built from their config, weights loaded strictly, prompts cut in sight."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdiff.treesearch.errors import SetupError, UsageError
from tsdiff.verifiers.checkpoints import cached_file, check_finite, check_weights, read_state_dict
from tsdiff.verifiers.clip_files import Source
from tsdiff.verifiers.clip_images import from_open_clip
from tsdiff.verifiers.clip_towers import Towers
from tsdiff.verifiers.libraries import quiet_libraries

if TYPE_CHECKING:
    from torch import Tensor, nn


def load(source: Source) -> Towers:
    """Build a model and load its weights.

    Raises:
      UsageError: if the config, the file or the tokenizer do not make a model together.
      SetupError: if another library's part of it is not on this machine.
    """
    with quiet_libraries():
        module = _build(source)
        _load_weights(module, source)
        _spare_last_block(module.visual)
        tokenize = _tokenizer(module, source)
    return Towers(
        module,
        encode_images=module.encode_image,
        encode_text=module.encode_text,
        tokenize=tokenize,
        preprocessing=from_open_clip(source.preprocess_cfg, module.visual.image_size, source.where),
        logit_scale=float(module.logit_scale.detach().exp()),
        logit_bias=None if module.logit_bias is None else float(module.logit_bias.detach()),
    )


def _build(source: Source) -> Any:
    """The network with random weights; the caller's random numbers stay what they were."""
    import open_clip
    import torch

    config = deepcopy(dict(source.model_cfg))
    hub_text = config["text_cfg"].get("hf_model_name")
    own_text = config.pop("custom_text", False) or hub_text
    # Never weights of the towers' own: the checkpoint holds everything.
    if "timm_model_name" in config["vision_cfg"]:
        config["vision_cfg"]["timm_model_pretrained"] = False
    if hub_text:
        config["text_cfg"] |= {"hf_model_pretrained": False, "hf_model_name": _text_config(source, hub_text)}
    try:
        with torch.random.fork_rng(devices=[]):
            return (open_clip.CustomTextCLIP if own_text else open_clip.CLIP)(**config)
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError, AttributeError, ZeroDivisionError, OSError) as error:
        raise UsageError(f"clip: open_clip cannot build the model config of {source.where} ({type(error).__name__}: {error})") from error


def _text_config(source: Source, name: str) -> str:
    """The folder with the config of a text tower that transformers builds: a path, or in the hub's cache."""
    if Path(name).is_dir():
        return name
    config = cached_file(name, "config.json")
    if config is None:
        raise SetupError(f"clip: {source.where} needs the config of {name}, which is not on this machine; fetch it with `hf download {name} config.json`")
    return str(config.parent)


def _load_weights(module: nn.Module, source: Source) -> None:
    import torch
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    (path,) = source.weights
    state = convert_state_dict(module, read_state_dict(path, "clip"))  # type: ignore[arg-type]
    if "positional_embedding" in state and not hasattr(module, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)  # weights from before open_clip set the text tower apart
    wanted = module.state_dict()
    if "text.transformer.embeddings.position_ids" not in wanted:
        state.pop("text.transformer.embeddings.position_ids", None)  # 0, 1, 2, ...: older transformers kept them
    for key, tensor in wanted.items():
        if key in ("logit_scale", "logit_bias") and key in state and state[key].numel() == tensor.numel() == 1:
            state[key] = state[key].reshape(tensor.shape)  # a number, or a list of one
    check_weights(state, module, str(path))
    with torch.no_grad():
        module.load_state_dict(state, strict=True)
    check_finite(module, f"clip: {path}")


def _spare_last_block(visual: nn.Module) -> None:
    """Where a ViT answers by its class token, its last block computes that token alone: the others' would be thrown away.

    The same numbers up to rounding, for a seventh less work with 6 blocks, a thirteenth with 12.
    """
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    if type(visual) is not VisionTransformer or visual.pool_type != "tok" or visual.attn_pool is not None or not visual.transformer.batch_first:
        return
    last: Any = visual.transformer.resblocks[-1]
    if type(last) is ResidualAttentionBlock:
        last.forward = partial(_class_token, last)


def _class_token(block: Any, tokens: Tensor, attn_mask: None = None) -> Tensor:
    """The class token (B, 1, w) after a residual attention block, of all tokens (B, n, w); images have no mask."""
    normed, token = block.ln_1(tokens), tokens[:, :1]
    token = token + block.ls_1(block.attn(normed[:, :1], normed, normed, need_weights=False)[0])
    after: Tensor = token + block.ls_2(block.mlp(block.ln_2(token)))
    return after


def _tokenizer(module: Any, source: Source) -> Any:
    """A function: prompt -> its token numbers (1, L), and how many were cut off."""
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    text = source.model_cfg["text_cfg"]
    length = text.get("context_length", 77)
    options = dict(text.get("tokenizer_kwargs") or {})
    name = text.get("hf_tokenizer_name")
    if not name:
        simple = SimpleTokenizer(context_length=length, **options)
        _check_vocabulary(module, simple.vocab_size, source)
        return partial(_tokens, simple, simple.encode, length - 2)
    try:
        library = HFTokenizer(
            name if source.folder is None else str(source.folder), context_length=length, tokenizer_mode=text.get("tokenizer_mode"), local_files_only=True, **options
        )
    except (OSError, ValueError, ImportError) as error:
        place = f"the tokenizer {name} of the hub is not on this machine" if source.folder is None else f"the tokenizer in {source.folder} cannot be loaded"
        raise SetupError(f"clip: {place} ({type(error).__name__}: {str(error).partition(chr(10))[0]})") from error
    _check_vocabulary(module, max(library.tokenizer.get_vocab().values()) + 1, source)
    own_ends = library.tokenizer_mode == "clips"  # which sets three marks itself

    def count(prompt: str) -> list[int]:
        return library.tokenizer(library.clean_fn(prompt), add_special_tokens=not own_ends, verbose=False).input_ids  # type: ignore[no-any-return]

    return partial(_tokens, library, count, length - 3 if own_ends else length)


def _tokens(tokenizer: Any, count: Any, room: int, prompt: str) -> tuple[dict[str, Tensor], int]:
    return {"text": tokenizer([prompt])}, max(0, len(count(prompt)) - room)


def _check_vocabulary(module: Any, tokens: int, source: Source) -> None:
    """Every token must have an embedding, or a prompt would fail in the middle of a search."""
    known = getattr(getattr(module, "text", module), "vocab_size", None)
    if known is not None and tokens > known:
        raise UsageError(
            f"clip: the tokenizer of {source.where} has {tokens} tokens, but the model knows {known}; "
            "a model with its own tokenizer says so by hf_tokenizer_name in text_cfg, and holds its files"
        )
