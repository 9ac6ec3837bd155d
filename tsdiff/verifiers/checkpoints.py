"""Files of weights: looked at before they load, loaded without running code, held against the network to the last tensor.

Nothing here imports torch before it reads weights. `who` is the verifier that messages speak for.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdiff.treesearch.errors import SetupError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

ADVICE = "give the config that belongs to this file"


# Looked at ------------------------------------------------------------------------------------------------------------


def read_json(path: Path, who: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
      UsageError: if the file holds anything else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{who}: {path} cannot be read as JSON ({error}); copy it again") from None
    if not isinstance(content, dict):
        raise UsageError(f"{who}: {path} must hold a JSON object")
    return content


def check_file(path: Path, who: str) -> None:
    """Refuse a checkpoint that cannot be whole, from its first bytes and its size alone.

    Raises:
      UsageError: for an empty file, a Git LFS pointer, or a safetensors or torch file that is cut short.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise UsageError(f"{who}: {path} is a Git LFS pointer, not the weights; run `git lfs pull` in its repository")
        problem = "" if size else "is empty"
        if start.startswith(b"PK") and not zipfile.is_zipfile(path):  # as torch writes; the table of contents comes last
            problem = "cannot be read: its end is missing"
        if size and path.suffix == ".safetensors":
            length = int.from_bytes(start, "little")
            try:
                header = json.loads(file.read(length)) if 8 + length <= size else None
                ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"] if header else [size]
            except (ValueError, TypeError, KeyError, AttributeError):
                ends = [size]
            if 8 + length + max(ends, default=0) != size:
                problem = "is not a whole safetensors file"
    if problem:
        raise UsageError(f"{who}: {path} {problem} ({size} bytes); copy or download it again")


# In the hub's cache ---------------------------------------------------------------------------------------------------


def cached_file(repository: str, name: str) -> Path | None:
    """A file of a hub repository in the local cache; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repository, name)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def cached_repository(repository: str, who: str) -> Path:
    """The folder of a hub repository in the local cache.

    Raises:
      SetupError: if it is not there.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        raise SetupError(
            f"{who}: there is neither a folder {repository!r} nor a repository of that name in the hub's cache, and nothing is downloaded "
            f"during a search; fetch it with `hf download {repository}`, or correct the name"
        ) from None


# Loaded ---------------------------------------------------------------------------------------------------------------


def read_state_dict(path: Path, who: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint: safetensors, or a torch file with a state dict, perhaps under "state_dict".

    Raises:
      UsageError: if the file is damaged, or holds anything but tensors.
    """
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        content: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(
            f"{who}: {path} cannot be read as weights ({type(error).__name__}: {reason}); copy it again, or save its state dict as safetensors"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not state or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise UsageError(f"{who}: {path} holds no state dict; save `model.state_dict()` as safetensors")
    return {key.removeprefix("module."): tensor for key, tensor in state.items()}


def check_weights(found: Mapping[str, Tensor], module: nn.Module, where: str) -> None:
    """Refuse weights that are not exactly a module's: nothing missing, nothing left over, every shape as built.

    Raises:
      UsageError: naming the file, how many tensors differ and the first of them.
    """
    check_shapes(found, {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}, where)


def check_shapes(found: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], where: str, advice: str = ADVICE) -> None:
    """As `check_weights`, for the names and shapes `wanted`; `advice` ends the message."""
    have = {key: tuple(tensor.shape) for key, tensor in found.items()}
    wrong = {
        "missing": sorted(wanted.keys() - have.keys()),
        "unexpected": sorted(have.keys() - wanted.keys()),
        "of another shape": [f"{key} {have[key]} instead of {wanted[key]}" for key in sorted(wanted.keys() & have.keys()) if wanted[key] != have[key]],
    }
    refuse_weights(where, wrong, advice)


def check_finite(module: nn.Module, where: str) -> None:
    """Refuse weights with NaN or infinities, as a damaged file may hold: every score would fail in the middle of a search.

    Raises:
      UsageError: naming the file and the first such tensor.
    """
    damaged = [key for key, tensor in module.state_dict().items() if tensor.is_floating_point() and not bool(tensor.isfinite().all())]
    if damaged:
        raise UsageError(f"{where} holds numbers that are not finite ({damaged[0]}{', ...' if damaged[1:] else ''}); copy or download it again")


def refuse_weights(where: str, wrong: Mapping[str, Sequence[str]], advice: str = ADVICE) -> None:
    """Raise UsageError if any tensor is wrong: `wrong` lists names by what is wrong with them."""
    told = [f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" for what, names in wrong.items() if names]
    if told:
        raise UsageError(f"{where} does not hold the weights of this model: {'; '.join(told)}; {advice}")
