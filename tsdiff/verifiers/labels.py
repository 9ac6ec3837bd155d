"""Classifiers' classes: which one a condition means, and what the logits say of it. Shapes: B rows, K classes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from tsdiff.treesearch.errors import UsageError, unknown_name
from tsdiff.treesearch.protocols import Candidates, Condition, Scores
from tsdiff.verifiers.neural import FeatureVerifier, answered, sighted

if TYPE_CHECKING:
    from torch import Tensor


def class_index(who: str, condition: Condition, names: Sequence[str], default: str = "") -> int:
    """The class that a condition means: by name, by one of the names that a comma parts, or by number, also as text.

    Args:
      who: the verifier, for messages.
      names: of the classes, in order.
      default: the class of conditions that have none.

    Raises:
      UsageError: for no class at all, or one that is not among these.
    """
    label = default if condition.class_label is None else condition.class_label
    label = label.strip() if isinstance(label, str) else label
    if label == "":
        raise UsageError(f"{who} scores for a class, but the condition {condition.label!r} has none; give one (--class), or the verifier's option label=...")
    meant = [index for index, name in enumerate(names) if label == name]
    if not meant and (isinstance(label, int) or label.isdecimal()):
        if 0 <= int(label) < len(names):
            return int(label)
        raise UsageError(f"{who}: class {label} does not exist; classes run from 0 to {len(names) - 1}")
    meant = meant or [index for index, name in enumerate(names) if str(label) in map(str.strip, name.split(","))]
    if len(meant) == 1:
        return meant[0]
    if meant:
        raise UsageError(f"{who}: class {label!r} may be any of {', '.join(f'{index} ({names[index]})' for index in meant)}; give its number")
    raise unknown_name(f"class of {who}", str(label), names, f"Numbers from 0 to {len(names) - 1} are classes too.")


def class_scores(logits: Tensor, classes: Sequence[int], scale: Literal["log-probability", "logit", "probability"]) -> Tensor:
    """What logits (B, K) say of each row's class: (B,)."""
    import torch

    if scale != "logit":
        logits = logits.log_softmax(-1)
    scores = logits.gather(-1, torch.tensor(classes, device=logits.device)[:, None])[:, 0]
    return scores.exp() if scale == "probability" else scores


class Classifier(FeatureVerifier):
    """A network that scores an image for the condition's class; `scale` says how."""

    needs: ClassVar[frozenset[str]] = frozenset({"images", "conditions"})

    scale: Literal["log-probability", "logit", "probability"]

    @abstractmethod
    def logits(self, images: Tensor) -> Tensor:
        """Logits (B, K) of all classes for images (B, 3, H, W) in [0, 1]."""

    @abstractmethod
    def _class(self, condition: Condition) -> int:
        """The number of the class that a condition means. Raises UsageError if there is none."""

    def check(self, condition: Condition) -> None:
        """Raise UsageError if the condition has no class, or one that is not among the model's."""
        self._class(condition)

    def score(self, candidates: Candidates) -> Scores:
        """Score images of any size and any number of trees in one batch; values are float32 (B,), differentiable.

        An image whose pixels are not all finite fails alone.
        """
        images, finite = sighted(candidates.images)
        logits, classes = self.logits(images), [self._class(condition) for condition in candidates.conditions]
        parts = {} if self.scale == "logit" else {"logit": class_scores(logits, classes, "logit")}
        return answered(class_scores(logits, classes, self.scale), finite, parts)

    def values(self, images: Tensor, classes: Sequence[int]) -> Tensor:
        """Scores (B,) of images (B, 3, H, W) in [0, 1] for class numbers, with gradients if the images have them."""
        return class_scores(self.logits(images), classes, self.scale)
