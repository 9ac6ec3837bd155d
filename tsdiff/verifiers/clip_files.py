"""The files of a CLIP model, looked at without loading them and without importing torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from tsdiff.treesearch.errors import SetupError, UsageError
from tsdiff.verifiers.checkpoints import check_file

OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass(frozen=True)
class Source:
    """A model's files.

    Attributes:
      library: which one builds it.
      where: what messages call it.
      folder: where its tokenizer is, and for transformers everything; None where the tokenizer is another repository's.
      weights: the files that hold the weights.
      model_cfg, preprocess_cfg: open_clip's, as far as they are known.
      has_bias: whether the model gives probabilities (SigLIP).
      width: dimensions of the features.
      quick_gelu: whether the image tower computes QuickGELU, as OpenAI's do.
      notice: what had to be assumed, to be said once; "" for nothing.
    """

    library: Literal["open_clip", "transformers"]
    where: str
    folder: Path | None
    weights: tuple[Path, ...]
    has_bias: bool
    width: int
    quick_gelu: bool
    model_cfg: Mapping[str, Any] = field(default_factory=dict)
    preprocess_cfg: Mapping[str, Any] = field(default_factory=dict)
    notice: str = ""


def open_clip_source(
    where: str, model_cfg: Mapping[str, Any], preprocess_cfg: Mapping[str, Any], weights: Path, *, folder: Path | None, notice: str = ""
) -> Source:
    """A source that open_clip builds, its config and its file looked at.

    Raises:
      UsageError: if the config is no CLIP model's, or the file is damaged.
    """
    lacking = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in model_cfg]
    if lacking or "multimodal_cfg" in model_cfg:
        reason = f"has no {', '.join(lacking)}" if lacking else "is a captioning model (multimodal_cfg)"
        raise UsageError(f"clip: the model config of {where} {reason}; it must describe an open_clip model of two towers")
    check_file(weights, "clip")
    has_bias, width, quick = "init_logit_bias" in model_cfg, int(model_cfg["embed_dim"]), bool(model_cfg.get("quick_gelu"))
    return Source("open_clip", where, folder, (weights,), has_bias, width, quick, model_cfg, preprocess_cfg, notice)


def model_configs() -> Path:
    """The folder of open_clip's registered model configs, found without importing it.

    Raises:
      SetupError: without open_clip.
    """
    spec = find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise SetupError("open_clip is not installed; `pip install open_clip_torch`")
    return Path(next(iter(spec.submodule_search_locations))) / "model_configs"
