"""Classifiers' classes: which one a condition means, and what the logits say of it. Shapes: B rows, K classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from tsdiff.treesearch.errors import UsageError, unknown_name
from tsdiff.treesearch.protocols import Condition

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
