"""The one place that prepares the import of torchvision, and so of transformers, diffusers and open_clip.

The package index's torchvision for Linux is built for CUDA. Beside a CPU build of torch its compiled operators cannot
be loaded, and `import torchvision` then fails while it registers the shape rules of operators that do not exist:
"operator torchvision::nms does not exist". Declaring the two schemas beforehand cures it. The operators still cannot
be *called*, and nothing in tsdiff calls them.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


@cache
def prepare_torchvision() -> bool:
    """Declare torchvision's missing operators, once, if they are really missing. Call before importing diffusers.

    Returns:
      Whether anything had to be declared: False without torchvision, or where its compiled operators load.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return False
    import torch

    if _operator_exists("nms"):
        return False
    for compiled in Path(next(iter(spec.submodule_search_locations))).glob("_C.*"):
        try:
            torch.ops.load_library(str(compiled))  # type: ignore[no-untyped-call]
        except (OSError, RuntimeError):
            continue  # built for another torch: exactly the case to mend
    if _operator_exists("nms"):
        return False
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        library.define(name + _SCHEMA)  # type: ignore[no-untyped-call]
    _KEEP.append(library)
    return True


# torch.library removes its definitions when the object dies.
_KEEP: list[Any] = []


def _operator_exists(name: str) -> bool:
    import torch

    return bool(torch._C._dispatch_has_kernel(f"torchvision::{name}")) or hasattr(torch.ops.torchvision, name)
