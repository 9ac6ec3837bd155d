"""Folders in transformers' layout: what must be in them, and models and image processors loaded exactly or refused.

Nothing is ever downloaded. `who` is the verifier that messages speak for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tsdiff.treesearch.errors import UsageError
from tsdiff.verifiers.checkpoints import check_file, check_finite, read_json, refuse_weights

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def check_folder(folder: Path, who: str) -> tuple[Path, ...]:
    """The files that hold the weights: all there, none damaged, an image processor beside them.

    Raises:
      UsageError: naming the file that is missing or damaged.
    """
    first = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if first is None:
        raise UsageError(f"{who}: {folder} holds no weights; they must be in {' or '.join(WEIGHTS)}")
    files = (first,)
    if first.suffix == ".json":
        files = tuple(folder / name for name in sorted(set(read_json(first, who).get("weight_map", {}).values())))
    for file in files:
        if not file.is_file():
            raise UsageError(f"{who}: {first} names {file.name}, which is not there")
        check_file(file, who)
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        raise UsageError(f"{who}: {folder} does not say how images are prepared; it must hold {' or '.join(PROCESSOR_FILES)}")
    return files


def load_config(folder: Path, who: str) -> Any:
    """The config, as transformers understands it.

    Raises:
      UsageError: if it does not.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{who}: the config in {folder} cannot be loaded ({type(error).__name__}: {str(error).partition(chr(10))[0]}); copy it again") from error


def load_model(cls: Any, config: Any, folder: Path, weights: tuple[Path, ...], who: str, *, spare: tuple[str, ...] = ()) -> Any:
    """A model of a class of transformers in float32: every tensor of the checkpoint used, and none made up.

    Args:
      spare: names of tensors that nothing computes with here, and that may therefore be missing.

    Raises:
      UsageError: naming the files and the first tensors that are wrong, or not finite.
    """
    import torch
    from safetensors import SafetensorError

    try:
        with torch.random.fork_rng(devices=[]):
            module, told = cls.from_pretrained(
                folder, config=config, dtype=torch.float32, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError) as error:
        raise UsageError(f"{who}: {folder} cannot be loaded ({type(error).__name__}: {str(error).partition(chr(10))[0]}); copy it again") from error
    mismatched = [f"{key} {tuple(have)} instead of {tuple(wanted)}" for key, have, wanted in sorted(told["mismatched_keys"])]
    missing = sorted(key for key in told["missing_keys"] if not key.endswith(spare))
    wrong = {"missing": missing, "unexpected": sorted(told["unexpected_keys"]), "of another shape": mismatched}
    files = ", ".join(map(str, weights))
    refuse_weights(files, wrong)
    check_finite(module, f"{who}: {files}")
    return module


def load_processor(folder: Path, who: str) -> Mapping[str, Any]:
    """What the image processor says about itself.

    Raises:
      UsageError: if it cannot be loaded.
    """
    from transformers import AutoImageProcessor

    try:
        told: Mapping[str, Any] = AutoImageProcessor.from_pretrained(folder, local_files_only=True).to_dict()
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{who}: the image processor in {folder} cannot be loaded ({type(error).__name__}: {str(error).partition(chr(10))[0]})") from error
    return told
