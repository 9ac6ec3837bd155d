"""CLIP and SigLIP models of transformers, from folders in its layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tsdiff.treesearch.errors import SetupError, UsageError
from tsdiff.verifiers.clip_files import Source
from tsdiff.verifiers.clip_images import from_transformers
from tsdiff.verifiers.clip_towers import Towers
from tsdiff.verifiers.libraries import quiet_libraries
from tsdiff.verifiers.transformers_folder import load_config, load_model, load_processor

if TYPE_CHECKING:
    from torch import Tensor


def load(source: Source) -> Towers:
    """Build a model and load its weights.

    Raises:
      UsageError: if the files do not make a model together.
      SetupError: if a package that the tokenizer needs is missing.
    """
    with quiet_libraries():
        from transformers import CLIPModel, SiglipModel

        assert source.folder is not None
        config = load_config(source.folder, "clip")
        module = load_model(SiglipModel if config.model_type == "siglip" else CLIPModel, config, source.folder, source.weights, "clip")
        tokenizer = _load_tokenizer(source)
        preprocessing = from_transformers(load_processor(source.folder, "clip"), config.vision_config.image_size, source.where)
    if max(tokenizer.get_vocab().values()) >= config.text_config.vocab_size:
        raise UsageError(f"clip: the tokenizer in {source.where} has more tokens than the model's {config.text_config.vocab_size}")
    length = config.text_config.max_position_embeddings
    # SigLIP was trained on prompts filled up to their full length, and reads the last token.
    padding = "max_length" if config.model_type == "siglip" else False

    def tokenize(prompt: str) -> tuple[dict[str, Tensor], int]:
        full = len(tokenizer(prompt, verbose=False).input_ids)
        tokens = tokenizer([prompt], padding=padding, truncation=True, max_length=length, return_tensors="pt")
        # A mask only where the tokenizer is published with one: SigLIP's is not, and reads the filling too.
        return {key: tokens[key] for key in ("input_ids", "attention_mask") if key in tokens}, max(0, full - length)

    return Towers(
        module,
        encode_images=lambda pixels: _features(module.get_image_features(pixel_values=pixels)),
        encode_text=lambda **tokens: _features(module.get_text_features(**tokens)),
        tokenize=tokenize,
        preprocessing=preprocessing,
        logit_scale=float(module.logit_scale.detach().exp()),
        logit_bias=float(module.logit_bias.detach()) if source.has_bias else None,
    )


def _features(answer: Any) -> Tensor:
    """The projected embedding, which transformers wraps since version 5."""
    return answer.pooler_output  # type: ignore[no-any-return]


def _load_tokenizer(source: Source) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.folder, local_files_only=True)
    except ImportError as error:
        raise SetupError(f"clip: the tokenizer in {source.where} needs a package ({str(error).strip().partition(chr(10))[0]}); `pip install tsdiff[text]`") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"clip: the tokenizer in {source.where} cannot be loaded ({type(error).__name__}: {str(error).partition(chr(10))[0]})") from error
