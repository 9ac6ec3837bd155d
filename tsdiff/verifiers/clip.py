"""CLIPScore: how well an image fits its prompt, by any CLIP or SigLIP model on this machine.

Images stay tensors from the decoder to the score: they are prepared, encoded and compared in one batch, whichever trees
they come from, and gradients flow back through all of it. Each prompt is encoded once.

Sources: Radford et al. 2021, "Learning transferable visual models from natural language supervision" (arXiv 2103.00020);
Hessel et al. 2021, "CLIPScore" (arXiv 2104.08718); Cherti et al. 2022, open_clip (arXiv 2212.07143); Zhai et al. 2023,
"Sigmoid loss for language image pre-training" (arXiv 2303.15343).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.parameters import parameter
from tsdiff.treesearch.protocols import Candidates, Condition, Scores
from tsdiff.verifiers import clip_network
from tsdiff.verifiers.clip_files import Source
from tsdiff.verifiers.clip_source import locate
from tsdiff.verifiers.neural import FeatureVerifier, answered, sighted

if TYPE_CHECKING:
    from torch import Tensor

    from tsdiff.verifiers.clip_network import ClipNetwork


@dataclass(frozen=True, kw_only=True)
class Clip(FeatureVerifier):
    """How well an image fits its prompt: the cosine of their features under a CLIP or SigLIP model.

    The model is a folder in open_clip's layout (open_clip_config.json, open_clip_model.safetensors, tokenizer files) or
    in transformers' (CLIPModel, SiglipModel), OWNER/NAME of such a repository in the hub's cache, a name that open_clip
    registers with pretrained=TAG or FILE, or a file with an open_clip model config and pretrained=FILE. Weights load
    strictly, nothing is downloaded, and weights trained with the other activation (QuickGELU) are refused.

    Scales, all increasing in the cosine, so that they choose alike among images of one prompt:
      cosine       the cosine itself, in [-1, 1]; 0.15 to 0.35 is usual
      cosine100    100 times the cosine
      clipscore    2.5 max(cosine, 0): CLIPScore, Hessel et al. 2021 (arXiv 2104.08718), with prefix "A photo depicts"
      logit        the model's own: learned scale times the cosine, plus SigLIP's bias
      probability  sigmoid of the logit; SigLIP only (Zhai et al. 2023, arXiv 2303.15343)

    Other scales than the cosine keep it as the part "cosine". An empty prompt is compared like any other.

    Images are not rounded to 8 bits on the way. Pipelines that score PIL pictures one by one give cosines that differ by
    less than 0.002 for smooth pictures, through rounding and Pillow's own resize; on equal tensors the library that trained
    the model gives the same to 1e-4.

    Raises:
      UsageError: for a wrong option, or files that are missing, damaged or do not belong together.
      SetupError: for weights that exist but are not on this machine; the message says how to fetch them.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"images", "conditions"})

    model: str = parameter("", help="a folder, OWNER/NAME, an open_clip name, or a config file")
    pretrained: str = parameter("", help="weights of a name or config file: a published tag, or a file")
    scale: Literal["cosine", "cosine100", "clipscore", "logit", "probability"] = parameter("cosine", help="what the score is")
    prefix: str = parameter("", help="words set before every prompt")
    name: str = parameter("clip", help="what its scores are called, to tell two of them apart")

    def _find(self) -> None:
        self._state["source"] = locate(str(self.model), str(self.pretrained))
        if self.scale == "probability" and not self.source.has_bias:
            raise UsageError(f"{self.name}: scale is 'probability', but {self.source.where} is no SigLIP model; use 'cosine' or 'logit'")

    def _load(self) -> ClipNetwork:
        return clip_network.load(self.source, self.name, self.dtype)

    @property
    def source(self) -> Source:
        """The model's files."""
        source: Source = self._state["source"]
        return source

    @property
    def network(self) -> ClipNetwork:
        """The model, for its features.

        Raises:
          UsageError: before `prepare`.
        """
        network: ClipNetwork = self._network
        return network

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the weights."""
        return self.source.weights

    # Scores -----------------------------------------------------------------------------------------------------------

    def check(self, condition: Condition) -> None:
        """Any prompt will do, an empty one too.

        Raises:
          UsageError: for a class without a prompt.
        """
        if not condition.prompt and condition.class_label is not None:
            raise UsageError(f"{self.name} compares an image with a text, but the condition is {condition.label} without a prompt; give a prompt")

    def score(self, candidates: Candidates) -> Scores:
        """Score images of any size and any number of trees in one batch; values are float32 (B,), differentiable.

        An image whose pixels are not all finite fails alone.
        """
        images, finite = sighted(candidates.images)
        cosines = self.cosines(images, [condition.prompt for condition in candidates.conditions])
        return answered(self._scaled(cosines), finite, {} if self.scale == "cosine" else {"cosine": cosines})

    def values(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of images (B, 3, H, W) in [0, 1] for their prompts, with gradients if the images have them."""
        return self._scaled(self.cosines(images, prompts))

    def cosines(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine (B,) of each image with its prompt, `prefix` set before it."""
        return self.network.cosines(images, [f"{self.prefix} {prompt}".strip() if self.prefix else prompt for prompt in prompts])

    def _scaled(self, cosines: Tensor) -> Tensor:
        towers = self.network.towers
        match self.scale:
            case "cosine":
                return cosines
            case "cosine100":
                return 100.0 * cosines
            case "clipscore":
                return 2.5 * cosines.clamp(min=0.0)
        logits = towers.logit_scale * cosines + (towers.logit_bias or 0.0)
        return logits.sigmoid() if self.scale == "probability" else logits
