"""Class-conditional search by a classifier: the logit of the condition's class under DINOv2 with a linear head.

Sources: Oquab et al. 2023, "DINOv2" (arXiv 2304.07193); as a verifier, Ma et al. 2025, "Inference-time scaling for
diffusion models beyond scaling denoising steps" (arXiv 2501.09732).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.parameters import parameter
from tsdiff.treesearch.protocols import Condition
from tsdiff.verifiers.dino_network import DinoNetwork, DinoSource, locate
from tsdiff.verifiers.labels import Classifier, class_index

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DinoClassifier(Classifier):
    """How surely an image shows the condition's class, by DINOv2 with a linear head.

    The model is a folder of transformers' Dinov2ForImageClassification (facebook/dinov2-large-imagenet1k-1-layer and its
    kin), or OWNER/NAME of one in the hub's cache; a class is a number or a name of its config. Weights load strictly,
    nothing is downloaded.

    Scales:
      log-probability  of the class among all classes, at most 0: look-alikes count against an image
      logit            of the class alone, unbounded; what Ma et al. (2025, arXiv 2501.09732) search by
      probability      of the class, in [0, 1]; differences among near-certain images vanish

    Other scales than the logit keep it as the part "logit". Such a search narrows a class to what is most typical of it:
    precision rises, recall falls (Ma et al. 2025).

    Raises:
      UsageError: for a wrong option, or files that are missing, damaged or do not belong together.
      SetupError: for weights that exist but are not on this machine; the message says how to fetch them.
    """

    name: str = parameter("dino-classifier", help="what its scores are called, to tell two of them apart")
    model: str = parameter("", help="a folder, or OWNER/NAME in the hub's cache")
    scale: Literal["log-probability", "logit", "probability"] = parameter("log-probability", help="what the score is")
    label: str = parameter("", help="the class, a name or number, where the condition has none")

    def _find(self) -> None:
        source = self._state["source"] = locate(str(self.model), self.name)
        if not source.labels:
            raise UsageError(f"{self.name}: {source.folder} gives features only; a model with classes is called ...-imagenet1k-1-layer (Dinov2ForImageClassification)")
        if self.label:
            class_index(self.name, Condition(class_label=self.label), source.labels)

    def _load(self) -> DinoNetwork:
        return DinoNetwork(self.source, self.name, self.dtype)

    @property
    def source(self) -> DinoSource:
        """The model's files, and its classes."""
        source: DinoSource = self._state["source"]
        return source

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the weights."""
        return self.source.weights

    def _class(self, condition: Condition) -> int:
        return class_index(self.name, condition, self.source.labels, self.label)

    def logits(self, images: Tensor) -> Tensor:
        """Logits (B, K) of all classes for images (B, 3, H, W) in [0, 1]."""
        network: DinoNetwork = self._network
        return network.logits(images)
