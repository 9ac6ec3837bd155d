"""Networks that turn images into features of length 1, by kind: what verifiers compare images with each other by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

from tsdiff.treesearch.errors import UsageError
from tsdiff.verifiers import clip_network, clip_source, dino_network
from tsdiff.verifiers.clip_files import Source
from tsdiff.verifiers.dino_network import DinoNetwork, DinoSource

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class FeatureNetwork(Protocol):
    """A network of images, weights loaded. Weights take no gradients; images do."""

    @property
    def device(self) -> torch.device: ...

    def to(self, device: str) -> None:
        """Move the weights."""
        ...

    def image_features(self, images: Tensor) -> Tensor:
        """Features (B, d), float32 of length 1, of images (B, 3, H, W) in [0, 1]; differentiable."""
        ...


def locate(kind: Literal["clip", "dino"], model: str, pretrained: str, who: str) -> Source | DinoSource:
    """The files of a feature network; no weights load.

    Args:
      kind: "clip" for CLIP and SigLIP (the projected image feature), "dino" for DINOv2 (the class token).
      model, pretrained: as for the verifiers clip and dino-classifier; a DINOv2 model needs no classes.
      who: the verifier, for messages.

    Raises:
      UsageError, SetupError: as these do.
    """
    if not model:
        raise UsageError(f"{who}: model is missing; write features={kind},model=..., naming a folder, or OWNER/NAME of one in the hub's cache")
    if kind == "clip":
        return clip_source.locate(model, pretrained)
    if pretrained:
        raise UsageError(f"{who}: pretrained={pretrained!r} was given, but a DINOv2 model is a folder that holds its own weights; leave pretrained out")
    return dino_network.locate(model, who)




def load(source: Source | DinoSource, name: str, dtype: Literal["float32", "float16", "bfloat16"] = "float32") -> FeatureNetwork:
    """The network of a source, on the CPU; `name` is the verifier's, for messages."""
    return DinoNetwork(source, name, dtype) if isinstance(source, DinoSource) else clip_network.load(source, name, dtype)
