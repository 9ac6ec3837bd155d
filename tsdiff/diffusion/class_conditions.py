"""Class conditions of a model family: which class a condition means, and its rows.

Classes have numbers, and names where the pipeline knows them: `id2label` of its `model_index.json`, in which a comma parts
the names of one class ("tench, Tinca tinca").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tsdiff.diffusion.source import INDEX, Source
from tsdiff.treesearch.errors import UsageError, unknown_name
from tsdiff.treesearch.protocols import Condition, Encoded

if TYPE_CHECKING:
    from torch import Tensor

LABELS = "id2label"
ROW = "class_labels"
"""The one tensor of a row: a class number ()."""


@dataclass(frozen=True)
class ClassRules:
    """What a class-conditional model can be conditioned on.

    Attributes:
      name: of the model, for messages.
      classes: how many there are. The number after the last class stands for none of them, which is what guidance leads
        away from.
      named: the classes that bear a name, by name; empty where the pipeline knows no names.
    """

    name: str
    classes: int
    named: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def check(self, condition: Condition) -> None:
        """Raise UsageError if the model cannot take a condition, with or without guidance.

        A prompt beside a class is what verifiers read; the model does not.
        """
        for key in (*condition.extra, *condition.tensors):
            raise UsageError(f"{key} was given, but {self.name!r} is conditioned on classes alone; leave it out")
        if condition.negative_prompt:
            raise UsageError(f"{self.name!r} is conditioned on classes, not on text, so it knows no negative prompt; leave it out")
        self.index(condition)

    def index(self, condition: Condition) -> int:
        """The number of the class that a condition means: by number, also as text, or by one of its names.

        Raises:
          UsageError: for no class at all, or one that is not among these.
        """
        label = condition.class_label.strip() if isinstance(condition.class_label, str) else condition.class_label
        if label is None or label == "":
            given = f", not on text such as {condition.prompt!r}" if condition.prompt else ""
            raise UsageError(f"{self.name!r} is conditioned on classes{given}; give one (--class, class_label=), by {'name or by ' if self.named else ''}number from 0 to {self.classes - 1}")
        if isinstance(label, str) and label in self.named:
            meant = self.named[label]
            if len(meant) > 1:
                raise UsageError(f"class {label!r} of {self.name!r} may be any of {', '.join(map(str, meant))}; give its number")
            return meant[0]
        if isinstance(label, int) or label.isdecimal():
            if isinstance(label, bool) or not 0 <= int(label) < self.classes:
                raise UsageError(f"{self.name!r} has no class {label}; classes run from 0 to {self.classes - 1}")
            return int(label)
        if not self.named:
            raise UsageError(f"{self.name!r} knows its classes by number alone, from 0 to {self.classes - 1}; give a number instead of {label!r}, or add {LABELS} to its {INDEX}")
        raise unknown_name(f"class of {self.name!r}", label, self.named, f"Numbers from 0 to {self.classes - 1} are classes too.")


def class_rules(source: Source, classes: int) -> ClassRules:
    """The rules of a pipeline's classes, with the names that it knows.

    Raises:
      UsageError: if names are given for what is no class.
    """
    known = source.entries.get(LABELS) if source.pipeline is None else None
    if known is None:
        single = getattr(source.pipeline, "labels", None) or {}
        return ClassRules(source.name, classes, {str(name): (int(number),) for name, number in single.items()})
    named: dict[str, tuple[int, ...]] = {}
    for number, names in known.items() if isinstance(known, Mapping) else [(known, None)]:
        if not str(number).isdecimal() or int(number) >= classes or not isinstance(names, str):
            raise UsageError(f"{LABELS} of {source.name!r} says {number!r}: {names!r}, but it must give a name to numbers from 0 to {classes - 1}; mend its {INDEX}")
        for name in filter(None, map(str.strip, names.split(","))):
            named[name] = (*(one for one in named.get(name, ()) if one != int(number)), int(number))
    return ClassRules(source.name, classes, named)


class ClassConditioner:
    """Makes rows of class conditions.

    Args:
      rules: of the model; conditions are checked before they are encoded.
      device: where rows are put.
    """

    def __init__(self, rules: ClassRules, device: str) -> None:
        self.rules = rules
        self.device = device
        self.notices: list[str] = []

    def encode(self, conditions: Sequence[Condition], *, guided: bool) -> list[Encoded]:
        """The rows of conditions, in order."""
        import torch

        def row(number: int) -> dict[str, Tensor]:
            return {ROW: torch.tensor(number, device=self.device)}

        without = (row(self.rules.classes),) if guided else ()
        return [Encoded((row(self.rules.index(condition)), *without), ROW) for condition in conditions]
