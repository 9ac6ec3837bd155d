"""Class-conditional search by words: which of given classes an image shows, by CLIP, without training on them.

Sources: Radford et al. 2021, "Learning transferable visual models from natural language supervision" (arXiv
2103.00020); as a verifier, Ma et al. 2025 (arXiv 2501.09732).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.parameters import parameter
from tsdiff.treesearch.protocols import Condition
from tsdiff.verifiers import clip_network
from tsdiff.verifiers.clip_files import Source
from tsdiff.verifiers.clip_source import locate
from tsdiff.verifiers.labels import Classifier, class_index
from tsdiff.verifiers.libraries import quiet_libraries

if TYPE_CHECKING:
    from torch import Tensor

    from tsdiff.verifiers.clip_network import ClipNetwork

IMAGENET = "imagenet"
"""As a list of classes: the names of ImageNet's 1000. As templates: OpenAI's 80. Both as open_clip has them."""


@dataclass(frozen=True, kw_only=True)
class ClipZeroShot(Classifier):
    """How surely an image shows the condition's class rather than the others, by their names under a CLIP model.

    A class is the direction of the mean feature of its name in every template; an image's logit for it is the model's
    learned scale times their cosine (Radford et al. 2021, section 3.1). The model is given as for the verifier clip. A
    condition's class is one of the names, or its number; where it has none, its prompt may be one.

    Classes and templates are lists of texts, parted by commas; or one file, a text a line or a JSON list; or "imagenet",
    which stands for the 1000 names and the 80 templates that open_clip brings along, in ImageNet's order.

    Scales:
      log-probability  of the class among all classes, at most 0: look-alikes count against an image
      logit            of the class alone: 100 times the cosine for OpenAI's models
      probability      of the class, in [0, 1]; differences among near-certain images vanish

    Other scales than the logit keep it as the part "logit".

    Raises:
      UsageError: for a wrong option, or files that are missing, damaged or do not belong together.
      SetupError: for weights that exist but are not on this machine; the message says how to fetch them.
    """

    name: str = parameter("clip-zero-shot", help="what its scores are called, to tell two of them apart")
    model: str = parameter("", help="a folder, OWNER/NAME, an open_clip name, or a config file")
    pretrained: str = parameter("", help="weights of a name or config file: a published tag, or a file")
    classes: tuple[str, ...] = parameter((), help="names of the classes, a file of them, or imagenet")
    templates: tuple[str, ...] = parameter(("a photo of a {}.",), help="texts with {} where the name goes, a file of them, or imagenet")
    scale: Literal["log-probability", "logit", "probability"] = parameter("log-probability", help="what the score is")
    label: str = parameter("", help="the class, a name or number, where the condition has none")

    def _find(self) -> None:
        if not self.classes:
            raise UsageError(f"{self.name}: classes is missing; write classes=cat,dog, or classes=FILE with a name a line, or classes=imagenet")
        names = self._state["names"] = _texts(self.name, "classes", self.classes)
        if len(set(names)) < 2:
            raise UsageError(f"{self.name}: classes holds only {names[0]!r}, but a class is told from at least one other")
        templates = self._state["templates"] = _texts(self.name, "templates", self.templates)
        wrong = [template for template in templates if template.count("{}") != 1]
        if wrong:
            raise UsageError(f"{self.name}: template {wrong[0]!r} must have {{}} in one place, where the name goes")
        self._state["source"] = locate(str(self.model), str(self.pretrained))
        if self.label:
            class_index(self.name, Condition(class_label=self.label), names)

    def _load(self) -> ClipNetwork:
        network = clip_network.load(self.source, self.name, self.dtype)
        self._state["directions"] = None  # encoded where the network will be
        return network

    def prepare(self, device: str) -> None:
        """Load the weights onto the verifier's own device, or the sampler's, and encode the classes there, once.

        Raises:
          UsageError: if the files do not make a model together.
          SetupError: if this machine lacks the device, or a part of the model.
        """
        import torch

        super().prepare(device)
        directions = self._state["directions"]
        if directions is None:
            templates = self._state["templates"]
            directions = torch.stack([self._network.direction([template.replace("{}", name) for template in templates]) for name in self.names])
        self._state["directions"] = directions.to(self._network.device)

    @property
    def source(self) -> Source:
        """The model's files."""
        source: Source = self._state["source"]
        return source

    @property
    def names(self) -> tuple[str, ...]:
        """The classes, in order."""
        names: tuple[str, ...] = self._state["names"]
        return names

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the weights."""
        return self.source.weights

    def _class(self, condition: Condition) -> int:
        spoken = condition.prompt if condition.prompt in self.names else self.label
        return class_index(self.name, condition, self.names, spoken)

    def logits(self, images: Tensor) -> Tensor:
        """Logits (B, K) of all classes for images (B, 3, H, W) in [0, 1]."""
        network: ClipNetwork = self._network
        directions: Tensor = self._state["directions"]
        return network.towers.logit_scale * (network.image_features(images) @ directions.T)


def _texts(who: str, what: str, given: tuple[str, ...]) -> tuple[str, ...]:
    """A list of texts as typed, as a file holds it, or as open_clip has it."""
    if given == (IMAGENET,):
        with quiet_libraries():
            from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

        return tuple(IMAGENET_CLASSNAMES) if what == "classes" else tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
    if len(given) == 1 and Path(given[0]).suffix in (".txt", ".json"):
        path = Path(given[0]).expanduser()
        try:
            text = path.read_text(encoding="utf-8")
            given = tuple(json.loads(text)) if path.suffix == ".json" else tuple(filter(None, map(str.strip, text.splitlines())))
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"{who}: {what}={path} cannot be read ({error}); it is a file with a text a line (.txt), or a JSON list of texts (.json)") from None
    if isinstance(given, str) or not given or not all(isinstance(text, str) and text for text in given):
        raise UsageError(f"{who}: {what} is {given!r} but must be several texts, none of them empty")
    return given
