"""LAION's aesthetic predictors: how pleasing people find an image, read off its CLIP features by a small head.

Source: Schuhmann et al. 2022, "LAION-5B" (arXiv 2210.08402), and the heads that its authors published: "improved
aesthetic predictor" (v2) and "aesthetic-predictor" (v1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.parameters import parameter
from tsdiff.treesearch.protocols import Candidates, Scores
from tsdiff.verifiers import clip_network
from tsdiff.verifiers.checkpoints import check_file, check_shapes, read_state_dict
from tsdiff.verifiers.clip_files import Source
from tsdiff.verifiers.clip_source import locate
from tsdiff.verifiers.neural import FeatureVerifier, answered, sighted

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tsdiff.verifiers.clip_network import ClipNetwork

# Outputs of the linear layers of a v2 head. The names of its layers count dropout and activations, too.
WIDTHS = (1024, 128, 64, 16, 1)
PLACES = {"linear": (0, 2, 4, 6, 7), "relu": (0, 3, 6, 9, 11)}


@dataclass(frozen=True, kw_only=True)
class Aesthetic(FeatureVerifier):
    """How pleasing an image is, whatever it shows: LAION's aesthetic predictor, nominally 1 to 10, usually 3 to 7.5.

    The head reads the image's CLIP features of length 1. Its file is one of the published layouts, told apart by the
    names of its tensors and loaded strictly:
      sac+logos+ava1-l14-linearMSE.pth, ava+logos-l14-linearMSE.pth    v2: five linear layers and nothing between them
      ava+logos-l14-reluMSE.pth                                        v2 with ReLU between them
      sa_0_4_vit_l_14_linear.pth, sa_0_4_vit_b_32_linear.pth           v1: one linear layer
    All were fitted to features of OpenAI's CLIP (ViT-L/14, and ViT-B/32 for the last), which computes QuickGELU: a CLIP
    of another width or activation, or another published tag, is refused. A folder or file with another training of the
    same CLIP is not told apart, and gives numbers without meaning.

    The v2 heads without ReLU are affine in the features, so that the gradient with respect to them is constant. Pure
    appeal is easily over-optimised: the prompt is not read (Ma et al. 2025, arXiv 2501.09732).

    Raises:
      UsageError: for a wrong option, or files that are missing, damaged or do not belong together.
      SetupError: for weights that exist but are not on this machine; the message says how to fetch them.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"images"})

    name: str = parameter("aesthetic", help="what its scores are called, to tell two of them apart")
    head: str = parameter("", help="the predictor's file, e.g. sac+logos+ava1-l14-linearMSE.pth")
    model: str = parameter("", help="OpenAI's CLIP ViT-L/14: a folder, OWNER/NAME, an open_clip name, or a config file")
    pretrained: str = parameter("", help="weights of a name or config file: a published tag, or a file")

    def _find(self) -> None:
        if not self.head or not self.model:
            missing = "head" if not self.head else "model"
            raise UsageError(
                f"{self.name}: {missing} is missing; write head=FILE, a published predictor such as sac+logos+ava1-l14-linearMSE.pth, and the CLIP "
                "that it was fitted to, model=openai/clip-vit-large-patch14 or model=ViT-L-14-quickgelu,pretrained=openai"
            )
        if not self._head_file.is_file():
            raise UsageError(f"{self.name}: there is no file {self.head!r}; head is the predictor's file, e.g. sac+logos+ava1-l14-linearMSE.pth")
        check_file(self._head_file, self.name)
        if self.pretrained not in ("", "openai") and not Path(self.pretrained).expanduser().is_file():
            raise UsageError(f"{self.name}: the predictors were fitted to OpenAI's weights, but pretrained is {self.pretrained!r}; use openai, or a file with them")
        source = self._state["source"] = locate(str(self.model), str(self.pretrained))
        if not source.quick_gelu:
            raise UsageError(
                f"{self.name}: the predictors were fitted to OpenAI's CLIP, which computes QuickGELU, but {source.where} does not; "
                "use openai/clip-vit-large-patch14, or ViT-L-14-quickgelu with pretrained=openai"
            )

    @property
    def source(self) -> Source:
        """The CLIP model's files."""
        source: Source = self._state["source"]
        return source

    @property
    def _head_file(self) -> Path:
        return Path(self.head).expanduser()

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the weights."""
        return (*self.source.weights, self._head_file)

    def _load(self) -> Predictor:
        # The small file first: what does not belong together is told before a CLIP model loads.
        head = Head(read_state_dict(self._head_file, self.name), str(self._head_file))
        if head.width != self.source.width:
            raise UsageError(
                f"{self.name}: {self.head} reads features of {head.width} dimensions, but those of {self.source.where} have {self.source.width}; "
                "give the CLIP that it was fitted to"
            )
        return Predictor(clip_network.load(self.source, self.name, self.dtype), head)

    def score(self, candidates: Candidates) -> Scores:
        """Score images of any size and any number of trees in one batch; values are float32 (B,), differentiable.

        An image whose pixels are not all finite fails alone.
        """
        images, finite = sighted(candidates.images)
        return answered(self.values(images), finite)

    def values(self, images: Tensor) -> Tensor:
        """Scores (B,) of images (B, 3, H, W) in [0, 1], with gradients if the images have them."""
        predictor: Predictor = self._network
        return predictor.head(predictor.image_features(images))


class Head:
    """A published head: linear layers on features (B, d), with ReLU between them or nothing.

    Args:
      state: tensors by name.
      where: the file, for messages.

    Raises:
      UsageError: if the tensors are not exactly those of a published layout.
    """

    def __init__(self, state: Mapping[str, Tensor], where: str) -> None:
        import torch

        layers, self.relu = _layout(state)
        first = state.get(f"{layers[0]}weight")
        self.width = first.shape[1] if first is not None and first.ndim == 2 else 0
        sizes = (self.width, *(WIDTHS if len(layers) > 1 else (1,)))
        wanted: dict[str, tuple[int, ...]] = {}
        for layer, (before, after) in zip(layers, pairwise(sizes), strict=True):
            wanted |= {f"{layer}weight": (after, before), f"{layer}bias": (after,)}
        check_shapes(state, wanted, where, "a head is one of LAION's published files, as it is")
        if not all(tensor.isfinite().all() for tensor in state.values()):
            raise UsageError(f"{where} holds numbers that are not finite; copy it again")
        self.layers = [tuple(state[f"{layer}{part}"].to(torch.float32) for part in ("weight", "bias")) for layer in layers]

    def to(self, device: torch.device) -> None:
        """Move the weights."""
        self.layers = [(weight.to(device), bias.to(device)) for weight, bias in self.layers]

    def __call__(self, features: Tensor) -> Tensor:
        """Scores (B,) of features (B, d) of length 1. Dropout, which training had, is off."""
        from torch.nn.functional import linear, relu

        for index, (weight, bias) in enumerate(self.layers):
            features = linear(relu(features) if self.relu and index else features, weight, bias)
        return features[:, 0]


def _layout(state: Mapping[str, Tensor]) -> tuple[tuple[str, ...], bool]:
    """What the names of the linear layers begin with, and whether there is ReLU between them."""
    if not any(key.startswith("layers.") for key in state):
        return ("",), False
    kind = "relu" if any(key.startswith(("layers.3.", "layers.9.", "layers.11.")) for key in state) else "linear"
    return tuple(f"layers.{place}." for place in PLACES[kind]), kind == "relu"


class Predictor:
    """A head on its CLIP model."""

    def __init__(self, clip: ClipNetwork, head: Head) -> None:
        self.clip = clip
        self.head = head

    @property
    def device(self) -> torch.device:
        """Where both are."""
        return self.clip.device

    def image_features(self, images: Tensor) -> Tensor:
        """What the head reads of images (B, 3, H, W): features (B, d) of length 1."""
        return self.clip.image_features(images)

    def to(self, device: str) -> None:
        """Move both."""
        self.clip.to(device)
        self.head.to(self.clip.device)
