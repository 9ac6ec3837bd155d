"""The models `shapes` and `shapes-small`: Stable Diffusion pipelines like any other, only small and in the package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tsdiff.diffusion.devices import check_dtype
from tsdiff.diffusion.source import source_of
from tsdiff.diffusion.stable_diffusion import StableDiffusionOutline
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Condition, Demo, LoadOptions
from tsdiff.treesearch.registry import split_reference
from tsdiff.worlds.shapes.grammar import warn

MODELS = Path(__file__).parent / "models"
"""The folder of the trained models, one folder each."""


class ShapesOutline(StableDiffusionOutline):
    """A model of the shapes world. Any text will do; words that the world does not have are warned of."""

    default_guidance_scale = 3.0
    demo = Demo("a red circle left of a blue square", ("shapes-clip", "shapes-oracle"))

    def check(self, condition: Condition, *, guided: bool = False) -> None:
        """Warn of words that the world does not have. Raises UsageError for what no text model can take."""
        super().check(condition, guided=guided)
        if condition.prompt:
            warn(condition.prompt)


def outline(reference: str, options: LoadOptions) -> ShapesOutline:
    """The model of a reference "shapes" or "shapes-small".

    Raises:
      UsageError: if the reference has options (there are none), the dtype is unknown, or the model's folder is missing or damaged.
    """
    name, rest = split_reference(reference)
    if rest:
        raise UsageError(f"the model {name!r} has no options, so {reference!r} cannot be read; say {name!r}")
    check_dtype(options.dtype)
    return ShapesOutline(replace(source_of(str(MODELS / name), options), name=name))
