"""DiT: classes by number and by name. What it has in common with all families is in `test_family_*.py`."""

from __future__ import annotations

import diffusers
from family import Shelf
from family_dit import DIT

from tsdiff.diffusion.loading import load_model, outline
from tsdiff.treesearch.protocols import Condition, LoadOptions


def test_classes_by_number_and_by_name(shelf: Shelf) -> None:
    named = diffusers.DiTPipeline(**shelf.pipe(DIT).components, id2label={0: "tench, Tinca tinca", 207: "golden retriever"})
    rules = outline(named, LoadOptions()).rules
    same = [Condition(class_label=label) for label in (207, "207", " golden retriever ")]
    assert {rules.index(condition) for condition in same} == {207}
    assert rules.index(Condition("a fish for verifiers", class_label="Tinca tinca")) == 0
    (encoded,) = load_model(named).encode([same[2]], guided=True)
    assert [int(row["class_labels"]) for row in encoded.rows] == [207, 1000]


def test_names_of_a_folder_are_those_of_the_object(shelf: Shelf) -> None:
    (encoded,) = load_model(shelf.folder(DIT), device="cpu").encode([Condition(class_label="golden retriever")], guided=False)
    assert [int(row["class_labels"]) for row in encoded.rows] == [207]
