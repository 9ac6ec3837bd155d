"""`shapes-clip`: the verifier `clip` with the CLIP that was trained in this world (`train/contrast.py`)."""

from __future__ import annotations

from tsdiff.treesearch.registry import reference
from tsdiff.worlds.shapes.model import MODELS


def shapes_clip(**options: str) -> str:
    """CLIPScore by the shapes world's own CLIP; takes the parameters of `clip`."""
    return reference("clip", **{"name": "shapes-clip", "model": str(MODELS / "shapes-clip")} | options)
