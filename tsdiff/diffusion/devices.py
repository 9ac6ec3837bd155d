"""Devices and number formats by name, checked before any weights are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tsdiff.treesearch.errors import SetupError, UsageError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float16", "bfloat16")


def available_devices() -> list[str]:
    """The devices of this machine, the best first; always ends with "cpu"."""
    import torch

    devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if torch.backends.mps.is_available():
        devices.append("mps")
    return [*devices, "cpu"]


def resolve_device(name: str = "auto") -> str:
    """A device that exists, e.g. "cuda:0".

    Args:
      name: "cpu", "cuda", "cuda:1", "mps", or "auto" for the best there is (cuda, then mps, then cpu).

    Raises:
      UsageError: if the name is no device name.
      SetupError: if this machine has no such device; the message names what it has.
    """
    here = available_devices()
    if name == "auto":
        return here[0]
    kind, separator, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (separator and not index.isdecimal()):
        raise UsageError(f"device {name!r} is not known; give 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'")
    exact = f"cuda:{int(index or 0)}" if kind == "cuda" else kind
    if exact not in here or (kind != "cuda" and int(index or 0) > 0):
        raise SetupError(f"device {name!r} is not there; this machine has {', '.join(here)}; use one of these or 'auto'")
    return exact


def check_dtype(name: str) -> None:
    """Raise UsageError unless `name` is "auto" or one of `DTYPES`."""
    if name != "auto" and name not in DTYPES:
        raise UsageError(f"dtype {name!r} is not known; give 'auto', {', '.join(map(repr, DTYPES))}")


def has_bfloat16(device: str) -> bool:
    """Whether a CUDA device computes in bfloat16 itself; Apple's are taken not to, since older systems do not."""
    import torch

    return device.startswith("cuda") and torch.cuda.get_device_capability(device)[0] >= 8


def resolve_dtype(name: str, device: str, usual: str = "bfloat16") -> torch.dtype:
    """The torch dtype of a name; "auto" is float32 on a CPU and `usual` elsewhere, where the device has it (else float16).

    Raises:
      UsageError: for a name that is not in `DTYPES`.
    """
    import torch

    check_dtype(name)
    if name == "auto":
        name = "float32" if device == "cpu" else usual if usual != "bfloat16" or has_bfloat16(device) else "float16"
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]
