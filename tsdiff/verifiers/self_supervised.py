"""How true a sample stays to what its trajectory promised: no prompt, no label, only the features of two pictures.

Source: Ma et al. 2025, "Inference-time scaling for diffusion models beyond scaling denoising steps" (arXiv 2501.09732),
whose self-supervised verifier is the cosine of the features of the clean estimate at sigma 0.4 and of the final sample.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from tsdiff.treesearch.parameters import parameter
from tsdiff.treesearch.protocols import Candidates, Need, Scores
from tsdiff.verifiers.clip_files import Source
from tsdiff.verifiers.dino_network import DinoSource
from tsdiff.verifiers.features import FeatureNetwork, load, locate
from tsdiff.verifiers.neural import FeatureVerifier, answered, sighted

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class _Consistency(FeatureVerifier, ABC):
    """The cosine of the features of a node's own clean estimate and of an ancestor's at a fixed signal-to-noise ratio."""

    features: Literal["dino", "clip"] = parameter("dino", help="the kind of network that pictures are compared by")
    model: str = parameter("", help="a folder, OWNER/NAME in the hub's cache; for clip also an open_clip name or config file")
    pretrained: str = parameter("", help="weights of an open_clip name or config file: a published tag, or a file")
    sigma: float = parameter(0.4, above=0.0, below=1.0, symbol="sigma", help="noise of the ancestor, of x = (1 - sigma) x0 + sigma eps")

    def _find(self) -> None:
        self._state["source"] = locate(self.features, str(self.model), str(self.pretrained), self.name)

    def _load(self) -> FeatureNetwork:
        return load(self.source, self.name, self.dtype)

    @property
    def source(self) -> Source | DinoSource:
        """The feature network's files."""
        source: Source | DinoSource = self._state["source"]
        return source

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the weights."""
        return self.source.weights

    @property
    def ratio(self) -> float:
        """sigma/alpha of the ancestor, the same signal-to-noise ratio on every schedule: sigma / (1 - sigma)."""
        return self.sigma / (1.0 - self.sigma)

    @property
    def needs(self) -> frozenset[Need]:
        """The node's picture, and that of the ancestor's clean estimate, which the engine keeps in passing."""
        return frozenset({"images", f"ancestor_images@{self.ratio!r}"})

    def score(self, candidates: Candidates) -> Scores:
        """Score pictures against their ancestors'; values are float32 (B,), differentiable. A row with a picture that is not finite fails alone."""
        images, finite = sighted(candidates.images)
        before, was_finite = sighted(candidates.ancestor_images(self.ratio))
        return answered(self.values(images, before), finite & was_finite.to(finite.device))

    def values(self, images: Tensor, before: Tensor) -> Tensor:
        """Cosines (B,) of the features of images (B, 3, H, W) with those of others; gradients flow to both."""
        network: FeatureNetwork = self._network
        return (network.image_features(images) * network.image_features(before)).sum(-1)


@dataclass(frozen=True, kw_only=True)
class SelfSupervised(_Consistency):
    """How much a finished sample resembles what it promised to become at noise level sigma, in [-1, 1].

    The cosine, by CLIP or DINOv2, of the sample with the clean estimate of its ancestor at sigma (Ma et al. 2025, arXiv
    2501.09732), which costs a decode and no network evaluation. Levels are matched by signal-to-noise ratio: sigma 0.4 of a flow is
    sigma/alpha = 0.667 on any schedule; the ancestor is the first level at least as clean. With so few steps that this is
    the last evaluation of a deterministic solver, its estimate is the sample, and every score 1.

    Only finished samples are judged. Values of other schedules or step counts do not compare, and smooth, trivial images
    score high: combine it with a verifier that reads the condition.

    Raises:
      UsageError: for a wrong option, or files that are missing, damaged or do not belong together.
      SetupError: for weights that exist but are not on this machine; the message says how to fetch them.
    """

    judges: ClassVar[Literal["any", "final"]] = "final"

    name: str = parameter("self-supervised", help="what its scores are called, to tell two of them apart")


@dataclass(frozen=True, kw_only=True)
class PathStability(_Consistency):
    """How little a node's clean estimate has changed since noise level sigma, in [-1, 1]: to prune unsteady paths early.

    The self-supervised verifier of Ma et al. (2025, arXiv 2501.09732) with the node's own clean estimate in place of the
    final sample, so that nodes on the way are judged, too. Nodes that are no cleaner than sigma cannot be; nodes of
    different levels do not compare.

    Raises:
      UsageError: for a wrong option, or files that are missing, damaged or do not belong together.
      SetupError: for weights that exist but are not on this machine; the message says how to fetch them.
    """

    name: str = parameter("path-stability", help="what its scores are called, to tell two of them apart")
    sigma: float = parameter(0.8, above=0.0, below=1.0, symbol="sigma", help="noise of the ancestor, of x = (1 - sigma) x0 + sigma eps")
