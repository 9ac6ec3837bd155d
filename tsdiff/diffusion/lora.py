"""LoRA files: low-rank changes of a model's weights, merged into a pipeline that we loaded ourselves.

Hu et al. 2021 (arXiv 2106.09685). A file holds matrices A and B for some layers; the layer's weight W becomes
W + scale * (alpha / rank) * B A. Merging is done once, by diffusers and peft, so an evaluation costs what it did before and
nothing of the adapter stays in the pipeline. A caller's pipeline object is never changed: its owner loads adapters.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsdiff.diffusion.quiet import quiet_libraries
from tsdiff.diffusion.source import Source, check_file, unwrapped
from tsdiff.treesearch.errors import SetupError, UsageError

FOLDER_FILE = "pytorch_lora_weights.safetensors"
"""What `save_lora_weights` of diffusers writes into a folder."""

_PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
_OTHER_KINDS = {"lokr_": "LoKr", "hada_": "LoHa", "oft_": "OFT"}
_FIRST_FACTORS = (".lora_A.weight", ".lora.down.weight", ".lora_linear_layer.down.weight")


@dataclass(frozen=True)
class Lora:
    """A LoRA file and the factor of its change."""

    file: Path
    scale: float


def parse_lora(text: str) -> Lora:
    """Read "PATH" or "PATH:SCALE"; the scale is 1 unless it is given, and may be negative.

    Args:
      text: PATH is a file of safetensors, or a folder with `pytorch_lora_weights.safetensors`.

    Raises:
      UsageError: if there is no such file, it is of another format, or the scale is no number.

    >>> parse_lora("missing.safetensors:0.5")
    Traceback (most recent call last):
        ...
    tsdiff.treesearch.errors.UsageError: LoRA file 'missing.safetensors' does not exist; download it and give its path
    """
    named, colon, number = text.rpartition(":")
    path, scale = text, 1.0
    if colon and not Path(text).expanduser().exists():
        try:
            path, scale = named, float(number)
        except ValueError:
            if Path(named).expanduser().exists():
                raise UsageError(f"the scale of LoRA {text!r} is {number!r} but must be a number, as in {named}:0.8") from None
    if not math.isfinite(scale):
        raise UsageError(f"the scale of LoRA {path!r} is {scale} but must be finite")
    file = Path(path).expanduser()
    if file.is_dir():
        if not (file / FOLDER_FILE).is_file():
            raise UsageError(f"folder {path!r} has no {FOLDER_FILE}; give the LoRA file itself")
        file /= FOLDER_FILE
    if file.suffix in _PICKLES:
        raise UsageError(f"LoRA file {path!r} is a pickle, which can run code when it is read; get or convert it as .safetensors")
    if not file.is_file():
        raise UsageError(f"LoRA file {path!r} does not exist; download it and give its path")
    if file.suffix != ".safetensors":
        raise UsageError(f"LoRA file {path!r} is not of safetensors; give a .safetensors file")
    return Lora(file, scale)


def check_loras(source: Source) -> None:
    """Raise unless all LoRA files of the options can be merged into a pipeline, as far as can be told before weights load.

    Raises:
      UsageError: for a pipeline object or a class that takes none, and files that are missing, damaged or no LoRA.
      SetupError: if peft is not installed.
    """
    texts = source.options.lora
    if not texts:
        return
    if source.pipeline is not None:
        raise UsageError(f"lora is {texts[0]!r} but the {source.class_name} object is never changed; load it yourself with `pipe.load_lora_weights(...)` and hand the pipeline over without lora")
    for text in texts:
        _check_keys(parse_lora(text).file)
    with quiet_libraries():
        import diffusers
        from diffusers.utils.constants import USE_PEFT_BACKEND

        if not hasattr(getattr(diffusers, source.class_name, None), "load_lora_weights"):
            raise UsageError(f"a {source.class_name} ({source.name!r}) takes no LoRA in diffusers; leave out lora")
        if not USE_PEFT_BACKEND:
            raise SetupError("LoRA files need the library peft, which is not installed; run `pip install peft`")


def _check_keys(file: Path) -> None:
    from safetensors import safe_open

    check_file(file)
    with safe_open(str(file), framework="pt") as opened:
        names = list(opened.keys())
    for mark, kind in _OTHER_KINDS.items():
        if any(mark in name for name in names):
            raise UsageError(f"{str(file)!r} is a {kind} file, which is not supported; give a LoRA")
    if not any("lora" in name.lower() for name in names):
        raise UsageError(f"{str(file)!r} holds no LoRA (its first tensor is {names[0] if names else 'none'}); give a LoRA file")


def lora_facts(texts: Sequence[str]) -> list[list[Any]]:
    """(SHA-256, scale) of every file: what a model's fingerprint says of them."""
    facts = []
    for lora in map(parse_lora, texts):
        with lora.file.open("rb") as opened:
            facts.append([hashlib.file_digest(opened, "sha256").hexdigest(), lora.scale])
    return facts


def merge_loras(pipeline: Any, name: str, texts: Sequence[str]) -> None:
    """Merge LoRA files into a pipeline of ours, in order.

    Args:
      pipeline: of diffusers, on its device.
      name: of the model, for messages.
      texts: "PATH" or "PATH:SCALE".

    Raises:
      UsageError: if a file changes layers that the model does not have, or leaves weights that are not numbers.
    """
    for lora in map(parse_lora, texts):
        with quiet_libraries():
            try:
                wanted = _layers_in(pipeline, lora)
                pipeline.load_lora_weights(str(lora.file.parent), weight_name=lora.file.name, adapter_name="lora", local_files_only=True)
                found = sum(1 for _ in _changed(pipeline))
                if found < wanted:
                    raise UsageError(f"LoRA {str(lora.file)!r} changes {wanted} layers but {name!r} has only {found} of them; it was made for another model")
                pipeline.fuse_lora(components=list(pipeline._lora_loadable_modules), lora_scale=lora.scale, safe_fusing=True, adapter_names=["lora"])
                pipeline.unload_lora_weights()
            except UsageError:
                raise
            except Exception as error:
                # Exception types of three libraries mean the same here; the cause stays attached.
                raise UsageError(f"LoRA {str(lora.file)!r} does not fit {name!r} ({(str(error).strip() or type(error).__name__).splitlines()[0][:300]})") from error


def _layers_in(pipeline: Any, lora: Lora) -> int:
    """Layers that a file changes, by the names that diffusers gives them."""
    read = pipeline.lora_state_dict(str(lora.file.parent), weight_name=lora.file.name, local_files_only=True)
    tensors = read[0] if isinstance(read, tuple) else read
    return sum(name.endswith(_FIRST_FACTORS) for name in tensors)


def _changed(pipeline: Any) -> Iterator[Any]:
    """Layers of a pipeline with an adapter of ours."""
    for part in pipeline.components.values():
        if hasattr(part, "modules"):
            for module in unwrapped(part).modules():
                if any("lora" in getattr(module, kind, {}) for kind in ("lora_A", "lora_embedding_A")):
                    yield module
